"""Tokens as text, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\ufffd"  # how bytes are decoded that are no whole character yet


class TextStream:
    """The text of an answer as far as it is sure. The pieces together are the tokenizer's text of all tokens.

    A character whose bytes are several tokens comes when it is whole, and text that may be the beginning of a stop
    string when it is clear that it is none. Each token is decoded with those before it that may change its spaces.

    Args:
        tokenizer: of transformers.
        stops: strings that end the answer; what comes from the first of them on is no part of it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
        self.stopped = False
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._ids: list[int] = []
        self._context, self._read = 0, 0  # where the tokens begin that are decoded again, and those that are new
        self._known = ""  # text of the tokens between these two
        self._held = ""

    def add(self, token: int) -> str:
        """The text that a token makes sure."""
        self._ids.append(token)
        text = self._decode(self._context)
        if len(text) <= len(self._known) or text.endswith(_UNFINISHED):
            return ""
        new = text[len(self._known) :]
        self._context, self._read = self._read, len(self._ids)
        self._known = self._decode(self._context)
        return self._take(new)

    def end(self) -> str:
        """The text that was held back."""
        if self.stopped:
            return ""
        rest = self._take(self._decode(self._context)[len(self._known) :])
        return rest if self.stopped else rest + self._held

    def _decode(self, begin: int) -> str:
        return self._tokenizer.decode(self._ids[begin:], skip_special_tokens=True)

    def _take(self, new: str) -> str:
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]
