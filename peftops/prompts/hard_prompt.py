"""Hard prompts: templates with demonstrations (Brown et al. 2020, arXiv:2005.14165). They have no trained parameters.

    instruction, demonstration 1, ..., demonstration k, query    each a filled template; the query without its target

A hard prompt is not an adapter: it makes the examples, for any method or for none. The same input gives the same ids.
Context and target are encoded together and separated afterwards, because a tokenizer may merge characters across their
border. A prompt that is too long loses whole demonstrations, the oldest first, and then the end (or start) of one field
of the query. It never loses a part of the template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from ..attaching.config import check_choice
from .chat import ids_of, pieces, render
from .example import Example

SPLIT = "|||"  # between the prompt and its target, as in promptsource
Row = Mapping[str, Any]


def joint(tokenizer: Any, context: str, continuation: str) -> Example:
    """Both together. The model is to predict the ids of the continuation, after the first ``len(ids of context)``.

    Spaces at the context's end become part of the continuation. Special tokens that the tokenizer puts at the end are
    left out.
    """
    bare = context.rstrip(" ")
    moved = context[len(bare) :] + continuation if continuation else ""  # a model begins a word with its space
    plain = lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])
    probe, own = list(tokenizer("a")["input_ids"]), plain("a")
    front = probe[: next((i for i in range(len(probe)) if probe[i : i + len(own)] == own), 0)]
    whole = plain(bare + moved)
    return Example.of(front + whole, len(whole) - len(plain(bare)))


@dataclass(frozen=True)
class HardPrompt:
    """A prompt of text alone.

    Args:
        template: text with ``{field}`` for a row's values and ``|||`` once, before the target: for instance
            ``"Review: {text}\\nSentiment:||| {label}"``. ``{{`` and ``}}`` are braces.
        demonstrations: rows that are shown with their targets, the oldest first.
        instruction: what comes first.
        separator: between the parts; not used in a chat, where parts are turns.
        shorten: the field of the query that may be cut if the prompt is too long; None if no field may be cut.
        keep: the end of that field that stays, "start" or "end".
        chat: whether to render through the tokenizer's chat template.

    Examples:
        >>> prompt = peftops.HardPrompt("Review: {text}\\nSentiment:||| {label}")
        >>> prompt.text({"text": "fine", "label": "good"})
        ('Review: fine\\nSentiment:', ' good')
    """

    template: str
    demonstrations: tuple[Row, ...] = ()
    instruction: str = ""
    separator: str = "\n\n"
    shorten: str | None = None
    keep: str = "start"
    chat: bool = False

    def __post_init__(self) -> None:
        check_choice("keep", self.keep, ("start", "end"))
        if self.template.count(SPLIT) != 1:
            raise ValueError(f"a template needs {SPLIT!r} exactly once, between prompt and target: {self.template!r}")
        try:
            parts = [part for part in Formatter().parse(self.template) if part[1] is not None]
        except ValueError as error:
            raise ValueError(f"the template {self.template!r} cannot be read: {error}") from None
        if any(not name.isidentifier() or spec or conversion for _, name, spec, conversion in parts):
            raise ValueError(f"a template's fields are plain names in braces, and {self.template!r} has others")
        names = {name for _, name, _, _ in parts}
        if self.shorten is not None and f"{{{self.shorten}}}" not in self.template.split(SPLIT)[0]:
            raise ValueError(f"shorten={self.shorten!r} is not a field of the prompt; the template has {sorted(names)}")
        for row in self.demonstrations:
            self.text(row)

    def text(self, row: Row) -> tuple[str, str]:
        """The prompt and the target of a row, without demonstrations; a ValueError if it lacks a field."""
        missing = [name for _, name, _, _ in Formatter().parse(self.template) if name is not None and name not in row]
        if missing:
            raise ValueError(f"the template needs {', '.join(missing)}; the row has {', '.join(map(str, row))}")
        return tuple(part.format_map(row) for part in self.template.split(SPLIT))

    def messages(self, row: Row, demonstrations: Sequence[Row] | None = None) -> list[dict[str, str]]:
        """The turns of a chat, the last of which is the target; the instruction is part of the first."""
        shown = self.demonstrations if demonstrations is None else demonstrations
        turns = [self.text(each) for each in (*shown, row)]
        first = f"{self.instruction}{self.separator}" if self.instruction else ""
        chat = []
        for i, (prompt, target) in enumerate(turns):
            chat.append({"role": "user", "content": (first if i == 0 else "") + prompt})
            chat.append({"role": "assistant", "content": target.strip()})
        return chat

    def encode(self, tokenizer: Any, row: Row, max_length: int | None = None, *, target: bool = True) -> Example:
        """Token ids of a row, at most ``max_length``; without the target if the model is to generate it.

        Raises:
            ValueError: a field is missing, there is no chat template, or the template alone is too long.
        """
        shown, row, limit = list(self.demonstrations), dict(row), float("inf") if max_length is None else max_length
        made = self._encode(tokenizer, row, shown, target)
        while len(made.ids) > limit and shown:
            del shown[0]
            made = self._encode(tokenizer, row, shown, target)
        while len(made.ids) > limit:
            field = tokenizer(str(row[self.shorten]), add_special_tokens=False)["input_ids"] if self.shorten else []
            if not field:
                raise ValueError(f"{len(made.ids)} tokens, with nothing left to cut, do not fit into {max_length}")
            left = max(0, len(field) - (len(made.ids) - max_length))
            row[self.shorten] = tokenizer.decode(field[:left] if self.keep == "start" else field[len(field) - left :])
            made = self._encode(tokenizer, row, shown, target)
        return made

    def _encode(self, tokenizer: Any, row: Row, shown: Sequence[Row], target: bool) -> Example:
        if self.chat:
            if not getattr(tokenizer, "chat_template", None):
                raise ValueError("this tokenizer has no chat template; use chat=False")
            *turns, last = self.messages(row, shown)
            if not target:
                return Example.of(ids_of(tokenizer, render(tokenizer, turns, ask=True)), 0)
            (asked, _), (answer, _) = pieces(tokenizer, [*turns, last])
            return Example.of(asked + answer, len(answer))
        query, answer = self.text(row)
        before = [self.instruction] if self.instruction else []
        context = self.separator.join([*before, *("".join(self.text(each)) for each in shown), query])
        return joint(tokenizer, context, answer if target else "")

    def save(self, path: str | Path) -> None:
        """Write it as JSON, with the demonstrations in their order."""
        Path(path).write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> HardPrompt:
        """The reverse of :meth:`save`."""
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(**{**fields, "demonstrations": tuple(fields.get("demonstrations", ()))})
