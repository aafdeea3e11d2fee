"""Factors cut over ranks give what they give on one: with ranks that are a loop, and with two processes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import peftops
from gloo import met, together
from numerics import assert_sums
from peftops.nn import column_parallel_lora, row_parallel_lora, shard_lora, unshard_lora
from strategies import normal, seeds

parallels = pytest.mark.parametrize("parallel", ["column", "row"])
schemes = pytest.mark.parametrize("scheme", ["slora", "local"])
SCALE = 0.75


def layer(n, k, r, seed, rows=5):
    """x, W, A, B and the exact layer, with the sum of magnitudes."""
    x, W, A, B = (normal(s, torch.float32, seed + i) for i, s in enumerate(((rows, k), (n, k), (r, k), (n, r))))
    exact = lambda *t: t[0] @ t[1].T + SCALE * t[0] @ t[2].T @ t[3].T
    values = [t.double() for t in (x, W, A, B)]
    return x, W, A, B, exact(*values), exact(*(t.abs() for t in values))


def both(parallel, scheme, world, x, W, shards):
    """What each rank of a layer cut by either scheme computes, with a loop for the ranks; and what they sent."""
    sent = []
    if parallel == "column":
        Ws, us = W.chunk(world), [F.linear(x, A) for A, _ in shards]
        sent = [u.numel() for u in us] if scheme == "slora" else []
        if scheme == "slora":
            return [
                column_parallel_lora(F.linear(x, w), x, A, B, SCALE, gather=lambda u, us=us: us)
                for w, (A, B) in zip(Ws, shards, strict=True)
            ], sent
        return [F.linear(x, w) + SCALE * F.linear(u, B) for w, u, (_, B) in zip(Ws, us, shards, strict=True)], sent
    xs, Ws = x.chunk(world, -1), W.chunk(world, -1)
    us = [F.linear(xi, A) for xi, (A, _) in zip(xs, shards, strict=True)]
    if scheme == "slora":
        sent = [u.numel() for u in us]
        return [
            row_parallel_lora(F.linear(xi, w), xi, A, B, SCALE, rank=i, reduce=lambda _, us=us: sum(us))
            for i, (xi, w, (A, B)) in enumerate(zip(xs, Ws, shards, strict=True))
        ], sent
    return [F.linear(xi, w) + SCALE * F.linear(u, B) for xi, w, u, (_, B) in zip(xs, Ws, us, shards, strict=True)], sent


@parallels
@schemes
@given(world=st.integers(1, 5), n=st.integers(1, 9), k=st.integers(1, 9), r=st.integers(1, 17), seed=seeds)
def test_simulated_ranks_are_one_device(parallel, scheme, world, n, k, r, seed):
    n, k = n * world, k * world
    x, W, A, B, exact, size = layer(n, k, r, seed)
    shards = shard_lora(A, B, world, parallel=parallel, scheme=scheme)
    each = -(-r // world)
    want = {
        ("column", "slora"): ((each, k), (n // world, world * each)),
        ("row", "slora"): ((r, k // world), (n // world, r)),
        ("column", "local"): ((r, k), (n // world, r)),
        ("row", "local"): ((r, k // world), (n, r)),
    }
    assert [tuple(tuple(f.shape) for f in shard) for shard in shards] == [want[parallel, scheme]] * world
    back = unshard_lora(shards, r, parallel=parallel, scheme=scheme)
    assert torch.equal(back[0], A) and torch.equal(back[1], B)
    ys, sent = both(parallel, scheme, world, x, W, shards)
    got = torch.cat(ys, -1) if parallel == "column" else sum(ys)
    assert_sums(got, exact, size, k + 2 * r + 2 * world + 4)
    if scheme == "slora":
        assert sent == [len(x) * (each if parallel == "column" else r)] * world


def pools(parallel, world, shards_of, n, k):
    size = (k, n // world) if parallel == "column" else (k // world, n)
    for rank in range(world):
        pool = peftops.AdapterPool({"layer": size}, pages=64, page_size=128)
        for name, shards in shards_of.items():
            pool.add(name, {"layer": shards[rank]}, SCALE)
        yield pool


@parallels
def test_local_shards_of_many_adapters_are_served_from_pools(parallel):
    n, k, world, rows = 24, 40, 4, ["a", None, "b", "a", "c"]
    x, W = normal((5, k), torch.float32, 1), normal((n, k), torch.float32, 2)
    ranks = {"a": 1, "b": 5, "c": 8}
    factors = {a: (normal((r, k), torch.float32, r), normal((n, r), torch.float32, r + 1)) for a, r in ranks.items()}
    shards = {a: shard_lora(*f, world, parallel=parallel, scheme="local") for a, f in factors.items()}
    got = []
    for i, pool in enumerate(pools(parallel, world, shards, n, k)):
        xi, Wi = (x, W.chunk(world)[i]) if parallel == "column" else (x.chunk(world, -1)[i], W.chunk(world, -1)[i])
        with torch.no_grad(), pool.use(rows) as index:
            got.append(peftops.multi_lora_linear(xi, Wi.contiguous(), pool.layer("layer"), index))
    got = torch.cat(got, -1) if parallel == "column" else sum(got)
    for i, a in enumerate(rows):
        A, B = factors[a] if a else (torch.zeros(1, k), torch.zeros(n, 1))
        exact = lambda x, W, A, B: x @ W.T + SCALE * x @ A.T @ B.T
        values = [t.double() for t in (x[i : i + 1], W, A, B)]
        assert_sums(got[i : i + 1], exact(*values), exact(*(t.abs() for t in values)), k + 8 + world + 4)


def in_a_process(rank, world, file, results):
    """A column-parallel layer, an activation and a row-parallel layer, as in an MLP; both schemes."""
    with met(rank, world, file):
        x, W1, A1, B1, *_ = layer(12, 8, 5, 1)
        _, W2, A2, B2, *_ = layer(8, 12, 3, 9)
        first, second = W1.chunk(world)[rank], W2.chunk(world, -1)[rank]
        for scheme in ("slora", "local"):
            a1, b1 = shard_lora(A1, B1, world, parallel="column", scheme=scheme)[rank]
            a2, b2 = shard_lora(A2, B2, world, parallel="row", scheme=scheme)[rank]
            if scheme == "slora":
                h = F.relu(column_parallel_lora(F.linear(x, first), x, a1, b1, SCALE))
                y = row_parallel_lora(F.linear(h, second), h, a2, b2, SCALE, rank=rank)
            else:
                h = F.relu(F.linear(x, first) + SCALE * F.linear(F.linear(x, a1), b1))
                y = F.linear(h, second) + SCALE * F.linear(F.linear(h, a2), b2)
            torch.distributed.all_reduce(y)  # the layer's own
            torch.save(y, f"{results}-{scheme}-{rank}")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_gloo_processes_are_one_device(tmp_path):
    together(in_a_process, tmp_path / "rendezvous", tmp_path / "y")
    x, W1, A1, B1, *_ = layer(12, 8, 5, 1)
    _, W2, A2, B2, *_ = layer(8, 12, 3, 9)
    full = lambda x, W, A, B: x @ W.T + SCALE * x @ A.T @ B.T
    h = F.relu(full(*(t.double() for t in (x, W1, A1, B1))))
    want = full(h, *(t.double() for t in (W2, A2, B2)))
    size1 = full(*(t.double().abs() for t in (x, W1, A1, B1)))  # bounds |h|, and the error of h by a part of it
    size = full(size1, *(t.double().abs() for t in (W2, A2, B2)))
    for scheme in ("slora", "local"):
        ys = [torch.load(tmp_path / f"y-{scheme}-{rank}") for rank in range(2)]
        assert torch.equal(*ys)
        assert_sums(ys[0], want, size, 8 + 12 + 2 * (5 + 3) + 2 * 4 + 8)


def test_bad_input():
    A, B = torch.zeros(4, 6), torch.zeros(9, 4)
    for call, match in (
        (lambda: shard_lora(A, B, 2, parallel="diagonal"), "parallel must be one of column, row, not 'diagonal'"),
        (lambda: shard_lora(A, B, 2, parallel="row", scheme="x"), "scheme must be one of slora, local, not 'x'"),
        (lambda: shard_lora(A, B, 0, parallel="row"), "world must be at least 1, not 0"),
        (lambda: shard_lora(A, B, 2, parallel="column"), "the 9 outputs cannot be cut evenly over 2 ranks"),
        (lambda: shard_lora(A, B, 4, parallel="row"), "the 6 inputs cannot be cut evenly over 4 ranks"),
        (lambda: shard_lora(A, B[:, :3], 3, parallel="row"), r"\[out, r\], not \[4, 6\] and \[9, 3\]"),
        (lambda: unshard_lora([(A, B)], 4, parallel="x"), "unshard_lora: parallel must be one of column, row, not 'x'"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
