"""The training loop's parts: loss, evaluation, learning rate, memory."""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..nn import language_model_loss
from ..optim import AdamW8bit
from ..prompts.example import Example
from .data import collate, in_order


def answer_loss(model: nn.Module, batch: list[Example], pad: int) -> tuple[Tensor, int]:
    """Sum of the negative log-likelihoods of the targets, and their number."""
    inputs = {name: t.to(model.device) for name, t in collate(batch, pad).items()}
    loss, targets = language_model_loss(model, **inputs)
    return loss, int(targets)


@torch.no_grad()
def evaluate(model: nn.Module, examples: list[Example], size: int, pad: int) -> float:
    """Mean loss per target."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in in_order(examples, size):
        loss, n = answer_loss(model, batch, pad)
        total, count = total + loss.item(), count + n
    model.train(was_training)
    return total / count


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then half a cosine down to 0 after the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


OPTIMIZERS = {
    "adamw": partial(torch.optim.AdamW, fused=True),
    "adamw8bit": AdamW8bit,
    "pagedadamw8bit": partial(AdamW8bit, paged=True),
}


def optimizer_for(name: str, parameters: list[nn.Parameter], weight_decay: float) -> torch.optim.Optimizer:
    return OPTIMIZERS[name](parameters, lr=0.0, weight_decay=weight_decay)


def memory_now() -> int:
    """Bytes of memory in use: of the GPU if there is one, else of this process, without the pages of mapped files (the
    system can take these back at any time)."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    try:
        return _status("VmRSS") - _status("RssFile")
    except (OSError, LookupError):
        return memory_peak()


def memory_peak() -> int:
    """The largest number of such bytes since :func:`reset_memory_peak`, or since the start if the system cannot reset
    it; 0 if the system does not tell."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        # The present number of file pages is subtracted, because Linux keeps no peak of them.
        return _status("VmHWM") - _status("RssFile")
    except (OSError, LookupError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(name: str) -> int:
    """A line of Linux's account of this process, in bytes."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024


def reset_memory_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # not Linux: the peak is then the one since the start
