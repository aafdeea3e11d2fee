"""LoRA beside a weight that is cut over several ranks (S-LoRA, arXiv:2311.03285, section 6).

A column-parallel layer has a part of the outputs on each rank, a row-parallel one a part of the inputs, and sums
its results over the ranks. Two ways to cut the factors with it:

* ``"slora"`` shares out the low-rank work as well: the small ``x A^T`` is gathered (column) or summed (row) between
  the two products. What that sends, about r values a token, is little beside what the layers themselves send.
* ``"local"`` sends nothing more than the layer does: one factor is whole on every rank, so there is more to compute
  and to keep, and each rank has an ordinary adapter of its own, fit for :class:`~peftops.AdapterPool`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

PARALLEL, SCHEMES = ("column", "row"), ("slora", "local")


def _check(op: str, parallel: str, scheme: str) -> None:
    for name, value, known in (("parallel", parallel, PARALLEL), ("scheme", scheme, SCHEMES)):
        if value not in known:
            raise ValueError(f"{op}: {name} must be one of {', '.join(known)}, not {value!r}")


def _cut(op: str, what: str, t: Tensor, dim: int, world: int) -> Sequence[Tensor]:
    if t.shape[dim] % world:
        raise ValueError(f"{op}: the {t.shape[dim]} {what} cannot be cut evenly over {world} ranks")
    return t.chunk(world, dim)


def shard_lora(
    A: Tensor, B: Tensor, world: int, *, parallel: str, scheme: str = "slora"
) -> list[tuple[Tensor, Tensor]]:
    """Cut the factors of one layer, A ``[r, in]`` and B ``[out, r]``, for ``world`` ranks.

    =========  ==========  =====================================  ============
    scheme     parallel    A of a rank                            B of a rank
    =========  ==========  =====================================  ============
    slora      column      by rank, ``[ceil(r / world), in]``     by output, ``[out / world, world * ceil(r / world)]``
    slora      row         by input, ``[r, in / world]``          by output, ``[out / world, r]``
    local      column      whole                                  by output, ``[out / world, r]``
    local      row         by input, ``[r, in / world]``          whole
    =========  ==========  =====================================  ============

    An r that ``world`` does not divide is padded with zeros, which changes no result.

    Returns:
        (A, B) for each rank.

    Raises:
        ValueError: parallel or scheme is unknown, a shape is wrong, or inputs or outputs cannot be cut evenly.
    """
    op = "shard_lora"
    _check(op, parallel, scheme)
    if world < 1:
        raise ValueError(f"{op}: world must be at least 1, not {world}")
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
        shapes = f"{list(A.shape)} and {list(B.shape)}"
        raise ValueError(f"{op}: A and B must have shapes [r, in] and [out, r], not {shapes}")
    if parallel == "row":
        inputs = _cut(op, "inputs", A, 1, world)
        outputs = _cut(op, "outputs", B, 0, world) if scheme == "slora" else [B] * world
        return list(zip(inputs, outputs, strict=True))
    outputs = _cut(op, "outputs", B, 0, world)
    if scheme == "local":
        return [(A, b) for b in outputs]
    pad = -len(A) % world
    return [(a, F.pad(b, (0, pad))) for a, b in zip(F.pad(A, (0, 0, 0, pad)).chunk(world), outputs, strict=True)]


def unshard_lora(
    shards: Sequence[tuple[Tensor, Tensor]], r: int, *, parallel: str, scheme: str = "slora"
) -> tuple[Tensor, Tensor]:
    """The factors that :func:`shard_lora` cut, from those of all ranks in order; r is the rank before padding."""
    _check("unshard_lora", parallel, scheme)
    first, second = zip(*shards, strict=True)
    if parallel == "row":
        return torch.cat(first, 1), torch.cat(second) if scheme == "slora" else second[0]
    A = torch.cat(first)[:r] if scheme == "slora" else first[0]
    return A, torch.cat(second)[:, :r]


def all_gather(t: Tensor) -> list[Tensor]:
    """t of every rank of torch's default process group, in order."""
    parts = [torch.empty_like(t) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, t.contiguous())
    return parts


def all_reduce(t: Tensor) -> Tensor:
    """The sum of t over the ranks of torch's default process group."""
    t = t.contiguous().clone()
    torch.distributed.all_reduce(t)
    return t


def column_parallel_lora(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float = 1.0,
    *,
    gather: Callable[[Tensor], Sequence[Tensor]] = all_gather,
) -> Tensor:
    """``y + scaling * gather(x A^T) B^T`` for one rank of a column-parallel layer cut by the scheme "slora".

    Args:
        y: ``[..., out / world]``, this rank's outputs of the layer.
        x: ``[..., in]``, the same on all ranks.
        A, B, scaling: this rank's shard.
        gather: gives the tensor of every rank, in order. Sends ``ceil(r / world)`` values a row. For inference:
            torch's collectives have no gradient.
    """
    return y + scaling * F.linear(torch.cat(list(gather(F.linear(x, A))), -1), B)


def row_parallel_lora(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float = 1.0,
    *,
    rank: int,
    reduce: Callable[[Tensor], Tensor] = all_reduce,
) -> Tensor:
    """y, with ``scaling * reduce(x A^T) B^T`` added to this rank's share of the outputs, for one rank of a
    row-parallel layer cut by the scheme "slora".

    Add it before the layer sums y over the ranks: that sum then puts the shares together, with no gather of its own.

    Args:
        y: ``[..., out]``, this rank's summand of the layer's outputs.
        x: ``[..., in / world]``, this rank's inputs.
        A, B, scaling: this rank's shard.
        rank: which one it is.
        reduce: sums a tensor over all ranks. Gets r values a row. For inference: torch's collectives have no gradient.
    """
    share = scaling * F.linear(reduce(F.linear(x, A)), B)
    begin = rank * len(B)
    return torch.cat((y[..., :begin], y[..., begin : begin + len(B)] + share, y[..., begin + len(B) :]), -1)
