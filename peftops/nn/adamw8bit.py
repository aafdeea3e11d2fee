"""AdamW whose two moments are kept in 8 bits, block-wise; Dettmers et al. 2022 (arXiv:2110.02861).

    m ~ signed_map[code] * absmax[block]
    v ~ unsigned_map[code] * absmax[block]

Plain torch operations, so that it runs wherever torch does; there is no kernel of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .dynamic_codes import codec, decode, encode
from .paged_memory import paged_memory

_CHUNK = 1 << 18  # elements updated at once: a dozen float32 temporaries of a megabyte
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Part(NamedTuple):
    """Of one parameter, what is updated at once; all but ``grad`` are written."""

    parameter: Tensor  # flat
    grad: Tensor
    moments: list[Tensor]  # exp_avg, exp_avg_sq, and their absmax if these are codes


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) with 2.03 bytes of state per parameter where ``torch.optim.AdamW`` has 8.

    Each step decodes the moments, updates them in float32 and moves the parameter by these before they are encoded
    again, so the first step is AdamW's to the bit. What the codes cost: an element within a factor ten of its block's
    largest is kept to 0.7% of that largest (first moment) or 0.35% (second). A second moment above zero is never
    stored as zero but at least as 3.25e-7 of its block's largest: the step would be divided by ``eps`` alone (here
    we differ from bitsandbytes). Rounding is to nearest, so a change of an element relative to its block's largest
    that is below half a code is lost, step after step, as in every such optimizer.

    The state lies where its parameter does; ``paged=True`` lets CUDA move it to the host while the GPU is full.

    Args:
        params: parameters or groups of them (of :func:`loraplus_groups`, say), dense, of float32, bfloat16 or float16.
        lr, betas, eps, weight_decay: as of AdamW; also per group.
        block_size: elements that share an absmax, a power of two from 32 to 4096.
        min_8bit_size: parameters with fewer elements keep float32 moments.
        paged: keep the state in :func:`~peftops.nn.paged_memory.paged_memory`, which on the CPU is any memory.

    Raises:
        ValueError: an option is out of range, or a state to be loaded is another optimizer's or another model's.
        TypeError: a parameter is of another dtype, or a gradient is sparse.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2, *, block_size: int = 256, min_8bit_size: int = 4096,
        paged: bool = False,
    ):  # fmt: skip
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, block_size=block_size,
                                      min_8bit_size=min_8bit_size, paged=paged))  # fmt: skip

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

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
        copies = []
        for group in self.param_groups:
            alike: dict[Any, list[_Part]] = {}  # parts that take the same step
            for p in group["params"]:
                if p.grad is None or p.numel() == 0:
                    continue
                state = self.state[p]
                if not state:
                    state.update(_new_state(p, group))
                state["step"] += 1
                key = state["step"], p.device, p.dtype, state["exp_avg"].dtype
                flat = p.detach().reshape(-1)
                if not p.is_contiguous():
                    copies.append((p, flat))
                alike.setdefault(key, []).extend(_parts(flat, p.grad.reshape(-1), state))
            for (step, *_), parts in alike.items():
                for batch in _batches(parts):
                    _update(batch, step, group)
        for p, flat in copies:
            p.copy_(flat.view_as(p))
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what ``state_dict()`` gave, of the same parameters: training goes on with the same bits.

        (``Optimizer.load_state_dict`` casts all that it loads to the dtype of the parameter, codes included.)
        """
        groups = state_dict["param_groups"]
        if any("min_8bit_size" not in group for group in groups):
            raise ValueError("AdamW8bit: this is the state of another optimizer")
        # Where the state lies is no part of it: that stays as it was asked for here.
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
        """What is kept of a parameter."""
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
        raise ValueError(f"AdamW8bit: the state of a parameter of shape {list(p.shape)} is another's: it has {is_of}")
    with _memory(p, group):
        return {k: t.to(p.device, copy=True) if isinstance(t, Tensor) else t for k, t in state.items()}


def _parts(flat: Tensor, grad: Tensor, state: dict[str, Any]) -> Iterator[_Part]:
    """A parameter in parts of at most a chunk, which are views."""
    moments = [t for name, t in state.items() if name != "step"]
    unit = 1 if len(moments) == 2 else moments[0].shape[1]  # elements of a row of them
    if unit == 1:
        moments = [t.view(-1) for t in moments]
    rows = _CHUNK // unit
    for begin in range(0, moments[0].shape[0], rows):
        elements = slice(begin * unit, (begin + rows) * unit)
        yield _Part(flat[elements], grad[elements], [t[begin : begin + rows] for t in moments])


def _batches(parts: list[_Part]) -> Iterator[list[_Part]]:
    """Parts that are a chunk together, at most: a step of many small tensors is one of a few large ones."""
    batch: list[_Part] = []
    size = 0
    for part in parts:
        size += part.grad.numel()
        if batch and size > _CHUNK:
            yield batch
            batch, size = [], part.grad.numel()
        batch.append(part)
    yield batch


def _update(batch: list[_Part], step: int, group: dict[str, Any]) -> None:
    """AdamW's step, the ``step``-th, of all parts of a batch."""
    first, second, *absmax = map(torch.cat, zip(*(part.moments for part in batch), strict=True))
    if absmax:
        codecs = codec(True, first.device), codec(False, first.device)
        first, second = decode(codecs[0], first, absmax[0]), decode(codecs[1], second, absmax[1])
    unit = first[:1].numel()
    rows = [part.moments[0].shape[0] for part in batch]
    sizes = [n * unit for n in rows]
    grads = [pad(part.grad, (0, n - part.grad.numel())) for part, n in zip(batch, sizes, strict=True)]
    grad = torch.cat(grads).float().view_as(first)

    beta1, beta2 = group["betas"]
    first.lerp_(grad, 1 - beta1)
    second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = second.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])

    own = [part.parameter.float() for part in batch]  # (itself, if it is float32)
    of_parts = lambda t: [x[: p.numel()] for x, p in zip(t.flatten().split(sizes), own, strict=True)]
    torch._foreach_mul_(own, 1 - group["lr"] * group["weight_decay"])
    torch._foreach_addcdiv_(own, of_parts(first), of_parts(denominator), -group["lr"] / (1 - beta1**step))
    if own[0] is not batch[0].parameter:
        torch._foreach_copy_([part.parameter for part in batch], own)

    moments = [first, second]
    if absmax:
        (first, first_absmax), (second, second_absmax) = map(encode, codecs, moments)
        moments = [first, second, first_absmax, second_absmax]
    for i, moment in enumerate(moments):
        torch._foreach_copy_([part.moments[i] for part in batch], list(moment.split(rows)))


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
