"""The requests that run, and the two kinds of passes over them: prompts, and one token further."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..nn import AdapterPool, matrix
from ..nn.prompt import cache_name
from ..ops import multi_lora_linear
from .cache import RowCache

BASE = -1  # index of a row that no adapter changes


class NotFinite(ValueError):
    """The error of a request whose logits are not finite."""


@dataclass(frozen=True)
class Logprob:
    """The logarithms of the probabilities that the model gave, before anything was drawn.

    Attributes:
        own: that of the token that was taken.
        top: those of the likeliest ones, by token, the likeliest first.

    Examples:
        >>> from peftops.serving import Logprob
        >>> Logprob(own=-0.7, top={5: -0.6, 6: -0.7}).top[5]
        -0.6
    """

    own: float
    top: dict[int, float]


@dataclass
class Request:
    """A question, and its answer so far."""

    number: int
    prompt: list[int]
    adapter: str | None
    max_new: int
    draw: Callable[[Tensor], int] | None = None  # None takes the likeliest token
    logprobs: int | None = None  # how many of the likeliest tokens are told of, beside the one taken
    watch: Callable[[int, Logprob | None], bool] | None = None  # is told each token; true ends the answer
    index: int = BASE  # in the pool, while it runs
    ids: list[int] = field(default_factory=list)
    told: list[Logprob] = field(default_factory=list)
    ended: bool = False  # by its watch
    error: Exception | None = None  # why it cannot go on

    @property
    def longest(self) -> int:
        return len(self.prompt) + self.max_new

    @property
    def cached(self) -> int:
        """Tokens whose keys and values are kept: all but the last one generated."""
        return len(self.prompt) + len(self.ids) - 1


class Rows:
    """The adapter of each row of the pass that runs; None while all rows are the base's."""

    index: Tensor | None = None


class PooledLinear(nn.Module):
    """A frozen linear layer to which each row's own adapter is added."""

    def __init__(self, base: nn.Module, pool: AdapterPool, name: str, rows: Rows):
        super().__init__()
        self.base, self.layer, self.rows = base, pool.layer(name), rows

    def forward(self, x: Tensor) -> Tensor:
        if self.rows.index is None:
            return self.base(x)
        return multi_lora_linear(x, matrix(self.base), self.layer, self.rows.index, self.base.bias)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias


