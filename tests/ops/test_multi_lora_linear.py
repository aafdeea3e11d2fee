import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import peftops
import reference
from numerics import FP32, assert_rounded, assert_sums
from peftops.ops.packed_tensor import PackedTensor
from strategies import dtypes, ins, layouts, normal, outs, ranks, seeds, strided

NAMES = ["a", "b", "c"]
op = torch.ops.peftops

# Runs of one adapter, longer than every tile and group of rows, among single rows; in any order.
batches = st.builds(
    lambda runs, seed: random.Random(seed).sample(rows := [name for name, n in runs for _ in range(n)], len(rows)),
    st.lists(st.tuples(st.sampled_from([None, *NAMES]), st.sampled_from([1, 1, 1, 2, 3, 5, 17, 40])), max_size=6),
    seeds,
)


def pool_of(n, k, rs, seed, trainable=False, device="cpu", **kw):
    pool = peftops.AdapterPool({"layer": (k, n)}, **{"pages": 2000, "page_size": 128, "device": device, **kw})
    factors = {}
    for i, (name, r) in enumerate(zip(NAMES, rs, strict=False)):
        A, B = (normal(s, torch.float32, seed + 2 * i + j, device) for j, s in enumerate(((r, k), (n, r))))
        factors[name] = (A.requires_grad_(trainable), B.requires_grad_(trainable), 0.5 + i)
        pool.add(name, {"layer": (A, B)}, 0.5 + i, trainable=trainable)
    return pool, factors


def check(pool, factors, x, W, rows, g, bias=None, base=F.linear):
    """The term and every gradient, given the base product and its gradient to the bit: the term is added to the one in
    float32 and rounded with it; to the other it is added once it is rounded itself, by torch, and rounded again."""
    x.requires_grad_()
    with pool.use(rows) as index:
        y = peftops.multi_lora_linear(x, W, pool.layer("layer"), index, bias)
        y.backward(g)
    got, x.grad = x.grad, None
    plain = base(x, W, bias)
    plain.backward(g.contiguous())  # as ours hands it on: torch may sum another layout in another order
    plain, dplain = plain.detach().double(), x.grad
    xd, gd, (n, k) = x.detach().double(), g.double(), W.shape
    term, dterm, size, dsize = (torch.zeros_like(t) for t in (plain, xd, plain, xd))
    stored = {a: [t.detach().to(pool.storage.dtype).double() for t in f[:2]] for a, f in factors.items()}
    for name, (A, B, s) in factors.items():
        mine, (Ad, Bd) = [i for i, a in enumerate(rows) if a == name], stored[name]
        xs, gs, Aa, Ba = xd[mine], gd[mine], Ad.abs(), Bd.abs()
        term[mine], size[mine] = s * (xs @ Ad.T) @ Bd.T, s * (xs.abs() @ Aa.T) @ Ba.T
        dterm[mine], dsize[mine] = s * (gs @ Bd) @ Ad, s * (gs.abs() @ Ba) @ Aa
        if not A.requires_grad or not mine:
            assert A.grad is None and B.grad is None
            continue
        assert_sums(A.grad, (s * gs @ Bd).T @ xs, (s * gs.abs() @ Ba).T @ xs.abs(), len(mine) + n + 4)
        assert_sums(B.grad, s * gs.T @ (xs @ Ad.T), s * gs.abs().T @ (xs.abs() @ Aa.T), len(mine) + k + 4)
    top = max(f[0].shape[0] for f in factors.values())
    assert y.is_contiguous()
    assert_rounded(y.detach(), plain + term, size, k + top + 4, FP32 * plain.abs())
    assert_rounded(got, dterm, dsize, n + top + 4, then=lambda t: dplain + t)


