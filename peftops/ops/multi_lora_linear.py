"""Linear layers with the low-rank terms of many adapters, one per row of the batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .. import _C
from .lora_linear import autocast
from .packed_tensor import PackedTensor

_add_ = torch.ops.peftops.multi_lora_add_.default
_gradient = torch.ops.peftops.multi_lora_gradient.default

LINE = _C.lora_line  # elements; the rows of factors are padded to whole lines
MAX_RANK = _C.lora_max_rank


def _base(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not isinstance(weight, PackedTensor):
        return F.linear(x, weight, bias)
    if not isinstance(weight, kinds := tuple(PackedTensor.FORMATS.values())):
        names = ", ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"multi_lora_linear: weight must be dense or one of {names}, not a {type(weight).__name__}")
    return weight.product(x, bias)


@torch.library.register_fake("peftops::multi_lora_add_")
def _(y, x, index, storage, handles, pages, where, scaling, transposed, max_rank):
    return x.new_empty((x.numel() // max(x.shape[-1], 1), max_rank), dtype=torch.float32)


@torch.library.register_fake("peftops::multi_lora_gradient")
def _(u, x, index, wanted, handles, pages, where, scaling, by_rank, total):
    return u.new_empty((total * x.shape[-1],))


@dataclass(frozen=True)
class PoolLayer:
    """One layer of an :class:`~peftops.AdapterPool`: where the factors of its resident adapters lie, by slot."""

    in_features: int
    out_features: int
    storage: Tensor  # [pages, page_size]
    handles: Tensor  # int64 [slots]: the adapter's index, -1 where none is loaded
    pages: Tensor  # int32 [slots, pages]
    where: Tensor  # int64 [slots, 3]: where A begins, where B^T begins, the rank
    scaling: Tensor  # float32 [slots]
    max_rank: list[int]  # of all adapters that the pool knows; a list of one, since it grows
    trainable: dict[int, tuple[Tensor, Tensor]]  # index -> A, B

    @property
    def slots(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.handles, self.pages, self.where, self.scaling

    def add_(self, y: Tensor, x: Tensor, index: Tensor, transposed: bool = False) -> Tensor:
        """``y += s u B^T`` with ``u = x A^T``, which is returned; if transposed, the same with A and B swapped."""
        return _add_(y, x, index, self.storage, *self.slots, transposed, self.max_rank[0])


class _Terms(torch.autograd.Function):
    """Adds the terms to y, the base product, in place: no other code has seen y yet."""

    @staticmethod
    def forward(ctx, y, x, index, layer, wanted, *factors):
        u = layer.add_(y, x, index)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, u, index)
        ctx.layer, ctx.wanted, ctx.like = layer, wanted, [(f.device, f.dtype) for f in factors]
        ctx.ranks = [A.shape[0] for A in factors[::2]]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, u, index = ctx.saved_tensors
        g, layer, need_x = g.contiguous(), ctx.layer, ctx.needs_input_grad[1]
        if not (need_x or ctx.ranks):
            return g, *[None] * (len(ctx.needs_input_grad) - 1)
        dx = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        v = layer.add_(dx, g, index, transposed=True)
        grads = []
        if ctx.ranks:
            wanted, total = torch.tensor(ctx.wanted, device="cpu"), sum(ctx.ranks)
            dA = _gradient(v, x, index, wanted, *layer.slots, True, total)
            dB = _gradient(u, g, index, wanted, *layer.slots, False, total)
            k, n = x.shape[-1], g.shape[-1]
            parts = (d.split([r * width for r in ctx.ranks]) for d, width in ((dA, k), (dB, n)))
            for r, a, b in zip(ctx.ranks, *parts, strict=True):
                grads += [a.view(r, k), b.view(n, r)]
        grads = [d.to(*like) for d, like in zip(grads, ctx.like, strict=True)]
        return g, dx if need_x else None, None, None, None, *grads


def multi_lora_linear(
    x: Tensor, weight: Tensor, pool_layer: PoolLayer, adapter_index: Tensor, bias: Tensor | None = None
) -> Tensor:
    """``x W^T + bias``, and to each row the term ``s_a x A_a^T B_a^T`` of its own adapter (S-LoRA, arXiv:2311.03285).

    One base product serves all rows, and the terms are added to it. Their sums are float32. The op groups rows by
    adapter, and reads factors from the pool's pages. Adapters may have any ranks and scalings.

    On CUDA the host plans a batch: it groups the rows, looks up pages, and copies both to the GPU with each call,
    without waiting. A CUDA graph keeps that plan: it replays the adapters of its capture, even if ``adapter_index``
    changes later. So call this op between graphs, or capture one graph per batch of adapters and discard it when one of
    them is evicted.

    Args:
        x: float32, bfloat16 or float16, ``[..., in]``.
        weight: ``[out, in]``, dense of x's dtype, an :class:`~peftops.NF4Tensor` or a
            :class:`~peftops.GroupQuantTensor`.
        pool_layer: ``pool.layer(name)`` of an :class:`~peftops.AdapterPool`.
        adapter_index: int64, one per row of x, from ``pool.use(names)``, on the CPU. A row with -1 has exactly the
            base's bits.
        bias: ``[out]`` or None.

    Returns:
        ``[..., out]`` in x's dtype. Differentiable once in x, and in A and B of those trainable adapters that
        the batch names.

    Raises:
        TypeError: weight is packed in a format without a product here.
        ValueError: shapes do not fit.
        RuntimeError: an index names no loaded adapter, or one that was evicted or changed since; the pool is on
            another device than x.

    Examples:
        >>> pool = peftops.AdapterPool({"layer": (64, 32)}, pages=4)
        >>> pool.add("a", {"layer": (torch.randn(4, 64), torch.randn(32, 4))}, {"layer": 0.5})
        >>> x, weight = torch.randn(3, 64), peftops.nf4_quantize(torch.randn(32, 64))
        >>> with pool.use(["a", None, "a"]) as index:
        ...     y = peftops.multi_lora_linear(x, weight, pool.layer("layer"), index)
    """
    x = autocast(x)
    n, k = pool_layer.out_features, pool_layer.in_features
    if weight.shape != (n, k):
        raise ValueError(f"multi_lora_linear: weight must have shape [{n}, {k}], not {list(weight.shape)}")
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"multi_lora_linear: the last dim of x must be {k}, but its shape is {list(x.shape)}")
    y = _base(x, weight, bias)
    if torch.is_grad_enabled():
        wanted = []
        if pool_layer.trainable:
            present = set(adapter_index.flatten().tolist())
            wanted = [i for i in list(pool_layer.trainable) if i in present]
        factors = [f for i in wanted for f in pool_layer.trainable[i]]
        return _Terms.apply(y, x, adapter_index, pool_layer, wanted, *factors)
    pool_layer.add_(y, x, adapter_index)
    return y
