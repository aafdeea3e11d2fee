"""Training data: files to token ids, token ids to batches."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..nn import IGNORED
from ..prompts.chat import pieces, prompt_ids
from ..prompts.example import Example
from ..prompts.hard_prompt import HardPrompt

_PAIRS = (("instruction", "response"), ("instruction", "output"), ("prompt", "completion"), ("prompt", "response"))
_KEYS = "instruction and response, prompt and completion, messages, or text"
_JSON, _TABLES, _PROSE = (".jsonl", ".ndjson", ".json"), {".csv": ",", ".tsv": "\t"}, (".txt", ".text", ".md")


class DataError(ValueError):
    """A data file that cannot be used, in a sentence that names the file and the line."""


@dataclass
class Row:
    """One line of data: chat messages, of which the model learns the assistant's; or text, of which it learns all."""

    messages: list[dict[str, str]] | None = None
    text: str | None = None
    fields: dict[str, Any] | None = None  # the line's values for a template, if there is one


def read_rows(path: Path, prompt: HardPrompt | None = None) -> list[Row]:
    """The rows of a file: JSON (an object a line, or one array of objects), a table with a header, or plain text (one
    row, cut up later). The suffix, in upper or lower case, tells the kind.

    With a ``prompt``, a row has the fields that the template needs.
    """
    suffix = path.suffix.lower()
    if suffix not in (*_JSON, *_TABLES, *_PROSE):
        known = ", ".join((*_JSON, *_TABLES, *_PROSE))
        raise DataError(f"{path}: the suffix tells the kind of a data file, and {suffix or 'none'} is not of {known}")
    text = read_text(path)
    if suffix in _PROSE:
        if prompt is not None:
            raise DataError(f"a template needs rows of fields, and {path} is plain text; give it JSONL")
        first = text.lstrip().split("\n", 1)[0]
        if first.startswith("{") and _is_json(first):
            raise DataError(f"{path} is named as plain text, but holds JSON; give it the suffix .jsonl")
        return [Row(text=text)]
    rows = []
    for where, value in _values(path, text) if suffix in _JSON else _records(path, text, _TABLES[suffix]):
        try:
            rows.append(_row(value, prompt))
        except ValueError as error:
            raise DataError(f"{path}, {where}: {error}") from None
    if not rows:
        raise DataError(f"{path} has no rows")
    return rows


