"""``scaling * B A``, added to any layer that can be seen as a matrix. All of the LoRA family computes with this."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import experts_linear, lora_linear
from .experts_linear import ExpertsLinear
from .layers import matrix, sizes
from .quantized import is_quantized


def factor_shapes(base: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A and B of rank ``r`` for a layer: two matrices, one pair for each expert, or two
    convolutions of which the second is 1 x 1."""
    in_, out = sizes(base)
    if isinstance(base, nn.Conv2d):
        return (r, base.in_channels, *base.kernel_size), (out, r, 1, 1)
    experts = base.weight.shape[:1] if isinstance(base, ExpertsLinear) else ()
    return (*experts, r, in_), (*experts, out, r)


def low_rank_change(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """``B A`` as a matrix in float32, or one for each expert."""
    A, B = lora_A.float(), lora_B.float()
    return B @ A if A.dim() == 3 else B.flatten(1) @ A.flatten(1)


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
        bias: False leaves out the bias of a linear layer.
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
    if is_quantized(weight):  # a linear layer, of which a step calls hundreds: on a GPU the host must not be late
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
    if isinstance(base, nn.Conv2d):
        h = F.dropout(x, dropout, training)
        u = F.conv2d(h, lora_A.to(x.dtype), None, base.stride, base.padding, base.dilation)
        return base(x) + scaling * F.conv2d(u, lora_B.to(x.dtype))
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
