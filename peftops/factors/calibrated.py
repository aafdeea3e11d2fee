"""Codes and factors with the smallest error in a layer's outputs, not in its weights.

    minimise || (W - Q - L R) H^1/2 ||    H = V V^T the inputs' moments

L R is best for given Q: the first singular vectors of (W - Q) V, times V^-1 on the right. Q for given L R is GPTQ's of
W - L R. The two are improved in turn, and the best pair is kept. The method's own solution, which does not use H, is
among the candidates, so the error is never above the method's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..nn import dequantized, sizes
from ..ops import NF4Tensor, nf4_quantize
from ..ops.gptq_quantize import gptq_from_moments
from ..ops.group_tensor import all_finite
from ..ops.moments import damped, output_errors
from ..ops.nf4_rounding import round_nf4
from ..ops.packed_tensor import PackedTensor
from .singular import leading, shared

_DAMPING = 0.05
Solution = tuple[PackedTensor, Tensor | None, Tensor | None]  # Q, and L [out, r] and R [r, in] if it has such


def moments_of(moments: dict[str, Tensor] | None, base: nn.Module, layer: str) -> Tensor | None:
    """Those of the inputs of a layer, if there are any.

    Raises:
        ValueError: they are no moments of such inputs.
    """
    own = (moments or {}).get(layer)
    if own is None:
        return None
    shape = [sizes(base)[0]] * 2
    if list(own.shape) != shape or own.dtype != torch.float32:
        raise ValueError(f"moments of {layer} must be float32 {shape}, not {own.dtype} {list(own.shape)}")
    if not (all_finite(own) and (own.diagonal() >= 0).all()):
        raise ValueError(f"moments of {layer} must be finite, and those of an input with itself not below 0")
    return own


def gptq_like(codes: PackedTensor, moments: Tensor) -> Callable[[Tensor], PackedTensor]:
    """GPTQ into the format that ``codes`` are of."""

    def quantize(dense: Tensor) -> PackedTensor:
        if isinstance(codes, NF4Tensor):
            plain = nf4_quantize(dense, block_size=codes.block_size, double_quant=codes.double_quant)
            return round_nf4(dense, plain, moments, _DAMPING)
        return gptq_from_moments(dense, moments.double(), codes.bits, codes.group_size, False, "mse", _DAMPING)

    return quantize


def calibrated_factors(
    weight: Tensor, r: int, own: Solution, quantize: Callable[[Tensor], PackedTensor], moments: Tensor, iterations: int
) -> tuple[PackedTensor, Tensor | None, Tensor | None, list[float]]:
    """The best of ``own`` and all iterates, and the relative output errors: of ``own``, then of each iterate.

    Args:
        weight: ``[out, in]``, any float dtype.
        quantize: GPTQ with these moments, of a dense weight.
        moments: float32 ``[in, in]``.
    """
    want = weight.float()
    v = damped(moments, _DAMPING).float()

    def error(codes: PackedTensor, left: Tensor | None, right: Tensor | None) -> float:
        dense = dequantized(codes, torch.float32)
        return output_errors(want, [dense if left is None else dense + left @ right], moments)[0]

    best, (_, left, right) = own, own
    errors = [error(*own)]
    for _ in range(max(1, iterations)):
        codes = quantize((want if left is None else want - left @ right).to(weight.dtype))
        lost = want - dequantized(codes, torch.float32)
        turned, left = shared(*leading(lost @ v, min(r, *lost.shape)), 1.0)
        right = torch.linalg.solve_triangular(v, turned, upper=True, left=False)
        errors.append(error(codes, left, right))
        if errors[-1] < min(errors[:-1]):
            best = codes, left, right
        elif len(errors) > 2:
            break
    return *best, errors
