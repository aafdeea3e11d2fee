"""``AdapterPool``: any number of LoRA adapters in host memory, and a bounded, paged working set of them."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..ops.multi_lora_linear import PoolLayer

_LINE = 64  # elements; factor rows are padded to whole lines (csrc/kernels/multi_lora_linear.h)


def _padded(n: int) -> int:
    return -(-n // _LINE) * _LINE


class AdapterPool:
    """Adapters for :func:`peftops.multi_lora_linear` (S-LoRA, arXiv:2311.03285, section 5).

    All adapters live in host memory; those in use lie in pages, and the least recently used that is neither
    pinned nor in use makes room. Every method may be called from any thread.

    Args:
        layers: name of a layer -> (in_features, out_features).
        pages: how many pages the working set has.
        page_size: elements per page, a power of two from 64.
        slots: how many adapters may be resident at once.
        dtype: float32, bfloat16 or float16, of the factors in the pool.
        device: of the pages, and of the inputs that meet them. What is known of them stays with the host.
    """

    def __init__(self, layers: Mapping[str, tuple[int, int]], *, pages: int, page_size: int = 16384,
                 slots: int = 256, dtype: torch.dtype = torch.float32,
                 device: torch.device | str | None = None):  # fmt: skip
        if page_size < _LINE or page_size & (page_size - 1):
            raise ValueError(f"AdapterPool: page_size must be a power of two from {_LINE}, not {page_size}")
        if pages < 1 or slots < 1:
            raise ValueError(f"AdapterPool: pages and slots must be at least 1, not {pages} and {slots}")
        self.storage = torch.zeros(pages, page_size, dtype=dtype, device=device)
        self._handles = torch.full((slots,), -1)
        self._table = torch.zeros(slots, pages, dtype=torch.int32)
        rank = [1]
        self._layers = {
            name: PoolLayer(k, n, self.storage, self._handles, self._table, torch.zeros(slots, 3, dtype=torch.int64),
                            torch.ones(slots), rank, {})
            for name, (k, n) in layers.items()
        }  # fmt: skip
        self._free, self._free_slots = list(range(pages))[::-1], list(range(slots))[::-1]
        self._hosts: dict[str, tuple[Tensor, dict, bool]] = {}  # flat pages, {layer: (A, B, scaling)}, trainable
        self._resident: OrderedDict[str, tuple[int, list[int], tuple]] = OrderedDict()  # least recently used first
        self._held: Counter[str] = Counter()  # pins and uses
        self._loads = 0
        self._lock = threading.RLock()

    def layer(self, name: str) -> PoolLayer:
        """What :func:`peftops.multi_lora_linear` needs to know of one layer."""
        return self._layers[name]

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def resident(self) -> list[str]:
        """The adapters in the working set, the least recently used first."""
        return list(self._resident)

    def add(self, name: str, factors: Mapping[str, tuple[Tensor, Tensor]], scaling: float = 1.0, *,
            trainable: bool = False) -> None:  # fmt: skip
        """Keep an adapter in host memory: A ``[r, in]`` and B ``[out, r]`` of each layer that it adapts.

        With ``trainable`` they are the leaves that get gradients; :meth:`use` notices when they have changed.
        """
        with self._lock:
            if name in self._hosts:
                raise ValueError(f"AdapterPool: there is an adapter named {name!r} already")
            size, kept = 0, {}
            for layer, (A, B) in factors.items():
                if layer not in self._layers:
                    raise ValueError(f"AdapterPool: {name!r} adapts {layer!r}, which the pool does not know")
                k, n = self._layers[layer].in_features, self._layers[layer].out_features
                r = A.shape[0] if A.dim() == 2 else 0
                if r < 1 or A.shape[1] != k or B.shape != (n, r):
                    raise ValueError(f"AdapterPool: {name!r}, {layer!r}: A and B must have shapes [r, {k}] and "
                                     f"[{n}, r], not {list(A.shape)} and {list(B.shape)}")  # fmt: skip
                size += r * (_padded(k) + _padded(n))
                kept[layer] = (A, B)
            kept = {layer: kept[layer] for layer in self._layers if layer in kept}  # the order in which load() counts
            pages, page_size = -(-size // self.storage.shape[1]), self.storage.shape[1]
            if pages > len(self.storage):
                raise ValueError(f"AdapterPool: {name!r} needs {pages} pages of {page_size} elements, but the whole "
                                 f"pool has {len(self.storage)}")  # fmt: skip
            host = torch.zeros(pages, page_size, dtype=self.storage.dtype)
            rank = next(iter(self._layers.values())).max_rank
            rank[0] = max(rank[0], *(A.shape[0] for A, _ in kept.values()), 1)
            self._flatten(host, kept)
            self._hosts[name] = host, {k: (A, B, scaling) if trainable else (A.shape[0], None, scaling)
                                       for k, (A, B) in kept.items()}, trainable  # fmt: skip

    @torch.no_grad()
    def _flatten(self, host: Tensor, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        flat, at = host.view(-1), 0
        for A, B in factors.values():
            for f in (A, B.t()):
                r, width = f.shape
                flat[at : at + r * _padded(width)].view(r, -1)[:, :width].copy_(f)
                at += r * _padded(width)

    def load(self, name: str) -> int:
        """Make an adapter resident and the most recently used; returns its index for this and later batches."""
        with self._lock:
            host, layers, trainable = self._find(name)
            versions = tuple(f._version for A, B, _ in layers.values() for f in (A, B)) if trainable else ()
            if name in self._resident:
                if self._resident[name][2] == versions:
                    self._resident.move_to_end(name)
                    return int(self._handles[self._resident[name][0]])
                self.evict(name)
            self._make_room(name, len(host))
            slot, pages = self._free_slots.pop(), [self._free.pop() for _ in range(len(host))]
            if trainable:
                self._flatten(host, {k: (A, B) for k, (A, B, _) in layers.items()})
            if pages:
                self.storage[torch.tensor(pages, device=self.storage.device)] = host.to(self.storage.device)
                self._table[slot, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
            self._loads += 1
            handle, at = self._loads * len(self._handles) + slot, 0
            for key, layer in self._layers.items():
                layer.where[slot] = 0
                if key in layers:
                    A, B, layer.scaling[slot] = layers[key]
                    r = A.shape[0] if trainable else A
                    layer.where[slot] = torch.tensor([at, at + r * _padded(layer.in_features), r])
                    at += r * (_padded(layer.in_features) + _padded(layer.out_features))
                    if trainable:
                        layer.trainable[handle] = A, B
            self._handles[slot] = handle
            self._resident[name] = slot, pages, versions
            return handle

    def _make_room(self, name: str, pages: int) -> None:
        idle = [other for other in self._resident if not self._held[other]]
        room = len(self._free) + sum(len(self._resident[o][1]) for o in idle)
        if room < pages or not (self._free_slots or idle):
            raise RuntimeError(
                f"AdapterPool: no room for {name!r}: it needs {pages} pages and a slot; of {len(self.storage)} pages "
                f"{len(self._free)} are free and {room - len(self._free)} can be evicted, of {len(self._handles)} "
                f"slots {len(self._free_slots)} and {len(idle)}; the others are pinned or in use"
            )
        while len(self._free) < pages or not self._free_slots:
            self.evict(idle.pop(0))

    def evict(self, name: str) -> None:
        """Take an adapter out of the working set; host memory keeps it."""
        with self._lock:
            self._find(name)
            if self._held[name]:
                raise RuntimeError(f"AdapterPool: {name!r} is pinned or in use")
            if name in self._resident:
                slot, pages, _ = self._resident.pop(name)
                for layer in self._layers.values():
                    layer.trainable.pop(int(self._handles[slot]), None)
                self._handles[slot] = -1
                self._free += pages
                self._free_slots.append(slot)

    def remove(self, name: str) -> None:
        """Forget an adapter altogether."""
        with self._lock:
            self.evict(name)
            del self._hosts[name]

    def pin(self, name: str) -> int:
        """Load an adapter and keep it resident until :meth:`unpin`."""
        with self._lock:
            handle = self.load(name)
            self._held[name] += 1
            return handle

    def unpin(self, name: str) -> None:
        with self._lock:
            if not self._held[name]:
                raise RuntimeError(f"AdapterPool: {name!r} is not pinned")
            self._held[name] -= 1

    @contextlib.contextmanager
    def use(self, names: Sequence[str | None]) -> Iterator[Tensor]:
        """Inside ``with pool.use(names) as index:`` the adapters, one per row (None: the base), stay resident."""
        held: dict[str, int] = {}
        try:
            for name in dict.fromkeys(n for n in names if n is not None):
                held[name] = self.pin(name)
            yield torch.tensor([-1 if n is None else held[n] for n in names], dtype=torch.int64)
        finally:
            for name in held:
                self.unpin(name)

    def _find(self, name: str) -> tuple[Tensor, dict, bool]:
        if name not in self._hosts:
            raise KeyError(f"AdapterPool: there is no adapter named {name!r}")
        return self._hosts[name]
