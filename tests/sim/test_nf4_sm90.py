"""The product with an NF4 weight by wgmma, as nvcc compiles it for sm_90a, in the interpreter."""

import ctypes
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
MANGLED = {torch.bfloat16: "13__nv_bfloat16", torch.float16: "6__half"}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
STAGES, OUTS, THREADS = 4, 128, 384


class Arguments(ctypes.Structure):  # Linear<Nf4Weight>
    _fields_ = [
        (name, ctypes.c_void_p) for name in ("packed", "absmax", "absmax_code", "absmax_scale", "absmax_offset")
    ]
    _fields_ += [(name, ctypes.c_int64) for name in ("rows", "cols", "block_size", "first")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("x", "bias", "u", "b", "y")]
    _fields_ += [("m", ctypes.c_int64), ("r", ctypes.c_int64), ("scaling", ctypes.c_float), ("int8", ctypes.c_bool)]
    _fields_ += [(name, ctypes.c_int32) for name in ("dtype", "bias_dtype", "b_dtype")]


def nvcc(*options):
    command = ["nvcc", "-std=c++17", "-O3", "-arch=sm_90a", "-DPEFTOPS_CUDA", "-I", sim.ROOT / "csrc", SOURCE, *options]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def ptx(tmp_path_factory):
    """The text, and the module that the interpreter made of it."""
    if isinstance(sim.simulator(), str):
        pytest.skip(sim.simulator())
    out = tmp_path_factory.mktemp("sm90") / "nf4.ptx"
    nvcc("-ptx", "-o", out)
    return out.read_text(), sim.simulator().load(out.read_text())


