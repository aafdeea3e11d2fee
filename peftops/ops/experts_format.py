"""The product with a stack of weights, for each format: its operators and their arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .group_tensor import GroupQuantTensor
from .mxfp4_tensor import MXFP4Tensor
from .nf4_tensor import NF4Tensor
from .packed_linear import Operands
from .packed_tensor import PackedTensor

_ops = torch.ops.peftops


@torch.library.register_fake("peftops::experts_nf4")
def _(
    x,
    packed,
    absmax,
    absmax_scale,
    absmax_offset,
    block_size,
    out_features,
    in_features,
    offsets,
    bias,
    u,
    lora_B,
    scaling,
    int8=False,
):
    return x.new_empty((x.shape[0], out_features))


@torch.library.register_fake("peftops::experts_nf4_backward")
def _(g, packed, absmax, absmax_scale, absmax_offset, block_size, in_features, offsets, v, lora_A):
    return g.new_empty((g.shape[0], in_features))


@torch.library.register_fake("peftops::experts_group")
def _(x, packed, scales, zeros, bits, group_size, offsets, bias, u, lora_B, scaling, int8=False):
    return x.new_empty((x.shape[0], scales.shape[0] // offsets.shape[0]))


@torch.library.register_fake("peftops::experts_group_backward")
def _(g, packed, scales, zeros, bits, group_size, offsets, v, lora_A):
    return g.new_empty((g.shape[0], scales.shape[1] * group_size))


@torch.library.register_fake("peftops::experts_mxfp4")
def _(x, blocks, scales, offsets, bias, u, lora_B, scaling, int8=False):
    return x.new_empty((x.shape[0], scales.shape[0] // offsets.shape[0]))


@torch.library.register_fake("peftops::experts_mxfp4_backward")
def _(g, blocks, scales, offsets, v, lora_A):
    return g.new_empty((g.shape[0], 2 * blocks.shape[1]))


@torch.library.register_fake("peftops::experts_dense")
def _(x, weight, offsets, bias, u, lora_B, scaling):
    return x.new_empty((x.shape[0], weight.shape[1]))


@torch.library.register_fake("peftops::experts_dense_backward")
def _(g, weight, offsets, v, lora_A):
    return g.new_empty((g.shape[0], weight.shape[2]))


def flat(stack: Tensor | None) -> Tensor | None:
    """The tensor of all experts, one after the other, in the shape that the operators take."""
    return None if stack is None else stack.flatten(0, 1)


@dataclass(frozen=True)
class ExpertsFormat:
    """The operators that multiply with a stack of weights in one format."""

    arguments: Callable[[Tensor], Operands]  # the stack as they take it: its tensors, then its numbers
    forward: Callable[..., Tensor]  # (x, weight, offsets, bias, u, lora_B, scaling, int8)
    backward: Callable[..., Tensor]  # (g, weight, offsets, v, lora_A)


FORMATS: dict[type[PackedTensor], ExpertsFormat] = {
    NF4Tensor: ExpertsFormat(
        lambda weight: (*weight._arguments, *weight.shape[1:]),
        lambda x, weight, *rest: _ops.experts_nf4(x, *weight, *rest),
        lambda g, weight, *rest: _ops.experts_nf4_backward(g, *weight[:-2], weight[-1], *rest),
    ),
    GroupQuantTensor: ExpertsFormat(
        lambda weight: (*map(flat, weight._arguments[:-2]), *weight._arguments[-2:]),
        lambda x, weight, *rest: _ops.experts_group(x, *weight, *rest),
        lambda g, weight, *rest: _ops.experts_group_backward(g, *weight, *rest),
    ),
    MXFP4Tensor: ExpertsFormat(
        lambda weight: tuple(map(flat, weight._arguments)),
        lambda x, weight, *rest: _ops.experts_mxfp4(x, *weight, *rest),
        lambda g, weight, *rest: _ops.experts_mxfp4_backward(g, *weight, *rest),
    ),
}
DENSE = ExpertsFormat(
    lambda weight: (weight,),
    lambda x, weight, *rest: _ops.experts_dense(x, *weight, *rest[:-1]),
    lambda g, weight, *rest: _ops.experts_dense_backward(g, *weight, *rest),
)
