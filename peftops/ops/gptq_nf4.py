"""NF4 from calibration data: how much damping the data needs, and when plain NF4 is better."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .moments import Moments, output_errors, rank
from .nf4_dequantize import nf4_dequantize
from .nf4_quantize import nf4_quantize
from .nf4_rounding import round_nf4
from .nf4_tensor import NF4Tensor

_DAMPING = (0.01, 0.05, 0.25, 1.0)  # the least is GPTQ's own; moments of few rows need more
_TRIED = 256  # rows of the weight on which these are tried
_FEW = 8  # inputs that span fewer directions than 1/8 of the columns tell too little


@dataclass(frozen=True)
class Calibrated:
    """A weight in NF4.

    Attributes:
        plain_error, error: the relative error of outputs on the calibration rows, of plain NF4 and of this weight. NaN
            without rows.
        why_plain: the reason if it is plain NF4; None if it is calibrated.
    """

    weight: NF4Tensor
    plain_error: float
    error: float
    damping: float | None = None
    why_plain: str | None = None


@torch.no_grad()
def gptq_nf4(
    weight: Tensor, moments: Moments, *, block_size: int = 64, double_quant: bool = True, damping: float | None = None
) -> Calibrated:
    """The work of :func:`peftops.gptq_quantize` for NF4, from the moments of the inputs.

    Args:
        damping: None tries a few: with the best of them, codes from one half of the rows have the least error on the
            other half.
    """
    plain = nf4_quantize(weight, block_size=block_size, double_quant=double_quant)
    if moments.count == 0:
        return Calibrated(plain, float("nan"), float("nan"), why_plain="there are no calibration rows")
    h, found = moments.mean(), plain
    why = _too_little(moments, h)
    if why is None and damping is None:
        damping = _best_damping(weight, moments, plain)
        why = None if damping else "what one half of the calibration rows asks for makes the other half worse"
    if why is None:
        found = round_nf4(weight, plain, h, damping)
    dense = lambda tensor: nf4_dequantize(tensor, dtype=torch.float32)
    if found is plain:
        (error,) = output_errors(weight, [dense(plain)], h)
        return Calibrated(plain, error, error, why_plain=why)
    before, after = output_errors(weight, [dense(plain), dense(found)], h)
    if not after < before:
        return Calibrated(plain, before, before, why_plain="calibration finds nothing better")
    return Calibrated(found, before, after, damping)


def _too_little(moments: Moments, h: Tensor) -> str | None:
    """Why the inputs are too few to calibrate with, if they are."""
    rows, width = moments.count, moments.width
    if min(moments.counts) == 0 or rows * _FEW < width:
        return f"{rows} calibration rows are too few for {width} inputs"
    directions, live = rank(h)
    if not live:
        return "the calibration rows are all 0"
    if directions * _FEW < live:
        return f"the calibration rows have {directions} directions, too few for {live} inputs"
    return None


def _best_damping(weight: Tensor, moments: Moments, plain: NF4Tensor) -> float | None:
    """The best damping, found with one half of the rows and tested on the other; None if plain NF4 is better there."""
    one, other = moments.halves()
    rows = weight[:: max(1, len(weight) // _TRIED)].contiguous()
    start = nf4_quantize(rows, block_size=plain.block_size, double_quant=plain.double_quant)
    tried = [round_nf4(rows, start, one, d, factors=(1.0,), dtype=torch.float32) for d in _DAMPING]
    dense = [nf4_dequantize(codes, dtype=torch.float32) for codes in (start, *tried)]
    errors = output_errors(rows, dense, other)
    best = min(range(len(errors)), key=errors.__getitem__)
    return _DAMPING[best - 1] if best else None
