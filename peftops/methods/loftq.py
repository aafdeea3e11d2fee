"""LoftQ, Li et al. 2023 (arXiv:2310.08659): QLoRA whose factors start as a correction of the error of quantisation.

    minimise || W - Q - s B A ||    Q_t = nf4(W - s B A),  s B A = the first r singular vectors of W - Q_t,  t = 1 .. T

The last step computes the vectors (:mod:`~peftops.factors.singular`), so the factors fit their Q. The error may rise
from one iterate to the next, so the best iterate is kept. (HF PEFT does not divide by s, so its start is right only for
s = 1.) With the moments of its inputs, a layer goes on from there to reduce the error of its outputs:
:mod:`~peftops.factors.calibrated`. For a layer that is already in 4 bits there is no W, and it starts as in QLoRA.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..attaching import register
from ..attaching.config import MOST_ITERATIONS, check_choice, check_range, needs_finite, needs_scaling
from ..attaching.targets import ALL_LINEAR, find_targets
from ..factors.calibrated import calibrated_factors, gptq_like, moments_of
from ..factors.singular import leading, shared, size
from ..nn import EXPERTS, LINEAR, dense_matrix, is_quantized, packed_layer
from ..ops import NF4Tensor, nf4_dequantize, nf4_quantize
from .lora import LoRA
from .qlora import QLoRAConfig, check_nothing_dense_is_adapted, quantize_base


@dataclass(frozen=True)
class LoftQConfig(QLoRAConfig):
    """Options of LoftQ: those of :class:`QLoRAConfig` (without double quantisation, as in the paper), and

    Args:
        iterations: T.
        moments: of :func:`peftops.input_moments`: choose codes and factors by the layers' outputs. The adapter's file
            does not hold these codes: keep the base as well (``peftops finetune --calibrate`` does).

    Examples:
        >>> model = peftops.attach(nn.Sequential(nn.Linear(64, 64)), peftops.LoftQConfig(r=2))
        >>> type(model[0].base.weight).__name__
        'NF4Tensor'
    """

    double_quant: bool = False
    iterations: int = 5
    moments: dict[str, Tensor] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("format", self.format, ("nf4",))  # factors correct the errors of NF4
        check_range("iterations", self.iterations, 1, MOST_ITERATIONS, whole=True)

    def as_built(self, adapters: dict[str, Any]) -> LoftQConfig:
        return replace(self, moments=None)


def loftq(
    weight: Tensor, r: int, scaling: float, *, iterations: int = 5, block_size: int = 64, double_quant: bool = False
) -> tuple[NF4Tensor, Tensor, Tensor, list[float]]:
    """Q, A and B of the best iterate, and the relative errors: of plain NF4, then of each iterate.

    Args:
        weight: ``[out, in]``, or ``[E, out, in]``; any float dtype, which Q has, too.
    """
    want, whole = weight.float(), size(weight).clamp(min=1e-30)
    rest, errors, best = want, [], None
    for _ in range(iterations):
        codes = nf4_quantize(rest.to(weight.dtype), block_size=block_size, double_quant=double_quant)
        lost = want - nf4_dequantize(codes, dtype=torch.float32)
        if not errors:
            errors.append((size(lost) / whole).item())
        A, B = shared(*leading(lost, min(r, *lost.shape[-2:])), scaling)
        rest = want - scaling * B @ A
        errors.append((size(lost - scaling * B @ A) / whole).item())
        if best is None or errors[-1] < min(errors[1:-1], default=float("inf")):
            best = codes, A, B
    return *best, errors


@register(LoftQConfig)
class LoftQ(LoRA):
    layers: ClassVar = (LINEAR, EXPERTS)

    def __init__(self, base: nn.Module, config: LoftQConfig, layer: str):
        super().__init__(base, config, layer)
        needs_scaling("LoftQ", self.scaling, layer)
        needs_finite("LoftQ", base.weight, layer)
        self.config, self._moments = config, moments_of(config.moments, base, layer)
        self.output_errors: list[float] = []  # with moments, relative: of LoftQ's own, then of each iterate
        self.errors: list[float] = []  # relative: of plain NF4, then of each iterate

    @staticmethod
    def prepare(model: nn.Module, config: LoftQConfig) -> None:
        """Quantise the linear layers that are not adapted."""
        check_nothing_dense_is_adapted("LoftQ", model)
        chosen = {*find_targets(model, ALL_LINEAR, LoftQ.layers)} - {*find_targets(model, config.target, LoftQ.layers)}
        quantize_base(model, chosen, config)

    @torch.no_grad()
    def begin(self, base: nn.Module) -> nn.Module:
        if is_quantized(base.weight):
            return base
        c, r = self.config, self.rank
        weight = dense_matrix(base, base.weight.dtype)
        if weight.is_meta:  # a skeleton has no numbers, so no error to correct
            return packed_layer(base, nf4_quantize(weight, block_size=c.block_size, double_quant=c.double_quant))
        codes, A, B, self.errors = loftq(
            weight, r, self.scaling, iterations=c.iterations, block_size=c.block_size, double_quant=c.double_quant
        )
        if (moments := self._moments) is not None:
            own = codes, self.scaling * B, A
            codes, left, A, self.output_errors = calibrated_factors(
                weight, r, own, gptq_like(codes, moments), moments, c.iterations
            )
            B = left / self.scaling
        self.lora_A[..., : A.shape[-2], :] = A  # (a small weight has fewer vectors than r: the rest starts as LoRA's)
        self.lora_B[..., : B.shape[-1]] = B
        return packed_layer(base, codes)

    def extra_repr(self) -> str:
        line = f", error {min(self.errors[1:]):.3%} (NF4 {self.errors[0]:.3%})" if self.errors else ""
        return super().extra_repr() + line
