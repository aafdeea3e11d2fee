"""The product with an NF4 weight by wgmma, as nvcc compiles it for sm_90a, in the interpreter."""

import re
import shutil
import subprocess

import pytest
import torch

import peftops
import sim
from numerics import assert_sums, code_error
from sim import sass

pytestmark = pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
SOURCE = sim.ROOT / "csrc/kernels/cuda/nf4_linear_sm90.cu"
OUTS = 128


def nvcc(*options):
    command = ["nvcc", "-std=c++17", "-O3", "-arch=sm_90a", "-DPEFTOPS_CUDA", "-I", sim.ROOT / "csrc", SOURCE, *options]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def h100(monkeypatch):
    """The operators in the simulator, which is an H100 with few multiprocessors, and this kernel is asked for."""
    if isinstance(sim.cuda_ops(), str):
        pytest.skip(sim.cuda_ops())
    monkeypatch.setenv("PEFTOPS_NF4_WGMMA", "on")
    with sim.on_cpu_tensors() as device:
        device.pretend(90, 4)
        yield device
        device.pretend()
        device.options()


def product(device, x, weight, bias=None, u=None, b=None, scaling=0.5):
    """The results, and the reports of the kernels' launches: the product's, and what adds its parts if there are any."""
    device.forget()
    y = torch.ops.peftops.nf4_linear(x, *weight._arguments, *weight.shape, bias, u, b, scaling)
    reports = device.reports()
    assert "wgmma_rows" in reports[0]["kernel"]
    return y, *reports


def problem(m, n, k, dtype, r=0, block=64, double_quant=True, factor=torch.float32):
    gen = torch.Generator().manual_seed(m + n)
    w, x, bias, u, b = (torch.randn(s, generator=gen) for s in ((n, k), (m, k), (n,), (m, r), (n, r)))
    weight = peftops.nf4_quantize(w, block_size=block, double_quant=double_quant)
    low_rank = (bias.to(factor), u, b.to(factor)) if r else ()
    return x.to(dtype), weight, *low_rank


def check(y, x, weight, bias=None, u=None, b=None, scaling=0.5, dense=None):
    """The bound of nf4_wgmma.cuh: k additions, a rescaling a chunk, the last factors, and the low-rank term."""
    dense = peftops.nf4_dequantize(weight, dtype=torch.float32).double() if dense is None else dense
    k = dense.shape[1]
    want, size = x.double() @ dense.T, x.double().abs() @ dense.abs().T
    error, terms = code_error(x.dtype) * size, k + k // 32 + 2
    if u is not None:
        want = want + scaling * u.double() @ b.double().T + bias.double()
        size = size + abs(scaling) * u.double().abs() @ b.double().abs().T + bias.double().abs()
        terms += u.shape[1] + 2
    assert_sums(y, want, size, terms, error)


