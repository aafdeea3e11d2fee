"""GPTQ: codes from calibration data."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .gptq_nf4 import gptq_nf4
from .group_quantize import group_quantize
from .group_tensor import GroupQuantTensor
from .moments import Moments, output_errors
from .nf4_tensor import NF4Tensor
from .packed_tensor import PackedTensor

_BLOCK = 128  # the errors of so many columns are carried on together, so that most of the work is one product

Inputs = Tensor | Iterable[Tensor]


@overload
def gptq_quantize(
    weight: Tensor,
    inputs: Inputs,
    *,
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = False,
    clip: Literal["none", "mse"] = "mse",
    damping: float = 0.01,
) -> GroupQuantTensor: ...
@overload
def gptq_quantize(
    weight: Tensor,
    inputs: Inputs,
    *,
    format: Literal["nf4"],
    block_size: int = 64,
    double_quant: bool = True,
    damping: float | None = None,
) -> NF4Tensor: ...
@torch.no_grad()
def gptq_quantize(weight: Tensor, inputs: Inputs, *, format: str = "group", **options: Any) -> PackedTensor:
    """Quantise a weight so that a layer's outputs for ``inputs`` change least (GPTQ, arXiv:2210.17323).

    Columns are rounded one after the other. The columns that follow make up for the error of each, as far as the second
    moments of the inputs allow.

    * ``format="group"``: a group gets its scale and zero when its first column's turn comes, by
      :func:`peftops.group_quantize`. Columns stay in order (no act-order), as QA-LoRA's pooling needs.
    * ``format="nf4"``: codes and constants as bitsandbytes might have written them. A block's constant is fixed when
      its first column's turn comes; with double quantisation codes are rounded against the 8-bit constant that is
      stored. On the calibration rows the result is at least as good as :func:`peftops.nf4_quantize`. If nothing better
      is found, or the rows are too few or too similar, the result is plain NF4, and a warning tells the reason. ``in``
      may be any number.

    Args:
        weight: float32, bfloat16 or float16, ``[out, in]``, finite; ``in`` is a multiple of ``group_size``.
        inputs: inputs of the layer, ``[..., in]``, or a list of such tensors; any float dtype. A few thousand rows are
            enough.
        bits, group_size, symmetric, clip: as in :func:`peftops.group_quantize`; clip is "mse" unless given.
        block_size, double_quant: as in :func:`peftops.nf4_quantize`.
        damping: this share of the mean of the moments' diagonal is added to the diagonal, or more if factoring needs
            more. The default is 0.01 for groups. For NF4 it is the best of 0.01, 0.05, 0.25 and 1: one half of the rows
            chooses codes, and the other half scores them.

    Returns:
        A weight of the dtype of ``weight``.

    Raises:
        TypeError: the format does not have an option that is given.
        ValueError: the format is unknown; the inputs are not finite, of another width than the weight, or (for groups)
            empty; damping is not positive; or the format's own quantiser rejects the weight.
        RuntimeError: as the format's own quantiser.

    Examples:
        >>> weight, inputs = torch.randn(8, 32), torch.randn(256, 32) @ torch.randn(32, 32)
        >>> error = lambda codes: (inputs @ (peftops.group_dequantize(codes) - weight).T).norm()
        >>> better = peftops.gptq_quantize(weight, inputs, bits=3)
        >>> bool(error(better) < error(peftops.group_quantize(weight, bits=3)))
        True
    """
    take = {"group": _group, "nf4": _nf4}.get(format)
    if take is None:
        raise ValueError(f"gptq_quantize: format must be 'group' or 'nf4', not {format!r}")
    known = [name for name, p in inspect.signature(take).parameters.items() if p.kind is p.KEYWORD_ONLY]
    wrong = [name for name in options if name not in known]
    if wrong:
        raise TypeError(f"gptq_quantize: format {format!r} takes {', '.join(known)}, not {', '.join(wrong)}")
    damping = options.get("damping")
    if damping is not None and not damping > 0:
        raise ValueError(f"gptq_quantize: damping must be positive, not {damping}")
    return take(weight, inputs, **options)


def _nf4(
    weight: Tensor, inputs: Inputs, *, block_size: int = 64, double_quant: bool = True, damping: float | None = None
) -> NF4Tensor:
    if weight.dim() != 2:
        raise ValueError(f"gptq_quantize: weight must be [out, in], but its shape is {list(weight.shape)}")
    moments = Moments.of(inputs, weight.shape[1], weight.device)
    found = gptq_nf4(weight.detach(), moments, block_size=block_size, double_quant=double_quant, damping=damping)
    if found.why_plain:
        warnings.warn(f"gptq_quantize: {found.why_plain}: this is plain NF4", stacklevel=4)
    return found.weight


def _group(
    weight: Tensor,
    inputs: Inputs,
    *,
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = False,
    clip: Literal["none", "mse"] = "mse",
    damping: float = 0.01,
) -> GroupQuantTensor:
    group_quantize(weight, bits=bits, group_size=group_size)  # raises if the weight or an option is wrong
    moments = Moments.of(inputs, weight.shape[1], weight.device).mean().double()
    return gptq_from_moments(weight, moments, bits, group_size, symmetric, clip, damping)


def gptq_from_moments(
    weight: Tensor, moments: Tensor, bits: int, group_size: int, symmetric: bool, clip: str, damping: float
) -> GroupQuantTensor:
    """Into groups, from the float64 moments of the inputs."""
    n, k = weight.shape
    follow = _following(moments, damping)
    w = weight.float().clone()
    codes = torch.empty((n, k), dtype=torch.uint8, device=w.device)
    scales, zeros = (torch.empty((n, k // group_size), device=w.device) for _ in range(2))
    block = max(_BLOCK, group_size)
    for begin in range(0, k, block):
        end = min(begin + block, k)
        errors = torch.empty((n, end - begin), device=w.device)
        for i in range(begin, end):
            group = i // group_size
            if i % group_size == 0:
                part = w[:, i : i + group_size].contiguous()
                found = group_quantize(part, bits=bits, group_size=group_size, symmetric=symmetric, clip=clip)
                scales[:, group], zeros[:, group] = found.scales[:, 0], found.zeros[:, 0]
            scale, zero = scales[:, group], zeros[:, group]
            code = (w[:, i] / scale + zero).round_().clamp_(0, 2**bits - 1)
            codes[:, i] = code
            errors[:, i - begin] = (w[:, i] - (code - zero) * scale) / follow[i, i]
            w[:, i + 1 : end].addr_(errors[:, i - begin], follow[i, i + 1 : end], alpha=-1)
        w[:, end:].addmm_(errors, follow[begin:end, end:], alpha=-1)
    return GroupQuantTensor.from_codes(codes, scales, zeros, bits=bits, dtype=weight.dtype)


def _following(moments: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the moments, float32. Row i, divided by its diagonal entry, is the
    correction of the columns from i on for an error of 1 in column i."""
    diagonal = moments.diagonal().clone()
    diagonal[diagonal == 0] = 1.0  # an input that is always 0: its column is rounded, without a correction of others
    while True:
        damped = moments.clone()
        damped.diagonal().copy_(diagonal + damping * diagonal.mean())
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            break
        damping *= 10
    inverse = torch.cholesky_inverse(factor)
    return torch.linalg.cholesky(inverse, upper=True).float()


def output_error(weight: Tensor, quantized: PackedTensor, inputs: Tensor) -> float:
    """The relative error of the outputs of the quantised weight, in the Frobenius norm."""
    moments = Moments.of(inputs, weight.shape[1], weight.device).mean()
    return output_errors(weight, [quantized.dequantize(dtype=torch.float32)], moments)[0]
