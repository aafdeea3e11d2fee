"""``peftops finetune``: a causal language model, a file of instructions, an adapter."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import torch

from ..attaching import METHODS, attach
from ..integrations import summary
from ..integrations.calibrated_files import write_nf4
from ..integrations.calibration import CalibrationConfig, input_moments
from ..integrations.files import fingerprint, writable_directory
from ..integrations.peft_files import CONFIG, OWN, WEIGHTS
from ..methods.qlora import QLoRAConfig
from ..methods.relora import ReLoRAConfig
from ..optim.checkpointing import compute_again
from ..prompts.chat import TURNS, prompt_ids
from ..prompts.example import Example
from ..prompts.few_shot import demonstrations
from ..prompts.hard_prompt import HardPrompt
from . import report
from .checkpoint import digest, load_checkpoint
from .data import DataError, Row, encode, read_rows
from .job import CHECKPOINT, Job
from .model import add_arguments as add_model_arguments
from .model import base_options, device_and_dtype, load_base, load_tokenizer, positions, vocabulary
from .quantize import calibrated, some_rows
from .training import OPTIMIZERS

METHOD_NAMES = {adapter.__name__.lower(): config for config, adapter in METHODS.items()}
# The settings that must be the same when a run is resumed.
_SETTINGS = (
    "method",
    "r",
    "alpha",
    "dropout",
    "target",
    "batch",
    "accumulate",
    "steps",
    "epochs",
    "lr",
    "warmup",
    "weight_decay",
    "clip",
    "max_length",
    "seed",
    "dtype",
    "block_size",
    "set",
    "template",
    "shots",
    "every",
    "optimizer",
    "turns",
    "eval_share",
    "eval_every",
)
BASE = "base"  # of --calibrate with qlora: the model on which the adapter is trained
_RESULTS = (CHECKPOINT, report.FILE, report.PLOT, CONFIG, WEIGHTS, OWN)  # files that a run may leave


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arg = parser.add_argument
    add_model_arguments(parser)
    arg(
        "--train",
        type=Path,
        required=True,
        help="JSON, JSONL or CSV (instruction and response, messages, or text) or plain text; the suffix tells which",
    )
    arg("--eval", type=Path, help="held-out data; by default a part of the training data")
    arg("--eval-share", type=float, default=0.05, help="the size of that part (default 0.05; 0: no evaluation)")
    arg("--eval-every", type=int, help="steps between evaluations (default: at the start and the end)")
    arg("--out", type=Path, required=True, help="directory for the adapter, the report and the plot")
    arg("--overwrite", action="store_true", help="delete what another run left in --out")
    arg("--method", choices=[*sorted(METHOD_NAMES), "none"], default="qlora", help="none: measure the model as it is")
    arg(
        "--template",
        help="template of a row: text with {field}, and ||| before the answer; or a JSON file of HardPrompt",
    )
    arg(
        "--turns",
        choices=TURNS,
        default="last",
        help="the assistant's answers in a conversation that are learnt (default last)",
    )
    arg("--shots", type=int, default=0, help="rows of the training data that every prompt shows first (default 0)")
    arg("--r", type=int, help="rank (default: the method's own, mostly 16)")
    arg("--alpha", type=float, help="numerator of the scaling (default 2 r)")
    arg("--dropout", type=float, default=_OF_METHODS["dropout"])
    arg("--target", default=_OF_METHODS["target"], help="all-linear, names with commas, or re:EXPRESSION")
    arg("--block-size", type=int, default=_OF_METHODS["block_size"], help="of NF4 (default 64)")
    arg("--set", action="append", default=[], metavar="NAME=VALUE", help="another option of the method: tokens=50")
    arg("--every", type=int, default=_OF_METHODS["every"], help="of ReLoRA: steps between restarts (default 1000)")
    arg("--steps", type=int, help="optimizer steps (default: as many as --epochs take)")
    arg("--epochs", type=float, default=1.0)
    arg("--batch", type=int, default=8, help="rows computed at once (default 8)")
    arg("--accumulate", type=int, default=1, help="batches per step of the optimizer")
    arg("--lr", type=float, default=5e-4, help="peak learning rate (default 5e-4)")
    arg("--warmup", type=int, help="steps (default: a tenth)")
    arg(
        "--optimizer",
        choices=[*OPTIMIZERS],
        default="adamw",
        help="adamw8bit: 2 bytes of state per parameter, not 8; pagedadamw8bit: on the host if a GPU is full",
    )
    arg("--weight-decay", type=float, default=0.0)
    arg("--clip", type=float, default=1.0, help="largest norm of the gradient (default 1)")
    arg("--max-length", type=int, default=512, help="tokens per row (default 512)")
    arg("--checkpointing", action="store_true", help="compute activations again in backward: less memory, more time")
    arg("--save-every", type=int, default=100, help="steps between checkpoints (default 100)")
    arg("--resume", action="store_true", help="go on from the checkpoint in --out")
    arg("--seed", type=int, default=0)
    arg(
        "--calibrate",
        nargs="?",
        const=True,
        metavar="FILE",
        help="with qlora, loftq, lqlora: choose the codes "
        "with the layers' inputs from this data file, or from the training data",
    )
    arg("--ask", help="a prompt to answer before and after (default: the first held-out one)")
    arg("--threads", type=int, help="CPU threads")


def run(args: argparse.Namespace) -> int:
    """The whole job. All mistakes of the input show before the model is loaded."""
    args.target = parse_target(args.target)
    _check(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    left = check_out(args)
    folder = writable_directory(args.out, 64 << 20)
    prompt = parse_template(args.template)
    rows, held_out = _read_data(args, prompt)
    print(f"reading {args.model}", flush=True)
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    if prompt is not None:
        shown = demonstrations([row.fields for row in rows], args.shots, seed=args.seed) or prompt.demonstrations
        rows = [row for row in rows if row.fields not in shown]  # or a prompt could contain its own answer
        chat = bool(getattr(tokenizer, "chat_template", None))
        prompt = dataclasses.replace(prompt, demonstrations=shown, chat=chat)
    examples = encode(rows, tokenizer, args.max_length, prompt, args.turns)
    evaluation = encode(held_out, tokenizer, args.max_length, prompt, args.turns) if held_out else []
    steps = max(1, round(args.epochs * len(examples) / (args.batch * args.accumulate)))
    args.steps = 0 if args.method == "none" else args.steps or steps
    args.warmup = args.steps // 10 if args.warmup is None else args.warmup
    files = {
        "data": digest(args.train),
        "eval": digest(args.eval),
        "model": fingerprint(args.model),
        "calibrate": digest(Path(args.calibrate)) if isinstance(args.calibrate, str) else args.calibrate,
    }
    settings = {key: getattr(args, key) for key in _SETTINGS} | files | {"prompt": repr(prompt)}
    state = load_checkpoint(folder / CHECKPOINT, settings, args.steps) if args.resume else None

    torch.manual_seed(args.seed)
    config = _config(args)
    codes = base_options(config) if args.method == "qlora" else {"quantize": False}
    calibration = _calibration_rows(args, examples, tokenizer)
    if calibration and codes["quantize"]:
        model = _calibrated_base(args, config, calibration, tokenizer)
    else:
        model = load_base(args, **codes)
    if calibration and not codes["quantize"]:
        config = dataclasses.replace(config, moments=input_moments(model, calibration))
    if state and isinstance(config, ReLoRAConfig):
        config = dataclasses.replace(config, restarts=state["step"] // config.every)
    attach(model, config) if config else model.requires_grad_(False)
    if calibration and args.method == "loftq":
        model.config._name_or_path = str(args.out / BASE)
        if not (args.resume and (args.out / BASE).exists()):
            _clear_base(args)
            write_nf4(model, args.out / BASE, tokenizer)
    _check_fit(model, [*examples, *evaluation])
    if args.checkpointing:
        compute_again(model)
    device, dtype = device_and_dtype(args.dtype)
    counts = summary(model)
    print(f"{args.method} on {device}, {str(dtype)[6:]}, {torch.get_num_threads()} threads")
    print(counts, flush=True)

    job = Job(args, model, tokenizer, examples, evaluation, folder, settings)
    if state:
        job.restore(state)
        print(f"resuming after step {job.step}", flush=True)
    else:
        for file in left:
            file.unlink()
        job.start(_question(args, held_out or rows, prompt, tokenizer))
    finished = job.train()
    if not finished:
        job.checkpoint()
        print(f"\nstopped after step {job.step} of {args.steps}; go on with --resume")
        return 130
    return job.finish(counts)


def _calibration_rows(args: argparse.Namespace, examples: list[Example], tokenizer: Any) -> list[list[int]]:
    """The rows for --calibrate."""
    if not args.calibrate:
        return []
    if args.calibrate is not True:
        examples = encode(read_rows(Path(args.calibrate)), tokenizer, args.max_length)
    return some_rows(examples)


def _calibrated_base(
    args: argparse.Namespace, config: QLoRAConfig, rows: list[list[int]], tokenizer: Any
) -> torch.nn.Module:
    """The model in calibrated NF4, in OUT/base: an adapter that is trained on these codes does not fit other codes."""
    base = args.out / BASE
    if not args.resume:
        _clear_base(args)
    if not (base.exists() and args.resume):
        codes = CalibrationConfig(config.block_size, config.double_quant)
        calibrated(
            args.model,
            rows,
            codes,
            base,
            tokenizer,
            dtype=device_and_dtype(args.dtype)[1],
            trust_remote_code=args.trust_remote_code,
        )
    args.model = base
    return load_base(args, quantize=True)


def _clear_base(args: argparse.Namespace) -> None:
    if args.overwrite and (args.out / BASE).exists():
        shutil.rmtree(args.out / BASE)


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
    for name, default in _OF_METHODS.items():
        if name not in names and getattr(args, name) != default:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} is not an option of {args.method}, which has {', '.join(names)}; see --set")
    given = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    for setting in args.set:
        name, equals, value = setting.partition("=")
        if not equals or name not in names:
            raise ValueError(f"--set {setting}: {args.method} takes NAME=VALUE with NAME one of {', '.join(names)}")
        given[name] = _value(value)
    return kind(**given)


# Options that only some methods have, and their defaults.
_OF_METHODS = {"r": None, "alpha": None, "dropout": 0.0, "target": "all-linear", "every": 1000, "block_size": 64}


def _value(text: str) -> Any:
    """A number, tuple, True or None in Python's notation; all else is text."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


