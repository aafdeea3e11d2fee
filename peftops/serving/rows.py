"""A batch whose keys and values are in rows, each as wide as the longest one: for models that do not work with
pages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.prompt import cache_name
from .batch import Batch, Request, Rows
from .cache import RowCache


class RowBatch(Batch):
    """Requests, each in a row of the cache.

    Args:
        model: whose linear layers are :class:`PooledLinear` with ``rows``.
        max_rows, max_tokens: of the cache, padding included.
    """

    def __init__(self, model: nn.Module, rows: Rows, *, max_rows: int, max_tokens: int):
        self.model, self.rows, self.max_rows, self.max_tokens = model, rows, max_rows, max_tokens
        self.running: list[Request] = []
        config = model.config.get_text_config()
        self.cache, self.window = RowCache(config.num_hidden_layers), _window(config)
        self.cache_name = cache_name(model)
        self.device = model.get_input_embeddings().weight.device

    @property
    def longest(self) -> tuple[int, str]:
        if self.window and self.window < self.max_tokens:
            return self.window, "the window over which this model's attention slides"
        return self.max_tokens, "max_tokens"

    def admits(self, joined: list[Request], request: Request) -> bool:
        """The number of rows times the longest prompt with its answer must fit."""
        every = [*self.running, *joined, request]
        return len(every) * max(r.longest for r in every) <= self.max_tokens

    def _groups(self, requests: list[Request]) -> Iterator[list[Request]]:
        return alike(requests)

    def drop(self, requests: list[Request]) -> None:
        self.cache.clear(len(self.running))

    def decode(self) -> None:
        self._together_or_each(self._tokens, self.running)

    def _prompts(self, group: list[Request]) -> None:
        first = self._first(group)
        self._reserve(live=first)
        most = max(len(r.prompt) for r in group)
        ids = torch.zeros(len(group), most, dtype=torch.int64)  # the padding of the shorter ones lies behind their ends
        for row, request in zip(ids, group, strict=True):
            row[: len(request.prompt)] = torch.tensor(request.prompt)
        ends = torch.tensor([len(r.prompt) - 1 for r in group])
        keep, at = ends.unique(return_inverse=True)
        self.cache.begin(first, torch.zeros_like(ends), most, torch.arange(most) > ends[:, None])
        logits = self._forward(group, ids, torch.arange(most).expand_as(ids), None, keep)
        self._append(group, logits[torch.arange(len(group)), at])

    def _tokens(self, requests: list[Request]) -> None:
        first = self._first(requests)
        lengths = torch.tensor([r.cached for r in requests])
        self.cache.begin(first, lengths, 1)
        hidden = torch.arange(int(lengths.max()) + 1) > lengths[:, None]
        dtype = self.model.get_input_embeddings().weight.dtype
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)[:, None, None]
        last = torch.tensor([[r.ids[-1]] for r in requests])
        logits = self._forward(requests, last, lengths[:, None], mask, torch.tensor([0]))
        self._append(requests, logits[:, 0])

    def _first(self, requests: list[Request]) -> int:
        """The row of the first one; the others follow."""
        return next(row for row, request in enumerate(self.running) if request is requests[0])

    def leave(self, row: int) -> None:
        """Move the last request to the row of a finished one."""
        last = self.running.pop()
        if row < len(self.running):
            self.cache.move(len(self.running), row)
            self.running[row] = last
        else:
            self.cache.clear(row)

    def _forward(
        self, requests: list[Request], ids: Tensor, positions: Tensor, mask: Tensor | None, keep: Tensor
    ) -> Tensor:
        self.rows.index = self._adapters(requests, [ids.shape[1]] * len(requests))
        there = lambda t: None if t is None else t.to(self.device)
        try:
            return self.model(
                input_ids=there(ids),
                position_ids=there(positions),
                attention_mask=there(mask),
                use_cache=True,
                logits_to_keep=there(keep),
                **{self.cache_name: self.cache},
            ).logits
        finally:
            self.rows.index = None

    def _reserve(self, live: int) -> None:
        """Make room for all running requests to their ends, and for a little more if the budget allows it, so that rows
        seldom move."""
        longest, count = max(r.longest for r in self.running), len(self.running)
        rows, capacity = min(1 << (count - 1).bit_length(), self.max_rows), -(-longest // 64) * 64
        if rows * capacity > self.max_tokens:
            rows, capacity = count, longest
        if count > self.cache.rows or longest > self.cache.capacity:
            self.cache.reserve(rows, capacity, live)


def alike(requests: list[Request]) -> Iterator[list[Request]]:
    """Groups of prompts whose lengths differ by a factor of two at most: that padding costs less than another pass."""
    group: list[Request] = []
    for request in sorted(requests, key=lambda r: len(r.prompt)):
        if group and len(request.prompt) > 2 * len(group[0].prompt):
            yield group
            group = []
        group.append(request)
    if group:
        yield group


def _window(config: Any) -> int | None:
    """The window of the model's attention in tokens; None without a window."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    slides = getattr(config, "use_sliding_window", True) if kinds is None else any("sliding" in kind for kind in kinds)
    return window if window and slides else None
