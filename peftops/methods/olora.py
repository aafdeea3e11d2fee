"""OLoRA, Büyükakyüz 2024 (arXiv:2406.01775): LoRA that starts from an orthonormal basis of the weight's columns.

    y = W x + b + s (B A - B0 A0) D(x)    W = Q R,  B0 = the first r columns of Q,  A0 = the first r rows of R

A and B start as A0 and B0, so the model starts as it was; the rest is as in :mod:`~peftops.methods.pissa`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..attaching import register
from .pissa import PiSSA, PiSSAConfig


@dataclass(frozen=True)
class OLoRAConfig(PiSSAConfig):
    """Options of OLoRA: those of :class:`LoRAConfig` (``iterations`` has no meaning).

    Examples:
        >>> model = peftops.attach(nn.Sequential(nn.Linear(8, 4)), peftops.OLoRAConfig(r=2))
        >>> peftops.summary(model).trainable
        24
    """

    start: ClassVar[str] = "olora"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations is not None:
            raise ValueError(f"iterations={self.iterations}, but OLoRA needs no SVD")


@register(OLoRAConfig)
class OLoRA(PiSSA):
    def start(self, weight: Tensor, config: OLoRAConfig) -> tuple[Tensor, Tensor]:
        q, upper = torch.linalg.qr(weight)
        return upper[..., : self.rank, :], q[..., : self.rank]
