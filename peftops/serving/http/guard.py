"""The checks of a request that do not depend on its route: the key, the size and time of its body, its line in the log,
and the shape of errors."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
import traceback
from collections.abc import Callable
from typing import Any

from .engine import ClientLeft
from .errors import ApiError
from .limits import Limits
from .metrics import Metrics

log = logging.getLogger("peftops.serve")
_ROUTES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/health",
    "/ready",
    "/metrics",
)
_DRAINED = 16  # times the limit: so much of a long body is read and dropped, so that the client gets the reason

Scope, Message = dict[str, Any], dict[str, Any]


class Guard:
    """Middleware of ASGI.

    Args:
        app: the routes.
        key: clients must send it under ``/v1``; None for no key.
        ready: whether requests under ``/v1`` are accepted.
    """

    def __init__(self, app: Any, *, limits: Limits, metrics: Metrics, key: str | None, ready: Callable[[], bool]):
        self._app, self._limits, self._metrics, self._key, self._ready = app, limits, metrics, key, ready

    async def __call__(self, scope: Scope, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        start, status = time.monotonic(), 0

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        scope["peftops"] = about = {}  # filled by the route, for the log
        try:
            await self._guarded(scope, receive, told)
        except ClientLeft:
            about["end"] = "client left"
        except Exception as error:
            # The sentence of an error may repeat a prompt, so only the places where it was raised are logged.
            log.error("%s:\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
            if not status:
                await ApiError(500, "the server failed", "internal_error").response()(scope, receive, told)
        finally:
            route = next((route for route in _ROUTES if scope["path"].startswith(route)), "other")
            self._metrics.requests.labels(route, str(status or 499)).inc()
            words = [f"{name}={value}" for name, value in about.items()]
            seconds = time.monotonic() - start
            log.info("%s %s %s %.3fs %s", scope["method"], route, status or 499, seconds, " ".join(words))

    async def _guarded(self, scope: Scope, receive: Callable, send: Callable) -> None:
        try:
            if scope["path"].startswith("/v1/"):
                self._check_key(scope)
                if not self._ready():
                    raise ApiError(503, "the server is shutting down", "shutting_down")
            body = await self._body(scope, receive)
        except ApiError as error:
            return await error.response()(scope, receive, send)
        whole = False

        async def replayed() -> Message:
            nonlocal whole
            if whole:
                return await receive()
            whole = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replayed, send)

    def _check_key(self, scope: Scope) -> None:
        if self._key is None:
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        kind, _, key = given.partition(b" ")
        if kind.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._key.encode()):
            raise ApiError(401, "the request has no valid API key; send it as a bearer token", "invalid_api_key")

    async def _body(self, scope: Scope, receive: Callable) -> bytes:
        try:
            return await asyncio.wait_for(self._read(receive), self._limits.body_seconds or None)
        except asyncio.TimeoutError:
            raise ApiError(408, "the body of the request did not come in time", "body_timeout") from None

    async def _read(self, receive: Callable) -> bytes:
        parts, size, more = [], 0, True
        while more and size <= _DRAINED * self._limits.body:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientLeft
            part, more = message.get("body", b""), message.get("more_body", False)
            size += len(part)
            if size > self._limits.body:
                parts.clear()
            else:
                parts.append(part)
        if size > self._limits.body:
            raise ApiError(413, f"the body has more than {self._limits.body} bytes", "body_too_large")
        return b"".join(parts)