# Options that are numbers: the lower bound, and whether the bound itself is allowed. All of them must be finite.
_NUMBERS = {
    **dict.fromkeys(("batch", "accumulate", "max_length", "save_every", "steps", "eval_every", "every"), (1, True)),
    **dict.fromkeys(("warmup", "weight_decay", "seed", "shots"), (0, True)),
    **dict.fromkeys(("clip", "alpha"), (0, False)),
}
_MOST_THREADS = 1024


def _check(args: argparse.Namespace) -> None:
    for name, (least, included) in _NUMBERS.items():
        value, option = getattr(args, name), f"--{name.replace('_', '-')}"
        if value is None:
            continue
        if not math.isfinite(value) or value >= 2**63:  # counts of steps and seeds have 64 bits
            raise ValueError(f"{option} must be a finite number, not {value}")
        if value < least or (value == least and not included):
            raise ValueError(f"{option} must be {'at least' if included else 'above'} {least}, not {value}")
    if not all(0 < value < math.inf for value in (args.lr, args.epochs)):
        raise ValueError(f"--lr and --epochs must be positive and finite, not {args.lr} and {args.epochs}")
    if args.threads is not None and not 1 <= args.threads <= _MOST_THREADS:
        raise ValueError(f"--threads must be at least 1 and at most {_MOST_THREADS}, not {args.threads}")
    if not 0 <= args.eval_share < 1:
        raise ValueError(f"--eval-share must be in [0, 1), not {args.eval_share}")
    if args.shots and not args.template:
        raise ValueError("--shots must be at least 0 and needs --template")
    if args.calibrate and args.method not in ("qlora", "loftq", "lqlora"):
        raise ValueError(f"--calibrate chooses codes, and {args.method} makes none; it is for qlora, loftq, lqlora")
    if args.method == "relora" and args.optimizer != "adamw":
        raise ValueError(f"relora prunes the optimizer's moments, which {args.optimizer} keeps as codes; use adamw")
    if not args.model.exists():
        raise FileNotFoundError(f"no model at {args.model}")
    config = _config(args)  # raises for options that the method does not accept
    if args.calibrate and getattr(config, "format", "nf4") != "nf4":
        raise ValueError(f"--calibrate chooses codes of NF4 and of groups, not of {config.format!r}")


