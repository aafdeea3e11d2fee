"""Linear layers of many experts over rows that are sorted by expert."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .experts_format import DENSE, FORMATS, ExpertsFormat, flat
from .lora_linear import autocast, autocasting
from .packed_linear import Compute
from .packed_tensor import PackedTensor

_ops = torch.ops.peftops
_shrink, _gradient = _ops.experts_shrink.default, _ops.experts_gradient.default


@torch.library.register_fake("peftops::experts_shrink")
def _(x, factor, offsets, by_rank, scale):
    r = factor.shape[0] // offsets.shape[0] if by_rank else factor.shape[1]
    return x.new_empty((x.shape[0], r), dtype=torch.float32)


@torch.library.register_fake("peftops::experts_gradient")
def _(u, x, offsets, dtype, by_rank, scale):
    rows, columns = (u.shape[1], x.shape[1]) if by_rank else (x.shape[1], u.shape[1])
    return u.new_empty((offsets.shape[0] * rows, columns), dtype=dtype)


def _forward(x, bias, lora_A, lora_B, offsets, weight, form, scaling, int8):
    u = None if lora_A is None else _shrink(x, flat(lora_A), offsets, True, 1.0)
    return u, form.forward(x, weight, offsets, flat(bias), u, flat(lora_B), scaling, int8)


class _ExpertsLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, lora_A, lora_B, offsets, weight, form, scaling, int8):
        u, y = _forward(x, bias, lora_A, lora_B, offsets, weight, form, scaling, int8)
        tensors = [part for part in weight if not isinstance(part, int)]
        # only the gradient of lora_A needs x
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, u, lora_A, lora_B, offsets, *tensors)
        ctx.numbers, ctx.form, ctx.scaling = weight[len(tensors) :], form, scaling
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, u, lora_A, lora_B, offsets, *tensors = ctx.saved_tensors
        need_x, need_bias, need_A, need_B = ctx.needs_input_grad[:4]
        v = dx = dbias = dA = dB = None
        if u is not None:
            v = _shrink(g, flat(lora_B), offsets, False, ctx.scaling) if need_x or need_A else None
            dA = _gradient(v, x, offsets, lora_A.dtype, True, 1.0).view(lora_A.shape) if need_A else None
            dB = _gradient(u, g, offsets, lora_B.dtype, False, ctx.scaling).view(lora_B.shape) if need_B else None
        if need_x:
            dx = ctx.form.backward(g, (*tensors, *ctx.numbers), offsets, v, flat(lora_A))
        if need_bias:  # a gradient of rank one, whose factor is 1 in every row
            ones = torch.ones(g.shape[0], 1, device=g.device)
            dbias = _gradient(ones, g, offsets, ctx.bias_dtype, True, 1.0).view(len(offsets), -1)
        return dx, dbias, dA, dB, *[None] * 5


def _format(x: Tensor, weight: Tensor) -> ExpertsFormat:
    """The weight's format, with its product. Raises an error unless x can be multiplied with the weight."""
    form = next((form for kind, form in FORMATS.items() if isinstance(weight, kind)), DENSE)
    if form is DENSE and isinstance(weight, PackedTensor):
        kinds = ", ".join(kind.__name__ for kind in FORMATS)
        raise TypeError(f"experts_linear: weight must be dense or one of {kinds}, not a {type(weight).__name__}")
    if weight.dim() != 3:
        raise ValueError(
            f"experts_linear: weight must have three dims, [experts, out, in], not shape {list(weight.shape)}"
        )
    if x.dim() != 2 or x.shape[1] != weight.shape[2]:
        raise ValueError(f"experts_linear: x must have shape [rows, {weight.shape[2]}], not {list(x.shape)}")
    if x.device != weight.device:
        raise ValueError(f"experts_linear: x is on {x.device}, weight on {weight.device}")
    if form is DENSE and weight.dtype != x.dtype:
        raise TypeError(f"experts_linear: x is {x.dtype}, weight {weight.dtype}; they must be the same")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("experts_linear: weight requires a gradient, but this op makes none for it; freeze it")
    return form


