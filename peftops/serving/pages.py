"""Keys and values of running requests in pages of an adapter pool, beside the adapters' factors.

A block holds some tokens of one sequence, in one page of each layer. A full block is known by the adapter, the tokens
before it and its own tokens. A prompt with the same beginning shares it (prefix caching). A known block that no request
uses stays until its room is needed; the least recently used one goes first.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .adapter_pool import AdapterPool, PoolFull


class Unfit(Exception):
    """Raised with the reason why a model's keys and values cannot be in pages."""


@dataclass(frozen=True)
class Layout:
    """The sizes of keys and values of a token.

    Attributes:
        heads: by layer, (heads of keys, dims of a key, dims of a value).
        windows: by layer, the window of its attention in tokens; None without a window.
        dtype: of keys and values.
    """

    heads: tuple[tuple[int, int, int], ...]
    windows: tuple[int | None, ...]
    dtype: torch.dtype

    @property
    def widest(self) -> int:
        """Bytes of a token in the layer with the largest keys and values."""
        return max(heads * (d + dv) for heads, d, dv in self.heads) * self.dtype.itemsize

    def pages(self, tokens: int, page_bytes: int) -> int:
        """How many pages this many tokens of one sequence fill."""
        return -(-tokens // (page_bytes // self.widest)) * len(self.heads)


@dataclass(eq=False)
class Block:
    """Its page in each layer."""

    pages: list[int]
    users: int = 1
    serial: int = -1  # of a known block
    key: tuple[Hashable, ...] | None = None  # the key by which it is known


class Blocks:
    """All blocks of a server.

    Args:
        most: the largest number of tokens in blocks, both those in use and those that are kept for later prompts.

    Raises:
        Unfit: a page is too small for a token, or the pool for a block.
    """

    def __init__(self, pool: AdapterPool, layout: Layout, most: int):
        width = pool.storage.shape[1] * pool.storage.itemsize
        if width < layout.widest or len(pool.storage) < len(layout.heads):
            raise Unfit(
                f"the pool has {len(pool.storage)} pages of {width} bytes, and a token needs a page in each "
                f"of {len(layout.heads)} layers, {layout.widest} bytes of it"
            )
        self.pool, self.layers, self.size = pool, len(layout.heads), width // layout.widest
        self.held = 0  # blocks in use, and known ones
        self._most = most // self.size
        self._known: dict[tuple[Hashable, ...], Block] = {}
        self._idle: OrderedDict[int, Block] = OrderedDict()  # the least recently used first
        self._serials = itertools.count()
        self.views = [_views(pool.storage.view(layout.dtype), self.size, *heads) for heads in layout.heads]

    def take(self, count: int) -> list[Block]:
        """New blocks; PoolFull if the pool lacks pages. Adapters that are not in use are evicted before known blocks,
        because loading an adapter again is fast and running a prompt again is slow."""
        while self.held + count > self._most and self.forget():
            pass
        while True:
            try:
                pages = self.pool.alloc(count * self.layers)
                break
            except PoolFull:
                if not self.forget():
                    raise
        self.held += count
        return [Block(pages[at : at + self.layers]) for at in range(0, len(pages), self.layers)]

    def forget(self) -> bool:
        """Free the known block that is unused for the longest time; returns whether there was one."""
        if not self._idle:
            return False
        _, block = self._idle.popitem(last=False)
        del self._known[block.key]
        self._free(block)
        return True

    def find(self, root: Hashable, tokens: Sequence[int]) -> list[Block]:
        """The known blocks with which a sequence begins; the caller uses them from now on."""
        found, parent = [], root
        for at in range(0, len(tokens) - self.size + 1, self.size):
            block = self._known.get((parent, *tokens[at : at + self.size]))
            if block is None:
                break
            self._idle.pop(block.serial, None)
            block.users += 1
            found.append(block)
            parent = block.serial
        return found

    def tell(self, parent: Hashable, tokens: Sequence[int], block: Block) -> int:
        """Make a full block known, after its parent's serial or its root. Returns the serial of the known block with
        these tokens, which may be an earlier block."""
        key = (parent, *tokens)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = block
            block.key, block.serial = key, next(self._serials)
        return known.serial

    def release(self, blocks: Sequence[Block]) -> None:
        """Their user no longer needs them. The last ones will be freed first."""
        for block in reversed(blocks):
            block.users -= 1
            if block.users == 0 and block.key is None:
                self._free(block)
            elif block.users == 0:
                self._idle[block.serial] = block

    def close(self) -> None:
        while self.forget():
            pass

    def _free(self, block: Block) -> None:
        self.pool.storage[torch.tensor(block.pages)] = 0  # the next owner must not read this one's numbers
        self.pool.free(block.pages)
        self.held -= 1


def _views(storage: Tensor, size: int, heads: int, d: int, dv: int) -> tuple[Tensor, Tensor]:
    """Views of the keys and values of a layer, ``[pages, heads, size, d]``, in pages ``[pages, elements]``."""
    keys, values = heads * size * d, heads * size * dv
    return (
        storage[:, :keys].unflatten(1, (heads, size, d)),
        storage[:, keys : keys + values].unflatten(1, (heads, size, dv)),
    )
