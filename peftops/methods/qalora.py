"""QA-LoRA, Xu et al. 2023 (arXiv:2309.14717): LoRA whose change is constant in each group of a quantised weight.

    y = scale (codes - zeros) x + b + s B A p(x)    s = alpha / r;  p adds up x over each group

A in R^(r x in/group) starts random (Kaiming uniform), B in R^(out x r) at 0: the model starts as its quantised
base. The change is constant in a group, so it merges into the zeros: codes and scales stay, and only the float32 zeros
are rounded. ``attach`` quantises the base, only the layers of the target.

HF PEFT has QA-LoRA for GPTQ models, without merging and with another pooling. ``pool="peft"`` reads and writes PEFT's
files (LoRA's with ``use_qalora``). With the paper's sum and its authors' mean, files have our own format.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..attaching import each_target, register
from ..attaching.config import Config, check_choice, check_range, check_scaling, check_target, refuse
from ..attaching.targets import ALL_LINEAR, Target
from ..nn import (
    EXPERTS,
    LINEAR,
    Adapter,
    ExpertsLinear,
    GroupLinear,
    MergeError,
    is_quantized,
    low_rank,
    matrix,
    module_at,
    owner_of,
    sizes,
    with_matrix,
)
from ..nn.undo import about
from ..ops import GroupQuantTensor, group_dequantize, group_quantize, qalora_linear, qalora_merge
from .lora import LoRAConfig


@dataclass(frozen=True)
class QALoRAConfig(Config):
    """Options of QA-LoRA.

    Args:
        r: rank.
        alpha: numerator of the scaling; by default 2 r.
        bits: of a code, 2, 3, 4 or 8. None takes those of a base that is already quantised, as for a file of PEFT's.
        group_size: columns of a weight that share a scale and a zero, a power of two from 8 to 4096.
        pool: "sum" as in the paper, "mean" as in its authors' code, or "peft", see :func:`peftops.qalora_linear`.
        target: as for :class:`LoRAConfig`.

    Examples:
        >>> model = peftops.attach(nn.Sequential(nn.Linear(64, 32)), peftops.QALoRAConfig(r=2, group_size=32))
        >>> peftops.merge(model).quantized  # exact: nothing is quantised again
        False
    """

    peft_type: ClassVar[str] = "QALORA"

    r: int = 16
    alpha: float | None = None
    bits: int | None = 4
    group_size: int = 32
    pool: str = "sum"
    target: Target = ALL_LINEAR

    def __post_init__(self) -> None:
        check_range("r", self.r, 1, whole=True)
        check_choice("bits", self.bits, (2, 3, 4, 8, None))
        check_choice("group_size", self.group_size, tuple(2**n for n in range(3, 13)))
        check_choice("pool", self.pool, ("sum", "mean", "peft"))
        check_scaling(self.alpha)
        check_target(self.target)
        super().__post_init__()

    @property
    def scaling(self) -> float:
        return (2.0 * self.r if self.alpha is None else self.alpha) / self.r

    def to_peft(self) -> dict[str, Any]:
        if self.pool != "peft":
            return super().to_peft()
        lora = LoRAConfig(r=self.r, alpha=self.alpha).to_peft()
        return {**lora, "use_qalora": True, "qalora_group_size": self.group_size}

    @classmethod
    def claims(cls, fields: dict[str, Any]) -> bool:
        return fields.get("peft_type") == LoRAConfig.peft_type and bool(fields.get("use_qalora"))

    @classmethod
    def from_peft(cls, fields: dict[str, Any], **own: Any) -> QALoRAConfig:
        if not cls.claims(fields):
            return super().from_peft(fields, **own)
        lora = LoRAConfig.from_peft({**fields, "use_qalora": False})
        refuse(fields, use_rslora=False, rank_pattern={}, alpha_pattern={})
        options = {"bits": None, "group_size": fields.get("qalora_group_size", 16), **own, "pool": "peft"}
        return cls(r=lora.r, alpha=lora.alpha, target=lora.target, **options)


@register(QALoRAConfig)
class QALoRA(Adapter):
    layers: ClassVar = (LINEAR, EXPERTS)
    peft_keys: ClassVar = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}

    def __init__(self, base: nn.Module, config: QALoRAConfig, layer: str):
        super().__init__()
        in_, out = sizes(base)
        weight, group, self.config, self.scaling = base.weight, config.group_size, config, config.scaling
        quantized = isinstance(weight, GroupQuantTensor)
        experts = base.weight.shape[:1] if isinstance(base, ExpertsLinear) else ()
        if type(base) not in (nn.Linear, GroupLinear) and not (experts and (quantized or not is_quantized(weight))):
            raise TypeError(f"QA-LoRA quantises plain linear layers, and {layer} is a {type(base).__name__}")
        if config.bits is None and not quantized:
            raise ValueError(f"bits=None is for a base that is quantised in groups of {group}, and {layer} is dense")
        if quantized and (weight.bits, weight.group_size) != (config.bits or weight.bits, group):
            raise ValueError(
                f"{layer} is quantised to {weight.bits} bits in groups of {weight.group_size} already, and the adapter "
                f"is for {'any' if config.bits is None else config.bits} bits in groups of {group}"
            )
        if in_ % group:
            raise ValueError(f"{layer} has {in_} inputs, which is not a multiple of group_size={group}")
        self.rank = config.r
        if experts and config.pool == "peft":
            raise ValueError(f"pool='peft' is for files of HF PEFT, which has no QA-LoRA for experts like {layer}")
        self.lora_A = nn.Parameter(torch.empty(*experts, config.r, in_ // group, device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(*experts, out, config.r, device=weight.device))
        nn.init.kaiming_uniform_(self.lora_A.flatten(0, -2), a=math.sqrt(5))

    @staticmethod
    def prepare(model: nn.Module, config: QALoRAConfig) -> None:
        """Quantise the layers of the target that are dense."""
        for path, base in each_target(QALoRA, model, config).items():
            if not is_quantized(base.weight):
                if base is not module_at(model, path):
                    raise ValueError(f"QA-LoRA would quantise {path}, which carries another adapter; attach it before")
                owner, leaf = owner_of(model, path)
                with about(path):
                    codes = group_quantize(matrix(base).contiguous(), bits=config.bits, group_size=config.group_size)
                    setattr(owner, leaf, _layer_of(base, codes).train(base.training))

    def adapt(self, base: nn.Module, x: Tensor, offsets: Tensor | None = None) -> Tensor:
        if offsets is not None:  # adding up a group's inputs is the same as an A that is constant in it
            group = self.config.group_size
            A = self.lora_A.repeat_interleave(group, -1) / (group if self.config.pool == "mean" else 1)
            return low_rank(base, x, A, self.lora_B, self.scaling, offsets=offsets)
        return qalora_linear(
            x,
            base.weight,
            base.bias,
            lora_A=self.lora_A,
            lora_B=self.lora_B,
            scaling=self.scaling,
            pool=self.config.pool,
        )

    def merge_into(self, base: nn.Module, *, dense: bool) -> tuple[nn.Module, MergeError]:
        """Other zeros under the same codes and scales, or the dense weight that these stand for."""
        merged = lambda *parts: qalora_merge(*parts, scaling=self.scaling, pool=self.config.pool)
        if isinstance(base, ExpertsLinear):
            each = zip(range(len(self.lora_A)), self.lora_A, self.lora_B, strict=True)
            zeros = torch.stack([merged(base.weight[e].contiguous(), A, B).zeros for e, A, B in each])
            codes = base.weight.with_zeros(zeros)
        else:
            codes = merged(base.weight, self.lora_A, self.lora_B)
        before, after = (group_dequantize(w, dtype=torch.float32) for w in (base.weight, codes))
        if not dense:
            return _layer_of(base, codes).train(base.training), MergeError.between(before, after, after)
        rounded = after.to(base.weight.dtype)
        layer = with_matrix(base, rounded, base.bias).train(base.training)
        return layer, MergeError.between(before, after, rounded)

    def extra_repr(self) -> str:
        return f"r={self.rank}, scaling={self.scaling:g}, pool={self.config.pool!r}"


def _layer_of(base: nn.Module, codes: GroupQuantTensor) -> nn.Module:
    """The base over other codes; the bias is shared."""
    return base.with_codes(codes, base.bias) if isinstance(base, ExpertsLinear) else GroupLinear(codes, base.bias)
