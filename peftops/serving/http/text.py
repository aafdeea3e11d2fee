"""Tokens as text, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\ufffd"  # the decoded sign for bytes that are not yet a whole character
_BYTES = 3  # bytes of an incomplete character, at most; some tokenizers have a sign for each
_MOST = 16  # tokens that are decoded again with each new one


class TextStream:
    """The final part of an answer's text so far. All pieces together are the tokenizer's text of all tokens.

    A character whose bytes are several tokens is held back until it is complete. Text that may be the beginning of a
    stop string is held back until it cannot be one. Each token is decoded together with those before it that may change
    its spaces.

    Args:
        tokenizer: of transformers.
        stops: strings that end the answer; the first one in the text, and all text after it, are left out.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
        self.stopped = False
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._ids: list[int] = []
        self._context, self._read = 0, 0  # where the tokens begin that are decoded again, and those that are new
        self._known = ""  # text of the tokens between these two
        self._held = ""

    def add(self, token: int) -> str:
        """The text that becomes final with a token."""
        self._ids.append(token)
        text = self._decode(self._context)
        held = min(len(text) - len(text.rstrip(_UNFINISHED)), _BYTES)
        sure = text[: len(text) - held]
        new, self._known = sure[len(self._known) :], max(self._known, sure, key=len)
        if not held and new:
            self._context, self._read = self._read, len(self._ids)
            self._known = self._decode(self._context)
        elif len(self._ids) - self._context > _MOST:
            self._forget(text, held)
        return self._take(new) if new else ""

    def _forget(self, text: str, held: int) -> None:
        """In a long run of unfinished text, drop tokens that cannot change the result. Otherwise each new token would
        decode the whole run again, and other requests would wait."""
        for begin in range(len(self._ids) - 1, self._context, -1):
            rest = self._decode(begin)
            if len(rest) >= held and self._decode(self._context, begin) + rest == text:
                self._context = self._read = begin
                self._known = rest[: len(rest) - held]
                return

    def end(self) -> str:
        """The text that was held back."""
        if self.stopped:
            return ""
        rest = self._take(self._decode(self._context)[len(self._known) :])
        return rest if self.stopped else rest + self._held

    def _decode(self, begin: int, end: int | None = None) -> str:
        return self._tokenizer.decode(self._ids[begin:end], skip_special_tokens=True)

    def _take(self, new: str) -> str:
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        ends = (n for stop in self._stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n]))
        keep = max(ends, default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]
