"""What holds of a pool after any sequence of calls, and what its errors say."""

import random
import threading
from collections import Counter

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import peftops
from strategies import normal

LAYERS = {"p": (5, 70), "q": (64, 3)}
PAGES, SLOTS, PAGE = 12, 3, 128
names = st.sampled_from("abcdef")


def stored(pool, name, layer):
    """A and B of a resident adapter, read back through its pages as the kernels do."""
    at, slot = pool.layer(layer), pool._resident[name][0]
    flat = pool.storage[at.pages[slot].long()].view(-1)
    a, b, r = at.where[slot].tolist()
    padded = lambda n: -(-n // 64) * 64
    k, n = at.in_features, at.out_features
    A, B = flat[a : a + r * padded(k)].view(r, -1), flat[b : b + r * padded(n)].view(r, -1)
    assert not A[:, k:].any() and not B[:, n:].any()
    return A[:, :k], B[:, :n].T


class Pool(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.pool = peftops.AdapterPool(LAYERS, pages=PAGES, slots=SLOTS, page_size=PAGE)
        self.known, self.order, self.held, self.need = {}, [], Counter(), {}

    def attempt(self, name, call):
        """Whatever loads: the model says whether there is room, and who makes it."""
        if name not in self.known:
            with pytest.raises(KeyError, match="there is no adapter named"):
                call()
            return None
        order, need = [o for o in self.order if o != name], self.need[name]
        idle = [o for o in order if not self.held[o]]
        if name not in self.order:
            used = lambda: PAGES - sum(self.need[o] for o in order)
            while idle and (used() < need or len(order) == SLOTS):
                order.remove(idle.pop(0))
            if used() < need or len(order) == SLOTS:
                with pytest.raises(RuntimeError, match=f"no room for '{name}': it needs {need} pages .* of {PAGES} "):
                    call()
                return None
        got = call()
        self.order = [*order, name]
        return got

    @rule(name=names, rank=st.integers(1, 3), seed=st.integers(0, 99),
          part=st.sampled_from([["p"], ["q"], ["p", "q"], ["q", "p"], []]))  # fmt: skip
    def add(self, name, rank, part, seed):
        shapes = {key: ((rank, LAYERS[key][0]), (LAYERS[key][1], rank)) for key in part}
        factors = {key: tuple(normal(s, torch.float32, seed + i) for i, s in enumerate(both))
                   for key, both in shapes.items()}  # fmt: skip
        if name in self.known:
            with pytest.raises(ValueError, match="already"):
                self.pool.add(name, factors)
            return
        self.pool.add(name, factors)
        self.known[name] = factors
        self.need[name] = -(-rank * sum({"p": 192, "q": 128}[key] for key in part) // PAGE)

    @rule(name=names)
    def load(self, name):
        self.attempt(name, lambda: self.pool.load(name))

    @rule(name=names)
    def pin(self, name):
        if self.attempt(name, lambda: self.pool.pin(name)) is not None:
            self.held[name] += 1

    @rule(name=names)
    def unpin(self, name):
        if self.held[name]:
            self.pool.unpin(name)
            self.held[name] -= 1
        else:
            with pytest.raises(RuntimeError, match="is not pinned"):
                self.pool.unpin(name)

    @rule(name=names)
    def use(self, name):
        def call():
            with self.pool.use([name, None, name]) as index:
                assert index.tolist() == [index[0], -1, index[0]]
                if not self.held[name]:
                    with pytest.raises(RuntimeError, match="pinned or in use"):
                        self.pool.evict(name)

        self.attempt(name, call)

    @rule(name=names, forget=st.booleans())
    def evict(self, name, forget):
        call = self.pool.remove if forget else self.pool.evict
        if name not in self.known or self.held[name]:
            with pytest.raises((KeyError, RuntimeError), match=r"no adapter named|pinned or in use"):
                call(name)
            return
        call(name)
        self.order = [o for o in self.order if o != name]
        if forget:
            del self.known[name]

    @invariant()
    def holds(self):
        assert self.pool.resident == self.order
        assert all(name in self.order for name in self.held if self.held[name])
        owned = [page for _, pages, _ in self.pool._resident.values() for page in pages]
        assert sorted(owned + self.pool._free) == list(range(PAGES))
        slots = [slot for slot, *_ in self.pool._resident.values()]
        assert sorted(slots + self.pool._free_slots) == list(range(SLOTS))
        assert (self.pool._handles >= 0).sum() == len(slots)
        for name in self.order:
            for key in LAYERS:
                if key not in self.known[name]:
                    assert self.pool.layer(key).where[self.pool._resident[name][0], 2] == 0
                    continue
                for got, want in zip(stored(self.pool, name, key), self.known[name][key], strict=True):
                    assert torch.equal(got, want)


TestPool = Pool.TestCase
TestPool.settings = settings(settings.default, max_examples=25, stateful_step_count=30)


def test_two_threads_load_and_run():
    pool = peftops.AdapterPool({"layer": (64, 64)}, pages=8, slots=4, page_size=128)
    for i in range(6):
        pool.add(str(i), {"layer": (normal((2, 64), torch.float32, i), normal((64, 2), torch.float32, 9 + i))})
    W, x, failures, evictions = normal((64, 64), torch.float32, 3), normal((2, 64), torch.float32, 4), [], set()
    run = lambda index: peftops.multi_lora_linear(x, W, pool.layer("layer"), index)
    want = {}
    with torch.no_grad():
        for a in "012345":
            with pool.use([a, a]) as index:
                want[a] = run(index)

    def work(seed):
        draw = random.Random(seed)
        try:
            with torch.no_grad():
                for _ in range(100):
                    pair = draw.sample("012345", 2)
                    with pool.use(pair) as index:
                        evictions.update(index.tolist())
                        y = run(index)
                    assert all(torch.equal(y[i], want[a][i]) for i, a in enumerate(pair))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures and len(evictions) > 20 and pool.free_pages == 0


def test_errors_name_sizes():
    with pytest.raises(ValueError, match="page_size must be a power of two from 64, not 96"):
        peftops.AdapterPool(LAYERS, pages=1, page_size=96)
    with pytest.raises(ValueError, match="at least 1, not 0 and 256"):
        peftops.AdapterPool(LAYERS, pages=0)
    pool = peftops.AdapterPool({"p": (64, 64)}, pages=2, page_size=128)
    with pytest.raises(ValueError, match="needs 3 pages of 128 elements, but the whole pool has 2"):
        pool.add("big", {"p": (torch.zeros(3, 64), torch.zeros(64, 3))})
    for A in (torch.tensor(1.0), torch.zeros(64), torch.zeros(1, 1, 64), torch.zeros(0, 64), torch.zeros(2, 63)):
        with pytest.raises(ValueError, match=r"must have shapes \[r, 64\] and \[64, r\], not \["):
            pool.add("bad", {"p": (A, torch.zeros(64, 1))})
    with pytest.raises(ValueError, match="adapts 'z', which the pool does not know"):
        pool.add("bad", {"z": (torch.zeros(1, 64), torch.zeros(64, 1))})
    assert pool.free_pages == 2 and pool.resident == []
    for name in "ab":
        pool.add(name, {"p": (torch.zeros(1, 64), torch.zeros(64, 1))})
    pool.add("c", {"p": (torch.zeros(2, 64), torch.zeros(64, 2))})
    pool.pin("a"), pool.load("b")
    with pytest.raises(RuntimeError, match=r"'c': it needs 2 pages .* of 2 pages 0 are free and 1 can be evicted"):
        pool.load("c")
