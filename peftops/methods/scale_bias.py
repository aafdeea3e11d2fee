"""The layers that LLaMA-Adapter V2, Gao et al. 2023 (arXiv:2304.15010), unlocks: norms, and a scale and a bias of
linear layers.

    y = s * (W x + b)    s in R^out;    or, as in the authors' code of 65B, y = W (s * x) + b    s in R^in

b is added to the bias that a layer has. s starts at 1 and b at 0: the model starts as it was.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..nn import Adapter, Stored, base_of, module_at, sizes
from .norm_tuning import NormTuning, NormTuningConfig
from .targets import ALL_LINEAR, find_targets

POSITIONS = ("output", "input")


def unlocked(model: nn.Module, position: str) -> dict[str, Stored]:
    """Norm tuning of all norms, and a :class:`ScaleBias` of every linear layer but the head."""
    linear = {path: base_of(module_at(model, path)) for path in find_targets(model, ALL_LINEAR)}
    norms = NormTuning.build(model, NormTuningConfig())
    return {**{path: ScaleBias(base, position) for path, base in linear.items()}, **norms}


class ScaleBias(Adapter):
    """The two vectors of one layer, which may be quantised."""

    peft_keys: ClassVar = {"scale": "adapter_scale", "bias": "adapter_bias"}

    def __init__(self, base: nn.Module, position: str):
        super().__init__()
        in_, out = sizes(base)
        device = base.weight.device
        self.position = position
        self.scale = nn.Parameter(torch.ones(out if position == "output" else in_, device=device))
        self.bias = nn.Parameter(torch.zeros(out, device=device))

    def adapt(self, base: nn.Module, x: Tensor) -> Tensor:
        if self.position == "input":
            y = base(x * self.scale.to(x.dtype))
            return y + self.bias.to(y.dtype)
        y = base(x)
        return (y + self.bias.to(y.dtype)) * self.scale.to(y.dtype)

    def extra_repr(self) -> str:
        return f"position={self.position!r}"