@given(
    n=outs,
    k=ins,
    rs=st.tuples(ranks, ranks, ranks),
    dtype=dtypes,
    storage=dtypes,
    layout=layouts,
    seed=seeds,
    rows=batches,
    bias=st.booleans(),
    page_size=st.sampled_from([64, 128, 1024]),
)
def test_matches_reference(device, n, k, rs, dtype, storage, layout, seed, rows, bias, page_size):
    pool, factors = pool_of(
        n, k, rs, seed, trainable=storage == torch.float32, dtype=storage, page_size=page_size, device=device
    )
    x, W, g = (normal(s, dtype, seed + 9 + i, device) for i, s in enumerate(((len(rows), k), (n, k), (len(rows), n))))
    check(
        pool, factors, strided(x, layout), W, rows, strided(g, layout), normal((n,), dtype, 1, device) if bias else None
    )


@pytest.mark.parametrize("count", [1, 2, 3])  # with three, one begins in the middle of a run of rows
def test_rows_wider_than_what_one_thread_does_at_a_time(device, threads, count):
    """Columns in several parts, few rows: threads share rows, and each makes u for itself."""
    threads(count)
    pool, factors = pool_of(1100, 1030, (16, 3, 40), 1, trainable=True, page_size=1024, device=device)
    rows = ["a", "b", None, *["c"] * 18, "a"]
    x, W, g = (
        normal(s, torch.float32, i, device) for i, s in enumerate(((len(rows), 1030), (1100, 1030), (len(rows), 1100)))
    )
    check(pool, factors, x, peftops.nf4_quantize(W), rows, g, base=peftops.nf4_linear)


def test_frozen_adapters_beside_trainable_ones(device):
    pool, factors = pool_of(70, 65, (3, 5, 4), 1, trainable=True, device=device)
    A, B, scaling = factors["b"]
    factors["b"] = A.detach(), B.detach(), scaling
    pool.remove("b")
    pool.add("b", {"layer": (A, B)}, scaling)
    rows = ["a", "b", None, *["b"] * 17, "c", "a"]
    x, W, g = (normal(s, torch.float32, i, device) for i, s in enumerate(((len(rows), 65), (70, 65), (len(rows), 70))))
    check(pool, factors, x, W, rows, g)


def test_a_high_rank(device):
    pool, factors = pool_of(3, 5, (1000,), 1, trainable=True, device=device)
    x, W, g = (
        normal((18, 5), torch.float32, 2, device),
        normal((3, 5), torch.float32, 3, device),
        normal((18, 3), torch.float32, 4, device),
    )
    check(pool, factors, x, W, ["a"] * 17 + [None], g)


def test_all_of_it_against_float64(device):
    """The base product as well, over three leading dims and transposed."""
    pool, factors = pool_of(65, 70, (3, 16, 5), 1, device=device)
    x, W, b = (normal(s, torch.float32, 2 + i, device) for i, s in enumerate(((3, 4, 5, 70), (65, 70), (65,))))
    x = x.permute(2, 0, 1, 3)
    rows = random.Random(1).choices([None, *NAMES], k=60)
    with pool.use(rows) as index:
        y = peftops.multi_lora_linear(x, W, pool.layer("layer"), index.view(5, 3, 4), b)
    assert y.shape == (5, 3, 4, 65) and y.is_contiguous()
    for xi, yi, a in zip(x.reshape(60, 70), y.view(60, 65), rows, strict=True):
        A, B, s = factors[a] if a else (torch.zeros(1, 70, device=device), torch.zeros(65, 1, device=device), 1.0)
        values = [t.double() for t in (xi[None], W, b, A, B)]
        assert_sums(
            yi[None], reference.linear(*values, s), reference.linear(*(t.abs() for t in values), s), 70 + 16 + 5
        )


quantizers = pytest.mark.parametrize(
    "quantize, base",
    [
        (peftops.nf4_quantize, peftops.nf4_linear),
        (lambda w: peftops.group_quantize(w, bits=4, group_size=32), peftops.group_linear),
        (peftops.mxfp4_quantize, peftops.mxfp4_linear),
    ],
    ids=["nf4", "group", "mxfp4"],
)


