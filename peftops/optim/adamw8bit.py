"""AdamW whose two moments are kept in 8 bits, block-wise; Dettmers et al. 2022 (arXiv:2110.02861)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..nn.paged_memory import paged_memory
from ..ops.adamw8bit import adamw8bit_

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOMENTS = ("exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax")


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) with 2.03 bytes of state per parameter where ``torch.optim.AdamW`` has 8.

    Each step decodes the moments, updates them in float32 and moves the parameter by these before they are encoded
    again, so the first step is AdamW's to float32 rounding; :func:`~peftops.ops.adamw8bit.adamw8bit_` does it, all
    parameters of a group at once. The codes have errors. If an element is at least a tenth of the largest in its block,
    its error is at most 0.7% of that largest (first moment) or 0.35% (second). A second moment above zero is stored as
    at least 3.25e-7 of its block's largest, never as zero: otherwise the step would be divided by ``eps`` alone.
    (bitsandbytes stores zero.) A change that is too small to change an element's code is lost at each step, as in every
    such optimizer.

    A gradient that is a NaN, infinite or huge affects only its own element. As in AdamW, a NaN or an infinity makes the
    parameter's element NaN for good. After a gradient of 1e25, whose square is infinite, only weight decay changes the
    element. A second moment that is NaN or above 2^63 (9e18, from a gradient of 1e11) is left out of its block's
    absmax. Such an element is stored as a power of two, and its first moment as zero. The sign of the block's second
    absmax marks a block with such an element. Its neighbours keep their moments.

    The state lies where its parameter does; ``paged=True`` lets CUDA move it to the host while the GPU is full. Under
    ``torch.compile`` a step runs in eager mode, so changes of ``step`` and ``lr`` cause no new compilation.

    Args:
        params: parameters or groups of them (of :func:`loraplus_groups`, say), dense, of float32, bfloat16 or float16.
        lr, betas, eps, weight_decay: as of AdamW; also per group.
        block_size: elements that share an absmax, a power of two from 32 to 4096.
        min_8bit_size: parameters with fewer elements keep float32 moments.
        paged: keep the state in :func:`~peftops.nn.paged_memory.paged_memory`, which on the CPU is ordinary memory.

    Raises:
        ValueError: an option is out of range, or a state to be loaded is another optimizer's or another model's.
        TypeError: a parameter is of another dtype, or a gradient is sparse.

    Examples:
        >>> layer = nn.Linear(128, 64)
        >>> optimizer = peftops.AdamW8bit(layer.parameters(), lr=1e-3)
        >>> layer(torch.ones(1, 128)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[layer.weight]["exp_avg"].dtype
        torch.uint8
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        block_size: int = 256,
        min_8bit_size: int = 4096,
        paged: bool = False,
    ):
        super().__init__(
            params,
            dict(
                lr=lr,
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
                block_size=block_size,
                min_8bit_size=min_8bit_size,
                paged=paged,
            ),
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.compiler.disable
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns what ``closure``, if given, does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.grad.layout != torch.strided:
                    raise TypeError(f"AdamW8bit needs dense gradients; one of {list(p.shape)} is {p.grad.layout}")
        for group in self.param_groups:
            copies = []
            alike: dict[Any, list[list[Tensor]]] = {}  # all that take the same step: parameter, gradient, moments
            for p in group["params"]:
                if p.grad is None or p.numel() == 0:
                    continue
                state = self.state[p]
                if not state:
                    state.update(_new_state(p, group))
                state["step"] += 1
                flat = p.detach().reshape(-1)
                if not p.is_contiguous():
                    copies.append((p, flat))
                moments = [state[name] for name in _MOMENTS if name in state]
                one = [flat, p.grad.reshape(-1), *moments]
                alike.setdefault((state["step"], p.device, len(moments)), []).append(one)
            options = {name: group[name] for name in ("block_size", "lr", "betas", "eps", "weight_decay")}
            for (step, *_), tensors in alike.items():
                adamw8bit_(*zip(*tensors, strict=True), step=step, **options)
            for p, flat in copies:
                p.copy_(flat.view_as(p))
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state that ``state_dict()`` returned for the same parameters: training goes on with the same bits.

        (``Optimizer.load_state_dict`` would cast every tensor, codes too, to the dtype of the parameter.)
        """
        groups = state_dict["param_groups"]
        if any("min_8bit_size" not in group for group in groups):
            raise ValueError("AdamW8bit: this is the state of another optimizer")
        # A loaded state does not say where it lies: the option of this optimizer stays.
        own = [(p, group["paged"]) for group in self.param_groups for p in group["params"]]
        saved = [(number, group) for group in groups for number in group["params"]]
        loaded = {
            p: _checked(state_dict["state"][number], p, {**group, "paged": paged})
            for (p, paged), (number, group) in zip(own, saved, strict=False)  # super refuses another number of them
            if number in state_dict["state"]
        }
        paged = [group["paged"] for group in self.param_groups]
        super().load_state_dict({**state_dict, "state": {}})
        self.state.update(loaded)
        for group, its in zip(self.param_groups, paged, strict=True):
            group["paged"] = its

    @staticmethod
    def state_bytes(p: Tensor, *, block_size: int = 256, min_8bit_size: int = 4096) -> int:
        """The state of a parameter."""
        layout = _layout(p, {"block_size": block_size, "min_8bit_size": min_8bit_size})
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout.values())


