"""ReLoRA's treatment of an optimizer: the state that it forgets at a restart, and the learning rate between two
restarts."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..attaching.config import check_choice, check_range


@torch.no_grad()
def prune_state(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], how: str = "reset", ratio: float = 0.9
) -> None:
    """Zero an optimizer's averages of the gradients of ``parameters``, in place; all of them or a share.

    Its count of steps goes on, so that Adam's correction of its averages does not start again.

    Args:
        how: "reset" zeroes all; "random" each element with probability ``ratio``; "magnitude" the share ``ratio`` of
            each tensor that is smallest.
        ratio: in [0, 1).

    Raises:
        TypeError: the optimizer keeps a state that is not a float tensor of the parameter's shape.

    Examples:
        >>> layer = nn.Linear(4, 2)
        >>> optimizer = torch.optim.AdamW(layer.parameters())
        >>> layer(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> peftops.prune_state(optimizer, [layer.weight])
        >>> optimizer.state[layer.weight]["exp_avg"].any().item()
        False
    """
    check_choice("how", how, ("reset", "random", "magnitude"))
    check_range("ratio", ratio, 0, 1)
    found = []
    for parameter in parameters:
        for name, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                continue  # the count of steps
            if value.shape != parameter.shape or not value.is_floating_point():
                kind = f"{type(optimizer).__name__} keeps {name} as {value.dtype} {list(value.shape)}"
                raise TypeError(f"prune_state: {kind}, which cannot be pruned")
            found.append(value)
    for value in found:
        if how == "reset":
            value.zero_()
        elif how == "random":
            value.mul_(torch.rand_like(value) >= ratio)
        elif count := int(ratio * value.numel()):
            size = value.abs()
            value.mul_(size > size.flatten().kthvalue(count).values)  # (torch.quantile ends at 16 million elements)


def relora_schedule(
    step: int,
    total: int,
    *,
    every: int,
    warmup: int = 500,
    restart_warmup: int = 100,
    floor: float = 0.1,
    offset: int = 0,
) -> float:
    """The jagged cosine: the factor of the learning rate for the step after ``step`` ones.

    It is a linear warm-up, then a cosine from 1 to ``floor``. At each multiple of ``every`` it falls to 0, and returns
    to the cosine within ``restart_warmup`` steps.

    Args:
        total: steps of the whole run, a multiple of ``every``.
        offset: if this run continues another one, the steps that the other one took after its last restart.

    Raises:
        ValueError: a number is out of range.

    Examples:
        >>> factor = lambda step: peftops.relora_schedule(step, 40, every=10, warmup=4, restart_warmup=2)
        >>> [round(factor(step), 2) for step in (0, 4, 9, 10, 12)]
        [0.0, 1.0, 0.96, 0.0, 0.89]
    """
    check_range("every", every, 1, whole=True)
    check_range("restart_warmup", restart_warmup, 0, every, whole=True)
    check_range("warmup", warmup, 0, every - offset + 1, whole=True)
    if not 0 < floor <= 1:
        raise ValueError(f"floor must be above 0 and at most 1, not {floor!r}")
    if total < every or total % every:
        raise ValueError(f"total must be a multiple of every={every}, not {total!r}")
    cosine = lambda at: floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (at - warmup) / max(1, total - warmup)))
    if step < warmup:
        return step / warmup
    at = step + offset
    since = at % every
    if since < restart_warmup and step >= every:
        return since / restart_warmup * cosine(at - since + restart_warmup)
    return cosine(at)
