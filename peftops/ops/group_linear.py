"""Linear layers over a group-quantised weight."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .group_tensor import GroupQuantTensor
from .lora_linear import autocast, sum_rows

Compute = Literal["float", "int8"]

_linear = torch.ops.peftops.group_linear.default
_backward = torch.ops.peftops.group_linear_backward.default


@torch.library.register_fake("peftops::group_linear")
def _(x, packed, scales, zeros, bits, group_size, bias, u, lora_B, scaling, int8):
    k = scales.shape[1] * group_size
    torch._check(x.shape[-1] == k, lambda: f"group_linear: the last dim of x must be {k}")
    return x.new_empty((*x.shape[:-1], scales.shape[0]))


@torch.library.register_fake("peftops::group_linear_backward")
def _(g, packed, scales, zeros, bits, group_size, v, lora_A):
    return g.new_empty((*g.shape[:-1], scales.shape[1] * group_size))


def check_group_weight(op: str, x: Tensor, weight: GroupQuantTensor) -> None:
    """Raise a sentence unless ``weight`` is one that ``op`` can multiply x with."""
    if not isinstance(weight, GroupQuantTensor):
        raise TypeError(
            f"{op}: weight must be a GroupQuantTensor (see peftops.group_quantize), not a {type(weight).__name__}"
        )
    if x.device != weight.device:
        raise ValueError(f"{op}: x is on {x.device}, weight on {weight.device}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: weight requires a gradient, but codes cannot have one; freeze it")


class _GroupLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, weight, int8):
        ctx.save_for_backward(*weight[:3])
        ctx.settings = weight[3:]
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _linear(x, *weight, bias, None, None, 1.0, int8)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        need_x, need_bias, *_ = ctx.needs_input_grad
        dx = _backward(g, *ctx.saved_tensors, *ctx.settings, None, None) if need_x else None
        return dx, sum_rows(g, ctx.bias_dtype) if need_bias else None, None, None


def group_linear(
    x: Tensor, weight: GroupQuantTensor, bias: Tensor | None = None, *, compute: Compute = "float"
) -> Tensor:
    """``x W^T + bias`` over a group-quantised weight: the inference of GPTQ models and of merged QA-LoRA.

    The weight is decoded in registers or cache-sized panels; it never exists densely, forward or backward.
    Sums are float32; with 16-bit ``x``, AVX-512 multiplies in int16 or bfloat16, with an error of the order
    of the rounding of the result. The result has the same bits for any number of threads. Backward keeps
    nothing of ``x``.

    ``compute="int8"`` allows ``x`` to be rounded to 8 bits, with a maximum for each row and group (or 128
    columns of it); codes, scales, zeros and sums stay as they are. Normal activations come out with a relative
    error of 0.5 % (group 32) to 0.7 % (128 and more), root of the mean square; an outlier costs its own group
    the precision of the rest. It is done where it is faster: from five rows on, and with AVX2 in groups of
    128 and more. The gradient is that of ``compute="float"``.

    Args:
        x: float32, bfloat16 or float16, ``[..., in]``; any strides.
        weight: ``[out, in]``, frozen; from :func:`peftops.group_quantize`.
        bias: ``[out]`` of any float dtype, or None.
        compute: ``"float"``, or ``"int8"`` to allow rounded activations.

    Returns:
        ``[..., out]`` in x's dtype. Differentiable once in ``x`` and ``bias``.

    Raises:
        TypeError: weight is not a GroupQuantTensor.
        ValueError: it requires a gradient, which codes cannot have; is on another device than x; or compute
            is unknown.
        RuntimeError: shapes do not fit, or a dtype is none of the three.
    """
    check_group_weight("group_linear", x, weight)
    if compute not in get_args(Compute):
        raise ValueError(f"group_linear: compute must be 'float' or 'int8', not {compute!r}")
    x, int8 = autocast(x), compute == "int8"
    if torch.is_grad_enabled():
        return _GroupLinear.apply(x, bias, weight._arguments, int8)
    return _linear(x, *weight._arguments, bias, None, None, 1.0, int8)
