"""What needs a GPU's memory or its grids: rows beyond 65,535 blocks, elements beyond 2^31, numbers near the limits of
16 bits, the same bits twice, and no temporary of the weight's size where none is promised."""

import pytest
import torch

import peftops
import reference
import sim
from numerics import assert_sums, cut_sums

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
BF16 = torch.bfloat16
ROWS = 600_000
SAMPLE = (0, 1, 63, 64, 65_535, 262_143, 262_144, 524_279, 524_280, 524_288, ROWS - 1)


def weight_of(format, n, k, dtype=BF16):
    torch.manual_seed(1)
    dense = 0.1 * torch.randn(n, k, device="cuda", dtype=dtype)
    if format == "nf4":
        weight = peftops.nf4_quantize(dense)
        return weight, peftops.nf4_linear, peftops.nf4_dequantize(weight, dtype=torch.float32)
    weight = peftops.group_quantize(dense, bits=format)
    return weight, peftops.group_linear, peftops.group_dequantize(weight, dtype=torch.float32)


@pytest.mark.parametrize("library", ["never", "always"])
@pytest.mark.parametrize("dtype, k", [(BF16, 64), (BF16, 256), (torch.float32, 64)])
@pytest.mark.parametrize("format", ["nf4", 2, 3, 4, 8])
def test_more_rows_than_a_grid_is_high(format, dtype, k, library):
    n, r = 64, 4
    weight, op, dense = weight_of(format, n, k, dtype)
    draw = lambda *shape: torch.randn(shape, device="cuda", dtype=dtype)
    x, A, B = draw(ROWS, k).requires_grad_(), draw(r, k).requires_grad_(), draw(n, r).requires_grad_()
    with sim.nf4_library(library):
        y = op(x, weight, lora_A=A, lora_B=B, scaling=0.5)
        g = draw(ROWS, n)
        dx, dA, dB = torch.autograd.grad(y, (x, A, B), g)
    rows, W = list(SAMPLE), dense.double()
    some, of = x.detach()[rows].double(), lambda t: t.detach().double()
    rounded = 2**-8 if dtype is BF16 else 0.0  # of a weight or its code
    want = some @ W.T + 0.5 * some @ of(A).T @ of(B).T
    S = (
        W.abs()
        if format == "nf4"
        else reference.group_dequantize(weight.codes.double(), weight.scales.double(), -weight.zeros.double().abs())
    )
    size = some.abs() @ S.T + 0.5 * some.abs() @ of(A).abs().T @ of(B).abs().T
    assert_sums(y[rows], want, size, cut_sums(y, k + 3 * r + 8), rounded * size)
    some, low_rank = of(g)[rows], 0.5 * of(B).abs() @ of(A).abs()
    want, size = some @ (W + 0.5 * of(B) @ of(A)), some.abs() @ (S + low_rank)
    assert_sums(dx[rows], want, size, cut_sums(dx, n + r + 8), 2 * rounded * size)  # the library's, once more
    u, v = of(x) @ of(A).T, of(g) @ of(B)
    size = of(g).abs().T @ (of(x).abs() @ of(A).abs().T)
    assert_sums(dB, 0.5 * of(g).T @ u, 0.5 * size, cut_sums(dB, ROWS + k))
    size = (of(g).abs() @ of(B).abs()).T @ of(x).abs()
    assert_sums(dA, 0.5 * v.T @ of(x), 0.5 * size, cut_sums(dA, ROWS + n))


