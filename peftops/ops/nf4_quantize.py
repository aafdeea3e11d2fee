"""NF4 quantisation."""

import torch
from torch import Tensor

from .nf4_tensor import NF4Tensor

_quantize = torch.ops.peftops.nf4_quantize.default
_quantize_absmax = torch.ops.peftops.nf4_quantize_absmax.default


@torch.library.register_fake("peftops::nf4_quantize")
def _(weight, block_size):
    blocks = -(-weight.numel() // block_size)
    packed = weight.new_empty(((weight.numel() + 1) // 2,), dtype=torch.uint8)
    return packed, weight.new_empty((blocks,), dtype=torch.float32)


@torch.library.register_fake("peftops::nf4_quantize_absmax")
def _(absmax, offset):
    return absmax.new_empty(absmax.shape, dtype=torch.uint8), absmax.new_empty((-(-absmax.numel() // 256),))


def nf4_quantize(weight: Tensor, *, block_size: int = 64, double_quant: bool = True) -> NF4Tensor:
    """Quantise a weight to NF4 (QLoRA, arXiv:2305.14314), bit for bit like bitsandbytes.

    Blocks of ``block_size`` elements of the row-major weight share one absmax. An element becomes the code
    nearest to ``element * (1 / absmax)``, the lower one at a tie. With ``double_quant`` the absmax values,
    less their mean, are quantised to the 8-bit dynamic map in blocks of 256. An all-zero block stays zero. A finite
    weight stays finite: if bitsandbytes' mean or one of its absmax values would overflow, this one is the nearest
    finite value.

    Args:
        weight: float32, bfloat16 or float16, any shape, not empty; any strides.
        block_size: a power of two from 32 to 4096.
        double_quant: 4.127 instead of 4.5 bits per element at block size 64.

    Raises:
        ValueError: the weight is empty or holds a NaN or an infinity.
        RuntimeError: the dtype is not a float of 16 or 32 bits, or the block size is out of range.

    Examples:
        >>> weight = peftops.nf4_quantize(torch.randn(256, 256))
        >>> round(8 * weight.nbytes / weight.numel(), 2)  # bits
        4.13
    """
    if weight.numel() == 0:
        raise ValueError(f"nf4_quantize: weight is empty, shape {tuple(weight.shape)}")
    packed, absmax = _quantize(weight.detach(), block_size)
    if not torch.compiler.is_compiling() and not weight.is_meta and not absmax.isfinite().all():
        block = int((~absmax.isfinite()).nonzero()[0])
        raise ValueError(
            f"nf4_quantize: weight holds a NaN or an infinity, the first in elements "
            f"{block * block_size} to {min((block + 1) * block_size, weight.numel()) - 1} of the flat weight"
        )
    scale = offset = None
    if double_quant:
        offset = absmax.mean()  # as in bitsandbytes; in float64 if its sum overflows
        offset = torch.where(offset.isfinite(), offset, absmax.double().mean().float())
        absmax, scale = _quantize_absmax(absmax, offset)
    return NF4Tensor(packed, absmax, scale, offset, block_size, weight.shape, weight.dtype)
