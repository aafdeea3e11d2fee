"""LQ-LoRA, Guo et al. 2023 (arXiv:2311.12023): a base in mixed precision, decomposed with the importance of each
weight.

    minimise || sqrt(F) o (W - Q - s B A) ||    s B A = SVD_r(W - Q), Q = codes of W - s B A, in turn, from Q = 0

F is the Fisher information of each weight (:func:`peftops.fisher`); the singular vectors use, in its place, the product
of the means of its rows and columns. Each weight gets NF4 or whole numbers of 2, 3, 4 or 8 bits. The choice makes the
sum of all errors least within a budget of bits (scipy's integer programming). The best iterate is kept, or plain codes
if no iterate is better. The start is not exactly the dense model, but closer to it than codes without factors.

The files hold the codes, because no other quantiser makes the same ones. For a layer that is already quantised there is
no W, and it starts as in QLoRA.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..attaching import each_target, register
from ..attaching.config import MOST_ITERATIONS, Config, check_range, needs_finite, needs_scaling
from ..factors.calibrated import calibrated_factors, gptq_like, moments_of
from ..factors.lq import lq_decompose
from ..factors.lq_budget import Precision, choose
from ..nn import LINEAR, PackedLinear, dense_matrix, is_quantized, shell_of, sizes
from ..nn.stored_base import BASE_KEYS, base_tensors
from .lora import LoRA, LoRAConfig
from .qlora import check_nothing_dense_is_adapted


@dataclass(frozen=True)
class LQLoRAConfig(LoRAConfig):
    """Options of LQ-LoRA: those of :class:`LoRAConfig`, with the paper's defaults, and

    Args:
        bits: bits per weight, on average over the target, with scales and zeros, without A and B.
        iterations: of the decomposition, at most; 0 for plain codes under LoRA.
        fisher: of :func:`peftops.fisher`, ``[out, in]`` by layer; None if all weights have the same importance.
        moments: of :func:`peftops.input_moments`: after the decomposition, reduce the error of the layers' outputs
            (:mod:`~peftops.factors.calibrated`), in the formats that it has chosen.
        precisions: a format for each layer instead of the budget: "nf4-64", "nf4-64-double", "int3-64", ...

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> config = peftops.LQLoRAConfig(r=2, iterations=1, precisions={"0": "int3-64"})
        >>> peftops.attach(model, config)[0].base.weight.bits
        3
    """

    peft_type: ClassVar[str] = "LQLORA"
    quantizes: ClassVar[bool] = True
    to_peft = Config.to_peft

    r: int = 64
    alpha: float | None = 16
    bits: float = 4.0
    iterations: int = 10
    fisher: dict[str, Tensor] | None = field(default=None, compare=False, repr=False)
    moments: dict[str, Tensor] | None = field(default=None, compare=False, repr=False)
    precisions: dict[str, str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("bits", self.bits, 1)
        check_range("iterations", self.iterations, 0, MOST_ITERATIONS, whole=True)
        for text in (self.precisions or {}).values():
            Precision.parse(text)

    def as_built(self, adapters: dict[str, Any]) -> LQLoRAConfig:
        precisions = {path: str(a.precision) for path, a in adapters.items() if isinstance(a, LQLoRA)}
        return replace(self, fisher=None, moments=None, iterations=0, precisions=precisions)

    from_peft = classmethod(Config.from_peft.__func__)


@register(LQLoRAConfig)
class LQLoRA(LoRA):
    layers: ClassVar = (LINEAR,)
    peft_keys: ClassVar = {**LoRA.peft_keys, **BASE_KEYS}

    @staticmethod
    def build(model: nn.Module, config: LQLoRAConfig) -> dict[str, LQLoRA]:
        check_nothing_dense_is_adapted("LQ-LoRA", model)
        bases = each_target(LQLoRA, model, config)
        adapters = {path: LQLoRA(base, config, path) for path, base in bases.items()}
        dense = {path: base for path, base in bases.items() if not is_quantized(base.weight)}
        for path in dense:
            shape = list(sizes(bases[path])[::-1])
            if config.fisher is not None and list(getattr(config.fisher.get(path), "shape", [])) != shape:
                raise ValueError(f"fisher must have a tensor {shape} for {path}")
            own = None if config.fisher is None else config.fisher[path].float()
            if own is not None and not (own.sum().isfinite() and (own >= 0).all()):
                raise ValueError(f"fisher of {path} must be finite and not below 0, as sums of squares are")
        missing = [path for path in dense if path not in (config.precisions or dense)]
        if missing:
            raise ValueError(f"precisions has nothing for {', '.join(missing[:4])}")
        if config.precisions is None:
            ranks = {path: adapters[path].lora_A.shape[0] for path in dense}
            plan = choose(dense, ranks, config.bits, config.fisher)
        else:
            plan = {path: Precision.parse(config.precisions[path]) for path in dense}
        for path, precision in plan.items():
            adapters[path].precision = precision
        return adapters

    def __init__(self, base: nn.Module, config: LQLoRAConfig, layer: str):
        super().__init__(base, config, layer)
        needs_scaling("LQ-LoRA", self.scaling, layer)
        needs_finite("LQ-LoRA", base.weight, layer)
        self._base, self.given = [base], is_quantized(base.weight)
        self.iterations, self.errors = config.iterations, []  # relative: of plain codes, then of each iterate
        self._importance = [None if config.fisher is None else config.fisher.get(layer)]
        self._moments, self.output_errors = [moments_of(config.moments, base, layer)], []
        self.precision: Precision | None = Precision.of(base.weight) if self.given else None
        asked = (config.precisions or {}).get(layer)
        if self.given and asked not in (None, str(self.precision)):
            raise ValueError(f"{layer} is quantised to {self.precision} already, not to {asked}")

    @torch.no_grad()
    def begin(self, base: nn.Module) -> nn.Module:
        if self.given:
            return base
        (importance,), r = self._importance, self.lora_A.shape[0]
        weight = dense_matrix(base, base.weight.dtype)
        importance = None if importance is None else importance.to(weight.device, torch.float32)
        if weight.is_meta:  # a model without numbers, in a plan
            codes, left = self.precision.quantize(weight), None
        else:
            codes, left, right, self.errors = lq_decompose(
                weight, r, self.precision.quantize, iterations=self.iterations, importance=importance
            )
            if (moments := self._moments[0]) is not None:
                codes, left, right, self.output_errors = calibrated_factors(
                    weight, r, (codes, left, right), gptq_like(codes, moments), moments, self.iterations
                )
        if left is not None:
            self.lora_A[: len(right)] = right / self.scaling**0.5
            self.lora_B[:, : len(right)] = left / self.scaling**0.5
        self._base = [PackedLinear.over(codes, base.bias, shell_of(base)).train(base.training)]
        self._importance, self._moments = [None], [None]
        return self._base[0]

    def stored(self) -> dict[str, Tensor]:
        return super().stored() | base_tensors(self._base[0])

    def restore(self, tensors: dict[str, Tensor]) -> None:
        own = base_tensors(self._base[0])
        if self.given and not all(torch.equal(tensors[name], part) for name, part in own.items()):
            raise ValueError(
                "this LQ-LoRA adapter was trained on other codes than the model has; load it onto the dense model"
            )
        super().restore(tensors)

    def extra_repr(self) -> str:
        line = f", error {min(self.errors):.3%} (plain {self.errors[0]:.3%})" if self.errors else ""
        return f"{super().extra_repr()}, {self.precision}{line}"
