"""``peftops plan``: the memory of each method on a model, and which one to choose."""

from __future__ import annotations

import argparse
import re

from ..planner import MOMENTS, WANTS, Estimate, choose, estimate_all, skeleton, traits_of
from .model import add_arguments as add_model_arguments
from .model import device_and_dtype

_UNITS = {
    "B": 1,
    "K": 2**10,
    "M": 2**20,
    "G": 2**30,
    "T": 2**40,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arg = parser.add_argument
    add_model_arguments(parser)
    arg("--memory", required=True, help="the available memory: 16GiB, 24GB, 800M")
    arg("--tasks", type=int, default=1, help="how many adapters for the one base (default 1)")
    arg("--want", choices=sorted(WANTS), default="quality", help="the goal (default quality)")
    arg("--batch", type=int, default=8, help="rows computed at once (default 8)")
    arg("--max-length", type=int, default=512, help="tokens per row (default 512)")
    arg("--r", type=int, default=16, help="rank (default 16)")
    arg("--optimizer", choices=[*MOMENTS], default="adamw", help="the optimizer whose state counts (default adamw)")
    arg("--checkpointing", action="store_true", help="compute activations again in backward")


def run(args: argparse.Namespace) -> int:
    memory = parse_bytes(args.memory)
    _, dtype = device_and_dtype(args.dtype)
    model = skeleton(args.model, dtype, trust_remote_code=args.trust_remote_code)
    options = {
        "batch": args.batch,
        "length": args.max_length,
        "checkpointing": args.checkpointing,
        "optimizer": args.optimizer,
    }
    estimates = estimate_all(model, r=args.r, **options)
    choice = choose(estimates, memory, want=args.want, tasks=args.tasks)
    count = sum(p.numel() for p in model.parameters())
    again = ", blocks computed again" if args.checkpointing else ""
    print(
        f"{args.model.name}: {count / 1e6:,.1f} M parameters, {str(dtype)[6:]}, "
        f"{args.batch} rows of {args.max_length} tokens{again}, {args.memory}\n"
    )
    print(table(estimates, memory))
    print(f"\nchoose: {choice.estimate.method if choice.estimate else 'nothing of these'}")
    print("\n".join(f"  {reason}" for reason in choice.reasons))
    print(
        "\nNot counted: workspace inside of kernels, memory that the allocator wastes (a tenth is a good reserve), the "
        "libraries' own memory."
    )
    return 0


def parse_bytes(text: str) -> int:
    """Bytes of a size in words.

    Raises:
        ValueError: the text is not a size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if found and not found[2]:
        raise ValueError(f"--memory {text} has no unit: {found[1]}GiB, for instance, or {found[1]}B for bytes")
    if not found or found[2].upper() not in _UNITS or not 0 < float(found[1]) < 2**63:
        raise ValueError(f"--memory must be a size such as 16GiB, 24GB or 800M, not {text!r}")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def table(estimates: list[Estimate], memory: int) -> str:
    """A line per method in MiB: first the methods that fit, and within both parts the least memory first."""
    cells = "{:14} {:>13} {:>9} {:>9} {:>11} {:>9} {:>5}  {}"
    lines = [
        cells.format(
            "method",
            "trainable",
            "weights",
            "optimizer",
            "activations",
            "MiB",
            "fits",
            "overhead, memory efficiency, versatility, quality",
        )
    ]
    mib = lambda size: f"{size / 2**20:,.0f}"
    for e in sorted(estimates, key=lambda e: (e.why_not is not None, e.total, e.method)):
        if e.why_not is not None:
            lines.append(f"{e.method:14} not for this model: {' '.join(e.why_not.split())}")
            continue
        traits = traits_of(e.method)
        words = f"{traits.overhead}, {traits.memory}, {traits.versatility}, {traits.quality}"
        lines.append(
            cells.format(
                e.method,
                f"{e.trainable:,}",
                mib(e.weights),
                mib(e.optimizer),
                mib(e.activations),
                mib(e.total),
                "yes" if e.total <= memory else "no",
                words,
            )
        )
    return "\n".join(lines)