def _check_operands(
    shape: torch.Size, offsets: Tensor, bias: Tensor | None, A: Tensor | None, B: Tensor | None
) -> None:
    """Raise an error unless the operands fit a stack of this shape."""
    experts, n, k = shape
    if offsets.dtype not in (torch.int32, torch.int64) or offsets.shape != (experts,):
        raise ValueError(
            f"experts_linear: offsets must be int32 or int64 of shape [{experts}], where the rows of each expert end, "
            f"not {offsets.dtype} {list(offsets.shape)}"
        )
    if bias is not None and bias.shape != (experts, n):
        raise ValueError(f"experts_linear: bias must have shape [{experts}, {n}], not {list(bias.shape)}")
    if A is None and B is None:
        return
    if A is None or B is None:
        missing = "lora_A" if A is None else "lora_B"
        raise ValueError(f"experts_linear: lora_A and lora_B belong together, but {missing} is None")
    if A.dim() != 3 or (A.shape[0], A.shape[2]) != (experts, k) or A.shape[1] == 0:
        raise ValueError(f"experts_linear: lora_A must have shape [{experts}, r, {k}], not {list(A.shape)}")
    if B.shape != (experts, n, A.shape[1]):
        raise ValueError(f"experts_linear: lora_B must have shape [{experts}, {n}, {A.shape[1]}], not {list(B.shape)}")


def experts_linear(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    *,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    compute: Compute = "float",
) -> Tensor:
    """``x W_e^T + bias_e + scaling * x A_e^T B_e^T`` for rows of x that are sorted by expert ``e``: the linear layers
    of a mixture of experts, over weights in 4 bits or dense ones.

    On the CPU, and for any number of threads, a row has the same bits as in :func:`peftops.nf4_linear`,
    :func:`peftops.group_linear` or :func:`peftops.mxfp4_linear` of its expert's rows and weight. An expert without rows
    costs nothing and has gradients of zero. Backward keeps ``x`` itself (only if ``lora_A`` needs a gradient) and ``x
    A_e^T`` (float32).

    On CUDA the call does not wait for the device: the kernel reads offsets there, so a captured graph works for any
    numbers of rows. Offsets are not checked there; rows that decreasing offsets leave out are zero. On an H100 or a
    B200, backward in bfloat16 may decode the weights of the experts that have rows, 256 MiB at a time, and torch's
    grouped product multiplies: always for groups and MXFP4, for NF4 where that is faster. ``PEFTOPS_NF4_LIBRARY``
    decides otherwise, as in :func:`peftops.nf4_linear`; on other GPUs ``always`` waits for the device.

    Args:
        x: float32, bfloat16 or float16, ``[rows, in]``; any strides.
        weight: ``[experts, out, in]``, frozen: an :class:`~peftops.NF4Tensor`, a :class:`~peftops.GroupQuantTensor`, an
            :class:`~peftops.MXFP4Tensor`, or a dense tensor of x's dtype, which may be the transpose of a contiguous
            ``[experts, in, out]``.
        offsets: int32 or int64, ``[experts]``: rows ``offsets[e - 1]`` to ``offsets[e]`` are expert e's, as in
            ``torch.nn.functional.grouped_mm``. Rows from the last on are zero in the result and in the gradient.
        bias: ``[experts, out]`` of any float dtype, or None.
        lora_A: ``[experts, r, in]``, and lora_B: ``[experts, out, r]``; of any float dtype, float32 for training.
        scaling: factor of the low-rank term.
        compute: ``"float"``, or ``"int8"`` to allow rounded activations and codes, as in :func:`peftops.nf4_linear`.

    Returns:
        ``[rows, out]`` in x's dtype. Differentiable once in ``x``, ``bias``, ``lora_A`` and ``lora_B``.

    Raises:
        TypeError: weight is packed in a format without a product here, or dense in another dtype than x.
        ValueError: weight requires a gradient; compute is unknown; shapes, devices or the dtype of offsets do not fit.
        RuntimeError: offsets decrease or exceed the rows (on the CPU), or a dtype is not one of the three.

    Examples:
        >>> weight = peftops.nf4_quantize(torch.randn(4, 32, 64))
        >>> x, offsets = torch.randn(6, 64), torch.tensor([2, 2, 5, 6])  # expert 1 has no rows
        >>> y = peftops.experts_linear(x, weight, offsets)
        >>> dense = peftops.nf4_dequantize(weight)
        >>> torch.allclose(y[2:5], x[2:5] @ dense[2].T, atol=1e-4)
        True
    """
    x = autocast(x)
    if autocasting(x) and not isinstance(weight, PackedTensor):
        weight = weight.to(x.dtype)
    form = _format(x, weight)
    _check_operands(weight.shape, offsets, bias, lora_A, lora_B)
    if compute not in ("float", "int8"):
        raise ValueError(f"experts_linear: compute must be 'float' or 'int8', not {compute!r}")
    arguments = (x, bias, lora_A, lora_B, offsets.long(), form.arguments(weight), form, scaling, compute == "int8")
    return _ExpertsLinear.apply(*arguments) if torch.is_grad_enabled() else _forward(*arguments)[1]
