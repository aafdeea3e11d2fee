"""Keys and values of a batch whose rows come and go.

Each row is a request, and starts at position 0. The place of a row does not depend on the lengths of others, so no row
moves when a request joins. When a request leaves, the last row moves into its place. So the rows in use are always the
first ones, and attention can read them without a copy.

There are always zeros beyond a row's end. Attention multiplies hidden values by 0, so a NaN that another request or
padding has left there would reach the result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RowCache:
    """The store of a transformers model's keys and values, ``[rows, heads, capacity, width]`` per layer.

    Before a pass, :meth:`begin` sets its rows and their lengths.
    """

    is_compileable = False

    def __init__(self, layers: int):
        self.is_sliding = [False] * layers
        self.pairs: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self.rows, self.capacity = 0, 0
        self._first, self._lengths, self._longest = 0, torch.zeros(0, dtype=torch.int64), 0
        self._padding: Tensor | None = None  # [rows, new]

    def reserve(self, rows: int, capacity: int, live: int) -> None:
        """Make room for this number of rows with this number of tokens; the first ``live`` rows are kept."""
        if (rows, capacity) == (self.rows, self.capacity):
            return
        wanted, self.rows, self.capacity = (rows, capacity), min(rows, self.rows), min(capacity, self.capacity)
        for layer, pair in enumerate(self.pairs):  # if one fails, rows and capacity are the smallest of all layers
            if pair is not None:
                self.pairs[layer] = tuple(_resized(t, rows, capacity, live) for t in pair)
        self.rows, self.capacity = wanted

    def begin(self, first: int, lengths: Tensor, new: int, padding: Tensor | None = None) -> None:
        """The next pass is for rows ``first``, ``first + 1``, .. that hold ``lengths`` tokens and get ``new`` each.
        Rows of a pass with several new tokens are empty before; ``padding`` ``[rows, new]`` marks the new positions
        without a token."""
        self._first, self._lengths, self._longest, self._padding = first, lengths, int(lengths.max()) + new, padding

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the new keys and values; returns all those of the rows, up to the longest row."""
        if self.pairs[layer_idx] is None:
            empty = lambda t: t.new_zeros(self.rows, t.shape[1], self.capacity, t.shape[3])
            self.pairs[layer_idx] = empty(keys), empty(values)
        result = []
        for store, new in zip(self.pairs[layer_idx], (keys, values), strict=True):
            rows = store[self._first : self._first + len(new)]
            if new.shape[2] == 1:
                rows[torch.arange(len(new)), :, self._lengths] = new[:, :, 0]
            else:
                if self._padding is not None:
                    new = new.masked_fill(self._padding.to(new.device)[:, None, :, None], 0)
                rows[:, :, : new.shape[2]] = new
            result.append(rows[:, :, : self._longest])
        return result[0], result[1]

    def move(self, source: int, target: int) -> None:
        """Move row ``source`` to row ``target``, and empty ``source``."""
        for pair in self.pairs:
            for store in pair or ():
                store[target] = store[source]
        self.clear(source)

    def clear(self, first: int) -> None:
        """Empty row ``first`` and all behind it."""
        for pair in self.pairs:
            for store in pair or ():
                store[first:] = 0

    # The methods that models and the code of masks call. A pass over several new tokens is causal from position 0; one
    # over a single new token brings its own mask.
    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0


def _resized(store: Tensor, rows: int, capacity: int, live: int) -> Tensor:
    new = store.new_zeros(rows, store.shape[1], capacity, store.shape[3])
    both = min(capacity, store.shape[2])
    new[:live, :, :both] = store[:live, :, :both]
    return new
