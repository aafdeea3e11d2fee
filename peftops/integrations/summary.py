"""Counts of a model: the parameters that train, and the memory of its frozen weights."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from ..attaching import adapted_layers, state_of
from ..attaching.left_dense import left_dense
from ..attaching.targets import layers
from ..nn import base_of, is_quantized

MOST = 6  # tensors that a line names


@dataclass
class Summary:
    """Counts of parameters and bytes; ``str()`` of it is a small table."""

    adapters: dict[str, str]  # name: config
    active: str | None
    layers: int  # adapted
    trainable: int  # parameters
    total: int  # parameters of the base and the adapters; four bits count as one
    frozen_bytes: int  # of the frozen linear weights that are adapted or quantised, in their present format
    dense_bytes: int  # of the same weights in their dense dtype
    packed: int = 0  # parameters that are in codes
    left_dense: dict[str, int] = field(default_factory=dict)  # other parameters of matrices, by name, "*" for layers

    def __str__(self) -> str:
        lines = [f"{name}{' (active)' if name == self.active else ''}: {kind}" for name, kind in self.adapters.items()]
        lines.append(f"trainable parameters: {self.trainable:,} of {self.total:,} ({self.trainable / self.total:.3%})")
        lines.append(f"adapted layers: {self.layers}")
        if self.frozen_bytes:
            lines.append(
                f"their frozen weights: {self.frozen_bytes / 2**20:,.1f} MiB, dense {self.dense_bytes / 2**20:,.1f} MiB"
            )
        if self.packed:
            largest = [f"{count:,} in {name}" for name, count in list(self.left_dense.items())[:MOST]]
            more = [f"{len(self.left_dense) - MOST} more"] if len(self.left_dense) > MOST else []
            lines.append(
                f"in codes: {self.packed:,} parameters ({self.packed / self.total:.1%}); "
                f"dense: {', '.join(largest + more) or 'no matrix'}"
            )
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """Count the parameters of ``model`` that train, and the memory of the linear weights that do not.

    Examples:
        >>> print(peftops.summary(llama()))
        trainable parameters: ...
    """
    state = state_of(model)
    inside = (base_of(module) for _, layer in adapted_layers(model) for _, module in layers(layer.base))
    adapted = {id(p) for module in inside for p in module.parameters(recurse=False) if p.dim() > 1}
    result = Summary({}, None, sum(1 for _ in adapted_layers(model)), 0, 0, 0, 0)
    if state is not None:
        result.adapters = {name: str(config) for name, config in state.configs.items()}
        result.active = state.switch.active
    for parameter in model.parameters():
        result.total += parameter.numel()
        result.trainable += parameter.numel() if parameter.requires_grad else 0
        if is_quantized(parameter) or id(parameter) in adapted:
            result.frozen_bytes += parameter.nbytes
            result.dense_bytes += parameter.numel() * parameter.dtype.itemsize
        result.packed += parameter.numel() if is_quantized(parameter) else 0
    result.left_dense = left_dense(model)
    return result
