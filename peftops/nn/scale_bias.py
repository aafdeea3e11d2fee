"""A scale and a bias of a linear layer, which LLaMA-Adapter V2 trains, Gao et al. 2023 (arXiv:2304.15010).

    y = s * (W x + b)    s in R^out;    or, as in the authors' code of 65B, y = W (s * x) + b    s in R^in

b is added to the layer's own bias. s starts at 1 and b at 0: the model starts as it was.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .layers import sizes

POSITIONS = ("output", "input")


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
