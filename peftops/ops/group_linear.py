"""Linear layers over a group-quantised weight."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .group_tensor import GroupQuantTensor
from .lora_linear import LoRATerm, autocast, check_lora, draw_seed, sum_rows

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
    def forward(ctx, x, bias, lora_A, lora_B, weight, int8, scaling, dropout_p, seed):
        u = None if lora_A is None else LoRATerm(lora_A, lora_B, scaling, dropout_p, seed).shrink(x)
        # x is needed for the gradient of lora_A alone.
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, u, lora_A, lora_B, seed, *weight[:3])
        ctx.settings, ctx.scaling, ctx.dropout_p = weight[3:], scaling, dropout_p
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _linear(x, *weight, bias, u, lora_B, scaling, int8)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, u, lora_A, lora_B, seed, *weight = ctx.saved_tensors
        need_x, need_bias, need_A, need_B = ctx.needs_input_grad[:4]
        v = dx = dbias = dA = dB = None
        if u is not None:
            term = LoRATerm(lora_A, lora_B, ctx.scaling, ctx.dropout_p, seed)
            v = term.shrink_gradient(g)
            dA = term.gradient_A(x, v) if need_A else None
            dB = term.gradient_B(g, u) if need_B else None
        if need_x and ctx.dropout_p > 0:
            dx = _backward(g, *weight, *ctx.settings, None, None)
            term.expand_gradient_(dx, v)
        elif need_x:
            dx = _backward(g, *weight, *ctx.settings, v, lora_A)
        if need_bias:
            dbias = sum_rows(g, ctx.bias_dtype)
        return dx, dbias, dA, dB, None, None, None, None, None


def group_linear(
    x: Tensor,
    weight: GroupQuantTensor,
    bias: Tensor | None = None,
    *,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    compute: Compute = "float",
) -> Tensor:
    """``x W^T + bias + scaling * dropout(x) A^T B^T`` over a group-quantised weight: the inference of GPTQ models and
    of merged QA-LoRA, and LoRA on top of them.

    The weight is decoded in registers or cache-sized panels; it never exists densely, forward or backward.
    Sums are float32; with 16-bit ``x``, AVX-512 multiplies in int16 or bfloat16, with an error of the order
    of the rounding of the result. The result has the same bits for any number of threads. Backward keeps ``x``
    itself (only if ``lora_A`` needs a gradient), ``x A^T`` (float32) and a seed.

    ``compute="int8"`` allows ``x`` to be rounded to 8 bits, with a maximum for each row and group (or 128
    columns of it); codes, scales, zeros and sums stay as they are. Normal activations come out with a relative
    error of 0.5 % (group 32) to 0.7 % (128 and more), root of the mean square; an outlier costs its own group
    the precision of the rest. It is done where it is faster: from five rows on, and with AVX2 in groups of
    128 and more. The gradient is that of ``compute="float"``.

    Args:
        x: float32, bfloat16 or float16, ``[..., in]``; any strides.
        weight: ``[out, in]``, frozen; from :func:`peftops.group_quantize`.
        bias: ``[out]`` of any float dtype, or None.
        lora_A: ``[r, in]``, and lora_B: ``[out, r]``; of any float dtype, float32 for training.
        scaling: factor of the low-rank term.
        dropout_p: probability in [0, 1) of dropping an element of ``x`` on its way to ``lora_A``, in training.
        compute: ``"float"``, or ``"int8"`` to allow rounded activations (never on their way to ``lora_A``).

    Returns:
        ``[..., out]`` in x's dtype. Differentiable once in ``x``, ``bias``, ``lora_A`` and ``lora_B``.

    Raises:
        TypeError: weight is not a GroupQuantTensor.
        ValueError: it requires a gradient, which codes cannot have; is on another device than x; compute is
            unknown; or shapes of the factors do not fit together.
        RuntimeError: shapes do not fit, or a dtype is none of the three.
    """
    check_group_weight("group_linear", x, weight)
    if compute not in get_args(Compute):
        raise ValueError(f"group_linear: compute must be 'float' or 'int8', not {compute!r}")
    x, int8 = autocast(x), compute == "int8"
    if lora_A is None and lora_B is None:
        dropout_p, seed = 0.0, None
    else:
        check_lora("group_linear", *weight.shape, lora_A, lora_B, dropout_p)
        dropout_p, seed = draw_seed(x, dropout_p, training)
    if torch.is_grad_enabled():
        return _GroupLinear.apply(x, bias, lora_A, lora_B, weight._arguments, int8, scaling, dropout_p, seed)
    u = None if lora_A is None else LoRATerm(lora_A, lora_B, scaling, dropout_p, seed).shrink(x)
    return _linear(x, *weight._arguments, bias, u, lora_B, scaling, int8)
