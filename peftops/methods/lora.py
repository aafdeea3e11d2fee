"""LoRA, Hu et al. 2021 (arXiv:2106.09685); with ``rslora``, Kalajdzievski 2023 (arXiv:2312.03732).

    y = W x + b + s B A D(x)    s = alpha / r, or alpha / sqrt(r) with rslora;  D = dropout

A in R^(r x in) starts random (Kaiming uniform), B in R^(out x r) at 0: the model starts as it was. W may also be
the kernel of a convolution (A then has its shape, with r channels, and B is 1 x 1) or an embedding (A, a column per id,
starts at 0, and B is normal), or the weights of a mixture's experts, each of which has an A and a B of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..attaching import register
from ..attaching.biases import BIASES, Biased, other_biases
from ..attaching.config import (
    Config,
    by_pattern,
    check_choice,
    check_pattern,
    check_range,
    check_scaling,
    check_target,
    needs,
    refuse,
)
from ..attaching.registry import each_adapter
from ..attaching.targets import ALL_LINEAR, Target, joined_target
from ..nn import CONVOLUTION, EMBEDDING, EXPERTS, LINEAR, Adapter, factor_shapes, kind_of, low_rank, low_rank_change

# PEFT's names of the starts of A and B that do not change the base. (None: files of old versions.)
STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
# PEFT's options that make something else of LoRA.
OTHERS = "layer_replication alora_invocation_tokens arrow_config kasa_config monteclora_config use_bdlora".split()


def start_of(fields: dict[str, Any]) -> Any:
    """The name of the start of PEFT's A and B, in lower case, because PEFT ignores case."""
    start = fields.get("init_lora_weights")
    return start.lower() if isinstance(start, str) else start


@dataclass(frozen=True)
class LoRAConfig(Config):
    """Options of LoRA.

    Args:
        r: rank.
        alpha: numerator of the scaling; by default 2 r.
        dropout: probability of dropping an element of a layer's input on its way to A, in training.
        target: "all-linear" (all linear layers, those of experts too, but the output layer), a list of names or their
            last parts, or a regular expression, with HF PEFT's meaning.
        rslora: scale by alpha / sqrt(r), which keeps large ranks stable.
        rank_pattern: other ranks for layers whose name ends in a match of the key, a regular expression.
        alpha_pattern: the same for alpha.
        bias: which of the model's biases train, too: "none", "lora_only" for those of adapted layers, or "all".
        lora_bias: whether B has a bias of its own, with the same scaling as B A.

    Examples:
        >>> model = peftops.attach(llama(), peftops.LoRAConfig(r=2, target=["q_proj", "v_proj"]))
        >>> peftops.summary(model).layers
        4
    """

    peft_type: ClassVar[str] = "LORA"

    r: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    target: Target = ALL_LINEAR
    rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    bias: str = "none"
    lora_bias: bool = False

    def __post_init__(self) -> None:
        check_pattern("rank_pattern", self.rank_pattern)
        check_pattern("alpha_pattern", self.alpha_pattern)
        check_scaling(self.alpha, self.alpha_pattern)
        for r in (self.r, *self.rank_pattern.values()):
            check_range("r", r, 1, whole=True)
        check_range("dropout", self.dropout, 0, 1)
        check_target(self.target)
        check_choice("bias", self.bias, BIASES)
        super().__post_init__()

    def rank_and_scaling(self, layer: str) -> tuple[int, float]:
        """r and s of a layer, by its name."""
        r = by_pattern(self.rank_pattern, layer, self.r)
        alpha = by_pattern(self.alpha_pattern, layer, 2.0 * self.r if self.alpha is None else self.alpha)
        return r, alpha / (math.sqrt(r) if self.rslora else r)

    def to_peft(self) -> dict[str, Any]:
        return {
            "peft_type": "LORA",
            "r": self.r,
            "lora_alpha": 2 * self.r if self.alpha is None else self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
            "bias": self.bias,
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "use_dora": False,
            **({"lora_bias": True} if self.lora_bias else {}),
        }

    @classmethod
    def from_peft(cls, fields: dict[str, Any], **own: Any) -> LoRAConfig:
        needs(fields, "r", "lora_alpha")
        target = joined_target(fields.get("target_modules"), fields.get("target_parameters"))
        if not target:
            needs(fields, "target_modules")
        refuse(fields, use_dora=False, use_qalora=False, **dict.fromkeys(OTHERS))
        if start_of(fields) not in STARTS:
            raise ValueError(
                f"this adapter needs init_lora_weights={fields['init_lora_weights']!r}, a start that HF PEFT may have "
                "subtracted from the base's weights, and peftops cannot compute it again; let PEFT convert it to plain "
                "LoRA (save_pretrained with path_initial_model_for_weight_conversion)"
            )
        return cls(
            r=fields["r"],
            alpha=fields["lora_alpha"],
            dropout=fields.get("lora_dropout", 0.0),
            target=target,
            rslora=fields.get("use_rslora", False),
            rank_pattern=fields.get("rank_pattern") or {},
            alpha_pattern=fields.get("alpha_pattern") or {},
            bias=fields.get("bias") or "none",
            lora_bias=bool(fields.get("lora_bias")),
            **own,
        )


@register(LoRAConfig)
class LoRA(Biased):
    layers: ClassVar = (LINEAR, EMBEDDING, CONVOLUTION, EXPERTS)
    peft_keys: ClassVar = {
        "lora_A": "lora_A.weight",
        "lora_B": "lora_B.weight",
        "lora_embedding_A": "lora_embedding_A",
        "lora_embedding_B": "lora_embedding_B",
        **Biased.peft_keys,
    }

    @classmethod
    def build(cls, model: nn.Module, config: LoRAConfig) -> dict[str, Adapter]:
        adapters: dict[str, Adapter] = each_adapter(cls, model, config)
        return adapters | (other_biases(model, adapters, config) if config.bias == "all" else {})

    def __init__(self, base: nn.Module, config: LoRAConfig, layer: str):
        super().__init__()
        self.rank, self.scaling = config.rank_and_scaling(layer)
        self.dropout = config.dropout
        if kind_of(base) == EXPERTS and self.dropout:
            raise ValueError(
                f"dropout is {self.dropout}, and adapters of experts have none, as in HF PEFT; set it to 0, "
                "or target to names of other layers"
            )
        device = base.weight.device
        A, B = (nn.Parameter(torch.zeros(shape, device=device)) for shape in factor_shapes(base, self.rank))
        if kind_of(base) == EMBEDDING:
            self.names = "lora_embedding_A", "lora_embedding_B"
            nn.init.normal_(B)
        else:
            self.names = "lora_A", "lora_B"
            nn.init.kaiming_uniform_(A.flatten(0, 1) if kind_of(base) == EXPERTS else A, a=math.sqrt(5))
        for name, factor in zip(self.names, (A, B), strict=True):
            self.register_parameter(name, factor)
        self.add_biases(base, config)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The factors of the product: A and B, or a method's own form of these two."""
        A, B = self.names
        return getattr(self, A), getattr(self, B)

    def adapt(self, base: nn.Module, x: Tensor, offsets: Tensor | None = None) -> Tensor:
        y = low_rank(
            base, x, *self.factors(), self.scaling, dropout=self.dropout, training=self.training, offsets=offsets
        )
        return self.moved(base, y) if self.biased else y

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.scaling * low_rank_change(weight, *self.factors()), self.with_biases(bias)

    def extra_repr(self) -> str:
        return f"r={self.rank}, scaling={self.scaling:g}, dropout={self.dropout}"
