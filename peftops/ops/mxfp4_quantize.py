"""MXFP4 quantisation."""

import torch
from torch import Tensor

from .mxfp4_tensor import BLOCK, MXFP4Tensor

_quantize = torch.ops.peftops.mxfp4_quantize.default


@torch.library.register_fake("peftops::mxfp4_quantize")
def _(weight):
    n, k = weight.shape
    empty = lambda width: weight.new_empty((n, width), dtype=torch.uint8)
    return empty(k // 2), empty(k // BLOCK)


def mxfp4_quantize(weight: Tensor) -> MXFP4Tensor:
    """Quantise a weight to MXFP4, by the rule of OCP's specification (microscaling formats 1.0, section 6.3).

    The scale of 32 columns is the power of two for which the exponent of their largest magnitude becomes that of 4 and
    6, the largest codes. An element becomes the nearest number of E2M1, the even one at a tie; a magnitude above 6
    becomes 6. Signs stay, also the sign of a zero. The rule is coarse: for a normal weight the relative error is 11.5 %
    (root of the mean square), and 9.2 % with :func:`peftops.nf4_quantize`. Use it for weights that must be in this
    format.

    Args:
        weight: float32, bfloat16 or float16, ``[out, in]`` or ``[experts, out, in]``, not empty; any strides. ``in`` is
            a multiple of 32.

    Raises:
        ValueError: the weight is empty or holds a NaN or an infinity.
        RuntimeError: the weight's shape or dtype is not one of those above.

    Examples:
        >>> peftops.mxfp4_quantize(torch.randn(32, 64)).nbytes  # codes and scales: 4.25 bits a weight
        1088
    """
    if weight.numel() == 0:
        raise ValueError(f"mxfp4_quantize: weight is empty, shape {tuple(weight.shape)}")
    stack = weight.dim() == 3
    blocks, scales = _quantize(weight.detach().flatten(0, 1) if stack else weight.detach())
    if not torch.compiler.is_compiling() and not weight.is_meta and (scales == 255).any():
        row, block = (scales == 255).nonzero()[0].tolist()
        raise ValueError(
            f"mxfp4_quantize: weight holds a NaN or an infinity, the first in row {row}, columns {block * BLOCK} to "
            f"{(block + 1) * BLOCK - 1}"
        )
    if stack:
        blocks, scales = (part.unflatten(0, weight.shape[:-1]) for part in (blocks, scales))
    return MXFP4Tensor(blocks, scales, weight.shape, weight.dtype)
