"""MXFP4 dequantisation."""

import torch
from torch import Tensor

from .mxfp4_tensor import BLOCK, MXFP4Tensor

_dequantize = torch.ops.peftops.mxfp4_dequantize.default


@torch.library.register_fake("peftops::mxfp4_dequantize")
def _(blocks, scales, dtype):
    return blocks.new_empty((scales.shape[0], scales.shape[1] * BLOCK), dtype=dtype)


def mxfp4_dequantize(weight: MXFP4Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """The numbers that an ``MXFP4Tensor`` stands for: exact in float32 and, unless a scale is extreme, in 16 bits.

    A number beyond the range of float32 (a code of 2 or more with the scale 254) becomes infinite, and a block with the
    scale 255 is NaN.

    Args:
        weight: from :func:`peftops.mxfp4_quantize` or a checkpoint.
        dtype: float32, bfloat16 or float16; by default ``weight.dtype``.

    Returns:
        A dense tensor of ``weight.shape``. No gradient flows through it.

    Raises:
        TypeError: weight is not an MXFP4Tensor.

    Examples:
        >>> weight = peftops.mxfp4_quantize(torch.tensor([[0.5, -3.0, 6.0, 2.4] * 8]))
        >>> peftops.mxfp4_dequantize(weight)[0, :4].tolist()
        [0.5, -3.0, 6.0, 2.0]
    """
    if not isinstance(weight, MXFP4Tensor):
        raise TypeError(f"mxfp4_dequantize: weight must be an MXFP4Tensor, not a {type(weight).__name__}")
    rows = (part.flatten(0, -2) for part in weight._arguments)  # of all experts of a stack
    return _dequantize(*rows, dtype or weight.dtype).view(weight.shape)
