"""What holds of a pool after any sequence of calls, and what its errors say."""

from collections import Counter

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import peftops
from adapter_factors import pair, stored
from numerics import assert_sums
from peftops.serving import PoolFull
from peftops.serving.paged import peak_tokens
from strategies import normal

LAYERS = {"p": (5, 70), "q": (64, 3)}
PAGES, SLOTS, PAGE = 12, 3, 128
names = st.sampled_from("abcdef")


class Pool(RuleBasedStateMachine):
    """The pool beside a model of it: who is resident, least recently used first; pins; pages that were handed out."""

    def __init__(self):
        super().__init__()
        self.pool = peftops.AdapterPool(LAYERS, pages=PAGES, slots=SLOTS, page_size=PAGE)
        self.known, self.order, self.pins, self.need, self.lent, self.trainable = {}, [], Counter(), {}, [], set()

    @initialize(ranks=st.lists(st.integers(1, 3), min_size=4, max_size=4))
    def begin(self, ranks):
        """With more adapters than slots: few runs would get there by themselves."""
        for i, (name, rank) in enumerate(zip("abcd", ranks, strict=True)):
            self.add(name, rank, [["p"], ["q"]][i % 2], i, i == 0)

    def room(self, pages, slots, order, spare=()):
        """The order that is left once there is room, or None if there cannot be."""
        order, idle = list(order), [o for o in order if not self.pins[o] and o not in spare]
        short = lambda: PAGES - len(self.lent) - sum(self.need[o] for o in order) < pages or SLOTS - len(order) < slots
        while short():
            if not idle:
                return None
            order.remove(idle.pop(0))
        return order

    def attempt(self, name, call):
        """Whatever loads: the model says whether there is room, and who makes it."""
        if name not in self.known:
            with pytest.raises(KeyError, match="there is no adapter named"):
                call()
            return None
        order = [o for o in self.order if o != name]
        if name not in self.order:
            need = self.need[name]
            order = self.room(need, 1, order)
            if order is None:
                with pytest.raises(PoolFull, match=f"no room for '{name}': it needs {need} pages .* of {PAGES} pages"):
                    call()
                return None
        got = call()
        self.order = [*order, name]
        return got

    @rule(
        name=names,
        rank=st.integers(1, 3),
        seed=st.integers(0, 99),
        trainable=st.booleans(),
        part=st.sampled_from([["p"], ["q"], ["p", "q"], ["q", "p"], []]),
    )
    def add(self, name, rank, part, seed, trainable):
        factors = {key: pair(*LAYERS[key], rank, seed) for key in part}
        if name in self.known:
            with pytest.raises(ValueError, match=f"there is an adapter named '{name}' already"):
                self.pool.add(name, factors)
            return
        self.pool.add(name, factors, trainable=trainable)
        self.known[name] = factors
        self.need[name] = -(-rank * sum({"p": 192, "q": 128}[key] for key in part) // PAGE)
        if trainable:
            self.trainable.add(name)

    @rule(name=names)
    def load(self, name):
        handle = self.attempt(name, lambda: self.pool.load(name))
        assert handle is None or self.pool.load(name) == handle

    @rule(name=names)
    def step(self, name):
        """An optimizer writes the leaves: the next load reads them again, in place if the adapter is pinned."""
        if name not in self.trainable or not self.known[name]:
            return
        before = self.attempt(name, lambda: self.pool.load(name))
        for f in (f for factors in self.known[name].values() for f in factors):
            f.add_(1)
        after = self.attempt(name, lambda: self.pool.load(name))
        assert (before is None and after is None) or before != after

    @rule(name=names)
    def fail(self, name):
        """A leaf that does not fit any more: a pinned adapter stays, without an index, until it does again."""
        if name not in self.trainable or not self.known[name]:
            return
        before = self.attempt(name, lambda: self.pool.load(name))
        A = next(iter(self.known[name].values()))[0]
        kept, shape = A.clone(), A.shape
        A.resize_(10007, shape[1]).zero_()  # written, so that the pool notices
        if before is not None:
            for load in (self.pool.load, self.pool.pin):
                with pytest.raises(RuntimeError):
                    load(name)
            at = self.pool._resident.get(name)
            assert (at is not None) == bool(self.pins[name])
            assert at is None or self.pool._handles[at.slot] == -1
            if at is None:
                self.order.remove(name)
        A.resize_(shape).copy_(kept)
        after = self.attempt(name, lambda: self.pool.load(name))
        assert (before is None and after is None) or before != after

    @rule(name=names)
    def pin(self, name):
        if self.attempt(name, lambda: self.pool.pin(name)) is not None:
            self.pins[name] += 1

    @rule(name=names)
    def unpin(self, name):
        if self.pins[name]:
            self.pool.unpin(name)
            self.pins[name] -= 1
        else:
            with pytest.raises(RuntimeError, match="is not pinned"):
                self.pool.unpin(name)

    @rule(name=names)
    def use(self, name):
        def call():
            with self.pool.use([name, None, name]) as index:
                assert index.tolist() == [index[0], -1, index[0]]
                with pytest.raises(RuntimeError, match="is in use"):
                    self.pool.evict(name)
                if not self.pins[name]:
                    with pytest.raises(RuntimeError, match="is not pinned"):
                        self.pool.unpin(name)

        self.attempt(name, call)

    @rule(wanted=st.lists(names, max_size=6, unique=True), any_name=st.booleans())
    def prefetch(self, wanted, any_name):
        wanted = [name for name in wanted if any_name or name in self.known]
        if not set(wanted) <= set(self.known):
            with pytest.raises(KeyError, match="there is no adapter named"):
                self.pool.prefetch(wanted)
            return
        done = []
        for name in wanted:
            order = [o for o in self.order if o != name]
            if name not in self.order:
                order = self.room(self.need[name], 1, order, done)
                if order is None:
                    break
            self.order = [*order, name]
            done.append(name)
        assert self.pool.prefetch(wanted).result(60) == done

    @rule(name=names, forget=st.booleans())
    def evict(self, name, forget):
        call = self.pool.remove if forget else self.pool.evict
        if name not in self.known or self.pins[name]:
            with pytest.raises((KeyError, RuntimeError), match=r"no adapter named|is pinned"):
                call(name)
            return
        call(name)
        self.order = [o for o in self.order if o != name]
        if forget:
            del self.known[name]
            self.trainable.discard(name)

    @rule(count=st.integers(0, PAGES + 1))
    def alloc(self, count):
        order = self.room(count, 0, self.order)
        if order is None:
            with pytest.raises(PoolFull, match=f"no room for {count} pages: it needs {count} pages and 0 slots"):
                self.pool.alloc(count)
            return
        self.order = order
        pages = self.pool.alloc(count)
        assert len(pages) == count and not set(pages) & set(self.lent)
        for page in pages:
            self.pool.storage[page] = page + 0.5
        self.lent += pages

    @rule(count=st.integers(0, PAGES), more=st.sampled_from(["", "twice", "unknown"]))
    def free(self, count, more):
        pages = self.lent[:count]
        if more and pages:
            bad = pages[0] if more == "twice" else next(p for p in range(PAGES + 1) if p not in self.lent)
            with pytest.raises(ValueError, match=f"page {bad} is not one that alloc"):
                self.pool.free([*pages, bad])
            return
        self.pool.free(pages)
        self.lent = self.lent[count:]

    @invariant()
    def holds(self):
        pool = self.pool
        assert pool.resident == self.order
        assert all(name in self.order for name in self.pins if self.pins[name])
        owned = [page for at in pool._resident.values() for page in at.pages]
        assert sorted([*owned, *self.lent, *pool._free]) == list(range(PAGES))
        assert sorted(pool._lent) == sorted(self.lent) and pool.free_pages == PAGES - len(owned) - len(self.lent)
        slots = [at.slot for at in pool._resident.values()]
        assert sorted(slots + pool._free_slots) == list(range(SLOTS))
        assert (pool._handles >= 0).sum() == len(slots)
        assert all((pool.storage[page] == page + 0.5).all() for page in self.lent)
        for key in LAYERS:
            handles = {int(pool._handles[pool._resident[o].slot]): o for o in self.order}
            mine = {o for o in self.order if o in self.trainable and key in self.known[o]}
            assert {handles[h] for h in pool.layer(key).trainable} == mine
        for name in self.order:
            for key in LAYERS:
                if key not in self.known[name]:
                    assert pool.layer(key).where[pool._resident[name].slot, 2] == 0
                    continue
                for got, want in zip(stored(pool, name, key), self.known[name][key], strict=True):
                    assert torch.equal(got, want)


TestPool = Pool.TestCase
TestPool.settings = settings(settings.default, max_examples=60, stateful_step_count=40)


def test_pages_for_the_caller_come_from_adapters_and_go_back_once():
    pool = peftops.AdapterPool({"layer": (64, 64)}, pages=5, slots=3, page_size=64)
    for i, name in enumerate("ab"):
        pool.add(name, {"layer": pair(64, 64, 1, i)})
        pool.load(name)
    mine = pool.alloc(3)
    assert pool.resident == ["b"] and pool.free_pages == 0 and len(set(mine)) == 3
    pool.storage[torch.tensor(mine)] = float("nan")
    assert all(torch.equal(f, g) for f, g in zip(stored(pool, "b", "layer"), pair(64, 64, 1, 1), strict=True))
    pool.free(mine[:2])
    for again in (mine[:1], mine[1:], [mine[2], mine[2]], [5], [-1]):
        with pytest.raises(ValueError, match="is not one that alloc"):
            pool.free(again)
    assert pool.free_pages == 2 and pool.load("a") >= 0 and pool.resident == ["b", "a"]
    pool.free(mine[2:])
    assert pool.free_pages == 1 and pool.alloc(0) == []


def test_a_load_that_fails_leaves_nothing_behind():
    pool = peftops.AdapterPool({"layer": (64, 64)}, pages=4, slots=2, page_size=64)
    A, B = pair(64, 64, 1)
    pool.add("a", {"layer": (A, B)}, trainable=True)
    A.resize_(5, 64)  # more than there are pages for
    for load in (pool.load, pool.pin):
        with pytest.raises(RuntimeError):
            load("a")
        assert pool.resident == [] and pool.free_pages == 4 and not pool._pins["a"]
    assert pool.layer("layer").trainable == {}


def test_a_pin_outlives_a_load_that_fails():
    """With its pages, which nobody else gets; the pin that failed is none."""
    pool = peftops.AdapterPool({"layer": (64, 64)}, pages=4, slots=2, page_size=64)
    A, B = pair(64, 64, 1)
    pool.add("a", {"layer": (A, B)}, trainable=True)
    pool.add("b", {"layer": pair(64, 64, 2)})
    first, kept = pool.pin("a"), A.clone()
    A.resize_(5, 64).zero_()
    for load in (pool.load, pool.pin):
        with pytest.raises(RuntimeError):
            load("a")
        assert pool.resident == ["a"] and pool.free_pages == 2 and pool._pins["a"] == 1
    assert pool.layer("layer").trainable == {}
    with pytest.raises(RuntimeError, match="neither -1 nor an adapter that is loaded"):
        peftops.multi_lora_linear(torch.zeros(1, 64), torch.zeros(64, 64), pool.layer("layer"), torch.tensor([first]))
    with pytest.raises(PoolFull, match="the others are pinned"):
        pool.load("b")
    A.resize_(1, 64).copy_(kept)
    assert pool.load("a") not in (first, -1) and torch.equal(stored(pool, "a", "layer")[0], kept)
    pool.unpin("a"), pool.evict("a")
    assert pool.resident == [] and pool.free_pages == 4


def test_pins_and_uses_are_counted_apart():
    pool = peftops.AdapterPool({"layer": (64, 64)}, pages=4, slots=2, page_size=64)
    pool.add("a", {"layer": pair(64, 64, 1)})
    with pool.use(["a"]):
        with pytest.raises(RuntimeError, match="'a' is not pinned"):
            pool.unpin("a")
        with pytest.raises(RuntimeError, match="'a' is in use"):
            pool.evict("a")
        pool.pin("a"), pool.pin("a")
    with pytest.raises(RuntimeError, match="'a' is pinned"):
        pool.remove("a")
    pool.unpin("a"), pool.unpin("a"), pool.evict("a")
    assert pool.free_pages == 4


def test_a_pinned_trainable_adapter_is_read_again_but_not_under_a_batch():
    pool = peftops.AdapterPool({"layer": (64, 64)}, pages=4, slots=2, page_size=64)
    A, B = pair(64, 64, 1)
    pool.add("a", {"layer": (A, B)}, trainable=True)
    first, pages = pool.pin("a"), list(pool._resident["a"].pages)
    with pool.use(["a"]) as index:
        assert index.tolist() == [first]
        A.add_(1)
        with pytest.raises(RuntimeError, match=r"'a' has changed while in use; leave use\(\) first"):
            pool.load("a")
    assert pool.load("a") not in (first, -1) and pool._resident["a"].pages == pages and pool._pins["a"] == 1
    assert torch.equal(stored(pool, "a", "layer")[0], A)
    with pytest.raises(RuntimeError, match="neither -1 nor an adapter that is loaded"):
        peftops.multi_lora_linear(torch.zeros(1, 64), torch.zeros(64, 64), pool.layer("layer"), torch.tensor([first]))


def test_ranks_and_scalings_by_layer():
    pool = peftops.AdapterPool({"p": (64, 64), "q": (64, 64), "s": (64, 64)}, pages=40, page_size=64)
    factors = {"q": pair(64, 64, 3), "p": pair(64, 64, 2, 5)}
    pool.add("a", factors, {"p": 0.5, "q": 3.0})
    x, zero = normal((1, 64), torch.float32, 9), torch.zeros(64, 64)
    with torch.no_grad(), pool.use(["a"]) as index:
        for name, scale in (("p", 0.5), ("q", 3.0)):
            A, B = factors[name]
            got = peftops.multi_lora_linear(x, zero, pool.layer(name), index)
            term = lambda x, A, B, s=scale: s * x.double() @ A.double().T @ B.double().T
            assert_sums(got, term(x, A, B), term(x.abs(), A.abs(), B.abs()), 64 + 3 + 2)
        assert not peftops.multi_lora_linear(x, zero, pool.layer("s"), index).any()


def test_peak_tokens():
    """By hand: the third request ends after 5 more tokens each, when 3 hold 10 + 20 + 5 + 15 tokens; and so on."""
    assert peak_tokens([]) == 0 and peak_tokens([(7, 4)]) == 11
    assert peak_tokens([(10, 30), (20, 10), (5, 5)]) == max(10 + 30, 30 + 20, 35 + 15)
    assert peak_tokens([(5, 5), (20, 10), (10, 30)]) == 50
    assert peak_tokens([(100, 1), (1, 50)]) == max(1 + 50, 101 + 2)


def test_errors_name_sizes():
    make = peftops.AdapterPool
    for bad, match in (
        (lambda: make({}, pages=1), "layers must name at least one layer"),
        (lambda: make({"p": (0, 4)}, pages=1), "'p' must have at least one feature in and out, not 0 and 4"),
        (lambda: make(LAYERS, pages=1, page_size=96), "page_size must be a power of two from 64, not 96"),
        (lambda: make(LAYERS, pages=0), "at least 1, not 0 and 256"),
        (lambda: make(LAYERS, pages=1, dtype=torch.float64), "must be float32, bfloat16 or float16, not torch.float64"),
    ):
        with pytest.raises(ValueError, match=match):
            bad()
    pool = make({"p": (64, 64)}, pages=2, page_size=128)
    with pytest.raises(ValueError, match="needs 3 pages of 128 elements, but the whole pool has 2"):
        pool.add("big", {"p": (torch.zeros(3, 64), torch.zeros(64, 3))})
    with pytest.raises(ValueError, match="the rank must be at most 8192, not 8193"):
        pool.add("big", {"p": (torch.zeros(8193, 64), torch.zeros(64, 8193))})
    for A in (torch.tensor(1.0), torch.zeros(64), torch.zeros(1, 1, 64), torch.zeros(0, 64), torch.zeros(2, 63)):
        with pytest.raises(ValueError, match=r"must have shapes \[r, 64\] and \[64, r\], not \["):
            pool.add("bad", {"p": (A, torch.zeros(64, 1))})
    with pytest.raises(ValueError, match="adapts 'z', which the pool does not know"):
        pool.add("bad", {"z": (torch.zeros(1, 64), torch.zeros(64, 1))})
    with pytest.raises(ValueError, match="count must not be negative, but is -1"):
        pool.alloc(-1)
    with pytest.raises(KeyError, match="there is no layer named 'z'"):
        pool.layer("z")
    assert pool.free_pages == 2 and pool.resident == []
    for name in "ab":
        pool.add(name, {"p": (torch.zeros(1, 64), torch.zeros(64, 1))})
    with pytest.raises(ValueError, match="there is an adapter named 'a' already"):
        pool.add("a", {"p": (torch.zeros(1, 64), torch.zeros(64, 1))})
    pool.add("c", {"p": (torch.zeros(2, 64), torch.zeros(64, 2))})
    pool.pin("a"), pool.load("b")
    with pytest.raises(PoolFull, match=r"'c': it needs 2 pages .* of 2 pages 0 are free and 1 can be evicted"):
        pool.load("c")
    with pytest.raises(PoolFull, match=r"no room for 2 pages: it needs 2 pages and 0 slots; of 2 pages 0 are free"):
        pool.alloc(2)
    assert pool.resident == ["a", "b"]


@pytest.mark.parametrize("bad", ["A", "B", "scaling", "too large for 16 bits"])
def test_numbers_that_are_not_finite_stay_out(bad):
    pool = peftops.AdapterPool(LAYERS, pages=4, dtype=torch.float16)
    A, B = pair(*LAYERS["p"], 2, 0)
    {"A": A, "too large for 16 bits": A}.get(bad, B)[0, 0] = {"B": float("inf"), "A": float("nan")}.get(bad, 1e5)
    scaling = float("nan") if bad == "scaling" else 1.0
    if bad == "scaling":
        B[0, 0] = 1
    with pytest.raises(ValueError, match="the factors and scaling of 'x' must be finite in torch.float16"):
        pool.add("x", {"p": (A, B)}, scaling)
    pool.add("x", {"p": pair(*LAYERS["p"], 2, 0)})  # the name is still free
