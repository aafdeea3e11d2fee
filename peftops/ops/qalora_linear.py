"""Linear layers over a group-quantised weight with a low-rank term that is constant in each group."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .group_tensor import GroupQuantTensor
from .lora_linear import autocast, check_lora, sum_rows
from .packed_linear import of_another_kind

Pool = Literal["sum", "mean", "peft"]

_pool_and_shrink = torch.ops.peftops.qalora_shrink.default
_linear = torch.ops.peftops.group_linear.default
_backward = torch.ops.peftops.group_linear_backward.default
_shrink = torch.ops.peftops.lora_shrink.default
_gradient = torch.ops.peftops.lora_gradient.default


@torch.library.register_fake("peftops::qalora_shrink")
def _(x, lora_A, group_size):
    r, groups = lora_A.shape
    torch._check(x.shape[-1] == groups * group_size)
    m = x.shape[:-1].numel()
    return x.new_empty((m, groups), dtype=torch.float32), x.new_empty((m, r), dtype=torch.float32)


def pool_factor(op: str, pool: Pool, weight: GroupQuantTensor) -> float:
    """The factor that a convention of pooling puts on the sum of a group; ValueError if the convention is unknown."""
    groups = weight.scales.shape[1]
    factors = {"sum": 1.0, "mean": 1 / weight.group_size, "peft": groups / weight.group_size}
    if pool not in factors:
        raise ValueError(f"{op}: pool must be one of {', '.join(map(repr, get_args(Pool)))}, not {pool!r}")
    return factors[pool]


class _QALoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, lora_A, lora_B, weight, factor):
        pooled, u = _pool_and_shrink(x, lora_A, weight[4])
        ctx.save_for_backward(pooled, u, lora_A, lora_B, *weight[:3])
        ctx.settings, ctx.factor = weight[3:], factor
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _linear(x, *weight, bias, u, lora_B, factor, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        pooled, u, lora_A, lora_B, *weight = ctx.saved_tensors
        need_x, need_bias, need_A, need_B = ctx.needs_input_grad[:4]
        v = dx = dbias = dA = dB = None
        if need_x or need_A:
            v = _shrink(g, lora_B, False, ctx.factor, 0.0, None)
        if need_x:
            dx = _backward(g, *weight, *ctx.settings, v, lora_A)
        if need_bias:
            dbias = sum_rows(g, ctx.bias_dtype)
        if need_A:
            dA = _gradient(v, pooled, lora_A.dtype, True, 1.0, 0.0, None)
        if need_B:
            dB = _gradient(u, g, lora_B.dtype, False, ctx.factor, 0.0, None)
        return dx, dbias, dA, dB, None, None


def qalora_linear(
    x: Tensor,
    weight: GroupQuantTensor,
    bias: Tensor | None = None,
    *,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
    pool: Pool = "sum",
) -> Tensor:
    """``x W^T + bias + scaling * p(x) A^T B^T`` over a group-quantised weight (QA-LoRA, arXiv:2309.14717).

    ``p`` adds up the columns of each group of the weight, so that the low-rank change of the weight is
    constant in a group and :func:`peftops.qalora_merge` can move it into the zeros, exactly. Pooling is
    part of the product with A; the weight is decoded as in :func:`peftops.group_linear`. Sums are float32.
    Backward keeps ``p(x)``, a ``group_size``-th of ``x``, and ``p(x) A^T``, both float32; not ``x``.

    Args:
        x: float32, bfloat16 or float16, ``[..., in]``; any strides.
        weight: ``[out, in]``, frozen.
        bias: ``[out]`` of any float dtype, or None.
        lora_A: ``[r, in / group_size]``, and lora_B: ``[out, r]``; of any float dtype, float32 for training.
        scaling: factor of the low-rank term.
        pool: ``"sum"`` as in the paper; ``"mean"`` as in its authors' code, which is sum / group_size; or ``"peft"`` as
            in PEFT's ``use_qalora``, which is mean * in / group_size. An adapter works only with the convention with
            which it was trained.

    Returns:
        ``[..., out]`` in x's dtype. Differentiable once in ``x``, ``bias``, ``lora_A`` and ``lora_B``.

    Raises:
        TypeError: weight is not a GroupQuantTensor.
        ValueError: it requires a gradient, which codes cannot have; pool is unknown; shapes of the factors or
            devices do not fit together.
        RuntimeError: x or bias has another shape, or a dtype is not one of the three.

    Examples:
        >>> weight = peftops.group_quantize(torch.randn(32, 64), group_size=32)
        >>> A, B = torch.randn(4, 2), torch.randn(32, 4)  # a column of A for each group
        >>> peftops.qalora_linear(torch.randn(2, 64), weight, lora_A=A, lora_B=B).shape
        torch.Size([2, 32])
    """
    if not isinstance(weight, GroupQuantTensor):
        raise of_another_kind("qalora_linear", weight, GroupQuantTensor)
    weight.check_operand("qalora_linear", x)
    check_lora("qalora_linear", weight.shape[0], weight.scales.shape[1], lora_A, lora_B, 0.0)
    factor = scaling * pool_factor("qalora_linear", pool, weight)
    x = autocast(x)
    if torch.is_grad_enabled():
        return _QALoRALinear.apply(x, bias, lora_A, lora_B, weight._arguments, factor)
    _, u = _pool_and_shrink(x, lora_A, weight.group_size)
    return _linear(x, *weight._arguments, bias, u, lora_B, factor, False)
