"""A batch whose keys and values lie in pages of the adapters' pool (S-LoRA's unified paging, arXiv:2311.03285)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .batch import Batch, Request, Rows
from .paged_attention import PagedModel, Pass
from .pages import Blocks

PASS = 2048  # tokens of prompts in one pass; a single prompt may be longer


def peak_tokens(requests: Sequence[tuple[int, int]], page: int = 1) -> int:
    """The largest number of tokens that a batch will hold; it decides whether one more request may join.

    All requests get one token at each step, and each request ends when it has all its tokens. At that step the
    remaining requests hold their present tokens and as many new ones as there were steps. A batch may start if the
    pages beside its adapters can hold the peak (S-LoRA's admission rule, arXiv:2311.03285).

    Args:
        requests: (tokens so far, tokens to come at most) of each.
        page: tokens of a page. A request's last page counts as full.
    """
    ordered = sorted(requests, key=lambda request: -request[1])
    whole = lambda tokens: -(-tokens // page) * page
    totals = [sum(whole(length + left) for length, _ in ordered[:i]) for i, (_, left) in enumerate(ordered, 1)]
    return max(totals, default=0)


class PagedBatch(Batch):
    """Requests, each with blocks of pages that grow with it. A pass has the tokens of all its requests in one row,
    without padding.

    Args:
        max_tokens: the largest number of tokens in blocks at once; the pool may have room for fewer.
    """

    def __init__(self, model: PagedModel, rows: Rows, blocks: Blocks, *, max_tokens: int):
        self.model, self.rows, self.blocks, self.max_tokens = model, rows, blocks, max_tokens
        self.running: list[Request] = []

    @property
    def longest(self) -> tuple[int, str]:
        room = len(self.blocks.pool.storage) // self.blocks.layers * self.blocks.size + 1
        return (room, "the pool's pages hold") if room < self.max_tokens else (self.max_tokens, "max_tokens")

    def refuses(self, request: Request) -> str | None:
        pool, adapter = self.blocks.pool, request.adapter
        pages = self._whole(request.longest - 1) * self.blocks.layers
        pages += 0 if adapter is None else pool.pages_of(adapter)
        if pages > len(pool.storage):
            return f"tokens and adapter need {pages} pages, and the pool has {len(pool.storage)}"
        return super().refuses(request)

    def admits(self, joined: list[Request], request: Request) -> bool:
        """The shared blocks, and the peak of the blocks that each request has for itself, must fit beside the adapters
        in use."""
        pool, size = self.blocks.pool, self.blocks.size
        if any(r.born + len(r.ids) != self._now for r in self.running):
            return False  # after an interrupt: the bound is for requests that go in step
        if request.adapter is not None:
            request.root = (request.adapter, *pool.state(request.adapter))
        self._find(request)
        every = [*self.running, *joined, request]
        shared = len({id(block) for r in every for block in r.blocks[: r.reused]})
        own = [(r.cached if r.ids else len(r.prompt), r.max_new - max(1, len(r.ids)), r.reused * size) for r in every]
        own = [(now - reused, left) for now, left, reused in own]
        new = request.adapter is not None and not pool.is_fixed(request.adapter)
        held = pool.fixed_pages - self.blocks.held * self.blocks.layers + (pool.pages_of(request.adapter) if new else 0)
        pages = (peak_tokens(own, size) // size + shared) * self.blocks.layers
        fits = peak_tokens(own) + shared * size <= self.max_tokens and pages + held <= len(pool.storage)
        if not fits:
            self.drop([request])
        return fits

    def drop(self, requests: list[Request]) -> None:
        for request in requests:
            self.blocks.release(request.blocks)
            request.blocks, request.table, request.reused, request.known = [], None, 0, 0

    def spare(self) -> bool:
        return self.blocks.forget()

    def leave(self, row: int) -> None:
        self.drop([self.running.pop(row)])

    def close(self) -> None:
        self.drop(self.running)
        self.running = []
        self.blocks.close()

    def decode(self) -> None:
        """Generate one more token for the requests that are furthest behind. These are all requests, except after an
        interrupt."""
        behind = min(r.born + len(r.ids) for r in self.running)
        now = [r for r in self.running if r.born + len(r.ids) == behind]
        self._together_or_each(self._tokens, now)
        self._tell(now)

    @property
    def _now(self) -> int:
        return max((r.born + len(r.ids) for r in self.running), default=0)

    def _groups(self, requests: list[Request]) -> Iterator[list[Request]]:
        """Of prompts with the same next block, one runs first, and the others then find its blocks."""
        left, now = list(requests), max(1, self._now)
        while left:
            group: list[Request] = []
            tokens, seen, later = 0, set(), []
            for request in left:
                self._find(request)
                at = request.reused * self.blocks.size
                begins = (request.root, *request.prompt[: at + self.blocks.size])
                fits = not group or tokens + len(request.prompt) - at <= PASS
                if begins in seen or not fits:
                    later.append(request)
                    continue
                if len(request.prompt) > at + self.blocks.size:
                    seen.add(begins)
                group.append(request)
                tokens += len(request.prompt) - at
                request.born = now - 1
            yield group
            self.reused_tokens += sum(r.reused for r in group) * self.blocks.size
            self._tell(group)
            left = later

    def _find(self, request: Request) -> None:
        """Known blocks with which a prompt begins. The prompt's last token is left out: it must run to give the next
        token."""
        found = self.blocks.find(request.root, request.prompt[:-1])
        self.drop([request])
        request.blocks, request.reused, request.known = found, len(found), len(found)
        request.parent = found[-1].serial if found else request.root

    def _tell(self, requests: list[Request]) -> None:
        """Make the blocks that have become full known, unless their pass failed."""
        size = self.blocks.size
        for request in requests:
            if request.error is not None or request.cached // size == request.known:
                continue
            every = [*request.prompt, *request.ids]
            for i in range(request.known, request.cached // size):
                tokens = every[i * size : (i + 1) * size]
                request.parent = self.blocks.tell(request.parent, tokens, request.blocks[i])
            request.known = request.cached // size

    def _prompts(self, group: list[Request]) -> None:
        self._run(group, [r.prompt[r.reused * self.blocks.size :] for r in group])

    def _tokens(self, requests: list[Request]) -> None:
        self._run(requests, [r.ids[-1:] for r in requests])

    def _run(self, requests: list[Request], tokens: list[list[int]]) -> None:
        logits = self._forward(requests, tokens)
        self._append(requests, logits)

    def _forward(self, requests: list[Request], tokens: list[list[int]]) -> torch.Tensor:
        counts = [len(new) for new in tokens]
        lengths = [len(r.prompt) + len(r.ids) for r in requests]
        self._reserve(requests, lengths)
        table = torch.zeros(self.blocks.layers, len(requests), self._whole(max(lengths)), dtype=torch.int32)
        for s, request in enumerate(requests):
            table[:, s, : len(request.blocks)] = self._table(request)
        ends = torch.tensor(lengths, dtype=torch.int32)
        cache = Pass(self.blocks.views, counts, ends, table)
        ids = torch.tensor([token for new in tokens for token in new])
        self.rows.index = self._adapters(requests, counts)
        try:
            return self.model.run(cache, ids, cache.positions, torch.tensor(counts).cumsum(0) - 1)
        finally:
            self.rows.index = None

    @staticmethod
    def _table(request: Request) -> torch.Tensor:
        """Pages ``[layers, blocks]``. Only new blocks are looked up, one by one."""
        have = 0 if request.table is None else request.table.shape[1]
        if have < len(request.blocks):
            new = torch.tensor([block.pages for block in request.blocks[have:]], dtype=torch.int32).t()
            request.table = new if request.table is None else torch.cat([request.table, new], 1)
        return request.table

    def _reserve(self, requests: list[Request], lengths: list[int]) -> None:
        """Take blocks for all tokens of a pass. Admission has made sure that there are enough."""
        for request, length in zip(requests, lengths, strict=True):
            request.blocks += self.blocks.take(self._whole(length) - len(request.blocks))

    def _whole(self, tokens: int) -> int:
        """The number of blocks that this number of tokens fills."""
        return -(-tokens // self.blocks.size)
