"""Surgical fine-tuning, Lee et al. 2022 (arXiv:2210.11466): one block trains, chosen by the kind of shift.

A change of the input (corruption) asks for the first block, one of features for a middle one, one of the labels
for the last. The block's parameters do not change at the start, so the model starts as it was. Instead of a choice of a
block, learning rates can follow the gradients of all trained parameters:

    Auto-RGN    w_i = RGN_i / max RGN,  RGN_i = ||g_i|| / ||theta_i||
    Auto-SNR    w_i = 1 if SNR_i, scaled to [0, 1] over all i, is at least a threshold, else 0,
                SNR_i = the mean over i's elements of mean(g)^2 / var(g) over samples
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..attaching import register
from ..attaching.config import Config, check_range
from ..attaching.selection import copies
from ..attaching.targets import blocks
from ..nn import Select


@dataclass(frozen=True)
class SurgicalConfig(Config):
    """Options of surgical fine-tuning.

    Args:
        blocks: "first", "middle", "last", "all", or the numbers of blocks, from 0.

    Examples:
        >>> model = peftops.attach(llama(), peftops.SurgicalConfig("first"))
        >>> {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad}
        {'0'}
    """

    peft_type: ClassVar[str] = "SURGICAL"

    blocks: str | list[int] = "first"

    def chosen(self, stack: list[str]) -> list[str]:
        by_name = {"first": stack[:1], "middle": stack[len(stack) // 2 :][:1], "last": stack[-1:], "all": stack}
        if isinstance(self.blocks, str) and self.blocks in by_name:
            return by_name[self.blocks]
        if isinstance(self.blocks, str) or not all(isinstance(i, int) and 0 <= i < len(stack) for i in self.blocks):
            raise ValueError(
                f"blocks must be {', '.join(map(repr, by_name))} or numbers below {len(stack)}, not {self.blocks!r}"
            )
        return [stack[i] for i in self.blocks]


@register(SurgicalConfig)
class Surgical(Select):
    @staticmethod
    def build(model: nn.Module, config: SurgicalConfig) -> dict[str, Surgical]:
        chosen = config.chosen(blocks(model))
        inside = lambda path, layer, leaf: any(path == name or path.startswith(f"{name}.") for name in chosen)
        return copies(Surgical, model, inside, "blocks chosen")


def _gradients(model: nn.Module, loss: Callable[[Any], Tensor], batches: Iterable[Any]) -> Iterable[dict[str, Tensor]]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError(f"nothing trains in this {type(model).__name__}; attach a method first")
    for batch in batches:
        yield dict(zip(named, torch.autograd.grad(loss(batch), list(named.values())), strict=True))


def auto_rgn(model: nn.Module, loss: Callable[[Any], Tensor], batches: Iterable[Any]) -> dict[str, float]:
    """The weight in [0, 1] of the learning rate of each trainable parameter, by its relative gradient norm.

    Args:
        loss: the mean loss of one of the ``batches``. The paper takes five batches, and computes new weights for every
            epoch.

    Returns:
        Weights by name; the largest is 1. A parameter whose elements are all 0 has weight 0.

    Examples:
        >>> model = nn.Linear(4, 2)
        >>> weights = peftops.auto_rgn(model, lambda x: model(x).square().mean(), [torch.ones(3, 4)])
        >>> max(weights.values())
        1.0
    """
    parameters, sums, count = dict(model.named_parameters()), {}, 0
    for gradients in _gradients(model, loss, batches):
        count += 1
        for name, g in gradients.items():
            size = parameters[name].detach().norm().item()
            sums[name] = sums.get(name, 0.0) + (g.norm().item() / size if size else 0.0)
    if not count:
        raise ValueError("auto_rgn needs at least one batch")
    largest = max(sums.values())
    return {name: value / largest if largest else 0.0 for name, value in sums.items()}


def auto_snr(
    model: nn.Module, loss: Callable[[Any], Tensor], samples: Iterable[Any], *, threshold: float = 0.5
) -> dict[str, float]:
    """1 for each trainable parameter whose gradient's signal-to-noise ratio over ``samples`` is high, else 0.

    Args:
        loss: of one sample, or of a small batch as one sample; two or more are needed.
        threshold: in [0, 1], of the ratios scaled so that the smallest is 0 and the largest 1.

    Examples:
        >>> model = nn.Linear(4, 2)
        >>> weights = peftops.auto_snr(model, lambda x: model(x).square().mean(), torch.randn(5, 1, 4))
        >>> set(weights.values()) <= {0.0, 1.0}
        True
    """
    check_range("threshold", threshold, 0, 1.0000001)
    count, first, second = 0, {}, {}
    for gradients in _gradients(model, loss, samples):
        count += 1
        for name, g in gradients.items():  # Welford's mean and squared deviations, stable in float32
            mean = first.setdefault(name, torch.zeros_like(g))
            ahead = g - mean
            mean += ahead / count
            second[name] = second.get(name, 0.0) + ahead * (g - mean)
    if count < 2:
        raise ValueError(f"auto_snr needs at least two samples, not {count}")
    ratio = {name: (first[name].square() / (second[name] / (count - 1) + 1e-12)).mean().item() for name in first}
    low, high = min(ratio.values()), max(ratio.values())
    return {name: float((value - low) / ((high - low) or 1.0) >= threshold) for name, value in ratio.items()}


def weighted_groups(model: nn.Module, weights: dict[str, float], lr: float) -> list[dict[str, Any]]:
    """The parameters as groups for an optimizer, each with its own rate, without the parameters of weight 0.

    Examples:
        >>> groups = peftops.weighted_groups(nn.Linear(4, 2), {"weight": 1.0, "bias": 0.0}, lr=0.1)
        >>> [group["lr"] for group in groups]
        [0.1]
    """
    parameters = dict(model.named_parameters())
    return [{"params": [parameters[name]], "lr": lr * w} for name, w in weights.items() if w]
