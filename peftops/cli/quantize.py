"""``peftops quantize``: a dense model becomes files in calibrated NF4. Other commands share its functions."""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..integrations.calibration import CalibrationConfig, CalibrationReport, quantize_model
from ..integrations.files import check_new_directory, write_atomically
from ..prompts.example import Example
from .data import encode, read_rows
from .model import add_arguments as add_model_arguments
from .model import device_and_dtype, load_tokenizer

PLOT = "calibration.png"
_TOKENS, _LENGTH = 8192, 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arg = parser.add_argument
    add_model_arguments(parser)
    arg(
        "--calibrate",
        type=Path,
        required=True,
        help="text of the kind that the model will see, not of a test set: a data file as for finetune --train",
    )
    arg("--out", type=Path, required=True, help="new directory for the model, the report and a plot")
    arg("--tokens", type=int, default=_TOKENS, help=f"tokens of the data to use, in random rows (default {_TOKENS})")
    arg("--max-length", type=int, default=_LENGTH, help=f"tokens per row (default {_LENGTH})")
    arg("--block-size", type=int, default=64, help="of NF4 (default 64)")
    arg("--no-double-quant", action="store_true", help="keep the blocks' constants in float32: 4.5 bits per weight")
    arg(
        "--damping",
        type=float,
        help="the larger, the less the data count (default: found for each layer with two halves of the data)",
    )
    arg(
        "--layout",
        choices=["bitsandbytes", "peftops"],
        default="bitsandbytes",
        help="layout of the files; transformers reads bitsandbytes'",
    )
    arg("--threads", type=int, help="CPU threads")


def run(args: argparse.Namespace) -> int:
    for name in ("tokens", "max_length", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    config = CalibrationConfig(args.block_size, not args.no_double_quant, args.damping, args.layout)
    check_new_directory(args.out)
    if args.threads:
        torch.set_num_threads(args.threads)
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    rows = some_rows(encode(read_rows(args.calibrate), tokenizer, args.max_length), args.tokens)
    _, dtype = device_and_dtype(args.dtype)
    calibrated(args.model, rows, config, args.out, tokenizer, dtype=dtype, trust_remote_code=args.trust_remote_code)
    print(f"the model, calibration.json and {PLOT} are in {args.out}")
    return 0


def some_rows(examples: list[Example], tokens: int = _TOKENS) -> list[list[int]]:
    """Token ids of random examples, always the same ones, until they have this number of tokens."""
    order, rows, count = list(examples), [], 0
    random.Random(0).shuffle(order)
    for example in order:
        if count >= tokens:
            break
        rows.append(example.ids)
        count += len(example.ids)
    return rows


def calibrated(
    model: Path | nn.Module, rows: list[list[int]], config: CalibrationConfig, out: Path, tokenizer: Any, **options: Any
) -> nn.Module:
    """:func:`peftops.quantize_model` with a bar, the report in words, and a plot."""
    from tqdm import tqdm

    device, _ = device_and_dtype("auto")
    with tqdm(desc="calibrating", unit="block") as bar:

        def show(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        model, report = quantize_model(
            model, rows, config, out=out, tokenizer=tokenizer, device=device, on_block=show, **options
        )
    print(report, flush=True)
    _plot(out / PLOT, report)
    return model


def _plot(path: Path, report: CalibrationReport) -> None:
    """Each layer's output error, as PNG: of plain NF4 and of the calibrated codes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers = [layer for layer in report.layers if layer.error is not None]
    kinds = list(dict.fromkeys(layer.name.rpartition(".")[2] for layer in layers))
    figure, axes = pyplot.subplots(figsize=(9, 5), dpi=120, layout="constrained")
    for i, kind in enumerate(kinds):
        own = [layer for layer in layers if layer.name.endswith(f".{kind}")]
        axes.plot([100 * layer.plain_error for layer in own], color=f"C{i % 10}", linestyle=":", linewidth=1)
        axes.plot([100 * layer.error for layer in own], color=f"C{i % 10}", linewidth=1.8, label=kind)
    axes.set(
        xlabel="block",
        ylabel="error of a layer's outputs, %",
        ylim=(0, None),
        title=f"dotted: plain NF4; lines: calibrated on {report.tokens:,} tokens",
    )
    axes.grid(alpha=0.3)
    if kinds:
        axes.legend(frameon=False, ncols=2)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
    pyplot.close(figure)