def rows_of(report):
    return int(re.search(r"Li(64|128|256)E", report["kernel"])[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "m, n, k, r, block, double_quant, multiprocessors, rows, parts",
    [
        (17, 128, 64, 0, 64, True, 4, 64, 1),  # fewer chunks than stages
        (64, 250, 64 * 20, 5, 128, False, 2, 64, 1),  # more
        (40, 72, 64 * 23, 20, 64, True, 3, 64, 3),  # parts of the depth, and ranks of two stages
        (100, 130, 64 * 7, 16, 64, True, 1, 128, 1),
        (256, 128, 64 * 6, 3, 64, False, 1, 256, 1),
    ],
)
def test_products(h100, m, n, k, r, block, double_quant, multiprocessors, rows, parts, dtype):
    """Tiles that are whole and not, in every size; sums of a hand-made tensor core within the bound."""
    case = problem(m, n, k, dtype, r, block, double_quant, torch.bfloat16 if m == 64 else torch.float32)
    h100.pretend(90, multiprocessors)
    for seed in (0, 1) if m < 100 else (2,):
        h100.options(seed=seed)
        y, report, *adding = product(h100, *case)
        check(y, *case)
        assert rows_of(report) == rows and report["grid"][2:] == [parts], (rows_of(report), report["grid"])
        assert len(adding) == (parts > 1)
        tiles, ranks, exact = -(-m // rows) * -(-n // OUTS), -(-r // 16), m == 64
        steps = tiles * 8 * (k // 64 * 7 + parts)  # by 8 warps: a fence, four products, commit, wait; and a last wait
        assert report["wgmma"] == steps + tiles * 8 * ranks * (6 if exact else 14)
        assert report["local"] == report["constant_replays"] == 0


def test_scales_over_many_octaves(h100):
    """Sums in units of the current absmax keep the bound when it leaps, and blocks of zeros leave them alone."""
    x, weight = problem(20, 128, 64 * 8, torch.bfloat16, double_quant=False)
    leaps = torch.exp2(torch.randint(-20, 21, weight.absmax.shape, generator=torch.Generator().manual_seed(3)).float())
    weight.absmax.mul_(leaps)
    weight.absmax.view(128, 8)[:, 3] = 0
    weight.absmax.view(128, 8)[5:9, [0, 1, 7]] = 0
    weight.absmax.view(128, 8)[11] = 0
    h100.pretend(90, 1)
    for perturb in (False, True):
        h100.options(perturb=perturb)
        y, *_ = product(h100, x, weight)
        assert (y[:, 11] == 0).all()
        check(y, x, weight)


def test_every_product_reads_its_place(h100):
    """One element of x, one of W: the result is their product in one place, whichever they are."""
    _, weight = problem(40, 128, 128, torch.float16)
    dense = peftops.nf4_dequantize(weight, dtype=torch.float32).double()
    eye = torch.zeros(64, 128, dtype=torch.float16)
    eye[range(64), torch.randperm(128, generator=torch.Generator().manual_seed(0))[:64]] = 1
    y, *_ = product(h100, eye, weight)
    check(y, eye, weight, dense=dense)


def test_the_low_rank_term_alone(h100):
    """Its bound is that of fp32, whatever x is: zeros here. Infinities and NaN go where they belong and nowhere else."""
    x, weight, bias, u, b = problem(24, 128, 64, torch.bfloat16, r=17)
    x = torch.zeros_like(x)
    u, b = u * torch.logspace(-20, 20, 17), b * torch.logspace(20, -20, 17)
    check(product(h100, x, weight, bias, u, b)[0], x, weight, bias, u, b)
    u[3, 2], u[5, 16], b[7, 4] = torch.inf, torch.nan, -torch.inf
    y, *_ = product(h100, x, weight, bias, u, b)
    want = (0.5 * u @ b.T + bias).to(x.dtype)
    assert torch.equal(y.isnan(), want.isnan()) and torch.equal(y.isinf(), want.isinf())
    assert torch.equal(y[y.isinf()], want[y.isinf()])


@pytest.mark.parametrize(
    "way, library, m, taken",
    [
        ("auto", "auto", 16, False),  # which the kernels for few rows have
        ("auto", "auto", 128, True),
        ("auto", "auto", 2048, False),  # which the library has
        ("auto", "never", 2048, True),
        ("auto", "always", 128, False),
        ("off", "never", 128, False),
        ("on", "always", 16, True),
    ],
)
def test_when_it_is_chosen(h100, monkeypatch, way, library, m, taken):
    """A small layer on two multiprocessors, like a large one on 132."""
    monkeypatch.setenv("PEFTOPS_NF4_WGMMA", way)
    h100.pretend(90, 2)
    x, weight = problem(m, 256, 1024, torch.bfloat16)
    h100.forget()
    with sim.nf4_library(library):
        torch.ops.peftops.nf4_linear(x, *weight._arguments, 256, 1024, None, None, None, 1.0)
    assert any("wgmma_rows" in report["kernel"] for report in h100.reports()) == taken


def test_what_it_does_not_take(h100, monkeypatch):
    """Other shapes and types go as before; another GPU, or another word, is an error."""
    x, weight = problem(20, 40, 100, torch.bfloat16)
    call = lambda x: torch.ops.peftops.nf4_linear(x, *weight._arguments, 40, 100, None, None, None, 1.0)
    h100.forget()
    call(x), call(x.float())
    assert not any("wgmma_rows" in report["kernel"] for report in h100.reports())
    h100.pretend(80, 108)
    with pytest.raises(RuntimeError, match="nf4_linear: PEFTOPS_NF4_WGMMA=on needs an H100 or H200: "):
        call(x)
    monkeypatch.setenv("PEFTOPS_NF4_WGMMA", "auto")
    call(x)
    monkeypatch.setenv("PEFTOPS_NF4_WGMMA", "yes")
    with pytest.raises(RuntimeError, match="nf4_linear: PEFTOPS_NF4_WGMMA must be auto, on or off, not yes"):
        call(x)


def test_what_ptxas_makes_of_it(tmp_path):
    """No spills, no wgmma that waits for the one before it (C7510), HGMMA in the main loop, and no register that a
    product still reads is written: ptxas would allow it across the back edge of a loop."""
    said = nvcc("-cubin", "-Xptxas=-v", "-o", tmp_path / "nf4.cubin")
    assert "C75" not in said
    assert said.count("0 bytes spill stores, 0 bytes spill loads") == said.count("Compiling entry") == 8
    if not sass.disassembler():
        pytest.skip("needs nvidia-cuda-nvdisasm")
    text = subprocess.run(
        [sass.disassembler(), "-c", tmp_path / "nf4.cubin"], capture_output=True, text=True, check=True
    ).stdout
    for name, program in sass.programs(text).items():
        assert not sass.overwritten(*program), name
    products = {name: code for name, code in sass.kernels(text).items() if "wgmma_rows" in name}
    assert len(products) == 6
    for name, code in products.items():
        loop = sass.main_loop(*code, wanted="HGMMA.64x")
        count = sass.histogram(loop)
        assert count["HGMMA"] % 4 == 0 and count["HGMMA"] >= 4, name
        assert not {"LDL", "STL"} & set(count), name
        per_chunk = len(loop) / (count["HGMMA"] / 4)
        assert per_chunk < 320, (name, per_chunk)


def test_a_register_that_is_written_too_early_is_found():
    product, wait = sass.Instruction("HGMMA.64x64x16.F32", "R24, R80, gdesc[UR12], R24", False), "WARPGROUP.DEPBAR.LE"
    look_up, jump = sass.Instruction("LDS.64", "R82, [R16]", False), sass.Instruction("BRA", "`(.L_x_1)", True)
    waits = sass.Instruction(wait, "gsb0, 0x0", False)
    assert sass.overwritten([product, look_up, waits], {})
    assert sass.overwritten([look_up, waits, product, jump, waits], {3: 0})  # around the loop
    assert not sass.overwritten([waits, look_up, product, jump, waits], {3: 0})
