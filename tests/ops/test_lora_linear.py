import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import peftops
import reference
from numerics import FP32, assert_sums, cut_sums
from strategies import dtypes, ins, layouts, normal, outs, ranks, rows, seeds, strided


def layer(device, m, n, k, r, dtype, adapter, seed, layout="plain", bias=True):
    leaf = lambda shape, dtype, i, how="plain": strided(normal(shape, dtype, seed + i, device), how).requires_grad_()
    return {
        "x": leaf((m, k), dtype, 0, layout),
        "weight": leaf((n, k), dtype, 1),
        "bias": leaf((n,), dtype, 2) if bias else None,
        "lora_A": leaf((r, k), adapter, 3),
        "lora_B": leaf((n, r), adapter, 4),
    }


def check(leaves, g, scaling, keep=None, **kw):
    """y and every gradient against float64. The base product and the low-rank term are each rounded to the
    dtype, so there is one more rounding than in a single sum, of the base alone."""
    present = {name: t for name, t in leaves.items() if t is not None}
    y = peftops.lora_linear(**leaves, scaling=scaling, **kw)
    grads = dict(zip(present, torch.autograd.grad(y, present.values(), g), strict=True))

    exact = {name: t.detach().double().requires_grad_() for name, t in present.items()}
    want_y = reference.linear(**exact, scaling=scaling, keep=keep)
    want = dict(zip(exact, torch.autograd.grad(want_y, exact.values(), g.double()), strict=True))

    size = {name: t.detach().double().abs() for name, t in present.items()}
    x, W, A, B, gs = size["x"], size["weight"], size["lora_A"], size["lora_B"], g.double().abs()
    kept = x if keep is None else x * keep
    v = scaling * gs @ B
    m, k = x.shape
    n, r = B.shape
    step = torch.finfo(y.dtype).eps / 2
    base = x @ W.T + size.get("bias", 0)
    terms = lambda count: cut_sums(y, count)
    assert_sums(y, want_y, base + scaling * (kept @ A.T) @ B.T, terms(k + r + 4), 2 * step * base)
    base = gs @ W
    mask = 1 if keep is None else keep
    assert_sums(grads["x"], want["x"], base + (v @ A) * mask, terms(n + r + 4), 2 * step * base)
    assert_sums(grads["lora_A"], want["lora_A"], v.T @ kept, terms(m + n + 4))
    assert_sums(grads["lora_B"], want["lora_B"], scaling * gs.T @ (kept @ A.T), terms(m + k + 4))
    assert_sums(grads["weight"], want["weight"], gs.T @ x, m + 4)
    if "bias" in grads:
        assert_sums(grads["bias"], want["bias"], gs.sum(0), m + 4)


@given(
    m=rows, n=outs, k=ins, r=ranks, dtype=dtypes, mixed=st.booleans(), layout=layouts, bias=st.booleans(), seed=seeds
)
def test_matches_reference(device, m, n, k, r, dtype, mixed, layout, bias, seed):
    leaves = layer(device, m, n, k, r, dtype, torch.float32 if mixed else dtype, seed, layout, bias)
    check(leaves, strided(normal((m, n), dtype, seed + 5, device), layout), 0.75)


@given(m=rows, n=outs, k=ins, r=ranks, dtype=dtypes, p=st.sampled_from([0.1, 0.8]), seed=seeds)
def test_dropout_matches_reference(device, m, n, k, r, dtype, p, seed):
    leaves = layer(device, m, n, k, r, dtype, torch.float32, seed)
    torch.manual_seed(seed)
    drawn = int(torch.randint(0, 2**62, (), device=device))
    torch.manual_seed(seed)
    keep = reference.dropout_mask(drawn, m, k, p).double().to(device) / (1 - p)
    check(leaves, normal((m, n), dtype, seed + 5, device), 0.75, keep, dropout_p=p, training=True)


@pytest.mark.parametrize("shape", [(1, 700, 600, 3), (300, 280, 300, 20), (70, 33, 1025, 300)])
def test_matches_reference_beyond_one_block(device, shape):
    m, n, k, r = shape
    check(layer(device, m, n, k, r, torch.float32, torch.float32, 1), normal((m, n), torch.float32, 9, device), 1.5)


def test_zero_B_leaves_the_base_bit_for_bit(device):
    leaves = layer(device, 7, 40, 50, 4, torch.bfloat16, torch.float32, 1)
    with torch.no_grad():
        leaves["lora_B"].zero_()
        want = torch.nn.functional.linear(leaves["x"], leaves["weight"], leaves["bias"])
        assert torch.equal(peftops.lora_linear(**leaves), want)


def test_any_leading_shape(device):
    leaves = layer(device, 12, 40, 50, 4, torch.float32, torch.float32, 1)
    flat = peftops.lora_linear(**leaves)
    x = leaves.pop("x")
    assert torch.equal(peftops.lora_linear(x.view(2, 3, 2, 50), **leaves).view(12, 40), flat)
    one = peftops.lora_linear(x[0], **leaves)
    assert one.shape == (40,) and ((one - flat[0]).abs() <= 100 * FP32 * 50).all()
    assert peftops.lora_linear(x.view(3, 4, 50)[:0], **leaves).shape == (0, 4, 40)