@quantizers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantised_bases_and_their_gradients(device, quantize, base, dtype):
    pool, factors = pool_of(100, 96, (3, 16, 5), 1, trainable=True, device=device)
    rows = [*["a"] * 17, None, "b", *["c"] * 40, "b"]
    x, g = normal((len(rows), 96), dtype, 5, device), normal((len(rows), 100), dtype, 7, device)
    W, bias = quantize(normal((100, 96), torch.float32, 6, device)), normal((100,), dtype, 8, device)
    check(pool, factors, x, W, rows, g, bias, base)


@quantizers
def test_subclasses_of_a_base_are_that_base(quantize, base):
    pool, _ = pool_of(64, 64, (1,), 1)
    W, x = quantize(torch.randn(64, 64)), torch.randn(2, 64)
    W.__class__ = type("Mine", (type(W),), {})
    with pool.use([None, None]) as index:
        assert torch.equal(peftops.multi_lora_linear(x, W, pool.layer("layer"), index), base(x, W))


def test_a_packed_weight_without_a_product_is_an_error():
    class Other(PackedTensor):
        PARTS, SETTINGS = ("codes",), ()

    pool, _ = pool_of(64, 64, (1,), 1)
    W = Other._make((torch.zeros(64),), (), torch.Size((64, 64)), torch.float32)
    formats = ", ".join(kind.__name__ for kind in PackedTensor.FORMATS.values())
    with pytest.raises(TypeError, match=f"must be dense or one of {formats}, not a Other"):
        peftops.multi_lora_linear(torch.zeros(1, 64), W, pool.layer("layer"), torch.tensor([-1]))


def test_base_rows_are_the_base_to_the_bit_and_threads_do_not_matter(device, threads):
    pool, _ = pool_of(1100, 70, (3, 16, 5), 1, trainable=True, device=device)
    x, W = (
        normal((40, 70), torch.float32, 5, device),
        peftops.nf4_quantize(normal((1100, 70), torch.float32, 6, device)),
    )
    rows, g = [None, "a", "b", "b", "c"] * 8, normal((40, 1100), torch.float32, 7, device)
    runs, x = [], x.requires_grad_()
    with pool.use(rows) as index:
        leaves = [x, *(f for pair in pool.layer("layer").trainable.values() for f in pair)]
        for n in (1, 2, 3, 7):
            threads(n)
            y = peftops.multi_lora_linear(x, W, pool.layer("layer"), index)
            runs.append([y, *torch.autograd.grad(y, leaves, g)])
        base = peftops.nf4_linear(x, W)
    assert len(leaves) == 7
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
    assert torch.equal(runs[0][0][::5], base[::5]) and not torch.equal(runs[0][0], base)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_stays_in_its_row_and_a_bad_adapter_in_its_rows(device, bad):
    pool, factors = pool_of(70, 65, (3, 5, 4), 1, trainable=True, device=device)
    rows = ["a"] * 17 + [None, "b"] + ["c"] * 5 + ["a"]
    x, W, g = (normal(s, torch.float32, i, device) for i, s in enumerate(((len(rows), 65), (70, 65), (len(rows), 70))))
    x = x.requires_grad_()

    def run(x, g=g):
        leaves = [x, *(f for A, B, _ in factors.values() for f in (A, B))]
        with pool.use(rows) as index:
            y = peftops.multi_lora_linear(x, W, pool.layer("layer"), index)
        return y.detach(), *torch.autograd.grad(y, leaves, g)

    fine = run(x)
    assert all(t.isfinite().all() for t in fine)
    for row, name in ((3, "a"), (17, None), (23, "c")):
        others = torch.arange(len(rows)) != row
        spoilt, spoilt_g = x.detach().clone(), g.clone()
        spoilt[row, 64] = spoilt_g[row, 69] = bad
        y, _, *grads = run(spoilt.requires_grad_())
        _, dx, *_ = run(x, spoilt_g)
        for got, want in ((y, fine[0]), (dx, fine[1])):
            assert torch.equal(got[others], want[others]) and not got[row].isfinite().any()
        for i, (a, d) in enumerate(zip([n for n in NAMES for _ in "AB"], grads, strict=True)):
            assert torch.equal(d, fine[2 + i]) == (a != name)
    with torch.no_grad():
        factors["b"][0][4, 64] = bad
    y, mine = run(x)[0], torch.tensor([a == "b" for a in rows])
    assert torch.equal(y[~mine], fine[0][~mine]) and not y[mine].isfinite().any()


