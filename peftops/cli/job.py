"""One run of ``peftops finetune``: its steps and its results."""

from __future__ import annotations

import argparse
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..attaching import hosts
from ..integrations import save
from ..methods.relora import relora_step
from ..optim.restarts import relora_schedule
from ..prompts.example import Example
from . import report
from .checkpoint import check_moments, check_tensors, save_checkpoint
from .data import batches
from .model import answer, pad_id
from .training import (
    answer_loss,
    evaluate,
    learning_rate,
    memory_now,
    memory_peak,
    optimizer_for,
    reset_memory_peak,
)

CHECKPOINT = "checkpoint.pt"


class Job:
    """One run of training: the state that changes from step to step, and the state that is needed to go on."""

    def __init__(
        self,
        args: argparse.Namespace,
        model: nn.Module,
        tokenizer: Any,
        examples: list[Example],
        evaluation: list[Example],
        folder: Path,
        settings: dict[str, Any],
    ):
        self.args, self.model, self.tokenizer, self.folder, self.settings = args, model, tokenizer, folder, settings
        self.examples, self.evaluation = examples, evaluation
        self.pad = pad_id(tokenizer, model)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = None
        if self.parameters:
            self.optimizer = optimizer_for(args.optimizer, list(self.parameters.values()), args.weight_decay)
        self.step, self.tokens, self.seconds, self.peak = 0, 0, 0.0, 0
        self.losses: list[float] = []
        self.evaluations: list[tuple[int, float]] = []
        self.question: list[dict[str, str]] = []
        self.answer_before = ""

    def start(self, question: list[dict[str, str]]) -> None:
        self.question = question
        self.answer_before = answer(self.model, self.tokenizer, question, 48)
        self.measure()

    def measure(self) -> None:
        if self.evaluation:
            loss = evaluate(self.model, self.evaluation, self.args.batch, self.pad)
            self.check_finite("held-out loss", loss)
            self.evaluations.append((self.step, loss))

    def check_finite(self, what: str, value: float) -> None:
        """Raise if a number is not finite: the run has failed, and further steps cannot repair it."""
        if not math.isfinite(value):
            kept = "; --resume goes on from the last checkpoint" if (self.folder / CHECKPOINT).exists() else ""
            raise ValueError(
                f"the {what} after step {self.step} is {value}: the model's outputs are not finite, or --lr "
                f"{self.args.lr:g} is too high{kept}"
            )

    def train(self) -> bool:
        """Run the steps to the end; returns False if an interrupt ended them."""
        from tqdm import tqdm

        args = self.args
        self.model.train()
        reset_memory_peak()
        stream = batches(self.examples, args.batch, args.seed)
        stream = islice(stream, self.step * args.accumulate, None)
        with interruptible() as stop, tqdm(total=args.steps, initial=self.step, unit="step", desc="training") as bar:
            while self.step < args.steps and not stop:
                begin = time.perf_counter()
                loss = self.one_step(list(islice(stream, args.accumulate)))
                self.seconds += time.perf_counter() - begin
                self.losses.append(loss)
                self.step += 1
                bar.update()
                speed = f"{self.tokens / self.seconds:,.0f}"
                bar.set_postfix({"loss": f"{loss:.3f}", "tok/s": speed, "memory": report.mebibytes(memory_now())})
                if args.eval_every and self.step % args.eval_every == 0 and self.step < args.steps:
                    self.measure()
                    self.model.train()
                if self.step % args.save_every == 0 and self.step < args.steps:
                    self.checkpoint()
        self.peak = max(self.peak, memory_peak())
        return self.step == args.steps

    def one_step(self, parts: list[list[Example]]) -> float:
        """One update from several batches. The loss is the mean over the targets of all of them."""
        args = self.args
        targets = sum(example.targets for part in parts for example in part)
        total = 0.0
        for part in parts:
            loss, _ = answer_loss(self.model, part, self.pad)
            (loss / targets).backward()
            total += loss.item()
            self.check_finite("loss", total)
            self.tokens += sum(len(example.ids) for example in part)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), args.clip)
        self.check_finite("gradient's norm", norm.item())
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.step()
        if args.method == "relora":
            relora_step(self.model, self.optimizer, self.step + 1)
        self.optimizer.zero_grad()
        return total / targets

    def learning_rate(self) -> float:
        args = self.args
        if args.method != "relora":
            return learning_rate(self.step, args.steps, args.lr, args.warmup)
        every = args.every
        total = -(-args.steps // every) * every
        return args.lr * relora_schedule(
            self.step, total, every=every, warmup=min(args.warmup, every), restart_warmup=min(100, every // 10)
        )

    def kept(self) -> dict[str, torch.Tensor]:
        """The trained parameters, and the base's parameters that a method changes: the tensors themselves, no
        copies."""
        base = {
            f"{path}:{name}": tensor
            for path, host in hosts(self.model)
            for adapter in host.adapters.values()
            for name, tensor in adapter.stored().items()
            if name.startswith("base_")
        }
        return {name: p.detach() for name, p in self.parameters.items()} | base

    def checkpoint(self) -> None:
        save_checkpoint(
            self.folder / CHECKPOINT,
            {
                "settings": self.settings,
                "adapter": self.kept(),
                "optimizer": self.optimizer.state_dict(),
                "random": torch.get_rng_state(),
                **{key: getattr(self, key) for key in self._PROGRESS},
            },
        )

    _PROGRESS = ("step", "tokens", "seconds", "peak", "losses", "evaluations", "question", "answer_before")

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint. The whole checkpoint is checked before a part of it is used."""
        path, kept = self.folder / CHECKPOINT, self.kept()
        check_tensors(path, state.get("adapter"), kept)
        moments = check_moments(path, state.get("optimizer"), self.parameters)
        groups = self.optimizer.state_dict()["param_groups"]  # the options decide these, not the file
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        with torch.no_grad():
            for name, tensor in kept.items():
                tensor.copy_(state["adapter"][name])
        torch.set_rng_state(state["random"])
        for key in self._PROGRESS:
            setattr(self, key, state[key])

    def finish(self, counts: Any) -> int:
        args = self.args
        after = self.answer_before
        if self.parameters:
            save(self.model, self.folder)  # first, so that no later error can lose the training
            self.measure()
            after = answer(self.model, self.tokenizer, self.question, 48)
        has = bool(self.evaluations)
        result = {
            "method": args.method,
            "trainable": counts.trainable,
            "total": counts.total,
            "frozen_bytes": counts.frozen_bytes,
            "dense_bytes": counts.dense_bytes,
            "peak_bytes": self.peak,
            "steps": args.steps,
            "rows_per_step": args.batch * args.accumulate,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "loss_before": self.evaluations[0][1] if has else None,
            "loss_after": self.evaluations[-1][1] if has else None,
            "losses": self.losses,
            "evaluations": self.evaluations,
        }
        report.write(self.folder, result)
        if self.parameters:
            report.plot(self.folder / report.PLOT, self.losses, self.evaluations, f"{args.method} of {args.model.name}")
        (self.folder / CHECKPOINT).unlink(missing_ok=True)
        print(f"\n{report.table([result])}\n")
        print(f"asked:  {self.question[-1]['content']}\nbefore: {self.answer_before}\nafter:  {after}\n")
        print(f"{'adapter, report.json and loss.png are' if self.parameters else 'report.json is'} in {self.folder}")
        return 0


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Collects Ctrl-C instead of raising it in the middle of a step; a second one raises at once."""
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
