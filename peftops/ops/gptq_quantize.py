"""GPTQ: group-wise codes from calibration data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from .group_dequantize import group_dequantize
from .group_quantize import group_quantize
from .group_tensor import GroupQuantTensor

_BLOCK = 128  # columns whose errors are carried on at once, so that most of the work is one product


@torch.no_grad()
def gptq_quantize(
    weight: Tensor,
    inputs: Tensor | Iterable[Tensor],
    *,
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = False,
    clip: Literal["none", "mse"] = "mse",
    damping: float = 0.01,
) -> GroupQuantTensor:
    """Quantise a weight so that what a layer computes from ``inputs`` changes least (GPTQ, arXiv:2210.17323).

    Columns are rounded one after the other, and the error of each is made up for in those that follow, as the
    second moments of the inputs tell. A group gets its scale and zero when its first column's turn comes, by
    :func:`peftops.group_quantize`. Columns stay in order (no act-order), as QA-LoRA's pooling needs.

    Args:
        weight: float32, bfloat16 or float16, ``[out, in]``, finite; ``in`` is a multiple of ``group_size``.
        inputs: what the layer is given, ``[..., in]``, or several such; any float dtype. A few thousand rows do.
        bits, group_size, symmetric, clip: as in :func:`peftops.group_quantize`.
        damping: this share of the mean of the moments' diagonal is added to it; more if that is not enough.

    Returns:
        A weight of the dtype of ``weight``.

    Raises:
        ValueError: the inputs are empty, not finite or of another width than the weight; damping is not
            positive; or :func:`peftops.group_quantize` rejects the weight.
        RuntimeError: as :func:`peftops.group_quantize`.

    Examples:
        >>> weight, inputs = torch.randn(8, 32), torch.randn(256, 32) @ torch.randn(32, 32)
        >>> error = lambda codes: (inputs @ (peftops.group_dequantize(codes) - weight).T).norm()
        >>> better = peftops.gptq_quantize(weight, inputs, bits=3)
        >>> bool(error(better) < error(peftops.group_quantize(weight, bits=3)))
        True
    """
    if not damping > 0:
        raise ValueError(f"gptq_quantize: damping must be positive, not {damping}")
    group_quantize(weight, bits=bits, group_size=group_size)  # says what is wrong with the weight, if anything is
    n, k = weight.shape
    moments = _moments([inputs] if isinstance(inputs, Tensor) else inputs, k, weight.device)
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


def _moments(batches: Iterable[Tensor], k: int, device: torch.device) -> Tensor:
    """The mean of x x^T over all rows, float64."""
    total, count = torch.zeros((k, k), dtype=torch.float64, device=device), 0
    for x in batches:
        if x.dim() == 0 or x.shape[-1] != k:
            raise ValueError(f"gptq_quantize: the last dim of inputs must be {k}, but a shape is {list(x.shape)}")
        rows = x.reshape(-1, k).to(device, torch.float32)
        total += (rows.t() @ rows).double()
        count += rows.shape[0]
    if count == 0:
        raise ValueError("gptq_quantize: inputs hold no row")
    if not total.isfinite().all():
        raise ValueError("gptq_quantize: inputs hold a NaN or an infinity, or are too large to square")
    return total / count


def _following(moments: Tensor, damping: float) -> Tensor:
    """Row i: what an error of 1 in column i asks of the columns from i on, times its own entry. The upper Cholesky
    factor of the inverse of the moments, float32."""
    diagonal = moments.diagonal().clone()
    diagonal[diagonal == 0] = 1.0  # an input that is always 0: its column is rounded, and asks nothing of others
    while True:
        damped = moments.clone()
        damped.diagonal().copy_(diagonal + damping * diagonal.mean())
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            break
        damping *= 10
    inverse = torch.cholesky_inverse(factor)
    return torch.linalg.cholesky(inverse, upper=True).float()


def output_error(weight: Tensor, quantised: GroupQuantTensor, inputs: Tensor) -> float:
    """How far the outputs of the quantised weight are from those of the weight, relative, in the Frobenius norm."""
    x, w = inputs.reshape(-1, inputs.shape[-1]).float(), weight.float()
    return float(((group_dequantize(quantised, dtype=torch.float32) - w) @ x.t()).norm() / (w @ x.t()).norm())
