"""LoRA, Hu et al. 2021 (arXiv:2106.09685); with ``rslora``, Kalajdzievski 2023 (arXiv:2312.03732).

    y = W x + b + s B A D(x)    s = alpha / r, or alpha / sqrt(r) with rslora;  D = dropout

A in R^(r x in) starts random (Kaiming uniform), B in R^(out x r) at 0: the model starts as it was.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..nn import Adapter
from ..ops import NF4Tensor, lora_linear, nf4_linear
from . import register
from .targets import ALL_LINEAR, Target


@dataclass(frozen=True)
class LoRAConfig:
    """Options of LoRA.

    Args:
        r: rank.
        alpha: numerator of the scaling; by default 2 r.
        dropout: probability of dropping an element of a layer's input on its way to A, in training.
        target: "all-linear" (all linear layers but the output layer), a list of names or their last parts,
            or a regular expression, with HF PEFT's meaning.
        rslora: scale by alpha / sqrt(r), which keeps large ranks stable.
        rank_pattern: other ranks for layers whose name ends in a match of the key, a regular expression.
        alpha_pattern: the same for alpha.
    """

    r: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    target: Target = ALL_LINEAR
    rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for r in (self.r, *self.rank_pattern.values()):
            if not isinstance(r, int) or r < 1:
                raise ValueError(f"r must be a whole number from 1, not {r!r}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout!r}")
        if not self.target:
            raise ValueError(f"target must be 'all-linear', names or a regular expression, not {self.target!r}")

    def rank_and_scaling(self, layer: str) -> tuple[int, float]:
        """r and s of a layer, by its name."""
        r = _by_pattern(self.rank_pattern, layer, self.r)
        alpha = _by_pattern(self.alpha_pattern, layer, 2.0 * self.r if self.alpha is None else self.alpha)
        return r, alpha / (math.sqrt(r) if self.rslora else r)

    def to_peft(self) -> dict:
        """The fields of HF PEFT's adapter_config.json that are this method's."""
        return {
            "peft_type": "LORA", "r": self.r, "lora_alpha": 2 * self.r if self.alpha is None else self.alpha,
            "lora_dropout": self.dropout, "use_rslora": self.rslora, "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern, "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True,
            "use_dora": False, "modules_to_save": None,
        }  # fmt: skip

    @classmethod
    def from_peft(cls, fields: dict, **own: object) -> LoRAConfig:
        """The reverse. ``own`` are options that PEFT does not know."""
        unsupported = {"bias": "none", "use_dora": False, "modules_to_save": None, "use_qalora": False,
                       "lora_bias": False, "trainable_token_indices": None, "target_parameters": None,
                       "layer_replication": None, "alora_invocation_tokens": None}  # fmt: skip
        for key, neutral in unsupported.items():
            if fields.get(key) not in (None, neutral, [], {}):
                raise ValueError(f"this adapter needs {key}={fields[key]!r}, which peftops does not support")
        return cls(
            r=fields["r"], alpha=fields["lora_alpha"], dropout=fields.get("lora_dropout", 0.0),
            target=fields["target_modules"], rslora=fields.get("use_rslora", False),
            rank_pattern=fields.get("rank_pattern") or {}, alpha_pattern=fields.get("alpha_pattern") or {}, **own,
        )  # fmt: skip


def _by_pattern(pattern: dict, layer: str, default):
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", layer):
            return value
    return default


@register(LoRAConfig)
class LoRA(Adapter):
    peft_keys = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}

    def __init__(self, base: nn.Linear, config: LoRAConfig, layer: str):
        super().__init__()
        r, self.scaling = config.rank_and_scaling(layer)
        if r > min(base.in_features, base.out_features):
            raise ValueError(
                f"r={r} is more than {layer} can use: its weight is {base.out_features} x {base.in_features}"
            )
        self.dropout = config.dropout
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, device=device))  # float32, whatever the base
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def adapt(self, base: nn.Linear, x: Tensor) -> Tensor:
        op = nf4_linear if isinstance(base.weight, NF4Tensor) else lora_linear
        return op(x, base.weight, base.bias, lora_A=self.lora_A, lora_B=self.lora_B, scaling=self.scaling,
                  dropout_p=self.dropout, training=self.training)  # fmt: skip

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.scaling * self.lora_B.float() @ self.lora_A.float(), bias

    def extra_repr(self) -> str:
        return f"r={self.lora_A.shape[0]}, scaling={self.scaling:g}, dropout={self.dropout}"
