"""Pieces of answers in the shape of OpenAI's API, whole or as server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from ..batch import Logprob
from .engine import Piece
from .errors import ApiError


@dataclass
class _Choice:
    text: list[str] = field(default_factory=list)
    told: list[tuple[int, Logprob, int]] = field(default_factory=list)  # token, its Logprob, where its text begins
    reason: str | None = None
    length: int = 0  # of the text


class Shape:
    """How the answers to one request look.

    Args:
        chat: whether they are messages, or text.
        model: as the client named it.
        prompt_tokens: of all prompts.
        decode: the text of one token.
    """

    def __init__(self, *, chat: bool, model: str, prompt_tokens: int, decode: Callable[[int], str]):
        self._chat, self._prompt_tokens, self._decode, self._generated = chat, prompt_tokens, decode, 0
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._kind = "chat.completion" if chat else "text_completion"

    async def whole(self, pieces: AsyncIterator[Piece], count: int) -> dict[str, Any]:
        """One object with ``count`` answers."""
        choices = [_Choice() for _ in range(count)]
        async for piece in pieces:
            self._count(piece)
            _add(choices[piece.choice], piece)
        made = [self._choice(i, choice) for i, choice in enumerate(choices)]
        return {**self._head, "object": self._kind, "choices": made, "usage": self._usage()}

    async def events(self, pieces: AsyncIterator[Piece], count: int, *, usage: bool) -> AsyncIterator[bytes]:
        """Server-sent events; the last one is ``[DONE]``, or an error."""
        kind = "chat.completion.chunk" if self._chat else self._kind
        chunk = lambda choices, **more: _event({**self._head, "object": kind, "choices": choices, **more})
        none = {"usage": None} if usage else {}
        try:
            if self._chat:
                for i in range(count):
                    delta = {"role": "assistant", "content": ""}
                    yield chunk([{"index": i, "delta": delta, "logprobs": None, "finish_reason": None}], **none)
            lengths = [0] * count
            async for piece in pieces:
                self._count(piece)
                part = _Choice(length=lengths[piece.choice])
                _add(part, piece)
                lengths[piece.choice] = part.length
                if piece.text or piece.reason or part.told:
                    yield chunk([self._part(piece.choice, part)], **none)
            if usage:
                yield chunk([], usage=self._usage())
        except ApiError as error:
            yield _event(error.body())
            return
        yield b"data: [DONE]\n\n"

    def _count(self, piece: Piece) -> None:
        self._generated += piece.token is not None

    def _usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._generated,
            "total_tokens": self._prompt_tokens + self._generated,
        }

    def _choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        text = "".join(choice.text)
        own = {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
        return {"index": index, **own, "logprobs": self._logprobs(choice), "finish_reason": choice.reason}

    def _part(self, index: int, part: _Choice) -> dict[str, Any]:
        text = "".join(part.text)
        own = {"delta": {"content": text} if text else {}} if self._chat else {"text": text}
        return {"index": index, **own, "logprobs": self._logprobs(part), "finish_reason": part.reason}

    def _logprobs(self, choice: _Choice) -> dict[str, Any] | None:
        if not choice.told:
            return None
        if self._chat:
            return {
                "content": [
                    {**self._entry(token, told.own), "top_logprobs": [self._entry(*pair) for pair in told.top.items()]}
                    for token, told, _ in choice.told
                ],
                "refusal": None,
            }
        return {
            "tokens": [self._decode(token) for token, _, _ in choice.told],
            "token_logprobs": [_finite(told.own) for _, told, _ in choice.told],
            "top_logprobs": [
                {self._decode(token): _finite(value) for token, value in reversed(told.top.items())}
                for _, told, _ in choice.told
            ],
            "text_offset": [at for _, _, at in choice.told],
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._decode(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}


def _finite(logprob: float) -> float:
    return max(logprob, -9999.0)  # JSON has no infinity; this is the number that others send


def _add(choice: _Choice, piece: Piece) -> None:
    if piece.logprob is not None:
        choice.told.append((piece.token, piece.logprob, choice.length))
    if piece.text:
        choice.text.append(piece.text)
        choice.length += len(piece.text)
    choice.reason = piece.reason or choice.reason


def _event(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()