def test_more_than_two_to_the_31_elements():
    """In a weight, and in a result."""
    n, k = 32_832, 65_536
    dense = torch.randn(n, k, device="cuda", dtype=BF16)
    weight = peftops.nf4_quantize(dense)
    back = peftops.nf4_dequantize(weight)
    for first in (0, n // 2, n - 64):
        piece = peftops.nf4_quantize(dense[first : first + 64].contiguous(), double_quant=False)
        codes = slice(first * k // 2, (first + 64) * k // 2)
        assert torch.equal(weight.packed[codes], piece.packed)
        error = (back[first : first + 64].float() - dense[first : first + 64].float()).abs().max()
        assert error < 1.0
    x = torch.randn(2, k, device="cuda", dtype=BF16)
    y = peftops.nf4_linear(x, weight)
    tail = back[-64:].double()
    size = x.double().abs() @ tail.abs().T
    assert_sums(y[:, -64:], x.double() @ tail.T, size, k, 2**-7 * size)
    del dense, back, weight
    weight, op, small = weight_of("nf4", 4096, 64)
    x = torch.randn(ROWS, 64, device="cuda", dtype=BF16)
    for library in ("never", "always"):
        with sim.nf4_library(library):
            y = op(x, weight)
        last = x[-100:].double()
        size = last.abs() @ small.double().abs().T
        assert_sums(y[-100:], last @ small.double().T, size, 64, 2**-8 * size)
        del y


@pytest.mark.parametrize("m", [1, 16, 64, 300])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_numbers_near_the_limit(dtype, m):
    """x as large as its type holds, with weights so small that the sums are in range, and the reverse: a chunk of codes
    times x has a sum of its own, before it is scaled."""
    limit = torch.finfo(dtype).max
    for factor, of_weight in ((0.9 * limit, 1e-6), (1.0, 0.9 * min(limit, 1e30))):
        dense = of_weight * torch.randn(128, 256, device="cuda")
        weight = peftops.nf4_quantize(dense, double_quant=False)
        x = torch.zeros(m, 256, device="cuda", dtype=dtype)
        x[:, ::64] = factor
        want = x.double() @ peftops.nf4_dequantize(weight, dtype=torch.float32).double().T
        size = x.double().abs() @ peftops.nf4_dequantize(weight, dtype=torch.float32).double().abs().T
        for library in ("never", "always"):
            with sim.nf4_library(library):
                y = peftops.nf4_linear(x, weight)
            held = want.abs() < 0.9 * limit
            if library == "always" and of_weight > torch.finfo(dtype).max / 2:
                continue
            assert y[held].isfinite().all()
            small = torch.finfo(dtype).smallest_normal * x.double().abs().sum(1, keepdim=True)  # a weight below it
            assert (((y.double() - want).abs() - 2**-6 * size - small)[held] <= 0).all()


@pytest.mark.parametrize("library", ["never", "always"])
@pytest.mark.parametrize("m", [1, 16, 64, 256, 2048])
def test_the_same_bits_in_two_runs(m, library):
    weight, op, _ = weight_of("nf4", 1024, 4096)
    draw = lambda *shape: torch.randn(shape, device="cuda", dtype=BF16, requires_grad=True)
    x, A, B, g = draw(m, 4096), draw(16, 4096), draw(1024, 16), draw(m, 1024).detach()
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        with sim.nf4_library(library):
            y = op(x, weight, lora_A=A, lora_B=B, dropout_p=0.1, training=True)
            runs.append((y, *torch.autograd.grad(y, (x, A, B), g)))
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("m", [1, 64])
def test_no_temporary_of_the_weight(m):
    """By the kernels: what a call takes beside its result is a thin product, and fp32 sums of parts of the depth."""
    weight, op, _ = weight_of("nf4", 4096, 4096)
    x = torch.randn(m, 4096, device="cuda", dtype=BF16, requires_grad=True)
    A, B = (torch.randn(s, device="cuda", requires_grad=True) for s in ((16, 4096), (4096, 16)))
    g = torch.randn(m, 4096, device="cuda", dtype=BF16)
    with sim.nf4_library("never"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = op(x, weight, lora_A=A, lora_B=B)
        torch.autograd.grad(y, (x, A, B), g)
    results = y.nbytes + x.nbytes + A.nbytes + B.nbytes
    sums = 8 * 4 * m * 4096
    assert torch.cuda.max_memory_allocated() - before < results + sums + (1 << 21)


def test_cuda_graphs_of_torch_compile():
    weight, op, _ = weight_of("nf4", 256, 256)
    A, B = (torch.randn(s, device="cuda", requires_grad=True) for s in ((8, 256), (256, 8)))

    def layer(x):
        return op(torch.nn.functional.silu(x), weight, lora_A=A, lora_B=B, scaling=0.5)

    compiled = torch.compile(layer, mode="reduce-overhead")
    for seed in range(4):
        torch.manual_seed(seed)
        x = torch.randn(32, 256, device="cuda", dtype=BF16)
        torch.compiler.cudagraph_mark_step_begin()
        y, want = compiled(x), layer(x)
        assert_sums(y, want.double(), want.double().abs() + 1, 16)
        grads, wants = (torch.autograd.grad(t.float().square().mean(), (A, B)) for t in (y, want))
        for got, ref in zip(grads, wants, strict=True):
            assert torch.allclose(got, ref, rtol=2e-2, atol=2e-2 * float(ref.abs().max()))
