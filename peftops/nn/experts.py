"""Mixtures of experts whose weights are parameters with three dims, as transformers' models keep them.

Such a parameter is not a layer, so no method could adapt it or put it in codes. :func:`open_experts` puts an
:class:`~peftops.nn.ExpertsLinear` in its place, over the same parameter and under the same name, and lets the module
compute by :func:`experts_forward`; :func:`close_experts` is the reverse, for what is dense and not adapted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .experts_linear import ExpertsLinear
from .quantized import is_quantized

_HOOKED = "_old_forward"  # where accelerate's hooks keep the forward that they replace


def stacks_of(module: nn.Module) -> tuple[str, ...]:
    """The names of the weights with three dims in a module of experts, in the order in which a row meets them; none
    for any other module. (The flags are those that transformers' decorator sets: core code does not need it.)"""
    if hasattr(module, "has_gate") and hasattr(module, "is_transposed"):
        names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    elif type(module).__name__ == "Llama4TextExperts":
        names = ("gate_up_proj", "down_proj")
    else:
        return ()
    return names if all(_is_stack(getattr(module, name, None)) for name in names) else ()


def _is_stack(part: object) -> bool:
    return isinstance(part, nn.Module) or (isinstance(part, nn.Parameter) and part.dim() == 3)


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of a module of experts, in transformers' interface (``ALL_EXPERTS_FUNCTIONS["peftops"]``).

    Rows are sorted by expert, and an expert without rows costs nothing. The index E stands for an expert of another
    process: its rows sort to the end and add zero. The sum over an input's experts is float32.

    Args:
        hidden_states: ``[T, H]``; top_k_index: ``[T, k]``; top_k_weights: ``[T, k]``.
    """
    k = top_k_index.shape[-1]
    ids, order = top_k_index.reshape(-1).sort(stable=True)
    up, down = stacks_of(self)
    experts = torch.arange(_count(self, down), device=ids.device)
    offsets = torch.searchsorted(ids, experts.to(ids.dtype), right=True)
    rows = _apply(self, up, hidden_states[order // k], offsets)
    rows = self._apply_gate(rows) if self.has_gate else self.act_fn(rows)
    rows = _apply(self, down, rows, offsets)
    if self.has_post_expert_norm:
        rows = self.post_expert_norm(rows)
    rows = rows * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    if getattr(self, "_is_expert_parallel", False):  # so that a norm or a weight cannot make zero something
        rows = rows.masked_fill((ids >= len(experts)).unsqueeze(-1), 0.0)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return rows[back].unflatten(0, top_k_index.shape).sum(1, dtype=torch.float32).to(hidden_states.dtype)


def even_experts_forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
    """The same for Llama 4, whose experts all see every row: ``[E * T, H]``, sorted by expert already."""
    up, down = stacks_of(self)
    count = _count(self, down)
    tokens = hidden_states.shape[0] // count
    offsets = torch.arange(1, count + 1, device=hidden_states.device) * tokens
    gate, rows = _apply(self, up, hidden_states, offsets).chunk(2, -1)
    return _apply(self, down, rows * self.act_fn(gate), offsets)


def _count(experts: nn.Module, name: str) -> int:
    part = getattr(experts, name)
    return (part if isinstance(part, nn.Parameter) else part.weight).shape[0]


def _apply(experts: nn.Module, name: str, x: Tensor, offsets: Tensor) -> Tensor:
    part = getattr(experts, name)
    if isinstance(part, nn.Parameter):
        part = stack_layer(experts, name)
    return part(x, offsets)


def stack_layer(experts: nn.Module, name: str) -> ExpertsLinear:
    """A layer over one of the parameters of a module of experts, and over its bias."""
    transposed = getattr(experts, "is_transposed", True)  # (Llama 4 has no flags, and its weights are transposed)
    bias = experts._parameters.get(f"{name}_bias")
    return ExpertsLinear(getattr(experts, name), bias, transposed=transposed).train(experts.training)


class _Opened:
    """The forward that replaces a module's own. (It is an object and not a bound function, so it can be pickled and
    copied with the module.)"""

    def __init__(self, experts: nn.Module):
        self.experts, self.names = experts, list(experts._parameters)

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        forward = experts_forward if hasattr(self.experts, "has_gate") else even_experts_forward
        return forward(self.experts, *args, **kwargs)


def open_experts(model: nn.Module) -> None:
    """Turn every mixture of experts in ``model`` into layers. Nothing is copied, and the results do not change."""
    for module in list(model.modules()):
        for name in stacks_of(module):
            if isinstance(getattr(module, name), nn.Parameter):
                if not is_opened(module):
                    vars(module)[_HOOKED if _HOOKED in vars(module) else "forward"] = _Opened(module)
                layer = stack_layer(module, name)
                for part in (name, f"{name}_bias"):
                    module._parameters.pop(part, None)
                setattr(module, name, layer)


def is_opened(module: nn.Module) -> bool:
    return any(isinstance(vars(module).get(name), _Opened) for name in ("forward", _HOOKED))


def close_experts(model: nn.Module) -> None:
    """Put the parameters back in each mixture whose layers are all dense and not adapted."""
    for module in list(model.modules()):
        layers = {name: getattr(module, name) for name in stacks_of(module)} if is_opened(module) else {}
        if not layers or not all(type(p) is ExpertsLinear and not is_quantized(p.weight) for p in layers.values()):
            continue
        place = next(name for name in ("forward", _HOOKED) if isinstance(vars(module).get(name), _Opened))
        opened = vars(module).pop(place)
        if place == _HOOKED:
            vars(module)[place] = type(module).forward.__get__(module)
        for name, layer in layers.items():
            setattr(module, name, layer.weight)
            if layer.bias is not None:
                module.register_parameter(f"{name}_bias", layer.bias)
        module._parameters = {name: module._parameters[name] for name in opened.names}


def keep_names(model: nn.Module) -> None:
    """Make transformers write experts that are in codes, or adapted, under their own names. Otherwise it would cut
    their tensors into one for each expert, as in the files of such models, and codes cannot be cut."""
    names = [name for name, module in model.named_modules() if isinstance(module, ExpertsLinear)]
    if names and hasattr(model, "save_pretrained"):
        ways = getattr(model, "_weight_conversions", None) or []
        means = lambda way: any(end in name for end in way.target_patterns for name in names)
        model._weight_conversions = [way for way in ways if not (hasattr(way, "operations") and means(way))]


@contextlib.contextmanager
def opened(model: nn.Module) -> Iterator[None]:
    """Inside, experts are layers. Afterwards, those that are still dense and not adapted are parameters again."""
    open_experts(model)
    try:
        yield
    finally:
        close_experts(model)
