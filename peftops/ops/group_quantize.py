"""Group-wise affine quantisation."""

from typing import Literal

import torch
from torch import Tensor

from .group_tensor import GroupQuantTensor, all_finite

_quantize = torch.ops.peftops.group_quantize.default


@torch.library.register_fake("peftops::group_quantize")
def _(weight, bits, group_size, symmetric, narrower):
    n, k = weight.shape
    groups = weight.new_empty((n, k // group_size), dtype=torch.float32)
    return weight.new_empty((n, k // 8 * bits), dtype=torch.uint8), groups, torch.empty_like(groups)


def group_quantize(
    weight: Tensor,
    *,
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = False,
    clip: Literal["none", "mse"] = "none",
) -> GroupQuantTensor:
    """Quantise a weight to integer codes with a scale and a zero per group: ``scales * (codes - zeros)``.

    Every ``group_size`` columns of a row share ``scale = (max - min) / (2**bits - 1)`` and a float
    ``zero = -min / scale``, so that both extremes are exact and the error is half a scale at most
    (QA-LoRA, arXiv:2309.14717; :func:`peftops.gptq_quantize` finds better codes from calibration data).
    With ``symmetric``, ``scale = 2 max|w| / (2**bits - 1)`` and ``zero = 2**(bits - 1)``, as in GPTQ.
    A constant group is exact.

    With ``clip="mse"`` each group takes the range of least squared error among its own and 31 narrower ones, down to
    half the width. A narrower range clips the extremes and has finer steps between them.

    Args:
        weight: float32, bfloat16 or float16, ``[out, in]`` or ``[experts, out, in]``, not empty; any strides. ``in``
            is a multiple of ``group_size``.
        bits: 2, 3, 4 or 8.
        group_size: a power of two from 8 to 4096.
        symmetric: one zero for all, in the middle of the codes.
        clip: ``"none"``, or ``"mse"``.

    Raises:
        ValueError: the weight is empty or holds a NaN or an infinity; clip is unknown.
        RuntimeError: the weight's shape or dtype, ``bits`` or ``group_size`` is not one of those above.

    Examples:
        >>> peftops.group_quantize(torch.randn(32, 64), bits=3, group_size=64).nbytes  # codes, scales, zeros
        1024
    """
    if weight.numel() == 0:
        raise ValueError(f"group_quantize: weight is empty, shape {tuple(weight.shape)}")
    if clip not in ("none", "mse"):
        raise ValueError(f"group_quantize: clip must be 'none' or 'mse', not {clip!r}")
    narrower = 31 if clip == "mse" else 0
    stack = weight.shape[:-2] if weight.dim() == 3 else ()
    rows = weight.detach().flatten(0, 1) if stack else weight.detach()
    packed, scales, zeros = _quantize(rows, bits, group_size, symmetric, narrower)
    if not torch.compiler.is_compiling() and not all_finite(scales):
        row, group = (~scales.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"group_quantize: weight holds a NaN or an infinity (or a span beyond float32), the first in "
            f"row {row}, columns {group * group_size} to {(group + 1) * group_size - 1}"
        )
    if stack:
        packed, scales, zeros = (part.unflatten(0, weight.shape[:-1]) for part in (packed, scales, zeros))
    return GroupQuantTensor(packed, scales, zeros, bits, group_size, weight.shape, weight.dtype)
