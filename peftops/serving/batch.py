"""The running requests, and the two kinds of passes over them: a pass of prompts, and a pass of one token each."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..nn import matrix
from ..ops import multi_lora_linear
from .adapter_pool import AdapterPool
from .pages import Block

BASE = -1  # index of a row that no adapter changes


class NotFinite(ValueError):
    """The error of a request whose logits are not finite."""


@dataclass(frozen=True)
class Logprob:
    """The logarithms of the probabilities that the model gave, before sampling options changed them.

    Attributes:
        own: that of the chosen token.
        top: those of the likeliest tokens, by token, the likeliest first.

    Examples:
        >>> from peftops.serving import Logprob
        >>> Logprob(own=-0.7, top={5: -0.6, 6: -0.7}).top[5]
        -0.6
    """

    own: float
    top: dict[int, float]


@dataclass(eq=False)
class Request:
    """A prompt, and its answer so far."""

    number: int
    prompt: list[int]
    adapter: str | None
    max_new: int
    draw: Callable[[Tensor], int] | None = None  # None takes the likeliest token
    logprobs: int | None = None  # number of the likeliest tokens to report, beside the chosen one
    watch: Callable[[int, Logprob | None], bool] | None = None  # is called with each token; true ends the answer
    index: int = BASE  # in the pool, while it runs
    ids: list[int] = field(default_factory=list)
    told: list[Logprob] = field(default_factory=list)
    ended: bool = False  # by its watch
    error: Exception | None = None  # the reason why it cannot go on
    blocks: list[Block] = field(default_factory=list)  # of its keys and values, if they are in pages
    table: Tensor | None = None  # int32 [layers, blocks], their pages, as far as they were looked up
    reused: int = 0  # of these, the ones that existed before
    known: int = 0  # of these, the ones that other requests may find
    root: Hashable = None  # the state of its adapter
    parent: Hashable = None  # of the next block to be known
    born: int = 0  # the step in which it joined

    @property
    def longest(self) -> int:
        return len(self.prompt) + self.max_new

    @property
    def cached(self) -> int:
        """Tokens whose keys and values are kept: all except the last generated one."""
        return len(self.prompt) + len(self.ids) - 1


class Rows:
    """The adapter of each row of the present pass; None while no row has an adapter."""

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


class Batch(ABC):
    """Requests that run together."""

    rows: Rows
    running: list[Request]
    reused_tokens = 0  # of prompts, whose keys and values existed already
    agree: Callable[[list[int]], list[int]] | None = None  # on a pass's tokens, between processes that share the model

    @property
    @abstractmethod
    def longest(self) -> tuple[int, str]:
        """The largest number of tokens of a request, and the reason for this bound."""

    @abstractmethod
    def admits(self, joined: list[Request], request: Request) -> bool:
        """Whether a request may join the running ones and ``joined``, so that each of them can be finished."""

    @abstractmethod
    def leave(self, row: int) -> None:
        """Remove ``running[row]``."""

    @abstractmethod
    def decode(self) -> None:
        """Generate one more token for all requests."""

    @abstractmethod
    def drop(self, requests: list[Request]) -> None:
        """Free the memory that is kept for requests that do not run."""

    @abstractmethod
    def _groups(self, requests: list[Request]) -> Iterable[list[Request]]:
        """Groups of requests whose prompts go through the model together."""

    @abstractmethod
    def _prompts(self, group: list[Request]) -> None:
        """A pass over prompts."""

    def refuses(self, request: Request) -> str | None:
        """The reason why a request could never run; None if it can."""
        most, why = self.longest
        new = len(request.prompt), request.max_new
        return f"{new[0]} + {new[1]} tokens are more than {why}, {most}" if sum(new) > most else None

    def spare(self) -> bool:
        """Free something that is kept for later reuse; returns whether there was anything."""
        return False

    def close(self) -> None:
        self.running = []

    def join(self, requests: list[Request]) -> None:
        """Run the prompts of new requests up to the first token of the answers."""
        for group in self._groups(requests):
            first = len(self.running)
            self.running += group
            try:
                self._together_or_each(self._prompts, group)
            except BaseException:  # after an interrupt, these requests wait again
                del self.running[first:]
                for request in group:
                    request.ids.clear()
                    request.told.clear()
                self.drop(group)
                raise

    def _together_or_each(self, run: Callable[[list[Request]], None], requests: list[Request]) -> None:
        """One pass over requests. If it fails, one pass for each, so that only requests that cannot go on have an
        ``error``. A pass writes a request's keys and values to their own places, so it can be repeated. Processes that
        share a model do not repeat it, because the pass may have succeeded in the other processes."""
        try:
            run(requests)
        except Exception as error:
            if self.agree is not None:
                raise
            if len(requests) == 1:
                requests[0].error = error
                return
            for request in requests:
                self._together_or_each(run, [request])

    def _adapters(self, requests: list[Request], counts: list[int]) -> Tensor | None:
        """The adapter of each token of a pass, on the host, where batches are planned; None if no token has an
        adapter."""
        index = torch.tensor([r.index for r in requests], device="cpu")
        return index.repeat_interleave(torch.tensor(counts, device="cpu")) if (index != BASE).any() else None

    def _append(self, requests: list[Request], logits: Tensor) -> None:
        """Choose the next token of each."""
        largest, likeliest = (t.tolist() for t in logits.max(-1))  # a NaN is the largest
        chosen = []
        for request, row, token, top in zip(requests, logits, likeliest, largest, strict=True):
            try:
                if not math.isfinite(top):
                    raise NotFinite("its logits are not finite: the adapter's numbers are not, or activations overflow")
                chosen.append(token if request.draw is None else request.draw(row))
            except Exception as error:
                request.error = error
                chosen.append(token)
        if self.agree is not None:
            chosen = self.agree(chosen)
        for request, row, token in zip(requests, logits, chosen, strict=True):
            if request.error is None:
                _take(request, row, token)


def _take(request: Request, logits: Tensor, token: int) -> None:
    try:
        told = None if request.logprobs is None else _logprob(logits, token, request.logprobs)
        request.ids.append(token)
        if told is not None:
            request.told.append(told)
        if request.watch is not None:
            request.ended = request.watch(token, told)
    except Exception as error:
        request.error = error


def _logprob(logits: Tensor, chosen: int, count: int) -> Logprob:
    every = logits.float().log_softmax(-1)
    top = every.topk(min(count, len(every)))
    return Logprob(float(every[chosen]), dict(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
