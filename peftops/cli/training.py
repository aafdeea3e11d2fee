"""The training loop's parts: loss, evaluation, learning rate, checkpoints, memory."""

from __future__ import annotations

import inspect
import math
import resource
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..integrations.files import write_atomically
from ..nn import AdamW8bit
from .data import IGNORE, Example, collate, in_order


def answer_loss(model: nn.Module, batch: list[Example], pad: int) -> tuple[Tensor, int]:
    """Sum of the negative log-likelihoods of the targets, and their number. Logits are computed at the
    positions that have targets alone: with a large vocabulary they would be most of the memory."""
    tensors = collate(batch, pad)
    labels = tensors.pop("labels").to(model.device)
    keep = max(example.targets for example in batch) + 1
    extra = {"logits_to_keep": keep} if _takes_logits_to_keep(model) else {}
    inputs = {name: t.to(model.device) for name, t in tensors.items()}
    logits = model(**inputs, use_cache=False, **extra).logits[:, -keep:-1]
    labels = labels[:, 1 - keep :]
    chosen = labels != IGNORE
    return F.cross_entropy(logits[chosen].float(), labels[chosen], reduction="sum"), int(chosen.sum())


def _takes_logits_to_keep(model: nn.Module) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


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
    "adamw": partial(torch.optim.AdamW, fused=True), "adamw8bit": AdamW8bit,
    "pagedadamw8bit": partial(AdamW8bit, paged=True),
}  # fmt: skip


def optimizer_for(name: str, parameters: list[nn.Parameter], weight_decay: float) -> torch.optim.Optimizer:
    return OPTIMIZERS[name](parameters, lr=0.0, weight_decay=weight_decay)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def load_checkpoint(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint that was written with the same settings.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or a setting differs; the sentence says which.
    """
    if not path.exists():
        raise FileNotFoundError(f"nothing to resume: no {path}")
    try:
        state = torch.load(path, weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from None
    different = [key for key, value in settings.items() if state["settings"].get(key) != value]
    if different:
        was = ", ".join(f"{key}={state['settings'].get(key)!r} (now {settings[key]!r})" for key in different)
        raise ValueError(f"{path} was made with other settings: {was}")
    return state


def memory_now() -> int:
    """Bytes of memory in use: of the GPU if there is one, else resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return memory_peak()


def memory_peak() -> int:
    """The most bytes since :func:`reset_memory_peak`, or since the start where the system cannot forget."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_memory_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # not Linux: the peak is then that of the whole process
