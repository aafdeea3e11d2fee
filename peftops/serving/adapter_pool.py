"""``AdapterPool``: any number of LoRA adapters in host memory, and a bounded, paged working set of them."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import threading
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from ..ops.multi_lora_linear import LINE, MAX_RANK, PoolLayer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _padded(n: int) -> int:
    return -(-n // LINE) * LINE


def _zeros(pages: int, page_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """On the CPU, memory for which the system is asked to use huge pages. A decoding step reads every factor once, and
    with pages of 4 KB it would also wait for address translation. The system may ignore the hint."""
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(pages, page_size, dtype=dtype, device=device)
    memory = mmap.mmap(-1, pages * page_size * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(pages, page_size)


class PoolFull(RuntimeError):
    """There is no room, and evicting all that may be evicted would not make enough."""


@dataclass(frozen=True)
class _Host:
    """An adapter in host memory, laid out as in the pool."""

    flat: Tensor  # [pages, page_size]
    where: Tensor  # int64 [layers, 3], as in PoolLayer
    scaling: Tensor  # float32 [layers]
    leaves: dict[str, tuple[Tensor, Tensor]]  # A and B by layer, if they are trainable
    serial: int  # a number that no other adapter has had

    def version(self) -> tuple[int, ...]:
        """A number that changes when an optimizer, or other code that autograd sees, writes a leaf."""
        return tuple(f._version for pair in self.leaves.values() for f in pair)

    @torch.no_grad()
    def fill(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        flat, at = self.flat.view(-1), 0
        for A, B in factors.values():
            for f in (A, B.t()):
                r, width = f.shape
                flat[at : at + r * _padded(width)].view(r, -1)[:, :width].copy_(f)
                at += r * _padded(width)


@dataclass
class _Resident:
    slot: int
    pages: list[int]
    version: tuple[int, ...] | None = None  # of the numbers in the pages; None after a load that failed
    loading: bool = True  # by one thread, while the lock is free


class AdapterPool:
    """Adapters for :func:`peftops.multi_lora_linear` (S-LoRA, arXiv:2311.03285, section 5).

    All adapters are in host memory; those in use also lie in pages of a working set. If there is no room, the least
    recently used adapter that is not pinned and not in use is evicted. :meth:`alloc` gives pages to other users of the
    memory, such as a KV cache. Every method may be called from any thread; while one thread copies factors, the others
    go on.

    The adapters of a batch must stay in their pages, so run a batch inside :meth:`use`, or pin its adapters. To use an
    index after its adapter was evicted is an error.

    Args:
        layers: name of a layer -> (in_features, out_features).
        pages: how many pages the working set has.
        page_size: elements per page, a power of two from 64.
        slots: how many adapters may be resident at once.
        dtype: float32, bfloat16 or float16, of the factors in the pool, for any dtype of x. A decoding step
            reads every factor once, so 16 bits take about half the time of 32.
        device: the device of the working set, on which x must be, too; by default torch's default device. On a GPU,
            load and compute on one stream, as threads do by default: a load may overwrite the pages of an adapter whose
            last batch has not finished.

    Raises:
        ValueError: an argument is out of range.

    Examples:
        >>> pool = peftops.AdapterPool({"layer": (64, 32)}, pages=4)
        >>> pool.add("a", {"layer": (torch.randn(4, 64), torch.randn(32, 4))}, {"layer": 0.5})
        >>> with pool.use(["a", None]) as index:
        ...     y = peftops.multi_lora_linear(torch.ones(2, 64), torch.zeros(32, 64), pool.layer("layer"), index)
        >>> y[1].any().item()
        False
    """

    def __init__(
        self,
        layers: Mapping[str, tuple[int, int]],
        *,
        pages: int,
        page_size: int = 16384,
        slots: int = 256,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        if not layers:
            raise ValueError("AdapterPool: layers must name at least one layer, name -> (in_features, out_features)")
        for name, (k, n) in layers.items():
            if k < 1 or n < 1:
                raise ValueError(f"AdapterPool: {name!r} must have at least one feature in and out, not {k} and {n}")
        if page_size < LINE or page_size & (page_size - 1):
            raise ValueError(f"AdapterPool: page_size must be a power of two from {LINE}, not {page_size}")
        if pages < 1 or slots < 1:
            raise ValueError(f"AdapterPool: pages and slots must be at least 1, not {pages} and {slots}")
        if dtype not in DTYPES:
            raise ValueError(f"AdapterPool: dtype must be float32, bfloat16 or float16, not {dtype}")
        where = torch.get_default_device() if device is None else torch.device(device)
        self.storage = _zeros(pages, page_size, dtype, where)
        # The host plans batches with these tables, so they are on the CPU also for a GPU.
        self._handles = torch.full((slots,), -1, device="cpu")
        self._table = torch.zeros(slots, pages, dtype=torch.int32, device="cpu")
        self._where = torch.zeros(len(layers), slots, 3, dtype=torch.int64, device="cpu")
        self._scaling = torch.ones(len(layers), slots, device="cpu")
        self._max_rank = [1]
        self._layers = {
            name: PoolLayer(
                k, n, self.storage, self._handles, self._table, self._where[i], self._scaling[i], self._max_rank, {}
            )
            for i, (name, (k, n)) in enumerate(layers.items())
        }
        self._free, self._free_slots = list(range(pages))[::-1], list(range(slots))[::-1]
        self._lent: set[int] = set()
        self._hosts: dict[str, _Host] = {}
        self._serials = itertools.count()
        self._resident: OrderedDict[str, _Resident] = OrderedDict()  # least recently used first
        self._pins: Counter[str] = Counter()
        self._uses: Counter[str] = Counter()
        self._loads = 0
        self._lock = threading.Condition()  # notified when a load ends
        self._worker: ThreadPoolExecutor | None = None

    def layer(self, name: str) -> PoolLayer:
        """One layer of the pool, as :func:`peftops.multi_lora_linear` takes it."""
        if name not in self._layers:
            raise KeyError(f"AdapterPool: there is no layer named {name!r}")
        return self._layers[name]

    @property
    def layers(self) -> Mapping[str, PoolLayer]:
        """All of them, by name."""
        return MappingProxyType(self._layers)

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def fixed_pages(self) -> int:
        """Pages that cannot be freed now: those that :meth:`alloc` handed out, and those of adapters that are pinned or
        in use."""
        with self._lock:
            return len(self._lent) + sum(len(at.pages) for name, at in self._resident.items() if self._holds(name))

    def pages_of(self, name: str) -> int:
        """The number of pages of an adapter; KeyError if there is no adapter of this name."""
        with self._lock:
            return len(self._find(name).flat)

    def is_fixed(self, name: str) -> bool:
        """Whether an adapter is pinned or in use."""
        with self._lock:
            return self._holds(name)

    def state(self, name: str) -> tuple[int, ...]:
        """A key for an adapter's numbers: it changes when they change, so results of old numbers are never taken for
        results of new ones. KeyError if there is no such adapter."""
        with self._lock:
            host = self._find(name)
            return (host.serial, *host.version())

    def _holds(self, name: str) -> bool:
        return bool(self._pins[name] or self._uses[name])

    @property
    def resident(self) -> list[str]:
        """The adapters in the working set, the least recently used first."""
        with self._lock:
            return list(self._resident)

    # Host memory.

    def add(
        self,
        name: str,
        factors: Mapping[str, tuple[Tensor, Tensor]],
        scaling: float | Mapping[str, float] = 1.0,
        *,
        trainable: bool = False,
    ) -> None:
        """Keep an adapter in host memory: A ``[r, in]`` and B ``[out, r]`` of each layer that it adapts.

        Ranks may differ by layer, and so may the scaling. With ``trainable``, A and B are the leaves that get
        gradients; :meth:`load` and :meth:`use` notice when they have changed (not by writes through ``.data``).

        Raises:
            ValueError: the name is taken, a layer unknown, a shape wrong, a number not finite (in the pool's dtype), or
                the whole pool too small.
        """
        sizes, known = {}, self._layers
        for layer, (A, B) in factors.items():
            if layer not in known:
                raise ValueError(f"AdapterPool: {name!r} adapts {layer!r}, which the pool does not know")
            k, n = known[layer].in_features, known[layer].out_features
            r = A.shape[0] if A.dim() == 2 else 0
            if r < 1 or A.shape[1] != k or B.shape != (n, r):
                raise ValueError(
                    f"AdapterPool: {name!r}, {layer!r}: A and B must have shapes [r, {k}] and "
                    f"[{n}, r], not {list(A.shape)} and {list(B.shape)}"
                )
            if r > MAX_RANK:
                raise ValueError(f"AdapterPool: {name!r}, {layer!r}: the rank must be at most {MAX_RANK}, not {r}")
            sizes[layer] = r, r * _padded(k), r * _padded(n)
        pages, page_size = self._pages_of(sizes), self.storage.shape[1]
        if pages > len(self.storage):
            raise ValueError(
                f"AdapterPool: {name!r} needs {pages} pages of {page_size} elements, but the whole "
                f"pool has {len(self.storage)}"
            )
        ordered, where, at = {layer: factors[layer] for layer in known if layer in factors}, [], 0
        for layer in known:
            r, a, b = sizes.get(layer, (0, 0, 0))
            where.append((at, at + a, r))
            at += a + b
        by_layer = [scaling.get(layer, 1.0) if isinstance(scaling, Mapping) else scaling for layer in known]
        host = _Host(
            torch.zeros(pages, page_size, dtype=self.storage.dtype, device="cpu"),
            torch.tensor(where, device="cpu"),
            torch.tensor(by_layer, dtype=torch.float32, device="cpu"),
            ordered if trainable else {},
            next(self._serials),
        )
        host.fill(ordered)
        if not (host.flat.isfinite().all() and host.scaling.isfinite().all()):
            raise ValueError(f"AdapterPool: the factors and scaling of {name!r} must be finite in {host.flat.dtype}")
        with self._lock:
            if name in self._hosts:
                raise ValueError(f"AdapterPool: there is an adapter named {name!r} already")
            self._hosts[name] = host
            self._max_rank[0] = max(self._max_rank[0], *(r for r, _, _ in sizes.values()), 1)

    def remove(self, name: str) -> None:
        """Remove an adapter from the working set and from host memory."""
        with self._lock:
            self.evict(name)
            self._hosts.pop(name, None)  # another thread may have come first

    def _pages_of(self, sizes: Mapping[str, tuple[int, int, int]]) -> int:
        return -(-sum(a + b for _, a, b in sizes.values()) // self.storage.shape[1])

    def _find(self, name: str) -> _Host:
        if name not in self._hosts:
            raise KeyError(f"AdapterPool: there is no adapter named {name!r}")
        return self._hosts[name]

    # The working set.

    def load(self, name: str) -> int:
        """Make an adapter resident and the most recently used; returns its index until it is evicted or changed.

        Raises:
            KeyError: there is no such adapter.
            PoolFull: a RuntimeError, if too little can be evicted; it names the sizes.
            RuntimeError: a trainable adapter has changed while a batch uses it.
        """
        return self._load(name)

    def pin(self, name: str) -> int:
        """Load an adapter and keep it resident until :meth:`unpin` was called as often as this.

        A pin that raises does not count. An earlier pin stays if a changed trainable adapter cannot be loaded again:
        its pages stay reserved, it has no index, and the next load tries again.
        """
        return self._load(name, self._pins)

    def unpin(self, name: str) -> None:
        """Undo one :meth:`pin`; RuntimeError if there is none."""
        with self._lock:
            if not self._pins[name]:
                raise RuntimeError(f"AdapterPool: {name!r} is not pinned")
            self._pins[name] -= 1

    @contextlib.contextmanager
    def use(self, names: Sequence[str | None]) -> Iterator[Tensor]:
        """Inside ``with pool.use(names) as index:`` the adapters, one per row (None: the base), stay resident."""
        held: dict[str, int] = {}
        try:
            for name in dict.fromkeys(n for n in names if n is not None):
                held[name] = self._load(name, self._uses)
            yield torch.tensor([-1 if n is None else held[n] for n in names], dtype=torch.int64, device="cpu")
        finally:
            with self._lock:
                self._uses.subtract(list(held))

    def prefetch(self, names: Collection[str]) -> Future[list[str]]:
        """Load adapters of a coming batch in the background, in order, until no room is left for the next one.

        They are not pinned: other loads may evict them again. The future's result has the names of the adapters that
        were loaded. A full pool is not an error here.
        """
        with self._lock:
            for name in names:
                self._find(name)
            if self._worker is None:
                self._worker = ThreadPoolExecutor(1, "peftops-prefetch")
            return self._worker.submit(self._prefetch, list(names))

    def _prefetch(self, names: list[str]) -> list[str]:
        done: list[str] = []
        for name in names:
            try:
                self._load(name, spare=done)
            except (PoolFull, KeyError):  # KeyError: removed meanwhile
                break
            done.append(name)
        return done

    def evict(self, name: str) -> None:
        """Take an adapter out of the working set; host memory keeps it. RuntimeError if it is pinned or in use."""
        with self._lock:
            self._find(name)
            while name in self._resident and self._resident[name].loading:
                self._lock.wait()
            if self._holds(name):
                raise RuntimeError(f"AdapterPool: {name!r} is {'in use' if self._uses[name] else 'pinned'}")
            if name in self._resident:
                self._drop(name)

    def alloc(self, count: int) -> list[int]:
        """Take pages out of the working set, for the caller's own use: ``pool.storage[page]`` is theirs until
        :meth:`free`. Adapters are evicted as for a load. The pages keep their old content.

        Raises:
            ValueError: count is negative.
            PoolFull: a RuntimeError, if too little can be evicted; it names the sizes.
        """
        if count < 0:
            raise ValueError(f"AdapterPool: count must not be negative, but is {count}")
        with self._lock:
            while not self._make_room(f"{count} pages", count, 0):
                pass
            pages = [self._free.pop() for _ in range(count)]
            self._lent.update(pages)
            return pages

    def free(self, pages: Sequence[int]) -> None:
        """Give pages back that :meth:`alloc` handed out; ValueError, and nothing is freed, if one was not."""
        with self._lock:
            for page, times in Counter(pages).items():
                if page not in self._lent or times > 1:
                    raise ValueError(f"AdapterPool: page {page} is not one that alloc() handed out, or is freed twice")
            self._lent.difference_update(pages)
            self._free += pages

    def _load(self, name: str, hold: Counter[str] | None = None, spare: Collection[str] = ()) -> int:
        """The load itself. One thread copies, without the lock; other threads that need the same adapter wait for
        it."""
        with self._lock:
            while True:  # after a wait, everything must be looked up again
                host, now = self._find(name), self._resident.get(name)
                if now is None and self._make_room(repr(name), len(host.flat), 1, spare):
                    now = _Resident(self._free_slots.pop(), [self._free.pop() for _ in range(len(host.flat))])
                    self._resident[name] = now
                    break
                if now is not None and not now.loading:
                    if now.version == host.version():
                        return self._loaded(name, now, hold)
                    if self._uses[name]:
                        raise RuntimeError(f"AdapterPool: {name!r} has changed while in use; leave use() first")
                    break
                if now is not None:
                    self._lock.wait()
            version = host.version()
            now.loading = True
            self._forget(now)
        try:
            if host.leaves:
                host.fill(host.leaves)
            pages = torch.tensor(now.pages, dtype=torch.int64, device="cpu")
            self.storage.index_copy_(0, pages.to(self.storage.device), host.flat.to(self.storage.device))
        except BaseException:
            with self._lock:
                if self._pins[name]:  # an earlier pin keeps the adapter's pages
                    now.version, now.loading = None, False
                else:
                    self._drop(name)
                self._lock.notify_all()
            raise
        with self._lock:
            self._table[now.slot, : len(pages)] = pages
            self._where[:, now.slot], self._scaling[:, now.slot] = host.where, host.scaling
            self._loads += 1
            handle = self._loads * len(self._handles) + now.slot
            for layer, pair in host.leaves.items():
                self._layers[layer].trainable[handle] = pair
            self._handles[now.slot] = handle
            now.version, now.loading = version, False
            self._lock.notify_all()
            return self._loaded(name, now, hold)

    def _loaded(self, name: str, now: _Resident, hold: Counter[str] | None) -> int:
        self._resident.move_to_end(name)
        if hold is not None:
            hold[name] += 1
        return int(self._handles[now.slot])

    def _make_room(self, what: str, pages: int, slots: int, spare: Collection[str] = ()) -> bool:
        """Evict enough adapters and return True; or wait for a load to end and return False; or raise."""
        idle = [
            other for other, at in self._resident.items() if not (self._holds(other) or at.loading or other in spare)
        ]
        room = len(self._free) + sum(len(self._resident[other].pages) for other in idle)
        if room < pages or len(self._free_slots) + len(idle) < slots:
            if any(at.loading for at in self._resident.values()):
                return not self._lock.wait()  # an adapter that is being loaded can be evicted in a moment
            have, total = (len(self._free), len(self._free_slots)), (len(self.storage), len(self._handles))
            raise PoolFull(
                f"AdapterPool: no room for {what}: it needs {pages} pages and {slots} slots; of {total[0]} pages "
                f"{have[0]} are free and {room - have[0]} can be evicted, of {total[1]} slots {have[1]} and {len(idle)}"
                "; the others are pinned, in use or allocated"
            )
        while len(self._free) < pages or len(self._free_slots) < slots:
            self._drop(idle.pop(0))
        return True

    def _forget(self, now: _Resident) -> None:
        """Make the present index of a slot invalid."""
        handle = int(self._handles[now.slot])
        self._handles[now.slot] = -1
        for layer in self._layers.values():
            layer.trainable.pop(handle, None)

    def _drop(self, name: str) -> None:
        now = self._resident.pop(name)
        self._forget(now)
        self._free += now.pages
        self._free_slots.append(now.slot)
