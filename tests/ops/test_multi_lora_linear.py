import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import assert_sums
from strategies import dtypes, ins, normal, outs, ranks, seeds

import peftops

NAMES = ["a", "b", "c"]


def pool_of(n, k, rs, seed, trainable=False, **kw):
    pool = peftops.AdapterPool({"layer": (k, n)}, **{"pages": 2000, "page_size": 128, **kw})
    factors = {}
    for i, (name, r) in enumerate(zip(NAMES, rs, strict=False)):
        A, B = normal((r, k), torch.float32, seed + 2 * i), normal((n, r), torch.float32, seed + 2 * i + 1)
        factors[name] = (A.requires_grad_(trainable), B.requires_grad_(trainable), 0.5 + i)
        pool.add(name, {"layer": (A, B)}, 0.5 + i, trainable=trainable)
    return pool, factors


@given(n=outs, k=ins, rs=st.tuples(ranks, ranks, ranks), dtype=dtypes, seed=seeds,
       rows=st.lists(st.sampled_from([None, *NAMES]), max_size=40))  # fmt: skip
def test_matches_reference(device, n, k, rs, dtype, seed, rows):
    """Forward and every gradient; the base product and the term are each rounded to the dtype."""
    pool, factors = pool_of(n, k, rs, seed, trainable=True)
    x, W, g = (normal(s, dtype, seed + 9 + i) for i, s in enumerate(((len(rows), k), (n, k), (len(rows), n))))
    x.requires_grad_()
    exact = {name: [t.detach().double().requires_grad_() for t in f[:2]] for name, f in factors.items()}
    xd, Wd, gd = x.detach().double().requires_grad_(), W.double(), g.double()
    want = [reference.linear(xd[i : i + 1], Wd, None, *(exact[a] if a else (None, None)), factors[a][2] if a else 1.0)
            for i, a in enumerate(rows)]  # fmt: skip
    with pool.use(rows) as index:
        y = peftops.multi_lora_linear(x, W, pool.layer("layer"), index)
        y.backward(g)
    step, base = torch.finfo(dtype).eps / 2, x.detach().double().abs() @ Wd.abs().T
    top = max(rs)
    term = torch.zeros_like(base)
    for i, a in enumerate(rows):
        if a:
            A, B = (t.detach().abs() for t in exact[a])
            term[i] = factors[a][2] * (xd[i].detach().abs() @ A.T) @ B.T
    if rows:
        out = torch.cat(want)
        out.backward(gd)
        assert_sums(y, out.detach(), base + term, k + top + 4, 2 * step * base)
    for name in NAMES:
        (A, B, s), mine = factors[name], [i for i, a in enumerate(rows) if a == name]
        if not mine:
            assert A.grad is None and B.grad is None
            continue
        xs, gs, Aa, Ba = xd.detach()[mine].abs(), gd[mine].abs(), *(t.detach().abs() for t in exact[name])
        assert_sums(A.grad, exact[name][0].grad, (s * gs @ Ba).T @ xs, len(mine) + n + 4)
        assert_sums(B.grad, exact[name][1].grad, s * gs.T @ (xs @ Aa.T), len(mine) + k + 4)


def test_base_rows_are_the_base_to_the_bit_and_threads_do_not_matter(device, threads):
    pool, _ = pool_of(100, 70, (3, 16, 5), 1)
    x, W = normal((40, 70), torch.float32, 5), peftops.nf4_quantize(normal((100, 70), torch.float32, 6))
    rows = [None, "a", "b", "b", "c"] * 8
    with pool.use(rows) as index, torch.no_grad():
        runs = []
        for n in (1, 2, 3):
            threads(n)
            runs.append(peftops.multi_lora_linear(x, W, pool.layer("layer"), index))
        base = peftops.nf4_linear(x, W)
    assert all(torch.equal(runs[0], y) for y in runs)
    assert torch.equal(runs[0][::5], base[::5]) and not torch.equal(runs[0], base)


def test_lru_pins_and_errors():
    pool, _ = pool_of(64, 64, (1, 1, 1), 1, pages=2, page_size=128)
    first = pool.load("a")
    pool.load("b"), pool.load("a"), pool.load("c")
    assert pool.resident == ["a", "c"] and pool.free_pages == 0 and pool.load("a") == first
    x, W = torch.randn(1, 64), torch.randn(64, 64)
    pool.evict("a")
    with pytest.raises(RuntimeError, match=r"adapter_index\[0\] is .* neither -1 nor an adapter that is loaded"):
        peftops.multi_lora_linear(x, W, pool.layer("layer"), torch.tensor([first]))
    pool.pin("a"), pool.pin("c")
    with pytest.raises(RuntimeError, match=r"no room for 'b': it needs 1 pages .* of 2 pages 0 are free and 0 can"):
        pool.load("b")
    with pytest.raises(RuntimeError, match="'a' is pinned or in use"):
        pool.evict("a")
    with pytest.raises(ValueError, match="there is an adapter named 'a' already"):
        pool.add("a", {})
    with pytest.raises(ValueError, match="needs 3 pages of 128 elements, but the whole pool has 2"):
        pool.add("big", {"layer": (torch.zeros(3, 64), torch.zeros(64, 3))})
