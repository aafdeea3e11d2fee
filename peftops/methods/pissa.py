"""PiSSA, Meng et al. 2024 (arXiv:2404.02948): LoRA that starts from the main singular vectors of the weight.

    y = W x + b + s (B A - B0 A0) D(x)    W = U S V^T,  A0 = sqrt(S_r / s) V_r^T,  B0 = U_r sqrt(S_r / s)

A and B start as A0 and B0, so the model starts as it was. The paper replaces W by W - s B0 A0. Here W stays, and the
frozen A0, B0 are subtracted in the same product, of rank 2 r. So an adapter can be switched off and can be one of
several. Its file is a LoRA of rank 2 r ([A; A0], [B, -B0]) that HF PEFT reads on the original base. A file that PEFT
saved without conversion has only A and B, of rank r: A0 and B0 are then computed from the base again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..attaching import register
from ..attaching.config import MOST_ITERATIONS, check_range, needs_finite, needs_scaling
from ..factors.singular import shared
from ..nn import EXPERTS, LINEAR, dense_matrix, is_quantized
from .lora import LoRA, LoRAConfig, start_of


@dataclass(frozen=True)
class PiSSAConfig(LoRAConfig):
    """Options of PiSSA: those of :class:`LoRAConfig`, and

    Args:
        iterations: of a randomised SVD, faster for large layers (16 is plenty); None for the exact one.

    Examples:
        >>> model = peftops.attach(nn.Sequential(nn.Linear(8, 4)), peftops.PiSSAConfig(r=2))
        >>> peftops.summary(model).trainable
        24
    """

    start: ClassVar[str] = "pissa"  # PEFT's name of it

    iterations: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations is not None:
            check_range("iterations", self.iterations, 1, MOST_ITERATIONS, whole=True)

    def _with_rank(self, factor: float) -> LoRAConfig:
        """The same scaling at ``factor`` times the rank."""
        grown = math.sqrt(factor) if self.rslora else factor
        return replace(
            self,
            r=int(factor * self.r),
            alpha=grown * (2.0 * self.r if self.alpha is None else self.alpha),
            rank_pattern={key: int(factor * r) for key, r in self.rank_pattern.items()},
            alpha_pattern={key: grown * alpha for key, alpha in self.alpha_pattern.items()},
        )

    def to_peft(self) -> dict[str, Any]:
        return super(PiSSAConfig, self._with_rank(2)).to_peft()

    @classmethod
    def claims(cls, fields: dict[str, Any]) -> bool:
        return fields.get("peft_type") == cls.peft_type and start_of(fields) == cls.start

    @classmethod
    def from_peft(cls, fields: dict[str, Any], **own: Any) -> PiSSAConfig:
        if cls.claims(fields):
            return super().from_peft({**fields, "init_lora_weights": True}, **own)
        return super().from_peft(fields, **own)._with_rank(0.5)


@register(PiSSAConfig)
class PiSSA(LoRA):
    layers: ClassVar = (LINEAR, EXPERTS)

    def __init__(self, base: nn.Module, config: PiSSAConfig, layer: str):
        super().__init__(base, config, layer)
        needs_scaling(type(self).__name__, self.scaling, layer)
        needs_finite(type(self).__name__, base.weight, layer)
        A, B = self.start(dense_matrix(base), config)
        with torch.no_grad():
            # (A small weight has fewer than r singular vectors: the other rows of A and columns of B start as LoRA's.)
            self.lora_A[..., : A.shape[-2], :], self.lora_B[..., : B.shape[-1]] = A, B
        self.rounded = is_quantized(base.weight)
        self.start_A = nn.Parameter(self.lora_A.detach().clone(), requires_grad=False)
        self.start_B = nn.Parameter(self.lora_B.detach().clone(), requires_grad=False)

    def start(self, weight: Tensor, config: PiSSAConfig) -> tuple[Tensor, Tensor]:
        """A0 and B0."""
        return main_factors(weight, self.rank, self.scaling, config.iterations)

    def factors(self) -> tuple[Tensor, Tensor]:
        return _beside(self.lora_A, self.start_A, self.lora_B, self.start_B)

    def stored(self) -> dict[str, Tensor]:
        return dict(zip(("lora_A", "lora_B"), self.factors(), strict=True))

    def complete(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        alone = self.lora_A.shape, self.lora_B.shape
        if (tensors["lora_A"].shape, tensors["lora_B"].shape) != alone:
            return tensors
        if self.rounded:
            raise ValueError(
                "HF PEFT subtracted the start of this adapter from a dense base, and this base is quantised"
            )
        A, B = tensors["lora_A"].to(self.start_A), tensors["lora_B"].to(self.start_B)
        return dict(zip(("lora_A", "lora_B"), _beside(A, self.start_A, B, self.start_B), strict=True))

    def restore(self, tensors: dict[str, Tensor]) -> None:
        A, B = tensors["lora_A"].chunk(2, -2), tensors["lora_B"].chunk(2, -1)
        for parameter, value in ((self.lora_A, A[0]), (self.start_A, A[1]), (self.lora_B, B[0]), (self.start_B, -B[1])):
            parameter.copy_(value)


def _beside(A: Tensor, A0: Tensor, B: Tensor, B0: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of ``B A - B0 A0``."""
    return torch.cat([A, A0], -2), torch.cat([B, -B0], -1)


def main_factors(weight: Tensor, r: int, scaling: float, iterations: int | None = None) -> tuple[Tensor, Tensor]:
    """A and B of rank ``r`` such that ``scaling * B A`` is closest to ``weight``, their singular values shared."""
    if iterations is None:
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(weight, min(2 * r, *weight.shape[-2:]), iterations)
        vt = v.mT
    return shared(u[..., :r], s[..., :r], vt[..., :r, :], scaling)
