"""Shifted sparse attention: causal attention within groups of tokens, shifted for half of the heads."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


def boundaries(tokens: int, group: int, start: int) -> list[tuple[int, int]]:
    """The groups ``[a, b)`` that cover ``tokens``: the first ends at ``start``, each other one is ``group`` long."""
    return list(pairwise([0, *range(start, tokens, group), tokens]))


class ShiftedAttention:
    """The attention function of an attention module of transformers, in place of one from the registry.

    The model's own function runs once for each group, with that group's part of the mask: padding stays hidden, and all
    other work of the function stays the same. Scores number ``tokens * group / 2`` a head instead of ``tokens^2 / 2``.

    Args:
        group: tokens of a group, at least 2; None for a quarter of the sequence, rounded up.
        shift: whether the second half of the heads has its groups shifted by half a group.
    """

    def __init__(self, group: int | None, shift: bool):
        self.group, self.shift = group, shift

    def __call__(
        self,
        function: Callable,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        tokens = query.shape[2]
        if key.shape[2] != tokens:
            raise ValueError(
                f"shifted attention is for training and knows no cache: {tokens} queries, but {key.shape[2]} keys; "
                "call model.eval() to generate"
            )
        group = self.group or max(2, -(-tokens // 4))
        halves = []
        for half, start in enumerate((group, group // 2 if self.shift else group)):
            spans, parts = boundaries(tokens, group, start), []
            # Split, not sliced: each of many slices would have a gradient of the whole size, mostly zero.
            own = (t.chunk(2, 1)[half].split([b - a for a, b in spans], 2) for t in (query, key, value))
            for (a, b), q, k, v in zip(spans, *own, strict=True):
                # The last two dimensions are queries and keys; a mask of two, of flash attention, has keys alone.
                mask = None if attention_mask is None else attention_mask[..., a:b]
                mask = mask[..., a:b, :] if mask is not None and mask.dim() == 4 else mask
                parts.append(function(module, q, k, v, mask, **options)[0])
            halves.append(torch.cat(parts, 1))
        return torch.cat(halves, 2), None
