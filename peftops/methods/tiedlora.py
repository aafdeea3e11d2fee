"""Tied-LoRA, Renduchintala et al. 2023 (arXiv:2311.09578): one A and one B for all layers of a shape.

    y = W x + b + s v * (B (u * (A D(x))))    s = alpha / r;  A, B shared;  u in R^r and v in R^out per layer

A starts random (Kaiming uniform), B at 0, u and v at 1. If B is frozen, B is random and v starts at 0. In both cases
the model starts as it was. Switches choose the factors that are tied and those that train: ``TiedLoRAConfig()`` is the
paper's TL6 (all train), ``TiedLoRAConfig.tl5()`` trains A and B alone; the paper's TL1 to TL4 freeze other factors. We
could not verify which ones, so they have no names here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..attaching import each_target, register
from ..attaching.config import Config, check_range, check_scaling, check_target
from ..attaching.targets import ALL_LINEAR, Target
from ..nn import Adapter, low_rank, sizes


@dataclass(frozen=True)
class TiedLoRAConfig(Config):
    """Options of Tied-LoRA.

    Args:
        r: rank.
        alpha: numerator of the scaling; by default r, as in the paper.
        dropout, target: as in :class:`LoRAConfig`.
        tie_A, tie_B: share the factor between all layers of a shape.
        train_A, train_B, train_u, train_v: whether each trains; B or v must.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        >>> peftops.summary(peftops.attach(model, peftops.TiedLoRAConfig(r=2))).layers
        2
    """

    peft_type: ClassVar[str] = "TIED_LORA"

    r: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    target: Target = ALL_LINEAR
    tie_A: bool = True
    tie_B: bool = True
    train_A: bool = True
    train_B: bool = True
    train_u: bool = True
    train_v: bool = True

    def __post_init__(self) -> None:
        check_range("r", self.r, 1, whole=True)
        check_range("dropout", self.dropout, 0, 1)
        check_scaling(self.alpha)
        check_target(self.target)
        if not (self.train_B or self.train_v):
            raise ValueError("train_B or train_v must be True: with both frozen, the model could not leave its start")
        super().__post_init__()

    @classmethod
    def tl5(cls, **options: Any) -> TiedLoRAConfig:
        return cls(train_u=False, train_v=False, **options)


class ScaledFactors(Adapter):
    """The product of Tied-LoRA and VeRA. Both vectors are folded into B. So with a frozen A, backward needs no x."""

    scaling: float
    dropout: float

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A [r, in], B [out, r], u [r] and v [out]."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B, u, v = self.parts()
        return A, v[:, None] * B * u

    def adapt(self, base: nn.Module, x: Tensor) -> Tensor:
        return low_rank(base, x, *self.factors(), self.scaling, dropout=self.dropout, training=self.training)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        A, B = self.factors()
        return weight + self.scaling * B.float() @ A.float(), bias


@register(TiedLoRAConfig)
class TiedLoRA(ScaledFactors):
    peft_keys: ClassVar = {name: name for name in ("tied_u", "tied_v", "tied_A", "tied_B")}
    peft_shared: ClassVar = {"tied_A": "base_model.tied_A.*", "tied_B": "base_model.tied_B.*"}

    @staticmethod
    def build(model: nn.Module, config: TiedLoRAConfig) -> dict[str, TiedLoRA]:
        shared: dict[tuple[int, int], TiedLoRA] = {}  # the first layer of each shape, in whose factors others share
        adapters = {}
        for path, base in each_target(TiedLoRA, model, config).items():
            adapters[path] = TiedLoRA(base, config, path, shared.get(sizes(base)))
            shared.setdefault(sizes(base), adapters[path])
        return adapters

    def __init__(self, base: nn.Module, config: TiedLoRAConfig, layer: str, like: TiedLoRA | None = None):
        super().__init__()
        self.rank = config.r
        (in_, out), r, device = sizes(base), config.r, base.weight.device
        self.shape, self.tied = f"{in_}x{out}", {"tied_A": config.tie_A, "tied_B": config.tie_B}
        self.scaling, self.dropout = (r if config.alpha is None else config.alpha) / r, config.dropout
        for name, size, train in (("tied_A", (r, in_), config.train_A), ("tied_B", (out, r), config.train_B)):
            factor = nn.Parameter(torch.zeros(size, device=device), requires_grad=train)
            if name == "tied_A" or not train:
                nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
            self.register_parameter(name, getattr(like, name) if like is not None and self.tied[name] else factor)
        self.tied_u = nn.Parameter(torch.ones(r, device=device), requires_grad=config.train_u)
        start = 1.0 if config.train_B else 0.0
        self.tied_v = nn.Parameter(torch.full((out,), start, device=device), requires_grad=config.train_v)

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.tied_A, self.tied_B, self.tied_u, self.tied_v

    def file_key(self, name: str, layer: str) -> str:
        if self.tied.get(name):
            return self.peft_shared[name].replace("*", self.shape)
        return super().file_key(name, layer)