def raw(trainable=True, device="cpu"):
    """Arguments of the raw operators: x, u, g, an index and the slots."""
    pool, _ = pool_of(70, 65, (3, 5, 4), 1, trainable=trainable, device=device)
    rows = ["a", None, "b", "b", "c"]
    layer = pool.layer("layer")
    index = torch.tensor([-1 if a is None else pool.load(a) for a in rows])
    return (
        normal((5, 65), torch.float32, 1, device),
        normal((5, 5), torch.float32, 2, device),
        normal((5, 70), torch.float32, 3, device),
        index,
        layer,
    )


def test_opcheck(device):
    x, u, g, index, layer = raw(device=device)
    for kind in (torch.float32, torch.bfloat16):
        for y, into in ((g, x), (x, g)):
            call = (y.to(kind), into.to(kind), index, layer.storage, *layer.slots, y is x, 5)
            torch.library.opcheck(op.multi_lora_add_.default, call)
        torch.library.opcheck(
            op.multi_lora_gradient.default, (u, x.to(kind), index, index[[0, 2]], *layer.slots, True, 8)
        )


@pytest.mark.parametrize("quantize", [lambda w: w, peftops.nf4_quantize], ids=["dense", "nf4"])
def test_inference_compiles_without_a_graph_break(device, quantize):
    pool, _ = pool_of(64, 96, (3, 16, 5), 1, device=device)
    W, bias = quantize(torch.randn(64, 96, device=device)), torch.randn(64, device=device)
    layer = pool.layer("layer")
    call = lambda x, index: peftops.multi_lora_linear(x, W, layer, index, bias)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for rows in (["a", None, "b", "c", "b"], ["c", "c", "a", "a", None], [None] * 5):
            x = torch.randn(5, 96, device=device)
            with pool.use(rows) as index:
                assert torch.equal(compiled(x, index), call(x, index))


def test_autocast_casts_x_and_nothing_else(device):
    pool, factors = pool_of(64, 96, (3, 16, 5), 1, trainable=True, device=device)
    W, x, rows = (
        torch.randn(64, 96, device=device),
        torch.randn(5, 96, requires_grad=True, device=device),
        ["a", None, "b", "c", "b"],
    )
    with pool.use(rows) as index:
        with torch.autocast(device, torch.bfloat16):
            y = peftops.multi_lora_linear(x, W, pool.layer("layer"), index)
        want = peftops.multi_lora_linear(x.bfloat16(), W.bfloat16(), pool.layer("layer"), index)
        dx, dA = torch.autograd.grad(y, (x, factors["a"][0]), torch.randn(5, 64, device=device).bfloat16())
    assert y.dtype == torch.bfloat16 and torch.equal(y, want)
    assert dx.dtype == dA.dtype == torch.float32


@pytest.mark.parametrize("change", ["evicted", "reloaded", "stepped"])
def test_an_adapter_that_changes_between_forward_and_backward_is_an_error(change):
    pool, factors = pool_of(64, 96, (3, 16, 5), 1, trainable=True)
    x, W = torch.randn(3, 96), torch.randn(64, 96)
    with pool.use(["a", None, "b"]) as index:
        y = peftops.multi_lora_linear(x, W, pool.layer("layer"), index)
    if change == "stepped":
        with torch.no_grad():
            factors["b"][0].add_(1)
    else:
        pool.evict("b")
    if change != "evicted":
        pool.load("b")
    with pytest.raises(RuntimeError, match=r"adapter_index\[2\] is .* out of date once their adapter is evicted or"):
        y.sum().backward()
    assert factors["a"][0].grad is None


