"""DoRA, Liu et al. 2024 (arXiv:2402.09353): LoRA for the direction of each row of the weight, and its length m.

    y = m / n * (W x + s B A D(x)) + b    n_i = || W_i + s (B A)_i ||, without a gradient (section 4.3)

m in R^out starts as the lengths of W's rows, B at 0: the model starts as it was. W may be the kernel of a convolution,
a row of it an output channel, or an embedding, whose rows here are its table's columns. n is computed without B A: n^2
= ||W||^2 + 2 s diag(W A^T B^T) + s^2 diag(B A A^T B^T), in float64, because the squares of very short rows are 0 in
float32. A row of zeros has no direction and length 0, and it stays zero. HF PEFT differs in two points: it applies
dropout also to the x of W x, and it has NaN for such rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..attaching import register
from ..attaching.config import needs_finite
from ..nn import (
    CONVOLUTION,
    EMBEDDING,
    LINEAR,
    dense_matrix,
    is_quantized,
    kind_of,
    low_rank,
    over_channels,
    product,
)
from .lora import LoRA, LoRAConfig


@dataclass(frozen=True)
class DoRAConfig(LoRAConfig):
    """Options of DoRA: those of :class:`LoRAConfig`.

    Examples:
        >>> model = peftops.attach(nn.Sequential(nn.Linear(8, 4)), peftops.DoRAConfig(r=2))
        >>> peftops.summary(model).trainable  # A: 16, B: 8, the rows' lengths: 4
        28
    """

    def to_peft(self) -> dict[str, Any]:
        return {**super().to_peft(), "use_dora": True}

    @classmethod
    def claims(cls, fields: dict[str, Any]) -> bool:
        return fields.get("peft_type") == cls.peft_type and bool(fields.get("use_dora"))

    @classmethod
    def from_peft(cls, fields: dict[str, Any], **own: Any) -> DoRAConfig:
        return super().from_peft({**fields, "use_dora": False}, **own)


@register(DoRAConfig)
class DoRA(LoRA):
    layers: ClassVar = (LINEAR, EMBEDDING, CONVOLUTION)
    peft_keys: ClassVar = {**LoRA.peft_keys, "magnitude": "lora_magnitude_vector"}

    def __init__(self, base: nn.Module, config: DoRAConfig, layer: str):
        super().__init__(base, config, layer)
        if getattr(base, "groups", 1) > 1:
            raise ValueError(f"DoRA needs the length of a row of W + s B A, and {layer}, in groups, has no such sum")
        needs_finite("DoRA", base.weight, layer)
        lengths = torch.linalg.vector_norm(dense_matrix(base), dim=1, dtype=torch.float64)
        # It depends only on the weight, so it is not in the state: a file of the adapter fits any base.
        self.register_buffer("squares", lengths.square(), persistent=False)
        shape = (1, -1, *[1] * (base.weight.dim() - 2)) if kind_of(base) == CONVOLUTION else (-1,)  # as in files
        self.magnitude = nn.Parameter(lengths.float().view(shape))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DoRA:
        """(A cast of the model does not change the dtype of lengths.)"""
        squares = self.squares
        super()._apply(fn, recurse)
        if not squares.is_meta:
            self.squares = squares.to(self.squares.device)
        return self

    @torch.no_grad()
    def lengths(self, base: nn.Module) -> Tensor:
        """n, float64, above 0."""
        A, B = (factor.flatten(1) for factor in self.factors())
        projected = product(base, A if is_quantized(base.weight) else A.to(base.weight.dtype))
        A, B = A.double(), B.double()
        cross = (B * projected.double().t()).sum(1)
        own = ((B @ (A @ A.t())) * B).sum(1)
        return above_zero((self.squares + 2 * self.scaling * cross + self.scaling**2 * own).clamp(min=0).sqrt())

    def adapt(self, base: nn.Module, x: Tensor) -> Tensor:
        y = low_rank(base, x, *self.factors(), self.scaling, dropout=self.dropout, training=self.training, bias=False)
        y = y * over_channels(base, self.magnitude.flatten() / self.lengths(base)).to(y.dtype)
        bias = getattr(base, "bias", None)
        return y if bias is None else y + over_channels(base, bias).to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        direction, bias = super().merged(weight, bias)
        lengths = above_zero(torch.linalg.vector_norm(direction, dim=1, keepdim=True, dtype=torch.float64))
        return (self.magnitude.view(-1, 1) * (direction / lengths)).float(), bias


def above_zero(lengths: Tensor) -> Tensor:
    """Lengths that can divide: 1 for a row of zeros, which stays zero."""
    return torch.where(lengths > 0, lengths, 1.0)
