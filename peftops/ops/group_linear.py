"""Linear layers over a group-quantised weight."""

from __future__ import annotations

import torch
from torch import Tensor

from .group_tensor import GroupQuantTensor
from .packed_linear import Compute, of_another_kind


@torch.library.register_fake("peftops::group_linear")
def _(x, packed, scales, zeros, bits, group_size, bias, u, lora_B, scaling, int8=False):
    k = scales.shape[1] * group_size
    torch._check(x.shape[-1] == k, lambda: f"group_linear: the last dim of x must be {k}")
    return x.new_empty((*x.shape[:-1], scales.shape[0]))


@torch.library.register_fake("peftops::group_linear_backward")
def _(g, packed, scales, zeros, bits, group_size, v, lora_A):
    return g.new_empty((*g.shape[:-1], scales.shape[1] * group_size))


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

    The weight is decoded in registers or cache-sized panels; the dense weight never exists, forward or backward.
    Sums are float32; with 16-bit ``x``, AVX-512 multiplies in int16 or bfloat16, with an error of the order
    of the rounding of the result. The result has the same bits for any number of threads. Backward keeps ``x``
    itself (only if ``lora_A`` needs a gradient), ``x A^T`` (float32) and a seed.

    ``compute="int8"`` allows ``x`` to be rounded to 8 bits, with a maximum for each row and group (or 128
    columns of it); codes, scales, zeros and sums are not changed. Normal activations come out with a relative
    error of 0.5 % (group 32) to 0.7 % (128 and more), root of the mean square; an outlier reduces the precision of the
    other elements of its group. ``x`` is rounded only where that is faster, in groups of 32 and more: with AVX-512 for
    codes of 4 bits, and for others from five rows on; with AVX2 for codes of 4 bits, up to 12 rows; with ARM's int8
    products from five rows on. The gradient is that of ``compute="float"``.

    On CUDA the dense weight does exist for many rows, and in backward: torch multiplies with a decoded temporary, as
    for :func:`peftops.nf4_linear`.

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
        RuntimeError: shapes do not fit, or a dtype is not one of the three.

    Examples:
        >>> weight = peftops.group_quantize(torch.randn(32, 64))
        >>> peftops.group_linear(torch.randn(2, 64), weight).shape
        torch.Size([2, 32])
    """
    if not isinstance(weight, GroupQuantTensor):
        raise of_another_kind("group_linear", weight, GroupQuantTensor)
    return weight.product(x, bias, lora_A, lora_B, scaling, dropout_p, training, compute)
