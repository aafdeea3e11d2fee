"""What holds of a pool while several threads load, prefetch and wait for one another."""

import random
import threading
from concurrent.futures import Future

import pytest
import torch

import peftops
from adapter_factors import pair
from strategies import normal


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_load_prefetch_allocate_and_run(dtype):
    """More adapters than slots, so that every batch evicts; each result is that of a pool that evicts nothing."""
    factors = [pair(64, 64, 2, 10 * i) for i in range(8)]
    pools = [
        peftops.AdapterPool({"layer": (64, 64)}, pages=p, slots=s, page_size=64, dtype=dtype)
        for p, s in ((32, 8), (24, 6))
    ]
    for pool in pools:
        for i, f in enumerate(factors):
            pool.add(str(i), {"layer": f})
    W, x = normal((64, 64), torch.float32, 3), normal((2, 64), torch.float32, 4)
    run = lambda pool, index: peftops.multi_lora_linear(x, W, pool.layer("layer"), index)
    want, failures, seen = {}, [], set()
    with torch.no_grad():
        for a in "01234567":
            with pools[0].use([a, a]) as index:
                want[a] = run(pools[0], index)

    def work(seed, pool=pools[1]):
        draw = random.Random(seed)
        try:
            with torch.no_grad():
                for _ in range(100):
                    batch = draw.sample("01234567", 2)
                    with pool.use(batch) as index:
                        coming = pool.prefetch(draw.sample("01234567", 2))
                        seen.update(index.tolist())
                        y = run(pool, index)
                    assert all(torch.equal(y[i], want[a][i]) for i, a in enumerate(batch))
                    if draw.random() < 0.3:
                        pages = pool.alloc(draw.randint(0, 4))
                        pool.storage[torch.tensor(pages, dtype=torch.int64)] = float("nan")
                        pool.free(pages)
                    coming.result(60)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures and len(seen) > 20 and not any(pools[1]._uses.values())
    owned = [page for at in pools[1]._resident.values() for page in at.pages]
    assert sorted(owned + pools[1]._free) == list(range(24))


def slow_copy(pool, name):
    """Makes the next copy of `name` wait for an event; returns two: it has begun, it may go on."""
    begun, go, host = threading.Event(), threading.Event(), pool._hosts[name]

    class Slow(dict):
        def __bool__(self):  # the load asks whether there are leaves just before it copies
            begun.set()
            assert go.wait(60)
            return False

    object.__setattr__(host, "leaves", Slow(host.leaves))
    return begun, go


def held_up_pool():
    """'a' is being loaded in the background into a pool for two, and 'b' is pinned."""
    pool = peftops.AdapterPool({"layer": (64, 64)}, pages=4, slots=2, page_size=64)
    for i, name in enumerate("abc"):
        pool.add(name, {"layer": pair(64, 64, 1, i)})
    begun, go = slow_copy(pool, "a")
    coming = pool.prefetch(["a"])
    assert begun.wait(60)
    pool.pin("b")  # is not held up
    return pool, go, coming


def in_background(*calls):
    got = [Future() for _ in calls]
    threads = [
        threading.Thread(target=lambda f=f, call=call: f.set_result(call()), daemon=True)
        for f, call in zip(got, calls, strict=True)
    ]
    for t in threads:
        t.start()
        t.join(0.2)
    return got


def test_who_wants_what_is_being_loaded_waits_for_it():
    pool, go, coming = held_up_pool()
    assert int(pool._handles[pool._resident["a"].slot]) == -1  # nobody sees what is half there
    got = in_background(lambda: pool.load("a"), lambda: pool.pin("a"))
    assert not any(f.done() for f in got)
    go.set()
    assert coming.result(60) == ["a"] and got[0].result(60) == got[1].result(60) == pool.load("a")
    assert pool._pins["a"] == 1 and pool.free_pages == 0


def test_what_is_being_loaded_makes_room_once_it_is_there():
    pool, go, coming = held_up_pool()
    (got,) = in_background(lambda: pool.load("c"))
    assert not got.done()
    go.set()
    assert coming.result(60) == ["a"] and got.result(60) >= 0 and pool.resident == ["b", "c"]


def test_evict_waits_for_a_load():
    pool, go, coming = held_up_pool()
    (got,) = in_background(lambda: pool.evict("a"))
    assert not got.done()
    go.set()
    assert coming.result(60) == ["a"] and got.result(60) is None and pool.resident == ["b"] and pool.free_pages == 2


def test_prefetch_stops_where_it_would_evict_its_own():
    pool = peftops.AdapterPool({"layer": (64, 64)}, pages=6, slots=2, page_size=64)
    for i, name in enumerate("abcd"):
        pool.add(name, {"layer": pair(64, 64, 1, i)})
    pool.load("d")
    assert pool.prefetch("abc").result(60) == ["a", "b"] == pool.resident  # "d" had to go, "a" not
    pool.pin("b")
    assert pool.prefetch("cab").result(60) == ["c"] and pool.resident == ["b", "c"]
    pool.pin("c")
    assert pool.prefetch("ab").result(60) == [] and pool.resident == ["b", "c"]