class Batch:
    """Requests, each in a row of the cache.

    Args:
        model: whose linear layers are :class:`PooledLinear` with ``rows``.
        max_rows, max_tokens: of the cache, padding included.
    """

    def __init__(self, model: nn.Module, rows: Rows, *, max_rows: int, max_tokens: int):
        self.model, self.rows, self.max_rows, self.max_tokens = model, rows, max_rows, max_tokens
        self.running: list[Request] = []
        self.cache = RowCache(model.config.get_text_config().num_hidden_layers)
        self.cache_name = cache_name(model)
        self.device = model.get_input_embeddings().weight.device

    def join(self, requests: list[Request]) -> None:
        """Run the prompts of new requests, each from position 0, up to the first token of the answers."""
        for group in alike(requests):
            first = len(self.running)
            self.running += group
            try:
                self._together_or_each(self._prompts, first, group)
            except BaseException:  # an interrupt: as if they had not come yet
                del self.running[first:]
                for request in group:
                    request.ids.clear()
                    request.told.clear()
                self.cache.clear(first)
                raise

    def decode(self) -> None:
        """One token further, for all."""
        self._together_or_each(self._tokens, 0, self.running)

    def _together_or_each(self, run: Callable[[int, list[Request]], None], first: int, requests: list[Request]) -> None:
        """One pass over requests in rows from ``first``; if it fails, one for each, so that only what cannot go on has
        an ``error``. A pass writes a row's keys and values where they belong, so doing it again is safe."""
        try:
            run(first, requests)
        except Exception as error:
            if len(requests) == 1:
                requests[0].error = error
                return
            for row, request in enumerate(requests, first):
                self._together_or_each(run, row, [request])

    def _prompts(self, first: int, group: list[Request]) -> None:
        self._reserve(live=first)
        most = max(len(r.prompt) for r in group)
        ids = torch.zeros(len(group), most, dtype=torch.int64)  # the padding of the shorter ones lies behind their ends
        for row, request in zip(ids, group, strict=True):
            row[: len(request.prompt)] = torch.tensor(request.prompt)
        ends = torch.tensor([len(r.prompt) - 1 for r in group])
        keep, at = ends.unique(return_inverse=True)
        self.cache.begin(first, torch.zeros_like(ends), most, torch.arange(most) > ends[:, None])
        logits = self._forward(group, ids, torch.arange(most).expand_as(ids), None, keep)
        _append(group, logits[torch.arange(len(group)), at])

    def _tokens(self, first: int, requests: list[Request]) -> None:
        lengths = torch.tensor([r.cached for r in requests])
        self.cache.begin(first, lengths, 1)
        hidden = torch.arange(int(lengths.max()) + 1) > lengths[:, None]
        dtype = self.model.get_input_embeddings().weight.dtype
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)[:, None, None]
        last = torch.tensor([[r.ids[-1]] for r in requests])
        logits = self._forward(requests, last, lengths[:, None], mask, torch.tensor([0]))
        _append(requests, logits[:, 0])

    def leave(self, row: int) -> None:
        """Let the last request have the row of one that is done."""
        last = self.running.pop()
        if row < len(self.running):
            self.cache.move(len(self.running), row)
            self.running[row] = last
        else:
            self.cache.clear(row)

    def _forward(
        self, requests: list[Request], ids: Tensor, positions: Tensor, mask: Tensor | None, keep: Tensor
    ) -> Tensor:
        adapters = torch.tensor([r.index for r in requests], device="cpu")  # which is where a batch is planned
        self.rows.index = adapters.repeat_interleave(ids.shape[1]) if (adapters != BASE).any() else None
        there = lambda t: None if t is None else t.to(self.device)
        try:
            return self.model(
                input_ids=there(ids), position_ids=there(positions), attention_mask=there(mask), use_cache=True,
                logits_to_keep=there(keep), **{self.cache_name: self.cache},
            ).logits  # fmt: skip
        finally:
            self.rows.index = None

    def _reserve(self, live: int) -> None:
        """Room for all that run, to their ends; a little more where the budget has it, so that it seldom moves."""
        longest, count = max(r.longest for r in self.running), len(self.running)
        rows, capacity = min(1 << (count - 1).bit_length(), self.max_rows), -(-longest // 64) * 64
        if rows * capacity > self.max_tokens:
            rows, capacity = count, longest
        if count > self.cache.rows or longest > self.cache.capacity:
            self.cache.reserve(rows, capacity, live)


def _append(requests: list[Request], logits: Tensor) -> None:
    largest, likeliest = (t.tolist() for t in logits.max(-1))  # a NaN is the largest
    for request, row, token, top in zip(requests, logits, likeliest, largest, strict=True):
        try:
            if not math.isfinite(top):
                raise NotFinite("its logits are not finite: the adapter's numbers are not, or activations overflow")
            chosen = token if request.draw is None else request.draw(row)
            told = None if request.logprobs is None else _logprob(row, chosen, request.logprobs)
            request.ids.append(chosen)
            if told is not None:
                request.told.append(told)
            if request.watch is not None:
                request.ended = request.watch(chosen, told)
        except Exception as error:
            request.error = error


def _logprob(logits: Tensor, chosen: int, count: int) -> Logprob:
    every = logits.float().log_softmax(-1)
    top = every.topk(min(count, len(every)))
    return Logprob(float(every[chosen]), dict(zip(top.indices.tolist(), top.values.tolist(), strict=True)))


def alike(requests: list[Request]) -> Iterator[list[Request]]:
    """Groups whose prompts differ by a factor of two at most: so much padding costs less than another pass."""
    group: list[Request] = []
    for request in sorted(requests, key=lambda r: len(r.prompt)):
        if group and len(request.prompt) > 2 * len(group[0].prompt):
            yield group
            group = []
        group.append(request)
    if group:
        yield group
