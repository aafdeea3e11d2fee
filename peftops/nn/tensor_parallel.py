"""LoRA beside a weight that is cut over several ranks (S-LoRA, arXiv:2311.03285, section 6).

A column-parallel layer has a part of the outputs on each rank, a row-parallel one a part of the inputs, and sums
its results over the ranks. Two ways to cut the factors with it:

* ``"slora"`` shares out the low-rank work as well: the small ``x A^T`` is gathered (column) or summed (row) between
  the two products. That sends about r values a token, few beside those that the layers themselves send.
* ``"local"`` sends nothing beside the layer's own sums: one factor is whole on every rank. It takes more computation
  and memory, and each rank has an ordinary adapter of its own, for its :class:`~peftops.AdapterPool`.

:class:`Parts` cuts a whole model, and adapters by the scheme "local" for the pools of its ranks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .quantized import is_quantized

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
        rank: the number of this rank.
        reduce: sums a tensor over all ranks. Gets r values a row. For inference: torch's collectives have no gradient.
    """
    share = scaling * F.linear(reduce(F.linear(x, A)), B)
    begin = rank * len(B)
    return torch.cat((y[..., :begin], y[..., begin : begin + len(B)] + share, y[..., begin + len(B) :]), -1)


def of_first_rank(values: Sequence[int]) -> list[int]:
    """The first rank's values, on all ranks of torch's default process group. Each rank passes the same number of
    values."""
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    t = torch.tensor(values, dtype=torch.int64, device=device)
    torch.distributed.broadcast(t, 0)
    return t.tolist()


class Summed(nn.Module):
    """A row-parallel layer: this rank's part of it, and the sum over the ranks of torch's default process group."""

    def __init__(self, part: nn.Linear):
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return all_reduce(self.part(x))


class Parts:
    """A model of transformers of which each process has a part: its heads of attention, and its share of the MLPs, as
    the model's own plan (``base_model_tp_plan``) cuts them. All other parts are whole on every rank.

    Args:
        model: dense, the same on all ranks; it is cut to this rank's part.
        rank, world: of this process.

    Raises:
        ValueError: the model has no plan, or one with other cuts than by columns and rows; a layer to be cut is in
            codes, or cannot be cut evenly. Nothing has changed then.
    """

    def __init__(self, model: nn.Module, rank: int, world: int):
        self.rank, self.world = rank, world
        config = model.config.get_text_config()
        heads = {name: getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads")}
        for name, count in heads.items():
            if count is not None and count % world:
                raise ValueError(f"{type(model).__name__} has {name}={count}, which {world} ranks cannot share evenly")
        self._how = _planned(model, getattr(config, "base_model_tp_plan", None) or {})
        for path, parallel in self._how.items():
            layer, dim = model.get_submodule(path), 0 if parallel == "column" else 1
            if type(layer) is not nn.Linear or is_quantized(layer.weight):
                raise ValueError(
                    f"{path} is not a dense linear layer, and only such layers can be cut for several ranks"
                )
            _cut(path, ("outputs", "inputs")[dim], layer.weight, dim, world)
        for path, parallel in self._how.items():
            self._cut_layer(model, path, parallel)

    def _cut_layer(self, model: nn.Module, path: str, parallel: str) -> None:
        layer, own = model.get_submodule(path), lambda t, dim: t.detach().chunk(self.world, dim)[self.rank].clone()
        layer.weight = nn.Parameter(own(layer.weight, 0 if parallel == "column" else 1), requires_grad=False)
        layer.out_features, layer.in_features = layer.weight.shape
        if parallel == "column" and layer.bias is not None:
            layer.bias = nn.Parameter(own(layer.bias, 0), requires_grad=False)
        if parallel == "row":
            if self.rank and layer.bias is not None:
                layer.bias = None  # the first rank's is in the sum
            model.set_submodule(path, Summed(layer))

    def adapter(
        self, factors: dict[str, tuple[Tensor, Tensor]], scalings: dict[str, float]
    ) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, float]]:
        """This rank's part of an adapter, A, B and the scaling by layer, under the names that the layers have now."""
        own, scaled = {}, {}
        for path, (A, B) in factors.items():
            how = self._how.get(path)
            name = f"{path}.part" if how == "row" else path
            shards = how and shard_lora(A, B, self.world, parallel=how, scheme="local")
            own[name], scaled[name] = shards[self.rank] if shards else (A, B), scalings[path]
        return own, scaled


def _planned(model: nn.Module, plan: dict[str, str]) -> dict[str, str]:
    """How each layer is cut."""
    found = {}
    for pattern, how in plan.items():
        expression = r"(.*\.)?" + re.escape(pattern).replace(r"\*", r"\d+")
        paths = [path for path, _ in model.named_modules() if re.fullmatch(expression, path)]
        if how in ("colwise", "rowwise"):
            found |= dict.fromkeys(paths, {"colwise": "column", "rowwise": "row"}[how])
        elif paths and not how.startswith("replicated"):
            raise ValueError(f"{type(model).__name__} is cut in a way that is not supported: {pattern} is {how}")
    if not found:
        raise ValueError(f"transformers has no plan to cut a {type(model).__name__} for several ranks")
    return found