def test_same_bits_for_any_number_of_threads(device, threads):
    seed = torch.tensor(5, device=device)
    x, g = normal((300, 515), torch.float32, 1, device), normal((300, 260), torch.float32, 2, device)
    A, B = normal((16, 515), torch.float32, 3, device), normal((260, 16), torch.float32, 4, device)
    op, runs = torch.ops.peftops, []
    for n in (1, 2, 3, 5):
        threads(n)
        y = torch.zeros(300, 260, device=device)
        u = op.lora_shrink(x, A, True, 1.0, 0.2, seed)
        op.lora_expand_(y, u, B, False, 0.5, 0.0, None)
        v = op.lora_shrink(g, B, False, 0.5, 0.0, None)
        runs.append((y, u, v, op.lora_gradient(v, x, torch.float32, True, 1.0, 0.2, seed)))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("by_rank", [True, False])
def test_registration(device, by_rank):
    x, y = torch.randn(6, 40, device=device), torch.randn(6, 40, device=device)
    f = torch.randn(3, 40, device=device) if by_rank else torch.randn(40, 3, device=device)
    u, seed, op = torch.randn(6, 3, device=device), torch.tensor(1, device=device), torch.ops.peftops
    torch.library.opcheck(op.lora_shrink.default, (x, f, by_rank, 0.5, 0.5, seed))
    torch.library.opcheck(op.lora_shrink.default, (x.t().contiguous().t(), f, by_rank, 0.5, 0.0, None))
    torch.library.opcheck(op.lora_expand_.default, (y, u, f, by_rank, 0.5, 0.5, seed))
    torch.library.opcheck(op.lora_gradient.default, (u, x, torch.bfloat16, by_rank, 0.5, 0.5, seed))


def test_compiles_without_a_graph_break(device):
    leaves = layer(device, 12, 40, 50, 4, torch.float32, torch.float32, 1)
    g = normal((12, 40), torch.float32, 2, device)
    call = lambda x: peftops.lora_linear(**{**leaves, "x": x}, scaling=0.5)
    y = torch.compile(call, fullgraph=True, backend="aot_eager")(leaves["x"])
    assert torch.equal(y, call(leaves["x"]))
    got = torch.autograd.grad(y, leaves.values(), g)
    want = torch.autograd.grad(call(leaves["x"]), leaves.values(), g)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_autocast(device):
    leaves = layer(device, 12, 40, 50, 4, torch.float32, torch.float32, 1)
    with torch.autocast(device, torch.bfloat16):
        y = peftops.lora_linear(**leaves)
    lower = {name: t.bfloat16() if name in ("x", "weight", "bias") else t for name, t in leaves.items()}
    assert y.dtype == torch.bfloat16 and torch.equal(y, peftops.lora_linear(**lower))


def test_bad_input(device):
    x, W, A, B = (torch.randn(*shape, device=device) for shape in ((5, 96), (64, 96), (4, 96), (64, 4)))
    with pytest.raises(ValueError, match=r"lora_linear: lora_A must have shape \[r, 96\], not \[96, 4\]"):
        peftops.lora_linear(x, W, lora_A=A.t(), lora_B=B)
    with pytest.raises(ValueError, match=r"lora_linear: lora_B must have shape \[64, 4\], not \[64, 5\]"):
        peftops.lora_linear(x, W, lora_A=A, lora_B=torch.randn(64, 5, device=device))
    with pytest.raises(ValueError, match="lora_A and lora_B belong together"):
        peftops.lora_linear(x, W, lora_A=None, lora_B=B)
    with pytest.raises(ValueError, match=r"the last dim of x must be 96, but its shape is \[5, 95\]"):
        peftops.lora_linear(x[:, 1:], W, lora_A=A, lora_B=B)
    with pytest.raises(TypeError, match="x is .*float32, weight .*bfloat16"):
        peftops.lora_linear(x, W.bfloat16(), lora_A=A, lora_B=B)
    op = torch.ops.peftops
    with pytest.raises(RuntimeError, match="dropout needs a seed"):
        op.lora_shrink(x, A, True, 1.0, 0.5, None)
    with pytest.raises(RuntimeError, match=r"the factor must have shape \[r, 96\], not \[64, 4\]"):
        op.lora_shrink(x, B, True, 1.0, 0.0, None)
    with pytest.raises(RuntimeError, match="u must be float32"):
        op.lora_gradient(torch.zeros(5, 4, device=device).bfloat16(), x, torch.float32, True, 1.0, 0.0, None)


@pytest.mark.parametrize("op", ["lora_linear", "nf4_linear", "group_linear", "qalora_linear"])
@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64), (2, 1, 3, 64)], ids=str)
def test_what_an_op_returns_can_be_changed_in_place(op, shape):
    """As models do: ``y += residual``, ``y[mask] = value``."""
    torch.manual_seed(0)
    x, dense = torch.randn(shape, requires_grad=True), torch.randn(96, 64)
    weight = {"lora_linear": lambda w: w, "nf4_linear": peftops.nf4_quantize}.get(op, peftops.group_quantize)(dense)
    inputs = 64 // 32 if op == "qalora_linear" else 64
    factors = {"lora_A": torch.randn(4, inputs, requires_grad=True), "lora_B": torch.randn(96, 4, requires_grad=True)}
    product = lambda: getattr(peftops, op)(x, weight, **factors)
    grads = lambda y: torch.autograd.grad(y.square().sum(), [x, *factors.values()])
    want = grads(product() + 1)
    y = product()
    y += 1
    for got, grad in zip(grads(y), want, strict=True):
        torch.testing.assert_close(got, grad)
