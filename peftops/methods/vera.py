"""VeRA, Kopiczko et al. 2023 (arXiv:2310.11454): one frozen random A and B per model, two vectors per layer.

    y = W x + b + lambda_b * (B (lambda_d * (A D(x))))    A in R^(r x max in), B in R^(max out x r), cut to the layer

lambda_b in R^out starts at 0 and lambda_d in R^r at ``d_initial``: the model starts as it was. A and B come from a
seed, by HF PEFT's recipe. They are saved nevertheless, because a seed may give other numbers on another version or
machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..attaching import each_target, register
from ..attaching.config import Config, check_range, check_target, needs, refuse
from ..attaching.targets import ALL_LINEAR, Target
from ..nn import sizes
from .tiedlora import ScaledFactors


@dataclass(frozen=True)
class VeRAConfig(Config):
    """Options of VeRA.

    Args:
        r: rank. It may be large: each rank costs one trained number per layer.
        dropout, target: as in :class:`LoRAConfig`.
        d_initial: where lambda_d starts.
        projection_seed: of A and B.

    Examples:
        >>> model = peftops.attach(nn.Sequential(nn.Linear(8, 4)), peftops.VeRAConfig(r=16))
        >>> peftops.summary(model).trainable  # lambda_d: 16, lambda_b: 4
        20
    """

    peft_type: ClassVar[str] = "VERA"

    r: int = 256
    dropout: float = 0.0
    target: Target = ALL_LINEAR
    d_initial: float = 0.1
    projection_seed: int = 0

    def __post_init__(self) -> None:
        check_range("r", self.r, 1, whole=True)
        check_range("dropout", self.dropout, 0, 1)
        check_target(self.target)
        super().__post_init__()

    def to_peft(self) -> dict[str, Any]:
        return {
            "peft_type": "VERA",
            "r": self.r,
            "vera_dropout": self.dropout,
            "d_initial": self.d_initial,
            "projection_prng_key": self.projection_seed,
            "save_projection": True,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_weights": True,
        }

    @classmethod
    def from_peft(cls, fields: dict[str, Any], **own: Any) -> VeRAConfig:
        needs(fields, "r", "target_modules")
        refuse(fields, bias="none", save_projection=True)
        return cls(
            r=fields["r"],
            dropout=fields.get("vera_dropout", 0.0),
            target=fields["target_modules"],
            d_initial=fields.get("d_initial", 0.1),
            projection_seed=fields.get("projection_prng_key", 0),
            **own,
        )


def _kaiming(rows: int, columns: int, generator: torch.Generator, device: torch.device) -> nn.Parameter:
    bound = math.sqrt(6 / columns)
    return nn.Parameter(torch.empty(rows, columns).uniform_(-bound, bound, generator=generator).to(device), False)


@register(VeRAConfig)
class VeRA(ScaledFactors):
    peft_keys: ClassVar = {"vera_lambda_b": "vera_lambda_b", "vera_lambda_d": "vera_lambda_d"}
    peft_shared: ClassVar = {"vera_A": "base_model.vera_A", "vera_B": "base_model.vera_B"}

    @staticmethod
    def build(model: nn.Module, config: VeRAConfig) -> dict[str, VeRA]:
        layers = each_target(VeRA, model, config)
        in_, out = (max(size) for size in zip(*map(sizes, layers.values()), strict=True))
        generator = torch.Generator().manual_seed(config.projection_seed)
        device = next(iter(layers.values())).weight.device
        A, B = _kaiming(config.r, in_, generator, device), _kaiming(out, config.r, generator, device)
        return {path: VeRA(base, config, A, B) for path, base in layers.items()}

    def __init__(self, base: nn.Module, config: VeRAConfig, vera_A: nn.Parameter, vera_B: nn.Parameter):
        super().__init__()
        self.scaling, self.dropout = 1.0, config.dropout
        self.vera_A, self.vera_B = vera_A, vera_B
        self.in_, self.out = sizes(base)
        self.vera_lambda_d = nn.Parameter(torch.full((config.r,), config.d_initial, device=vera_A.device))
        self.vera_lambda_b = nn.Parameter(torch.zeros(self.out, device=vera_A.device))

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.vera_A[:, : self.in_], self.vera_B[: self.out], self.vera_lambda_d, self.vera_lambda_b
