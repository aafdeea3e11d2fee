"""Linear layers over an MXFP4 weight."""

from __future__ import annotations

import torch
from torch import Tensor

from .mxfp4_tensor import BLOCK, MXFP4Tensor
from .packed_linear import Compute, of_another_kind


@torch.library.register_fake("peftops::mxfp4_linear")
def _(x, blocks, scales, bias, u, lora_B, scaling, int8=False):
    k = scales.shape[1] * BLOCK
    torch._check(x.shape[-1] == k, lambda: f"mxfp4_linear: the last dim of x must be {k}")
    return x.new_empty((*x.shape[:-1], scales.shape[0]))


@torch.library.register_fake("peftops::mxfp4_linear_backward")
def _(g, blocks, scales, v, lora_A, dropout_p, seed):
    return g.new_empty((*g.shape[:-1], scales.shape[1] * BLOCK))


def mxfp4_linear(
    x: Tensor,
    weight: MXFP4Tensor,
    bias: Tensor | None = None,
    *,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    compute: Compute = "float",
) -> Tensor:
    """``x W^T + bias + scaling * dropout(x) A^T B^T`` over an MXFP4 weight, such as those of gpt-oss.

    The weight is decoded in registers or cache-sized panels; the dense weight never exists, forward or backward. Codes
    are exact in every product. Sums are float32; with 16-bit ``x``, AVX-512 multiplies in int16 or bfloat16, as in
    :func:`peftops.nf4_linear`. A row has the same bits for any number of threads and any values of the other rows.
    Backward keeps ``x`` itself (only if ``lora_A`` needs a gradient), ``x A^T`` (float32) and a seed.

    ``compute="int8"`` allows ``x`` to be rounded to 8 bits, with a maximum for each row and block of the weight; codes,
    scales and sums are not changed. ``x`` is rounded only where that is faster: with AVX-512, with AVX2 up to 12
    rows, with ARM's int8 products from five rows on. The gradient is that of ``compute="float"``.

    On CUDA the dense weight does exist for many rows, and in backward: torch multiplies with a decoded temporary, as
    for :func:`peftops.nf4_linear`.

    Args:
        x: float32, bfloat16 or float16, ``[..., in]``; any strides.
        weight: ``[out, in]``, frozen; from :func:`peftops.mxfp4_quantize` or :meth:`MXFP4Tensor.from_blocks`.
        bias: ``[out]`` of any float dtype, or None.
        lora_A: ``[r, in]``, and lora_B: ``[out, r]``; of any float dtype, float32 for training.
        scaling: factor of the low-rank term.
        dropout_p: probability in [0, 1) of dropping an element of ``x`` on its way to ``lora_A``, in training.
        compute: ``"float"``, or ``"int8"`` to allow rounded activations (never on their way to ``lora_A``).

    Returns:
        ``[..., out]`` in x's dtype. Differentiable once in ``x``, ``bias``, ``lora_A`` and ``lora_B``.

    Raises:
        TypeError: weight is not an MXFP4Tensor.
        ValueError: it requires a gradient, which codes cannot have; is on another device than x; compute is
            unknown; or shapes of the factors do not fit together.
        RuntimeError: shapes do not fit, or a dtype is not one of the three.

    Examples:
        >>> weight = peftops.mxfp4_quantize(torch.randn(32, 64))
        >>> peftops.mxfp4_linear(torch.randn(2, 64), weight).shape
        torch.Size([2, 32])
    """
    if not isinstance(weight, MXFP4Tensor):
        raise of_another_kind("mxfp4_linear", weight, MXFP4Tensor)
    return weight.product(x, bias, lora_A, lora_B, scaling, dropout_p, training, compute)