def shared_bytes(rows):
    stages, sums = STAGES * rows * 128, rows * (OUTS + 4) * 4
    return -(-(max(stages, sums) + 256 * 32 * 4 + 256 * 4 + 2 * STAGES * 8) // 16) * 16


def product(chip, ptx, x, weight, bias=None, u=None, b=None, scaling=0.5):
    """What the launcher does, for the tile of x that it takes."""
    m, (n, k) = len(x), weight.shape
    rows = 64 if m <= 64 else 128 if m <= 128 else 256
    y = torch.full((m, n), torch.nan, dtype=x.dtype)
    packed, absmax, scale, offset, block = weight._arguments
    parts = dict(packed=packed, x=x, bias=bias, u=u, b=b, y=y)
    if scale is None:
        parts["absmax"] = absmax
    else:
        parts |= dict(absmax_code=absmax, absmax_scale=scale, absmax_offset=offset)
    for name, tensor in parts.items():
        if tensor is not None:
            chip.allow(tensor, read_only=name != "y")
    pointers = {name: tensor.data_ptr() for name, tensor in parts.items() if tensor is not None}
    types = dict(
        dtype=DTYPES[x.dtype],
        bias_dtype=DTYPES[bias.dtype] if bias is not None else 0,
        b_dtype=DTYPES[b.dtype] if b is not None else 0,
    )
    arguments = Arguments(
        rows=n,
        cols=k,
        block_size=block,
        m=m,
        r=0 if u is None else u.shape[1],
        scaling=scaling,
        int8=False,
        **pointers,
        **types,
    )
    name = re.search(rf"\.entry (\w*wgmma_rowsI{MANGLED[x.dtype]}Li{rows}E\w*)\(", ptx[0])[1]
    grid = -(-m // rows), -(-n // OUTS)
    log_block = ctypes.c_int(block.bit_length() - 1)
    report = chip.launch(ptx[1], name, grid, (THREADS,), [arguments, log_block], shared_bytes(rows))
    return y, report


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


@pytest.mark.parametrize("dtype", MANGLED)
@pytest.mark.parametrize(
    "m, n, k, r, block, double_quant",
    [
        (17, 128, 64, 0, 64, True),
        (64, 250, 64 * 6, 5, 128, False),
        (100, 130, 64 * 5, 16, 64, True),
        (256, 128, 64 * 4, 0, 64, False),
    ],
)
def test_products(chip, ptx, m, n, k, r, block, double_quant, dtype):
    """Tiles that are whole and not, fewer chunks than stages and more; sums of a hand-made tensor core within the bound."""
    case = problem(m, n, k, dtype, r, block, double_quant, torch.bfloat16 if m == 64 else torch.float32)
    for seed in (0, 1) if m < 100 else (2,):
        chip.options(seed=seed)
        y, report = product(chip, ptx, *case)
        check(y, *case)
        rows = 64 if m <= 64 else 128 if m <= 128 else 256
        blocks = -(-m // rows) * -(-n // OUTS)
        assert report["wgmma"] == blocks * 8 * (k // 64 * 7 + 1)  # by 8 warps: a fence, four products, commit, wait
        assert report["local"] == report["constant_replays"] == 0
        assert report["async_copy"]["waves"] == report["async_copy"]["ideal"]


def test_scales_over_many_octaves(chip, ptx):
    """Sums in units of the current absmax keep the bound when it leaps, and blocks of zeros leave them alone."""
    x, weight = problem(20, 128, 64 * 8, torch.bfloat16, double_quant=False)
    leaps = torch.exp2(torch.randint(-20, 21, weight.absmax.shape, generator=torch.Generator().manual_seed(3)).float())
    weight.absmax.mul_(leaps)
    weight.absmax.view(128, 8)[:, 3] = 0
    weight.absmax.view(128, 8)[5:9, [0, 1, 7]] = 0
    weight.absmax.view(128, 8)[11] = 0
    for perturb in (False, True):
        chip.options(perturb=perturb)
        y, _ = product(chip, ptx, x, weight)
        assert (y[:, 11] == 0).all()
        check(y, x, weight)


def test_every_product_reads_its_place(chip, ptx):
    """One element of x, one of W: the result is their product in one place, whichever they are."""
    _, weight = problem(40, 128, 128, torch.float16)
    dense = peftops.nf4_dequantize(weight, dtype=torch.float32).double()
    eye = torch.zeros(64, 128, dtype=torch.float16)
    eye[range(64), torch.randperm(128, generator=torch.Generator().manual_seed(0))[:64]] = 1
    y, _ = product(chip, ptx, eye, weight)
    check(y, eye, weight, dense=dense)


@pytest.fixture
def asked_for(monkeypatch):
    """The operators in the simulator, where a variable asks for this kernel."""
    if isinstance(sim.cuda_ops(), str):
        pytest.skip(sim.cuda_ops())
    monkeypatch.setenv("PEFTOPS_NF4_WGMMA", "on")
    with sim.on_cpu_tensors() as device:
        device.pretend(90, 132)
        yield device
        device.pretend()


@pytest.mark.parametrize("m", [20, 70, 130])
def test_the_launcher(asked_for, m):
    x, weight, bias, u, b = problem(m, 72, 192, torch.bfloat16, r=4)
    asked_for.forget()
    y = torch.ops.peftops.nf4_linear(x, *weight._arguments, 72, 192, bias, u, b, 0.5)
    (report,) = asked_for.reports()
    assert "wgmma_rows" in report["kernel"] and report["shared_bytes"] == shared_bytes(
        64 if m < 64 else 128 if m < 128 else 256
    )
    check(y, x, weight, bias, u, b)


def test_what_it_does_not_take(asked_for, monkeypatch):
    """Other shapes and types go as before; another GPU, or another word, is an error."""
    x, weight = problem(20, 40, 100, torch.bfloat16)
    call = lambda x: torch.ops.peftops.nf4_linear(x, *weight._arguments, 40, 100, None, None, None, 1.0)
    asked_for.forget()
    call(x), call(x.float())
    assert not any("wgmma_rows" in report["kernel"] for report in asked_for.reports())
    asked_for.pretend(80, 108)
    with pytest.raises(RuntimeError, match="nf4_linear: PEFTOPS_NF4_WGMMA=on needs an H100 or H200: "):
        call(x)
    monkeypatch.setenv("PEFTOPS_NF4_WGMMA", "yes")
    with pytest.raises(RuntimeError, match="nf4_linear: PEFTOPS_NF4_WGMMA must be on or off, not yes"):
        call(x)


def test_what_ptxas_makes_of_it(tmp_path):
    """No spills, no wgmma that waits for the one before it (C7510), and HGMMA in the main loop."""
    said = nvcc("-cubin", "-Xptxas=-v", "-o", tmp_path / "nf4.cubin")
    assert "C7510" not in said and said.count("0 bytes spill stores, 0 bytes spill loads") == 6
    if not sass.disassembler():
        pytest.skip("needs nvidia-cuda-nvdisasm")
    text = subprocess.run(
        [sass.disassembler(), "-c", tmp_path / "nf4.cubin"], capture_output=True, text=True, check=True
    ).stdout
    for name, code in sass.kernels(text).items():
        loop = sass.main_loop(*code, wanted="HGMMA.64x")
        count = sass.histogram(loop)
        assert count["HGMMA"] % 4 == 0 and count["HGMMA"] >= 4, name
        assert not {"LDL", "STL"} & set(count), name
        per_chunk = len(loop) / (count["HGMMA"] / 4)
        assert per_chunk < 420, (name, per_chunk)
