"""``scaling * B A``, added to any layer that can be seen as a matrix. All methods of LoRA's family compute with
this."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import experts_linear, lora_linear
from .experts_linear import ExpertsLinear
from .layers import convolved, is_convolution, matrix, pointwise, sizes
from .quantized import is_quantized


def factor_shapes(base: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A and B of rank ``r`` for a layer: two matrices, one pair for each expert, or two
    convolutions of which the second is 1 x 1. Where the layer's channels are in groups, B's are, too, and A's are not,
    as in HF PEFT."""
    in_, out = sizes(base)
    if is_convolution(base):
        if r % base.groups:
            raise ValueError(f"r is {r}; a convolution in {base.groups} groups needs a multiple of {base.groups}")
        ones = [1] * len(base.kernel_size)
        return (r, base.in_channels, *base.kernel_size), (out, r // base.groups, *ones)
    experts = base.weight.shape[:1] if isinstance(base, ExpertsLinear) else ()
    return (*experts, r, in_), (*experts, out, r)


def low_rank_change(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """``B A`` in float32, for a weight as a matrix, or as one for each expert.

    Raises:
        TypeError: B has groups.
    """
    A, B = lora_A.float(), lora_B.float()
    if weight.dim() == 3:
        return B @ A
    A, B = A.flatten(1), B.flatten(1)
    if B.shape[1] != len(A):
        raise TypeError("an adapter of a convolution in groups cannot be merged: it reads all channels in each of them")
    return B @ A


def low_rank(
    base: nn.Module,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    dropout: float = 0.0,
    training: bool = False,
    bias: bool = True,
    offsets: Tensor | None = None,
) -> Tensor:
    """The base's output for ``x``, plus ``scaling * B A dropout(x)``; embeddings and experts have no dropout.

    Args:
        lora_A, lora_B: of the shapes that :func:`factor_shapes` tells, any float dtype.
        bias: False leaves out the bias of the layer.
        offsets: where experts' rows end, see :class:`~peftops.nn.ExpertsLinear`.
    """
    weight = base.weight
    if isinstance(base, ExpertsLinear):
        return experts_linear(
            x,
            base.matrices,
            offsets,
            base.bias if bias else None,
            lora_A=lora_A,
            lora_B=lora_B,
            scaling=scaling,
            compute=base.compute,
        )
    if is_quantized(weight):  # a step calls hundreds of linear layers: on a GPU the host must be fast enough
        return weight.product(
            x,
            base.bias if bias else None,
            lora_A=lora_A,
            lora_B=lora_B,
            scaling=scaling,
            dropout_p=dropout,
            training=training,
            compute=getattr(base, "compute", "float"),
        )
    if isinstance(base, nn.Embedding):
        y = base(x)
        return y + (scaling * (F.embedding(x, lora_A.t()) @ lora_B.t())).to(y.dtype)
    if is_convolution(base):
        y = base(x) if bias else convolved(base, x, base.weight, groups=base.groups)
        u = convolved(base, F.dropout(x, dropout, training), lora_A)
        return y + scaling * pointwise(base, u, lora_B, groups=base.groups)
    return lora_linear(
        x,
        matrix(base),
        base.bias if bias else None,
        lora_A=lora_A,
        lora_B=lora_B,
        scaling=scaling,
        dropout_p=dropout,
        training=training,
    )


def product(base: nn.Module, x: Tensor) -> Tensor:
    """``x W^T`` of a linear layer, without its bias."""
    weight = base.weight
    if is_quantized(weight):
        return weight.product(x, compute=getattr(base, "compute", "float"))
    return F.linear(x, matrix(base))
