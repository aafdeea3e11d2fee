"""Linear layers over a frozen weight in a packed format: all that does not depend on the format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .lora_linear import LoRATerm, autocast, check_lora, draw_seed, sum_rows
from .packed_tensor import PackedTensor

Compute = Literal["float", "int8"]

# The tensors of a weight, some of them None, and then the numbers of which the operators want to know.
Weight = tuple[Tensor | int | None, ...]


def check_weight(op: str, x: Tensor, weight: Tensor, kind: type[PackedTensor], maker: str) -> torch.Size:
    """The shape of ``weight``; a sentence is raised unless it is one that ``op`` can multiply x with."""
    if not isinstance(weight, kind):
        raise TypeError(f"{op}: weight must be {kind._NAME} (see peftops.{maker}), not a {type(weight).__name__}")
    if len(shape := weight.shape) != 2:
        raise ValueError(f"{op}: weight must have two dims, [out, in], not shape {list(shape)}")
    if x.device != weight.device:
        raise ValueError(f"{op}: x is on {x.device}, weight on {weight.device}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: weight requires a gradient, but codes cannot have one; freeze it")
    return shape


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, lora_A, lora_B, weight, forward, backward, scaling, dropout_p, seed, int8):
        u = None if lora_A is None else LoRATerm(lora_A, lora_B, scaling, dropout_p, seed).shrink(x)
        tensors = [part for part in weight if not isinstance(part, int)]
        # x is needed for the gradient of lora_A alone.
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, u, lora_A, lora_B, seed, *tensors)
        ctx.numbers, ctx.product = weight[len(tensors) :], backward
        ctx.scaling, ctx.dropout_p = scaling, dropout_p
        ctx.bias_dtype = None if bias is None else bias.dtype
        return forward(x, weight, bias, u, lora_B, scaling, int8)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, u, lora_A, lora_B, seed, *tensors = ctx.saved_tensors
        need_x, need_bias, need_A, need_B = ctx.needs_input_grad[:4]
        term = v = dx = dbias = dA = dB = None
        if u is not None:
            term = LoRATerm(lora_A, lora_B, ctx.scaling, ctx.dropout_p, seed)
            v = term.shrink_gradient(g)
            dA = term.gradient_A(x, v) if need_A else None
            dB = term.gradient_B(g, u) if need_B else None
        if need_x:
            dx = ctx.product(g, (*tensors, *ctx.numbers), term, v)
        if need_bias:
            dbias = sum_rows(g, ctx.bias_dtype)
        return dx, dbias, dA, dB, *[None] * 7


def packed_linear(
    op: str,
    forward: Callable[..., Tensor],
    backward: Callable[..., Tensor],
    weight: Weight,
    shape: torch.Size,
    x: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    dropout_p: float,
    training: bool,
    compute: Compute,
) -> Tensor:
    """``x W^T + bias + scaling * dropout(x) A^T B^T``, differentiable, for one format of W ``[out, in]``:

    * ``forward(x, weight, bias, u, lora_B, scaling, int8)`` is ``x W^T + bias + scaling * u B^T``, where ``int8``
      allows x to be rounded;
    * ``backward(g, weight, term, v)`` is ``g W`` and, unless they are None, the gradient of x through the low-rank
      ``term``, given the gradient ``v`` of its u.

    Backward keeps ``x`` itself (only if ``lora_A`` needs a gradient), ``u = dropout(x) A^T`` (float32) and a seed.
    """
    if compute not in ("float", "int8"):
        raise ValueError(f"{op}: compute must be 'float' or 'int8', not {compute!r}")
    x, int8 = autocast(x), compute == "int8"
    if lora_A is None and lora_B is None:
        dropout_p, seed = 0.0, None
    else:
        check_lora(op, *shape, lora_A, lora_B, dropout_p)
        dropout_p, seed = draw_seed(x, dropout_p, training)
    if torch.is_grad_enabled():
        arguments = (x, bias, lora_A, lora_B, weight, forward, backward, scaling, dropout_p, seed, int8)
        return _PackedLinear.apply(*arguments)
    u = None if lora_A is None else LoRATerm(lora_A, lora_B, scaling, dropout_p, seed).shrink(x)
    return forward(x, weight, bias, u, lora_B, scaling, int8)