def test_bad_input():
    pool, _ = pool_of(64, 96, (3, 16, 5), 1)
    layer, x, W = pool.layer("layer"), torch.randn(3, 96), torch.randn(64, 96)
    a, call = pool.load("a"), peftops.multi_lora_linear
    for index in (torch.tensor([a, a]), torch.tensor([a] * 4), torch.tensor([], dtype=torch.int64)):
        with pytest.raises(RuntimeError, match=f"an adapter for each of the 3 rows of x, not for {len(index)}"):
            call(x, W, layer, index)
    for dtype in (torch.int32, torch.float32, torch.bool):
        with pytest.raises(RuntimeError, match="adapter_index must be int64"):
            call(x, W, layer, torch.ones(3, dtype=dtype))
    for wrong in (-2, 0, a + 1, a + 256, 2**62, -(2**63)):
        with pytest.raises(RuntimeError, match=rf"adapter_index\[1\] is {wrong}, which is neither -1 nor an adapter"):
            call(x, W, layer, torch.tensor([a, wrong, -1]))
    with pytest.raises(ValueError, match=r"weight must have shape \[64, 96\], not \[96, 64\]"):
        call(x, W.T, layer, torch.tensor([a] * 3))
    with pytest.raises(ValueError, match=r"the last dim of x must be 96, but its shape is \[3, 95\]"):
        call(x[:, :95], W, layer, torch.tensor([a] * 3))


def test_bad_input_to_the_raw_operators():
    """Nothing is written when one of them raises."""
    x, u, g, index, layer = raw()
    before, storage = g.clone(), layer.storage
    add = lambda y=g, x=x, index=index, storage=storage, slots=layer.slots, top=5: op.multi_lora_add_(
        y, x, index, storage, *slots, False, top
    )
    swap = lambda i, t: tuple(t if j == i else s for j, s in enumerate(layer.slots))
    for call, match in (
        (lambda: add(y=g.T.contiguous().T), "y must be contiguous"),
        (lambda: add(y=g[:4].clone()), "y must have the 5 rows of x, not 4"),
        (lambda: add(x=x.bfloat16()), "x and y must be of one dtype"),
        (lambda: add(x=x.double(), y=g.double()), "x must be float32, bfloat16 or float16, not Double"),
        (lambda: add(top=4), "an adapter has rank 5, more than 4"),
        (lambda: add(storage=storage.double()), "storage must be float32, bfloat16 or float16, not Double"),
        (lambda: add(storage=storage.flatten()), r"storage must be contiguous, \[pages, page_size\]"),
        (lambda: add(storage=torch.zeros(4, 96)), "page_size must be a power of two from 64, not 96"),
        (lambda: add(slots=swap(1, layer.pages[:3])), r"pages must have shape \[256, 2000\], not \[3, 2000\]"),
        (lambda: add(slots=swap(2, layer.where[:3])), r"where must have shape \[256, 3\], not \[3, 3\]"),
        (lambda: add(slots=swap(3, layer.scaling[:3])), r"scaling must have shape \[256\], not \[3\]"),
        (lambda: add(slots=swap(3, layer.scaling.double())), "scaling must be float32"),
        (
            lambda: op.multi_lora_gradient(u[:4], x, index, index[:1], *layer.slots, True, 3),
            r"u must have shape \[5, 5\]",
        ),
        (lambda: op.multi_lora_gradient(u, x, index, index[:1], *layer.slots, True, 4), "add up to 3, not 4"),
        (
            lambda: op.multi_lora_gradient(u, x, index, index[:1] + 256, *layer.slots, True, 3),
            "evicted or changed between",
        ),
    ):
        with pytest.raises(RuntimeError, match=match):
            call()
    assert torch.equal(g, before)


def test_lru_pins_and_errors():
    pool, _ = pool_of(64, 64, (1, 1, 1), 1, pages=2, page_size=128)
    first = pool.load("a")
    pool.load("b"), pool.load("a"), pool.load("c")
    assert pool.resident == ["a", "c"] and pool.free_pages == 0 and pool.load("a") == first
    x, W = torch.randn(1, 64), torch.randn(64, 64)
    pool.evict("a")
    with pytest.raises(RuntimeError, match=r"adapter_index\[0\] is .* neither -1 nor an adapter that is loaded"):
        peftops.multi_lora_linear(x, W, pool.layer("layer"), torch.tensor([first]))