def check_out(args: argparse.Namespace) -> list[Path]:
    """The files that another run left in --out; --overwrite deletes them when this run begins.

    Raises:
        ValueError: the directory holds a model, which files of an adapter would make unreadable; or another run's
            results, and neither --resume nor --overwrite is given.
    """
    folder = args.out
    if folder.is_dir() and ((folder / "config.json").exists() or any(folder.glob("*.gguf"))):
        raise ValueError(f"--out {folder} holds a model, which an adapter's files would make unreadable; give another")
    left = [folder / name for name in _RESULTS if (folder / name).exists()]
    if left and not args.resume and not args.overwrite:
        unfinished = folder / CHECKPOINT in left
        what, way = ("an unfinished run", "--resume goes on, ") if unfinished else ("the results of another run", "")
        raise ValueError(f"--out {folder} holds {what}; {way}--overwrite deletes it, or give another directory")
    return left if args.overwrite and not args.resume else []


def _check_fit(model: torch.nn.Module, examples: list[Example]) -> None:
    """Check that the model has an embedding for each token, and a position."""
    largest, longest = (max(map(of, examples)) for of in (lambda e: max(e.ids), lambda e: len(e.ids)))
    if largest >= vocabulary(model):
        raise ValueError(f"the tokenizer makes a token {largest}, and the model has {vocabulary(model)} of them")
    if longest > positions(model):
        raise ValueError(
            f"a row has {longest} tokens, and the model {positions(model)} positions; give --max-length "
            f"{positions(model)}"
        )


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


def _question(args: argparse.Namespace, rows: list[Row], prompt: HardPrompt | None, tokenizer: Any) -> list:
    """The question that is asked before and after training: --ask, or the question of the first row whose prompt leaves
    room for an answer."""
    if args.ask:
        return [{"role": "user", "content": args.ask}]
    asked = [_asked(row, prompt) for row in rows[:100]]
    return next((q for q in asked if len(prompt_ids(tokenizer, q)) < args.max_length), asked[0])


def _asked(row: Row, prompt: HardPrompt | None) -> list[dict[str, str]]:
    if prompt is not None:
        return prompt.messages(row.fields)[:-1]
    return row.messages[:-1] if row.messages else [{"role": "user", "content": row.text[:80]}]