def read_text(path: Path, what: str = "data file") -> str:
    """The text of a file, without a byte-order mark; an empty file is an error."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"no {what} {path}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: byte {error.start} cannot be read") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if not text.strip():
        raise DataError(f"{path} is empty")
    return text


def lines_of(text: str) -> Iterator[tuple[int, str]]:
    """The lines of JSONL that are not empty, by number. Only a line feed ends a line, because a JSON string may contain
    other separators such as U+2028."""
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _values(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    if text.lstrip().startswith("["):
        for number, value in enumerate(parsed(text, f"{path} begins as an array, but is not JSON"), 1):
            yield f"row {number}", value
    elif path.suffix.lower() == ".json" and _is_json(text):
        yield "row 1", json.loads(text)
    else:
        for number, line in lines_of(text):
            yield f"line {number}", parsed(line, f"{path}, line {number} is not JSON")


def parsed(text: str, problem: str) -> Any:
    """The value of a JSON text. An error's sentence begins with ``problem``."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f" of line {error.lineno}" if error.lineno > 1 else ""
        raise DataError(f"{problem}: {error.msg} at column {error.colno}{line}") from None
    except ValueError as error:  # a number of too many digits
        raise DataError(f"{problem}: {error}") from None
    except RecursionError:
        raise DataError(f"{problem}: it is nested too deeply") from None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _records(path: Path, text: str, delimiter: str) -> Iterator[tuple[str, Any]]:
    """The lines of a table, as dicts with the names in its first line."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader)
        if len(set(header)) < len(header) or not all(name.strip() for name in header):
            raise DataError(f"{path}, line 1: a table needs a header of different names, not {header}")
        for record in reader:
            if record and len(record) != len(header):
                raise DataError(f"{path}, line {reader.line_num} has {len(record)} fields, the header {len(header)}")
            if record:
                yield f"line {reader.line_num}", dict(zip(header, record, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num} cannot be read as a table: {error}") from None


def _row(value: Any, prompt: HardPrompt | None) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"expected an object with {_KEYS}, not {type(value).__name__}")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError("a string has half of a surrogate pair, which is not a character") from None
    if prompt is not None:
        return Row(messages=prompt.messages(value), fields=value)
    if value.get("messages") is not None:
        return Row(messages=check_messages(value["messages"]))
    for ask, answer in _PAIRS:
        if isinstance(value.get(ask), str) and isinstance(value.get(answer), str):
            question = value[ask] + (f"\n\n{value['input']}" if value.get("input") else "")
            return Row([{"role": "user", "content": question}, {"role": "assistant", "content": value[answer]}])
    if isinstance(value.get("text"), str):
        return Row(text=value["text"])
    raise DataError(f"expected {_KEYS}; it has {', '.join(map(str, value)) or 'nothing'}")


def check_messages(messages: Any) -> list[dict[str, str]]:
    whole = isinstance(messages, list) and all(isinstance(m, dict) for m in messages)
    if not whole or not all(isinstance(m.get(key), str) for m in messages for key in ("role", "content")):
        raise DataError("each of messages must have a role and a content, which are text")
    if not messages or messages[-1]["role"] != "assistant":
        raise DataError("the last of messages must be the assistant's")
    return messages


def encode(
    rows: list[Row], tokenizer: Any, max_length: int, prompt: HardPrompt | None = None, turns: str = "last"
) -> list[Example]:
    """Token ids of the rows, with the answers as targets. A row that is too long loses its end; text is cut into
    pieces. With a ``prompt``, a row loses demonstrations and a part of the field that may be shortened, and must then
    fit.

    Args:
        turns: the answers of a conversation that are learnt: only the "last" one, or "all" of the assistant's.

    Raises:
        DataError: no row leaves room for an answer within ``max_length``; the chat template fails.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    examples = []
    for row in rows:
        if prompt is not None:
            examples.append(prompt.encode(tokenizer, row.fields, max_length))
        elif row.messages is not None:
            parts = _parts(row.messages, tokenizer, end, turns)
            ids = [i for part, _ in parts for i in part]
            labels = [i if learnt else IGNORED for part, learnt in parts for i in part]
            example = Example(ids[:max_length], labels[:max_length])
            if example.ids and example.labels[0] == IGNORED and example.targets:
                examples.append(example)
        else:
            ids = list(tokenizer(row.text)["input_ids"]) + end
            cuts = [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
            examples += [Example.of(cut, len(cut) - 1) for cut in cuts if len(cut) > 1]
    if not examples:
        raise DataError(f"no row of the data leaves room for an answer within {max_length} tokens; raise --max-length")
    return examples


def _parts(messages: list[dict[str, str]], tokenizer: Any, end: list[int], turns: str) -> list[tuple[list[int], bool]]:
    """A conversation as pieces of ids, each with a flag: whether the model is to learn it."""
    if getattr(tokenizer, "chat_template", None):
        return pieces(tokenizer, messages, turns)
    answer = tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"] + end
    return [(prompt_ids(tokenizer, messages[:-1]), False), (answer, True)]


def batches(examples: list[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """An endless series of batches, in an order that depends only on the seed. Every epoch is shuffled; within parts of
    it, rows of similar length come together, so that there is little padding."""
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
    """A batch as tensors, padded on the left. All answers end at the last position, so only the logits of the last
    positions are needed."""
    length = max(len(e.ids) for e in batch)
    ids = torch.full((len(batch), length), pad)
    labels = torch.full((len(batch), length), IGNORED)
    mask = torch.zeros((len(batch), length), dtype=torch.long)
    for i, example in enumerate(batch):
        row = torch.tensor(example.ids)
        ids[i, length - len(row) :] = row
        mask[i, length - len(row) :] = 1
        labels[i, length - len(row) :] = torch.tensor(example.labels)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}
