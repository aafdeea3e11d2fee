"""What layers and methods have to know of each kind of quantised weight; everything else treats them alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..ops import (
    GroupQuantTensor,
    NF4Tensor,
    group_dequantize,
    group_linear,
    group_quantize,
    lora_linear,
    nf4_dequantize,
    nf4_linear,
    nf4_quantize,
)


@dataclass(frozen=True)
class Kind:
    linear: Callable[..., Tensor]  # (x, weight, bias, lora_A=, lora_B=, scaling=, dropout_p=, training=)
    dequantize: Callable[..., Tensor]  # (weight, dtype=)
    quantize_like: Callable[[Tensor, Tensor], Tensor]  # (dense, weight): dense, quantised as weight is


KINDS: dict[type[Tensor], Kind] = {
    NF4Tensor: Kind(
        nf4_linear,
        nf4_dequantize,
        lambda dense, like: nf4_quantize(dense, block_size=like.block_size, double_quant=like.double_quant),
    ),
    GroupQuantTensor: Kind(
        group_linear,
        group_dequantize,
        lambda dense, like: group_quantize(dense, bits=like.bits, group_size=like.group_size),
    ),
}


def is_quantized(weight: object) -> bool:
    return type(weight) in KINDS


def linear_op(layer: nn.Module) -> Callable[..., Tensor]:
    """The op that multiplies with the weight of a linear layer, as the layer does, and adds a low-rank term."""
    if not is_quantized(layer.weight):
        return lora_linear
    op = KINDS[type(layer.weight)].linear
    return partial(op, compute=layer.compute) if hasattr(layer, "compute") else op


def dequantized(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return KINDS[type(weight)].dequantize(weight, dtype=dtype)


def quantized_like(dense: Tensor, weight: Tensor) -> Tensor:
    return KINDS[type(weight)].quantize_like(dense, weight)
