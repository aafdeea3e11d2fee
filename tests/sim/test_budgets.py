"""What each CUDA kernel may cost, counted by the simulator: sectors of global memory, passes over the banks of shared
memory, tensor-core instructions. The numbers are exact, so a budget that fails is a change of the kernel."""

import pytest
import torch

import peftops
import reference
import sim
from numerics import assert_exact, assert_sums, code_error

SECTOR = 32


@pytest.fixture(params=[0, 1, 2], ids="seed{}".format)
def device(request):
    """The simulator under three schedules."""
    if isinstance(sim.cuda_ops(), str):
        pytest.skip(sim.cuda_ops())
    with sim.on_cpu_tensors(seed=request.param) as device:
        yield device


def launches(device, f):
    device.forget()
    result = f()
    assert device.lib.sim_last_stream() == sim.STREAM  # every launcher passes the current stream on
    return result, device.reports()


def within(counter, key, factor, of="ideal"):
    assert counter[key] <= factor * counter[of], counter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_quantize(device, dtype):
    weight = torch.randn(128, 512, dtype=dtype)
    packed, (report,) = launches(device, lambda: peftops.nf4_quantize(weight, double_quant=False).packed)
    read, written = report["global_read"], report["global_write"]
    assert read["sectors"] == read["unique"] == weight.nbytes // SECTOR  # the weight once, and nothing else
    within(written, "sectors", 1.02)
    assert written["unique"] == packed.nbytes // SECTOR + weight.numel() // 64 * 4 // SECTOR
    within(report["shared_load"], "waves", 1.05)
    within(report["shared_store"], "waves", 1.05)
    assert report["local"] == 0
    _, reports = launches(device, lambda: peftops.nf4_quantize(weight))
    assert len(reports) == 2  # double quantisation takes one more


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4_dequantize(device, dtype, double_quant):
    weight = peftops.nf4_quantize(torch.randn(128, 512), double_quant=double_quant)
    dense, (report,) = launches(device, lambda: peftops.nf4_dequantize(weight, dtype=dtype))
    written = report["global_write"]
    assert written["sectors"] == written["unique"] == dense.nbytes // SECTOR
    read = report["global_read"]
    within(read, "sectors", 1.02)
    parts = sum(-(-t.nbytes // SECTOR) + 1 for t in weight._arguments[1:4] if t is not None)  # and where they lie
    assert read["unique"] <= weight.packed.nbytes // SECTOR + parts
    within(report["shared_load"], "waves", 1.05)
    within(report["shared_store"], "waves", 1.05)
    assert report["local"] == 0 and report["divergent"] == 0


def columns_of(report, source, text):
    """The counters of the lines of a kernel file that hold ``text``."""
    lines = [
        n
        for n, line in enumerate((sim.ROOT / "csrc/kernels/cuda" / source).read_text().splitlines(), 1)
        if text in line
    ]
    assert lines, f"{source} has no line with {text}"
    rows = [report["lines"][str(n)] for n in lines if str(n) in report["lines"]]
    return {key: sum(row[key] for row in rows) for key in rows[0]}


@pytest.mark.parametrize("m", [1, 5, 8, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nf4_linear_of_few_rows(device, m, dtype):
    n, k = 96, 4096 + 64  # more chunks than are scaled at a time, and a last one alone
    weight = peftops.nf4_quantize(torch.randn(n, k, dtype=dtype))
    _, (report,) = launches(device, lambda: peftops.nf4_linear(torch.randn(m, k, dtype=dtype), weight))
    stream = columns_of(report, "nf4_rows.cuh", "= *reinterpret_cast<const uint2*>(w.packed")
    assert stream["sectors"] == weight.packed.nbytes // SECTOR  # once, and in whole sectors
    assert report["mma"] == n * k // (16 * 16) * -(-m // 8)
    within(columns_of(report, "nf4_rows.cuh", "memory.in.pairs.at["), "waves", 1.0, "ideal_waves")
    assert report["local"] == 0 and report["atomics"] == 0
    within(report["shared_store"], "waves", 1.01)
    x, once = columns_of(report, "nf4_rows.cuh", "x[m][0] = p[0], x[m][1] = p[1]"), m * k * 2 // SECTOR
    assert x["sectors"] == 2 * once * n // 32  # for every 32 rows of the weight, in halves of sectors
    everything = report["global_read"]
    assert everything["sectors"] - x["sectors"] <= 1.15 * (everything["unique"] - once)  # absmax, its scale and offset


@pytest.mark.parametrize("m, n, k, stripes", [(100, 200, 64 * 6, 1), (64 * 127 + 5, 10, 64 * 2, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nf4_linear_of_many_rows(device, m, n, k, stripes, dtype):
    """Whole tiles of 64 rows of x and 128 or, where that makes blocks enough, 256 rows of the weight."""
    r = 4
    weight = peftops.nf4_quantize(torch.randn(n, k, dtype=dtype))
    x, bias, lora_A, lora_B = (torch.randn(*s, dtype=dtype) for s in ((m, k), (n,), (r, k), (n, r)))
    with torch.no_grad():
        y, reports = launches(device, lambda: peftops.nf4_linear(x, weight, bias, lora_A=lora_A, lora_B=lora_B))
    report = reports[-1]
    tiles = -(-m // 64) * -(-n // (128 * stripes))
    assert report["mma"] == tiles * 8 * (8 * stripes) * (k // 16)
    assert report["async_copy"]["waves"] == report["async_copy"]["ideal"]
    for line in ("memory.in.pairs.at[bytes", "const uint4 x[2]"):
        within(columns_of(report, "nf4_many.cuh", line), "waves", 1.0, "ideal_waves")
    within(report["shared_store"], "waves", 1.01)
    assert report["local"] == 0
    dense = peftops.nf4_dequantize(weight, dtype=torch.float32).double()
    arguments = [t.double() for t in (x, dense, bias, lora_A, lora_B)]
    want, size = (reference.linear(*(f(t) for t in arguments)) for f in (torch.clone, torch.abs))
    assert_sums(y, want, size, 2 * k + r + 4, code_error(dtype) * x.double().abs() @ dense.abs().T)


def test_nf4_linear_is_the_same_under_every_schedule():
    if isinstance(sim.cuda_ops(), str):
        pytest.skip(sim.cuda_ops())
    weight = peftops.nf4_quantize(torch.randn(70, 128))
    for m, dtype in ((3, torch.bfloat16), (70, torch.bfloat16), (5, torch.float32)):
        x, runs = torch.randn(m, 128, dtype=dtype, requires_grad=True), []
        for seed in (0, 1, 2, 3):
            with sim.on_cpu_tensors(seed=seed):
                y = peftops.nf4_linear(x, weight)
                runs.append((y, *torch.autograd.grad(y.sum(), x)))
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_beyond_int32():
    """Offsets are 64 bits wide. Only the last blocks of the grid run, so almost no page of the memory is touched."""
    if isinstance(sim.cuda_ops(), str):
        pytest.skip(sim.cuda_ops())
    elements, tail, block_size = 2**31 + 4096, 8192, 4096
    packed, absmax = torch.empty(elements // 2, dtype=torch.uint8), torch.empty(elements // block_size)
    packed[-tail // 2 :] = torch.randint(0, 256, (tail // 2,), dtype=torch.uint8)
    absmax[-2:] = torch.tensor([2.0, 3.0])
    with sim.on_cpu_tensors(last_blocks=2):
        dense = torch.ops.peftops.nf4_dequantize(packed, absmax, None, None, block_size, 1, elements, torch.bfloat16)
        codes, _ = torch.ops.peftops.nf4_quantize(dense.flatten(), block_size)
    want = reference.nf4_dequantize(packed[-tail // 2 :], absmax[-2:], block_size, torch.Size([tail]))
    assert_exact(dense[0, -tail:], want)
    assert torch.equal(codes[-tail // 2 :], reference.nf4_quantize(want.bfloat16(), block_size)[0])
