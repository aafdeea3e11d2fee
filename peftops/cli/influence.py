"""``peftops influence``: which training rows made a model say something."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ..influence import Influence, language
from ..prompts.example import Example
from .data import DataError, Row, collate, encode, read_rows
from .model import load_adapted, load_tokenizer, pad_id


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arg = parser.add_argument
    arg("--train", type=Path, required=True, help="the data that the adapter was trained on")
    arg("--prompt", required=True, help="the question")
    arg("--completion", required=True, help="the answer, from the model or your own")
    arg("--top", type=int, default=10, help="how many rows to print (default 10)")
    arg("--fit", type=int, default=1000, help="rows from which the curvature is estimated (default 1000)")
    arg("--damping", type=float, help="added to every eigenvalue (default: a tenth of each matrix's mean)")
    arg("--batch", type=int, default=8, help="rows computed at once (default 8)")
    arg("--max-length", type=int, default=512, help="tokens per row (default 512)")
    arg("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    for name in ("top", "fit", "batch", "max_length"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    if not args.adapter:
        raise ValueError("influence needs --adapter: it measures the influence of examples on an adapter's parameters")
    rows = read_rows(args.train)
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    numbers, examples = _examples(rows, tokenizer, args)
    conversation = [{"role": "user", "content": args.prompt}, {"role": "assistant", "content": args.completion}]
    asked = encode([Row(messages=conversation)], tokenizer, args.max_length)
    model = load_adapted(args)
    pad = pad_id(tokenizer, model)

    def batches(chosen: list[Example]) -> list[dict[str, Tensor]]:
        made = [collate(chosen[i : i + args.batch], pad) for i in range(0, len(chosen), args.batch)]
        return [{name: t.to(model.device) for name, t in batch.items()} for batch in made]

    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))  # little padding
    numbers, examples = [numbers[i] for i in order], [examples[i] for i in order]
    sample = sorted(random.Random(args.seed).sample(range(len(examples)), min(args.fit, len(examples))))
    print(f"{len(examples)} examples of {args.train.name}, the curvature from {len(sample)}", flush=True)
    passes: list[tqdm] = []

    def counted(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any) -> Tensor:
            passes[0].update()
            return loss(*args)

        return made

    influence = Influence(
        model, damping=args.damping, loss=counted(language.loss), sampled_loss=counted(language.sampled_loss)
    )
    fitted, everything, query = batches([examples[i] for i in sample]), batches(examples), batches(asked)
    # The curvature takes two passes over its rows, the scores one pass over all rows, and likeness one more.
    with tqdm(total=2 * (len(fitted) + len(everything) + len(query)), unit="batch") as progress:
        passes.append(progress)
        influence.fit(fitted, seed=args.seed)
        scores = influence.scores(influence.queries(query), everything)[0]
        own = influence.self_influence(everything) * influence.self_influence(query)
    alike = scores / own.sqrt().clamp(min=1e-30)
    print(
        table(
            [
                (scores[i].item(), alike[i].item(), numbers[i], _text(rows[numbers[i]]))
                for i in scores.argsort(descending=True)[: args.top].tolist()
            ]
        )
    )
    return 0


def _examples(rows: list[Row], tokenizer: Any, args: argparse.Namespace) -> tuple[list[int], list[Example]]:
    """The examples of all rows, and the row of each (a text gives several). Rows without room for an answer are left
    out."""
    numbers, examples, without = [], [], 0
    for number, row in enumerate(rows):
        try:
            made = encode([row], tokenizer, args.max_length)
        except DataError:
            made, without = [], without + 1
        numbers += [number] * len(made)
        examples += made
    if not examples:
        raise DataError(f"no row of {args.train} leaves room for an answer within {args.max_length} tokens")
    if without:
        print(f"{without} rows left out: no room for an answer within {args.max_length} tokens")
    return numbers, examples


def _text(row: Row) -> str:
    said = row.text if row.messages is None else " -> ".join(m["content"] for m in row.messages[-2:])
    return " ".join(said.split())


def table(lines: list[tuple[float, float, int, str]]) -> str:
    """Score (how much the row lowers the loss of the completion), likeness in [-1, 1], row and text, best first."""
    made = [f"{'score':>10} {'alike':>6} {'row':>6}  text"]
    for score, alike, number, text in lines:
        cut = text if len(text) <= 90 else f"{text[:87]}..."
        made.append(f"{score:>10.3g} {alike:>6.2f} {number + 1:>6}  {cut}")
    return "\n".join(made)
