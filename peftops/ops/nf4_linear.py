"""Linear layers over an NF4 weight, with a low-rank term or without."""

import torch
from torch import Tensor

from .nf4_tensor import NF4Tensor
from .packed_linear import Compute, of_another_kind


@torch.library.register_fake("peftops::nf4_linear")
def _(
    x,
    packed,
    absmax,
    absmax_scale,
    absmax_offset,
    block_size,
    out_features,
    in_features,
    bias,
    u,
    lora_B,
    scaling,
    int8=False,
):
    torch._check(x.shape[-1] == in_features, lambda: f"nf4_linear: the last dim of x must be {in_features}")
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("peftops::nf4_linear_backward")
def _(g, packed, absmax, absmax_scale, absmax_offset, block_size, in_features, v, lora_A, dropout_p, seed):
    return g.new_empty((*g.shape[:-1], in_features))


def nf4_linear(
    x: Tensor,
    weight: NF4Tensor,
    bias: Tensor | None = None,
    *,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    compute: Compute = "float",
) -> Tensor:
    """``x W^T + bias + scaling * dropout(x) A^T B^T`` over an NF4 weight (QLoRA, arXiv:2305.14314).

    The weight is decoded in registers or cache-sized panels; the dense weight never exists, forward or backward.
    Sums are float32. With 16-bit ``x``, AVX-512 multiplies in int16: the error of an element of ``x`` is at most 2^-12
    of the mean magnitude of the others in its 32 to 128 columns, with or without outliers. A row has the same bits for
    any number of threads and any values of the other rows. Backward keeps ``x`` itself (only if ``lora_A`` needs a
    gradient), ``x A^T`` (float32) and a seed.

    ``compute="int8"`` allows ``x`` and the sixteen codes to be rounded to 8 bits, ``x`` with a maximum for each row and
    block of the weight (or 128 columns of it); absmax and sums are not changed. Normal activations and weights come out
    with a relative error of 0.8 %, root of the mean square; an outlier reduces the precision of the other elements of
    its block. Both are rounded only where that is faster and in_features is a multiple of 32: with AVX-512,
    with AVX2 up to 12 rows, with ARM's int8 products from five rows on. The gradient is that of ``compute="float"``.

    On CUDA the dense weight may exist. For up to some 64 rows of a 16-bit ``x`` the kernels are faster and decode on
    the way. For more rows, and in backward, the weight is decoded into a temporary of ``x``'s dtype, forward at most
    256 MiB at a time, and torch multiplies. ``PEFTOPS_NF4_LIBRARY=never`` in the environment always takes the kernels;
    ``always`` takes torch, except for float16 with an adapter. docs/cuda_roofline.md has the measurements.

    Args:
        x: float32, bfloat16 or float16, ``[..., in]``; any strides.
        weight: ``[out, in]``, frozen.
        bias: ``[out]`` of any float dtype, or None.
        lora_A: ``[r, in]``, and lora_B: ``[out, r]``; of any float dtype, float32 for training. ``x`` is not cast to
            their dtype.
        scaling: factor of the low-rank term.
        dropout_p: probability in [0, 1) of dropping an element of ``x`` on its way to ``lora_A``, in training.
        compute: ``"float"``, or ``"int8"`` to allow rounded activations and codes (never on the way to ``lora_A``).

    Returns:
        ``[..., out]`` in x's dtype. Differentiable once in ``x``, ``bias``, ``lora_A`` and ``lora_B``.

    Raises:
        TypeError: weight is not an NF4Tensor.
        ValueError: it requires a gradient, which codes cannot have; compute is unknown; shapes or devices do not fit
            together.
        RuntimeError: x or a factor has another dtype than the three.

    Examples:
        >>> weight = peftops.nf4_quantize(torch.randn(32, 64))
        >>> x, A, B = torch.randn(2, 64), torch.randn(4, 64), torch.zeros(32, 4)
        >>> torch.equal(peftops.nf4_linear(x, weight, lora_A=A, lora_B=B), peftops.nf4_linear(x, weight))
        True
    """
    if not isinstance(weight, NF4Tensor):
        raise of_another_kind("nf4_linear", weight, NF4Tensor)
    return weight.product(x, bias, lora_A, lora_B, scaling, dropout_p, training, compute)
