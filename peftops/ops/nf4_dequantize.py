"""NF4 dequantisation."""

import torch
from torch import Tensor

from .nf4_tensor import NF4Tensor

with torch.device("cpu"):  # even if the importing code has set another default
    NF4_CODE = torch.ops.peftops.nf4_dequantize(
        torch.arange(16, dtype=torch.uint8) * 17, torch.ones(1), None, None, 32, 1, 32, torch.float32
    )[0, ::2].contiguous()  # the number of each code, to be multiplied by absmax; ascending
    ABSMAX_MAP = torch.ops.peftops.nf4_absmax(torch.arange(256, dtype=torch.uint8), torch.ones(1), torch.zeros(1))

_dequantize = torch.ops.peftops.nf4_dequantize.default


@torch.library.register_fake("peftops::nf4_dequantize")
def _(packed, absmax, absmax_scale, absmax_offset, block_size, rows, cols, dtype):
    return packed.new_empty((rows, cols), dtype=dtype)


@torch.library.register_fake("peftops::nf4_absmax")
def _(absmax, absmax_scale, absmax_offset):
    return absmax_scale.new_empty(absmax.shape)


def nf4_dequantize(weight: NF4Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """The numbers that an ``NF4Tensor`` stands for: ``code * absmax``, in float32, rounded once to ``dtype``.

    Args:
        weight: from :func:`peftops.nf4_quantize`.
        dtype: float32, bfloat16 or float16; by default ``weight.dtype``.

    Returns:
        A dense tensor of ``weight.shape``. No gradient flows through it.

    Examples:
        >>> peftops.nf4_dequantize(peftops.nf4_quantize(torch.tensor([[-2.0, 0.0, 2.0]]))).tolist()
        [[-2.0, 0.0, 2.0]]
    """
    if not isinstance(weight, NF4Tensor):
        raise TypeError(f"nf4_dequantize: weight must be an NF4Tensor, not a {type(weight).__name__}")
    cols = weight.shape[-1] if weight.dim() else 1
    dense = _dequantize(*weight._arguments, weight.numel() // cols, cols, dtype or weight.dtype)
    return dense.view(weight.shape)
