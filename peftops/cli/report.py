"""The table and the plot of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..integrations.files import write_atomically
from .data import parsed, read_text

FILE, PLOT = "report.json", "loss.png"


def mebibytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"


_LINES = {
    "method": lambda r: r["method"],
    "trainable parameters": lambda r: f"{r['trainable']:,} ({r['trainable'] / r['total']:.2%})",
    "frozen linear weights": lambda r: mebibytes(r["frozen_bytes"]),
    "  the same, dense": lambda r: mebibytes(r["dense_bytes"]),
    "peak memory in training": lambda r: mebibytes(r["peak_bytes"]),
    "steps x rows": lambda r: f"{r['steps']} x {r['rows_per_step']}",
    "training time": lambda r: f"{r['seconds']:.0f} s",
    "tokens/s": lambda r: f"{r['tokens'] / max(r['seconds'], 1e-9):,.0f}",
    "held-out loss before": lambda r: _number(r["loss_before"]),
    "held-out loss after": lambda r: _number(r["loss_after"]),
    "perplexity before": lambda r: _number(_perplexity(r["loss_before"]), 1),
    "perplexity after": lambda r: _number(_perplexity(r["loss_after"]), 1),
}


_COUNTS = (
    "trainable",
    "total",
    "frozen_bytes",
    "dense_bytes",
    "peak_bytes",
    "steps",
    "rows_per_step",
    "seconds",
    "tokens",
)
_LOSSES = ("loss_before", "loss_after")


def _perplexity(loss: float | None) -> float | None:
    return None if loss is None else math.exp(loss) if loss < 700 else math.inf  # beyond a double's range


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def table(reports: list[dict[str, Any]]) -> str:
    """Runs side by side, a line per figure."""
    cells = [[name, *(line(report) for report in reports)] for name, line in _LINES.items()]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    pad = lambda row: "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    return "\n".join(map(pad, cells))


def write(folder: Path, report: dict[str, Any]) -> None:
    write_atomically(folder / FILE, lambda path: path.write_text(json.dumps(report, indent=2) + "\n"))


def read(folder: Path) -> dict[str, Any]:
    """A run's report. All figures that :func:`table` shows are checked: they are there and are numbers.

    Raises:
        FileNotFoundError: there is no report.
        ValueError: it is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(f"no {FILE} in {folder}; is it the output of peftops finetune?")
    report = parsed(read_text(path, "report"), f"{path} is damaged")
    if not isinstance(report, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(report).__name__}, not an object")
    finite = lambda value: isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e18
    wrong = [key for key in _COUNTS if not finite(report.get(key)) or report[key] < 0]
    wrong += [key for key in _LOSSES if report.get(key, "") is not None and not finite(report.get(key))]
    if wrong or not report["total"] or not isinstance(report.get("method"), str):
        raise ValueError(f"{path} is damaged: its {', '.join(wrong) or 'method or total'} cannot be right")
    return report


def plot(path: Path, losses: list[float], evaluations: list[tuple[int, float]], title: str) -> None:
    """The loss as PNG: every step, its running mean, and the held-out loss where it was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="#9db7d5", linewidth=1, label="training, each step")
    smooth, mean = [], None
    for loss in losses:
        mean = loss if mean is None else 0.9 * mean + 0.1 * loss
        smooth.append(mean)
    axes.plot(steps, smooth, color="#1f4e8c", linewidth=2, label="training, running mean")
    if evaluations:
        axes.plot(*zip(*evaluations, strict=True), color="#c8501e", marker="o", linewidth=1.5, label="held out")
    axes.set(xlabel="optimizer step", ylabel="loss per target token (nats)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
    pyplot.close(figure)
