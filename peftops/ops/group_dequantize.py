"""Group-wise dequantisation."""

import torch
from torch import Tensor

from .group_tensor import GroupQuantTensor

_dequantize = torch.ops.peftops.group_dequantize.default


@torch.library.register_fake("peftops::group_dequantize")
def _(packed, scales, zeros, bits, group_size, dtype):
    return packed.new_empty((scales.shape[0], scales.shape[1] * group_size), dtype=dtype)


def group_dequantize(weight: GroupQuantTensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """The numbers that a ``GroupQuantTensor`` stands for: ``(codes - zeros) * scales``, in float32, rounded once.

    Args:
        weight: from :func:`peftops.group_quantize`.
        dtype: float32, bfloat16 or float16; by default ``weight.dtype``.

    Returns:
        A dense tensor of ``weight.shape``. No gradient flows through it.

    Examples:
        >>> weight = peftops.group_quantize(torch.arange(16.0).view(1, 16), bits=4, group_size=16)
        >>> torch.equal(peftops.group_dequantize(weight).round(), torch.arange(16.0).view(1, 16))
        True
    """
    if not isinstance(weight, GroupQuantTensor):
        raise TypeError(f"group_dequantize: weight must be a GroupQuantTensor, not a {type(weight).__name__}")
    *parts, bits, group_size = weight._arguments
    rows = (part.flatten(0, -2) for part in parts)  # of all experts of a stack
    return _dequantize(*rows, bits, group_size, dtype or weight.dtype).view(weight.shape)