def _layout(p: Tensor, group: dict[str, Any]) -> dict[str, tuple[list[int], torch.dtype]]:
    """Shape and dtype of each tensor that is kept of a parameter."""
    if p.numel() < group["min_8bit_size"]:
        return dict.fromkeys(("exp_avg", "exp_avg_sq"), (list(p.shape), torch.float32))
    blocks = -(-p.numel() // group["block_size"])
    codes, absmax = ([blocks, group["block_size"]], torch.uint8), ([blocks], torch.float32)
    return {"exp_avg": codes, "exp_avg_sq": codes, "exp_avg_absmax": absmax, "exp_avg_sq_absmax": absmax}


def _new_state(p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    # Whatever the codes, times an absmax of zero they are zeros.
    with _memory(p, group):
        zeros = {k: torch.zeros(shape, dtype=dtype, device=p.device) for k, (shape, dtype) in _layout(p, group).items()}
    return {"step": 0, **zeros}


def _memory(p: Tensor, group: dict[str, Any]) -> AbstractContextManager[None]:
    return paged_memory(p.device) if group["paged"] else nullcontext()


def _checked(state: dict[str, Any], p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    """A copy of one parameter's loaded state, where the parameter is."""
    is_of = {k: (list(t.shape), t.dtype) for k, t in state.items() if isinstance(t, Tensor)}
    if is_of != _layout(p, group) or not isinstance(state.get("step"), int):
        raise ValueError(f"AdamW8bit: the state of a parameter of shape {list(p.shape)} does not fit: it has {is_of}")
    with _memory(p, group):
        return {k: t.to(p.device, copy=True) if isinstance(t, Tensor) else t for k, t in state.items()}


def _check(group: dict[str, Any]) -> None:
    """Raise for options or parameters of a group that the optimizer cannot work with."""
    number = lambda x, low, high: isinstance(x, (int, float)) and not isinstance(x, bool) and low <= x < high
    for name in ("lr", "weight_decay"):
        if not number(group[name], 0, math.inf):
            raise ValueError(f"{name} must be a number from 0, not {group[name]!r}")
    if not number(group["eps"], 0, math.inf) or group["eps"] == 0:
        raise ValueError(f"eps must be a number above 0, not {group['eps']!r}")
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not all(number(beta, 0, 1) for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), not {betas!r}")
    size, least = group["block_size"], group["min_8bit_size"]
    if not isinstance(size, int) or size not in (1 << i for i in range(5, 13)):
        raise ValueError(f"block_size must be a power of two from 32 to 4096, not {size!r}")
    if not isinstance(least, int) or not number(least, 0, math.inf):
        raise ValueError(f"min_8bit_size must be a whole number from 0, not {least!r}")
    for p in group["params"]:
        if p.dtype not in _DTYPES:
            raise TypeError(f"a parameter must be float32, bfloat16 or float16, not {p.dtype} {list(p.shape)}")
