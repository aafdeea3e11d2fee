"""The linear layers of all experts of one mixture, as one layer over a weight with three dims."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import experts_linear
from .quantized import StoredInParts, is_quantized, own_rows


class ExpertsLinear(StoredInParts):
    """E linear layers of one shape: ``y_s = W_e x_s + bias_e`` for each row s of expert e, see
    :func:`peftops.experts_linear`.

    Args:
        weight: codes ``[E, out, in]``, or a dense parameter as its model stores it: ``[E, out, in]``, or
            ``[E, in, out]`` if ``transposed``.
        bias: ``[E, out]`` or None.
        transposed: how a dense weight is stored. (Codes are ``[E, out, in]`` anyway: their blocks follow rows.)
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        transposed: bool = False,
        compute: Literal["float", "int8"] = "float",
    ):
        super().__init__()
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
        self.transposed = transposed
        self.compute = compute

    @property
    def matrices(self) -> Tensor:
        """The weight as ``[E, out, in]``, no copy."""
        return self.as_matrices(self.weight)

    def as_matrices(self, weight: Tensor) -> Tensor:
        return weight.transpose(1, 2) if self.transposed and not is_quantized(weight) else weight

    def with_codes(self, weight: Tensor, bias: Tensor | None) -> ExpertsLinear:
        """The same layer over another weight."""
        layer = ExpertsLinear(weight, bias, transposed=self.transposed, compute=self.compute)
        return layer.train(self.training)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """``x [S, in]``, rows sorted by expert; rows ``offsets[e-1]:offsets[e]`` are expert e's."""
        if self.weight.requires_grad and torch.is_grad_enabled():
            return self._trained(x, offsets)
        return experts_linear(x, self.matrices, offsets, self.bias, compute=self.compute)

    def _trained(self, x: Tensor, offsets: Tensor) -> Tensor:
        """By torch's own product, which has a gradient of the weight, and leaves the rows of no expert undefined."""
        rows = torch.arange(x.shape[0], device=x.device)
        none = (rows >= offsets[-1]).unsqueeze(-1)
        y = F.grouped_mm(x.masked_fill(none, 0), self.matrices.to(x.dtype).mT, offs=offsets.int())
        if self.bias is not None:
            expert = torch.searchsorted(offsets, rows.to(offsets.dtype), right=True).clamp(max=len(offsets) - 1)
            y = y + self.bias[expert].to(y.dtype)
        return y.masked_fill(none, 0)

    def extra_repr(self) -> str:
        experts, out, in_ = self.matrices.shape
        weight = own_rows(self.weight)
        kind = type(weight).__name__ if is_quantized(weight) else "dense"
        return f"experts={experts}, in_features={in_}, out_features={out}, bias={self.bias is not None}, {kind}"
