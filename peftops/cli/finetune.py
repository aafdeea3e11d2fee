"""``peftops finetune``: a causal language model, a file of instructions, an adapter."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import hashlib
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..integrations import save, summary
from ..integrations.files import writable_directory
from ..methods import METHODS, attach, hosts
from ..methods.few_shot import demonstrations
from ..methods.hard_prompt import HardPrompt
from ..methods.optimizer_state import relora_schedule
from ..methods.relora import ReLoRAConfig, relora_step
from . import report
from .data import DataError, Example, Row, batches, encode, read_rows
from .model import answer, device_and_dtype, load_base, load_tokenizer
from .training import (
    OPTIMIZERS,
    answer_loss,
    evaluate,
    learning_rate,
    load_checkpoint,
    memory_now,
    memory_peak,
    optimizer_for,
    reset_memory_peak,
    save_checkpoint,
)

CHECKPOINT = "checkpoint.pt"
METHOD_NAMES = {adapter.__name__.lower(): config for config, adapter in METHODS.items()}
# What must be the same for a run to be resumed.
_SETTINGS = ("method", "r", "alpha", "dropout", "target", "batch", "accumulate", "steps", "epochs", "lr", "warmup",
             "weight_decay", "max_length", "seed", "dtype", "block_size", "set", "template", "shots",
             "every", "optimizer")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arg = parser.add_argument
    arg("--model", type=Path, required=True, help="directory with config.json and safetensors, or a GGUF file")
    arg("--train", type=Path, required=True, help="JSONL (instruction and response, messages, or text) or plain text")
    arg("--eval", type=Path, help="held-out data; by default a part of the training data")
    arg("--eval-share", type=float, default=0.05, help="that part (default 0.05; 0: no evaluation)")
    arg("--eval-every", type=int, help="steps between evaluations (default: at the start and the end)")
    arg("--out", type=Path, required=True, help="directory for the adapter, the report and the plot")
    arg("--method", choices=[*sorted(METHOD_NAMES), "none"], default="qlora", help="none: what the model does as it is")
    arg("--template", help="of each row: text with {field}, and ||| before the answer; or a JSON file of HardPrompt")
    arg("--shots", type=int, default=0, help="rows of the training data that every prompt shows first (default 0)")
    arg("--r", type=int, help="rank (default: the method's own, mostly 16)")
    arg("--alpha", type=float, help="numerator of the scaling (default 2 r)")
    arg("--dropout", type=float, default=0.0)
    arg("--target", default="all-linear", help="all-linear, names with commas, or re:EXPRESSION")
    arg("--block-size", type=int, default=64, help="of NF4 (default 64)")
    arg("--set", action="append", default=[], metavar="NAME=VALUE", help="another option of the method: tokens=50")
    arg("--every", type=int, default=1000, help="of ReLoRA: steps between restarts (default 1000)")
    arg("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    arg("--steps", type=int, help="optimizer steps (default: as many as --epochs take)")
    arg("--epochs", type=float, default=1.0)
    arg("--batch", type=int, default=8, help="rows computed at once (default 8)")
    arg("--accumulate", type=int, default=1, help="such batches per step")
    arg("--lr", type=float, default=5e-4, help="peak learning rate (default 5e-4)")
    arg("--warmup", type=int, help="steps (default: a tenth)")
    arg("--optimizer", choices=[*OPTIMIZERS], default="adamw",
        help="adamw8bit: 2 bytes of state per parameter, not 8; pagedadamw8bit: and on the host while a GPU is full")
    arg("--weight-decay", type=float, default=0.0)
    arg("--clip", type=float, default=1.0, help="largest norm of the gradient (default 1)")
    arg("--max-length", type=int, default=512, help="tokens per row (default 512)")
    arg("--checkpointing", action="store_true", help="compute activations again in backward: less memory, more time")
    arg("--save-every", type=int, default=100, help="steps between checkpoints (default 100)")
    arg("--resume", action="store_true", help="go on from the checkpoint in --out")
    arg("--seed", type=int, default=0)
    arg("--ask", help="a prompt to answer before and after (default: the first held-out one)")
    arg("--threads", type=int, help="CPU threads")


def run(args: argparse.Namespace) -> int:
    """The whole job. Everything that can be wrong with the input shows before the model is loaded."""
    args.target = parse_target(args.target)
    _check(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    folder = writable_directory(args.out, 64 << 20)
    prompt = parse_template(args.template)
    rows, held_out = _read_data(args, prompt)
    print(f"reading {args.model}", flush=True)
    tokenizer = load_tokenizer(args.model)
    if prompt is not None:
        shown = demonstrations([row.fields for row in rows], args.shots, seed=args.seed) or prompt.demonstrations
        rows = [row for row in rows if row.fields not in shown]  # or a row would be asked with its answer in sight
        chat = bool(getattr(tokenizer, "chat_template", None))
        prompt = dataclasses.replace(prompt, demonstrations=shown, chat=chat)
    examples = encode(rows, tokenizer, args.max_length, prompt)
    evaluation = encode(held_out, tokenizer, args.max_length, prompt) if held_out else []
    steps = max(1, round(args.epochs * len(examples) / (args.batch * args.accumulate)))
    args.steps = 0 if args.method == "none" else args.steps or steps
    args.warmup = args.steps // 10 if args.warmup is None else args.warmup
    settings = {key: getattr(args, key) for key in _SETTINGS} | {"data": _digest(args.train)}
    state = load_checkpoint(folder / CHECKPOINT, settings) if args.resume else None

    torch.manual_seed(args.seed)
    config = _config(args)
    codes = {"block_size": config.block_size, "double_quant": config.double_quant} if args.method == "qlora" else {}
    model = load_base(args.model, args.dtype, quantize=bool(codes), **codes)
    if state and isinstance(config, ReLoRAConfig):
        config = dataclasses.replace(config, restarts=state["step"] // config.every)
    attach(model, config) if config else model.requires_grad_(False)
    if args.checkpointing:
        # Renamed in transformers 5.2x.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    device, dtype = device_and_dtype(args.dtype)
    counts = summary(model)
    print(f"{args.method} on {device}, {str(dtype)[6:]}, {torch.get_num_threads()} threads")
    print(counts, flush=True)

    job = Job(args, model, tokenizer, examples, evaluation, folder, settings)
    if state:
        job.restore(state)
        print(f"resuming after step {job.step}", flush=True)
    else:
        job.start(_question(args.ask, held_out or rows, prompt))
    finished = job.train()
    if not finished:
        job.checkpoint()
        print(f"\nstopped after step {job.step} of {args.steps}; go on with --resume")
        return 130
    return job.finish(counts)


class Job:
    """One run of training: what changes from step to step, and what is needed to go on."""

    def __init__(self, args: argparse.Namespace, model: nn.Module, tokenizer: Any, examples: list[Example],
                 evaluation: list[Example], folder: Path, settings: dict[str, Any]):  # fmt: skip
        self.args, self.model, self.tokenizer, self.folder, self.settings = args, model, tokenizer, folder, settings
        self.examples, self.evaluation = examples, evaluation
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
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
            self.evaluations.append((self.step, loss))

    def train(self) -> bool:
        """Steps to the end; False if interrupted before."""
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
        """One update from several batches, each target counted once: the mean is over all of them."""
        args = self.args
        targets = sum(example.targets for part in parts for example in part)
        total = 0.0
        for part in parts:
            loss, _ = answer_loss(self.model, part, self.pad)
            (loss / targets).backward()
            total += loss.item()
            self.tokens += sum(len(example.ids) for example in part)
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), args.clip)
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
        return args.lr * relora_schedule(self.step, total, every=every, warmup=min(args.warmup, every),
                                         restart_warmup=min(100, every // 10))  # fmt: skip

    def kept(self) -> dict[str, torch.Tensor]:
        """What trains, and whatever of the base a method changes: the tensors themselves."""
        base = {
            f"{path}:{name}": tensor
            for path, host in hosts(self.model) for adapter in host.adapters.values()
            for name, tensor in adapter.stored().items() if name.startswith("base_")
        }  # fmt: skip
        return {name: p.detach() for name, p in self.parameters.items()} | base

    def checkpoint(self) -> None:
        save_checkpoint(self.folder / CHECKPOINT, {
            "settings": self.settings, "adapter": self.kept(),
            "optimizer": self.optimizer.state_dict(), "random": torch.get_rng_state(),
            **{key: getattr(self, key) for key in self._PROGRESS},
        })  # fmt: skip

    _PROGRESS = ("step", "tokens", "seconds", "peak", "losses", "evaluations", "question", "answer_before")

    def restore(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, tensor in self.kept().items():
                tensor.copy_(state["adapter"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        for key in self._PROGRESS:
            setattr(self, key, state[key])

    def finish(self, counts: Any) -> int:
        args = self.args
        after = self.answer_before
        if self.parameters:
            self.measure()
            after = answer(self.model, self.tokenizer, self.question, 48)
            save(self.model, self.folder)
        has = bool(self.evaluations)
        result = {
            "method": args.method, "trainable": counts.trainable, "total": counts.total,
            "frozen_bytes": counts.frozen_bytes, "dense_bytes": counts.dense_bytes, "peak_bytes": self.peak,
            "steps": args.steps, "rows_per_step": args.batch * args.accumulate, "seconds": self.seconds,
            "tokens": self.tokens, "loss_before": self.evaluations[0][1] if has else None,
            "loss_after": self.evaluations[-1][1] if has else None, "losses": self.losses,
            "evaluations": self.evaluations,
        }  # fmt: skip
        report.write(self.folder, result)
        if self.parameters:
            report.plot(self.folder / "loss.png", self.losses, self.evaluations, f"{args.method} of {args.model.name}")
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


def parse_target(text: str) -> str | list[str]:
    if text.startswith("re:"):
        return text[3:]
    return text if text == "all-linear" else [part.strip() for part in text.split(",") if part.strip()]


def parse_template(text: str | None) -> HardPrompt | None:
    if text is None:
        return None
    if text.endswith(".json"):
        return HardPrompt.load(text)
    return HardPrompt(text.replace("\\n", "\n"))


def _config(args: argparse.Namespace) -> object | None:
    if args.method == "none":
        return None
    kind = METHOD_NAMES[args.method]
    names = [field.name for field in sorted(dataclasses.fields(kind), key=lambda field: field.kw_only)]  # its own first
    given = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    for setting in args.set:
        name, equals, value = setting.partition("=")
        if not equals or name not in names:
            raise ValueError(f"--set {setting}: {args.method} takes NAME=VALUE with NAME one of {', '.join(names)}")
        given[name] = _value(value)
    return kind(**given)


def _value(text: str) -> Any:
    """A number, tuple, True or None as Python writes it; anything else is text."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def _check(args: argparse.Namespace) -> None:
    for name in ("batch", "accumulate", "max_length", "save_every", "steps", "eval_every", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if not 0 <= args.eval_share < 1:
        raise ValueError(f"--eval-share must be in [0, 1), not {args.eval_share}")
    if args.lr <= 0 or args.epochs <= 0:
        raise ValueError("--lr and --epochs must be positive")
    if args.shots < 0 or (args.shots and not args.template):
        raise ValueError("--shots must be at least 0 and needs --template")
    if args.method == "relora" and args.optimizer != "adamw":
        raise ValueError(f"relora prunes the optimizer's moments, which {args.optimizer} keeps as codes; use adamw")
    if not args.model.exists():
        raise FileNotFoundError(f"no model at {args.model}")
    _config(args)  # raises for options that the method does not accept


def _read_data(args: argparse.Namespace, prompt: HardPrompt | None) -> tuple[list[Row], list[Row]]:
    rows = read_rows(args.train, prompt)
    if args.eval:
        return rows, read_rows(args.eval, prompt)
    count = int(len(rows) * args.eval_share)
    if count == 0:
        return rows, []
    if count == len(rows):
        raise DataError(f"{args.train} has {len(rows)} rows, too few to hold some out; give --eval or --eval-share 0")
    every = len(rows) // count
    held = set(range(0, count * every, every))
    return [r for i, r in enumerate(rows) if i not in held], [r for i, r in enumerate(rows) if i in held]


def _question(ask: str | None, rows: list[Row], prompt: HardPrompt | None) -> list[dict[str, str]]:
    if ask:
        return [{"role": "user", "content": ask}]
    first = rows[0]
    if prompt is not None:
        return prompt.messages(first.fields)[:-1]
    return first.messages[:-1] if first.messages else [{"role": "user", "content": first.text[:80]}]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
