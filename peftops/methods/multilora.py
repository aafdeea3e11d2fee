"""MultiLoRA, Wang et al. 2023 (arXiv:2311.11501): several LoRAs side by side, whose scalings start at 0.

    y = W x + b + s sum_i c_i * (B_i A_i D(x))    s = alpha / r,  i = 1 .. n,  c_i in R^out

All A_i and B_i start random (Kaiming uniform) and the scalings c_i at 0: the model starts as it was, and its first step
changes only the c_i. It is computed and saved as one LoRA of rank n r with B = [diag(c_1) B_1, ...], so HF PEFT reads
it as LoRA. We could not verify if the paper's scaling is a vector or a number, so ``scaling`` offers both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..attaching import register
from ..attaching.config import check_choice, check_range
from ..nn import LINEAR
from .lora import LoRA, LoRAConfig


@dataclass(frozen=True)
class MultiLoRAConfig(LoRAConfig):
    """Options of MultiLoRA: those of :class:`LoRAConfig`, r being the rank of each, and

    Args:
        n: how many.
        scaling: "vector", a number per output and LoRA, or "scalar", one per LoRA.

    Examples:
        >>> model = peftops.attach(nn.Sequential(nn.Linear(8, 4)), peftops.MultiLoRAConfig(r=2, n=3))
        >>> y = model(torch.ones(1, 8))
    """

    n: int = 3
    scaling: str = "vector"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("n", self.n, 1, whole=True)
        check_choice("scaling", self.scaling, ("vector", "scalar"))
        if self.rslora:
            raise ValueError("rslora=True: MultiLoRA scales by alpha / r")

    def to_peft(self) -> dict[str, Any]:
        stacked = replace(
            self,
            r=self.n * self.r,
            alpha=self.n * (2.0 * self.r if self.alpha is None else self.alpha),
            rank_pattern={key: self.n * r for key, r in self.rank_pattern.items()},
            alpha_pattern={key: self.n * alpha for key, alpha in self.alpha_pattern.items()},
        )
        return super(MultiLoRAConfig, stacked).to_peft()

    @classmethod
    def from_peft(cls, fields: dict[str, Any], n: int = 3, **own: Any) -> MultiLoRAConfig:
        each = lambda key, share: {layer: share(value) for layer, value in (fields.get(key) or {}).items()}
        one = {
            "r": fields["r"] // n,
            "rank_pattern": each("rank_pattern", lambda r: r // n),
            "lora_alpha": fields["lora_alpha"] / n,
            "alpha_pattern": each("alpha_pattern", lambda alpha: alpha / n),
        }
        return super().from_peft({**fields, **one}, n=n, **own)


@register(MultiLoRAConfig)
class MultiLoRA(LoRA):
    layers: ClassVar = (LINEAR,)

    def __init__(self, base: nn.Module, config: MultiLoRAConfig, layer: str):
        super().__init__(base, config, layer)
        (r, in_), (out, _), n = self.lora_A.shape, self.lora_B.shape, config.n
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(n * r, in_, device=device))
        self.lora_B = nn.Parameter(torch.empty(n, out, r, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        for B in self.lora_B:
            nn.init.kaiming_uniform_(B, a=math.sqrt(5))
        self.scalings = nn.Parameter(torch.zeros(n, out if config.scaling == "vector" else 1, device=device))

    def factors(self) -> tuple[Tensor, Tensor]:
        B = self.scalings[:, :, None] * self.lora_B
        return self.lora_A, B.transpose(0, 1).flatten(1)

    def stored(self) -> dict[str, Tensor]:
        return dict(zip(("lora_A", "lora_B"), self.factors(), strict=True))

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """A file has the scalings in B, so here they become 1."""
        self.lora_A.copy_(tensors["lora_A"])
        self.lora_B.copy_(tensors["lora_B"].unflatten(1, (len(self.lora_B), -1)).transpose(0, 1))
        self.scalings.fill_(1)
