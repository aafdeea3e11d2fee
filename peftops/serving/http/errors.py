"""Refusals, in the shape of OpenAI's API."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse

from ..batch import NotFinite
from ..server import Cancelled


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: a sentence for the client, without words of the prompt.
        code: a word for programs.
        param: the field at fault.
    """

    def __init__(self, status: int, message: str, code: str, param: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 404: "not_found_error", 503: "overloaded_error"}.get(self.status)
        kind = kind or ("invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(self.status)
        return JSONResponse(self.body(), self.status, headers)


def bad(message: str, code: str = "invalid_value", param: str | None = None) -> ApiError:
    return ApiError(400, message, code, param)


def no_model() -> ApiError:
    return ApiError(404, "there is no model of this name; GET /v1/models lists them", "model_not_found", "model")


def of_request(error: Exception) -> ApiError:
    """The answer for an error of a request in the engine. Only known sentences are passed on."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, NotFinite):
        return ApiError(422, f"the answer stopped: {error}", "not_finite", "model")
    if isinstance(error, Cancelled):
        return ApiError(503, "the server ended this request", "cancelled")
    return ApiError(500, f"the server could not finish this answer ({type(error).__name__})", "internal_error")
