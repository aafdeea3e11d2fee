"""Linear layers over an NF4 weight, with a low-rank term or without."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .lora_linear import LoRATerm, autocast, check_lora, draw_seed, sum_rows
from .nf4_tensor import NF4Tensor

_linear = torch.ops.peftops.nf4_linear.default
_backward = torch.ops.peftops.nf4_linear_backward.default


@torch.library.register_fake("peftops::nf4_linear")
def _(x, packed, absmax, absmax_scale, absmax_offset, block_size, out_features, in_features, bias, u, lora_B, scaling):
    torch._check(x.shape[-1] == in_features, lambda: f"nf4_linear: the last dim of x must be {in_features}")
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("peftops::nf4_linear_backward")
def _(g, packed, absmax, absmax_scale, absmax_offset, block_size, in_features, v, lora_A, dropout_p, seed):
    return g.new_empty((*g.shape[:-1], in_features))


class _NF4Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, lora_A, lora_B, weight, n, k, scaling, dropout_p, seed):
        u = None if lora_A is None else LoRATerm(lora_A, lora_B, scaling, dropout_p, seed).shrink(x)
        # x is needed for the gradient of lora_A alone.
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, u, lora_A, lora_B, seed, *weight[:4])
        ctx.block_size, ctx.k, ctx.scaling, ctx.dropout_p = weight[4], k, scaling, dropout_p
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _linear(x, *weight, n, k, bias, u, lora_B, scaling)

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
        if need_x:
            dx = _backward(g, *weight, ctx.block_size, ctx.k, v, lora_A, ctx.dropout_p, seed)
        if need_bias:
            dbias = sum_rows(g, ctx.bias_dtype)
        return dx, dbias, dA, dB, None, None, None, None, None, None


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
) -> Tensor:
    """``x W^T + bias + scaling * dropout(x) A^T B^T`` over an NF4 weight (QLoRA, arXiv:2305.14314).

    The weight is decoded in registers or cache-sized panels; it never exists densely, forward or backward.
    Sums are float32; with 16-bit ``x``, AVX-512 multiplies in int16, with an error below the rounding of the
    result. The result has the same bits for any number of threads. Backward keeps ``x`` itself (only if
    ``lora_A`` needs a gradient), ``x A^T`` (float32) and a seed.

    CUDA is the exception: where that is reckoned faster, many rows on an H100 for instance, forward decodes the weight
    into a temporary of ``x``'s dtype and has torch multiply. ``PEFTOPS_NF4_LIBRARY=never`` in the environment keeps to
    the kernels, ``always`` to torch but for float16 with an adapter; docs/cuda_roofline.md has the reasons.

    Args:
        x: float32, bfloat16 or float16, ``[..., in]``; any strides.
        weight: ``[out, in]``, frozen.
        bias: ``[out]`` of any float dtype, or None.
        lora_A: ``[r, in]``, and lora_B: ``[out, r]``; of any float dtype, float32 for training. ``x`` is not
            cast to meet them.
        scaling: factor of the low-rank term.
        dropout_p: probability in [0, 1) of dropping an element of ``x`` on its way to ``lora_A``, in training.

    Returns:
        ``[..., out]`` in x's dtype. Differentiable once in ``x``, ``bias``, ``lora_A`` and ``lora_B``.

    Raises:
        TypeError: weight is not an NF4Tensor.
        ValueError: it requires a gradient, which codes cannot have; shapes or devices do not fit together.
        RuntimeError: x or a factor has a dtype that is none of the three.
    """
    if not isinstance(weight, NF4Tensor):
        raise TypeError(
            f"nf4_linear: weight must be an NF4Tensor (see peftops.nf4_quantize), not a {type(weight).__name__}"
        )
    if weight.dim() != 2:
        raise ValueError(f"nf4_linear: weight must have two dims, [out, in], not shape {list(weight.shape)}")
    if x.device != weight.device:
        raise ValueError(f"nf4_linear: x is on {x.device}, weight on {weight.device}")
    n, k = weight.shape
    x = autocast(x)
    if lora_A is None and lora_B is None:
        dropout_p, seed = 0.0, None
    else:
        check_lora("nf4_linear", n, k, lora_A, lora_B, dropout_p)
        dropout_p, seed = draw_seed(x, dropout_p, training)
    if torch.is_grad_enabled():
        if weight.requires_grad:
            raise ValueError("nf4_linear: weight requires a gradient, but codes cannot have one; freeze it")
        return _NF4Linear.apply(x, bias, lora_A, lora_B, weight._arguments, n, k, scaling, dropout_p, seed)
    u = None if lora_A is None else LoRATerm(lora_A, lora_B, scaling, dropout_p, seed).shrink(x)
    return _linear(x, *weight._arguments, n, k, bias, u, lora_B, scaling)
