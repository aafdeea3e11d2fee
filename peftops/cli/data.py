"""Training data: files to token ids, token ids to batches."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..methods.hard_prompt import HardPrompt

IGNORE = -100  # the label of a position that has no target

_PAIRS = (("instruction", "response"), ("instruction", "output"), ("prompt", "completion"), ("prompt", "response"))
_KEYS = "instruction and response, prompt and completion, messages, or text"


class DataError(ValueError):
    """A data file that cannot be used, in a sentence that names the file and the line."""


@dataclass
class Row:
    """One line of data: chat messages, the last of which is to be learnt; or text, all of it to be learnt."""

    messages: list[dict[str, str]] | None = None
    text: str | None = None
    fields: dict[str, Any] | None = None  # what the line has for a template, if there is one


@dataclass
class Example:
    """Token ids; the last ``targets`` of them are to be predicted."""

    ids: list[int]
    targets: int


def read_rows(path: Path, prompt: HardPrompt | None = None) -> list[Row]:
    """The rows of a JSONL file, or of a plain text file (one row, cut up later).

    With a ``prompt``, a row may have any fields that its template needs.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"no data file {path}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: byte {error.start} cannot be read") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if not text.strip():
        raise DataError(f"{path} is empty")
    if path.suffix not in (".jsonl", ".json"):
        if prompt is not None:
            raise DataError(f"a template needs rows of fields, and {path} is plain text; give it JSONL")
        return [Row(text=text)]
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                rows.append(_row(json.loads(line), prompt))
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number} is not JSON: {error.msg} at column {error.colno}") from None
            except ValueError as error:
                raise DataError(f"{path}, line {number}: {error}") from None
    return rows


def _row(value: Any, prompt: HardPrompt | None) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"expected an object with {_KEYS}, not {type(value).__name__}")
    if prompt is not None:
        return Row(messages=prompt.messages(value), fields=value)
    if isinstance(value.get("messages"), list):
        messages = value["messages"]
        if not all(isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in messages):
            raise DataError("each of messages must have a role and a content")
        if not messages or messages[-1]["role"] != "assistant":
            raise DataError("the last of messages must be the assistant's")
        return Row(messages=messages)
    for ask, answer in _PAIRS:
        if isinstance(value.get(ask), str) and isinstance(value.get(answer), str):
            question = value[ask] + (f"\n\n{value['input']}" if value.get("input") else "")
            return Row([{"role": "user", "content": question}, {"role": "assistant", "content": value[answer]}])
    if isinstance(value.get("text"), str):
        return Row(text=value["text"])
    raise DataError(f"expected {_KEYS}; it has {', '.join(map(str, value)) or 'nothing'}")


def prompt_ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """The ids that ask for an answer to ``messages``."""
    if getattr(tokenizer, "chat_template", None):
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])
    text = "\n".join(m["content"] for m in messages) + "\n"
    return list(tokenizer(text)["input_ids"])


def encode(rows: list[Row], tokenizer: Any, max_length: int, prompt: HardPrompt | None = None) -> list[Example]:
    """Token ids of the rows, with the answers as targets; longer ones lose their end, text is cut into pieces. With
    a ``prompt``, they lose demonstrations and what it may shorten, and must fit then.

    Raises:
        DataError: no row leaves room for an answer within ``max_length``.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    examples = []
    for row in rows:
        if prompt is not None:
            made = prompt.encode(tokenizer, row.fields, max_length)
            examples.append(Example(made.ids, made.targets))
        elif row.messages is not None:
            asked = prompt_ids(tokenizer, row.messages[:-1])
            answer = tokenizer(row.messages[-1]["content"], add_special_tokens=False)["input_ids"] + end
            answer = answer[: max(0, max_length - len(asked))]
            if asked and answer:
                examples.append(Example(asked + answer, len(answer)))
        else:
            ids = list(tokenizer(row.text)["input_ids"]) + end
            pieces = [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
            examples += [Example(piece, len(piece) - 1) for piece in pieces if len(piece) > 1]
    if not examples:
        raise DataError(f"no row of the data leaves room for an answer within {max_length} tokens; raise --max-length")
    return examples


def batches(examples: list[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """Batches without end, in an order that depends on the seed alone: every epoch is shuffled, and within
    stretches of it rows of like length come together, so that there is little padding."""
    for epoch in range(2**31):
        shuffle = random.Random(f"{seed}-{epoch}").shuffle
        order = list(examples)
        shuffle(order)
        stretch = 32 * size
        made = []
        for i in range(0, len(order), stretch):
            alike = sorted(order[i : i + stretch], key=lambda e: len(e.ids))
            made += [alike[j : j + size] for j in range(0, len(alike), size)]
        shuffle(made)
        yield from made


def in_order(examples: list[Example], size: int) -> Iterator[list[Example]]:
    """All examples once, longest first, for evaluation."""
    order = sorted(examples, key=lambda e: -len(e.ids))
    return (order[i : i + size] for i in range(0, len(order), size))


def collate(batch: list[Example], pad: int) -> dict[str, Tensor]:
    """A batch as tensors, padded on the left: all answers end at the last position, so the logits that are
    needed are those of the last few."""
    length = max(len(e.ids) for e in batch)
    ids = torch.full((len(batch), length), pad)
    labels = torch.full((len(batch), length), IGNORE)
    mask = torch.zeros((len(batch), length), dtype=torch.long)
    for i, example in enumerate(batch):
        row = torch.tensor(example.ids)
        ids[i, length - len(row) :] = row
        mask[i, length - len(row) :] = 1
        labels[i, length - example.targets :] = row[len(row) - example.targets :]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}
