"""Linear layers with a low-rank term over a dense weight, and the thin products that they are made of."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_shrink = torch.ops.peftops.lora_shrink.default
_expand_ = torch.ops.peftops.lora_expand_.default
_gradient = torch.ops.peftops.lora_gradient.default


@torch.library.register_fake("peftops::lora_shrink")
def _(x, factor, by_rank, scale, dropout_p, seed):
    k = x.shape[-1]
    torch._check(factor.dim() == 2 and factor.shape[1 if by_rank else 0] == k)
    return x.new_empty((x.numel() // k if k else 0, factor.shape[0 if by_rank else 1]), dtype=torch.float32)


@torch.library.register_fake("peftops::lora_expand_")
def _(y, u, factor, by_rank, scale, dropout_p, seed):
    return None


@torch.library.register_fake("peftops::lora_gradient")
def _(u, x, dtype, by_rank, scale, dropout_p, seed):
    k, r = x.shape[-1], u.shape[-1]
    return u.new_empty((r, k) if by_rank else (k, r), dtype=dtype)


class LoRATerm:
    """``scaling * dropout(x) A^T B^T`` and its gradients, with the tensors that the backward pass needs.

    The intermediate ``u = dropout(x) A^T`` is float32 ``[rows of x, r]``; dropout is a seed.
    """

    def __init__(self, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout_p: float, seed: Tensor | None):
        self.A, self.B, self.scaling = lora_A, lora_B, scaling
        self.dropout = dropout_p, seed

    def shrink(self, x: Tensor) -> Tensor:
        """u, from x."""
        return _shrink(x, self.A, True, 1.0, *self.dropout)

    def expand_(self, y: Tensor, u: Tensor) -> None:
        """Add the term to y."""
        _expand_(y, u, self.B, False, self.scaling, 0.0, None)

    def shrink_gradient(self, g: Tensor) -> Tensor:
        """v, the gradient of u before dropout, from the gradient of the output."""
        return _shrink(g, self.B, False, self.scaling, 0.0, None)

    def expand_gradient_(self, dx: Tensor, v: Tensor) -> None:
        """Add the term's gradient to dx."""
        _expand_(dx, v, self.A, True, 1.0, *self.dropout)

    def gradient_A(self, x: Tensor, v: Tensor) -> Tensor:
        return _gradient(v, x, self.A.dtype, True, 1.0, *self.dropout)

    def gradient_B(self, g: Tensor, u: Tensor) -> Tensor:
        return _gradient(u, g, self.B.dtype, False, self.scaling, 0.0, None)


def check_lora(op: str, n: int, k: int, lora_A: Tensor | None, lora_B: Tensor | None, dropout_p: float) -> None:
    """Raise an error unless the factors of ``op``, over a weight ``[n, k]``, fit together."""
    if lora_A is None or lora_B is None:
        raise ValueError(
            f"{op}: lora_A and lora_B belong together, but {'lora_A' if lora_A is None else 'lora_B'} is None"
        )
    if lora_A.dim() != 2 or lora_A.shape[1] != k or lora_A.shape[0] == 0:
        raise ValueError(f"{op}: lora_A must have shape [r, {k}], not {list(lora_A.shape)}")
    if lora_B.shape != (n, lora_A.shape[0]):
        raise ValueError(f"{op}: lora_B must have shape [{n}, {lora_A.shape[0]}], not {list(lora_B.shape)}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{op}: dropout_p must be in [0, 1), not {dropout_p}")


def draw_seed(x: Tensor, dropout_p: float, training: bool) -> tuple[float, Tensor | None]:
    """The dropout of one call: its probability, and a seed from torch's generator unless that is 0."""
    if not training or dropout_p == 0.0:
        return 0.0, None
    return dropout_p, torch.randint(0, 2**62, (), device=x.device)


def autocasting(x: Tensor) -> bool:
    """Whether autocast is on for x (the meta device knows none)."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def autocast(x: Tensor) -> Tensor:
    """x in the dtype that autocast gives to the input of a linear layer."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if autocasting(x) else x


def sum_rows(g: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of a bias: summed in float32, rounded once."""
    return g.reshape(-1, g.shape[-1]).sum(0, dtype=torch.float32).to(dtype)


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed):
        term = LoRATerm(lora_A, lora_B, scaling, dropout_p, seed)
        y = F.linear(x, weight, bias)
        u = term.shrink(x)
        term.expand_(y, u)
        # With a frozen A (LoRA-FA, VeRA) over a frozen weight, backward needs only u, a fraction of x.
        need_x = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        ctx.save_for_backward(x if need_x else None, weight, u, lora_A, lora_B, seed)
        ctx.scaling, ctx.dropout_p = scaling, dropout_p
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, weight, u, lora_A, lora_B, seed = ctx.saved_tensors
        need_x, need_weight, need_bias, need_A, need_B = ctx.needs_input_grad[:5]
        term = LoRATerm(lora_A, lora_B, ctx.scaling, ctx.dropout_p, seed)
        dx = dweight = dbias = None
        rows = g.reshape(-1, g.shape[-1])
        v = term.shrink_gradient(g)
        if need_x:
            dx = torch.matmul(g, weight)
            term.expand_gradient_(dx, v)
        if need_weight:
            dweight = rows.t() @ x.reshape(-1, x.shape[-1])
        if need_bias:
            dbias = sum_rows(g, g.dtype)
        dA = term.gradient_A(x, v) if need_A else None
        dB = term.gradient_B(g, u) if need_B else None
        return dx, dweight, dbias, dA, dB, None, None, None


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """``x W^T + bias + scaling * dropout(x) A^T B^T`` over a dense weight (LoRA, arXiv:2106.09685).

    The base product is torch's own; the low-rank term is added in place, in float32. Backward keeps ``x``
    itself (unless ``lora_A`` and ``weight`` are frozen), ``x A^T`` (float32) and a seed, and no copy or cast of ``x``.

    Args:
        x: float32, bfloat16 or float16, ``[..., in]``.
        weight: ``[out, in]``, of x's dtype.
        bias: ``[out]`` of x's dtype, or None.
        lora_A: ``[r, in]``, and lora_B: ``[out, r]``; of any float dtype, float32 for training.
        scaling: factor of the low-rank term.
        dropout_p: probability in [0, 1) of dropping an element of ``x`` on its way to ``lora_A``, in training.

    Returns:
        ``[..., out]`` in x's dtype. Differentiable once in all tensors.

    Examples:
        >>> x, weight = torch.randn(2, 64), torch.randn(32, 64)
        >>> peftops.lora_linear(x, weight, lora_A=torch.randn(4, 64), lora_B=torch.randn(32, 4)).shape
        torch.Size([2, 32])
    """
    x = autocast(x)
    if autocasting(x):
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    n, k = weight.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"lora_linear: the last dim of x must be {k}, but its shape is {list(x.shape)}")
    if x.dtype != weight.dtype:
        raise TypeError(f"lora_linear: x is {x.dtype}, weight {weight.dtype}; they must be the same")
    check_lora("lora_linear", n, k, lora_A, lora_B, dropout_p)
    # The product is of rows, [n, k]: with more dimensions, torch returns a view of it. Autograd forbids changing a view
    # that a Function returns, and models do change it (y += residual).
    rows = x.flatten(0, -2) if x.dim() > 2 else x
    y = _LoRALinear.apply(rows, weight, bias, lora_A, lora_B, scaling, *draw_seed(x, dropout_p, training))
    return y.view(*x.shape[:-1], n) if x.dim() > 2 else y
