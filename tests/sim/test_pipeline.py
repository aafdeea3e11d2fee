"""pipeline.cu as nvcc compiles it for sm_90a: right numbers under every schedule, and what is broken in it is found."""

import ctypes
import re
import shutil
import subprocess

import pytest
import torch

import sim
from sim.hopper import Map, tensor_map

TILE, ROWS, OUT, STAGES, TILES = 64, 32, 128, 3, 7
STAGE_BYTES = 2 * TILE * ROWS
KERNELS = ["by_tma", "by_threads"]
RIGHT = {
    kernel: dict(
        tiles=TILES, stages=STAGES, producer_ring=STAGES, consumer_ring=STAGES, full=full, empty=8, bytes=STAGE_BYTES
    )
    for kernel, full in zip(KERNELS, (1, 128), strict=True)
}


@pytest.fixture(scope="module")
def ptx(tmp_path_factory):
    if not shutil.which("nvcc"):
        pytest.skip("needs nvcc")
    out = tmp_path_factory.mktemp("pipeline") / "pipeline.ptx"
    source = sim.ROOT / "tests/sim/pipeline.cu"
    subprocess.run(["nvcc", "-std=c++17", "-arch=sm_90a", "-ptx", str(source), "-o", str(out)], check=True)
    return out.read_text()


class Plan(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in RIGHT["by_tma"]]


def launch(chip, module, kernel, **changes):
    """out^T and what it should be; ``changes`` to the plan."""
    plan = RIGHT[kernel] | changes
    gen = torch.Generator().manual_seed(1)
    x, w = (torch.randn(rows, TILE * TILES, generator=gen).bfloat16() for rows in (ROWS, OUT))
    out = torch.full((OUT, ROWS), torch.nan)
    for t in (x, w, out):
        chip.allow(t)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (out, w)]
    source = ctypes.c_void_p(x.data_ptr())
    if kernel == "by_tma":
        source = Map.from_buffer_copy(tensor_map(chip, x, (ROWS, TILE), 3).tobytes())
    shared = plan["stages"] * (STAGE_BYTES + 16)
    chip.launch(module, kernel, (1,), (384,), [*pointers, source, Plan(**plan)], shared)
    return out, w.double() @ x.double().T


def check(chip, module, kernel, **changes):
    out, want = launch(chip, module, kernel, **changes)
    if not (out.double() - want).abs().max() < 1e-3:
        raise sim.Finding("wrong numbers")


@pytest.mark.parametrize("kernel", KERNELS)
def test_right_numbers_under_every_schedule(chip, ptx, kernel):
    module = chip.load(ptx)
    for seed in range(6):
        chip.options(seed=seed)
        check(chip, module, kernel)
    for stages in (1, 2, 8):  # fewer than tiles, and more
        check(chip, module, kernel, stages=stages, producer_ring=stages, consumer_ring=stages)


def without(ptx, kernel, mark, line=""):
    """The text with the n-th marked line of a kernel left out or replaced, for each n."""
    begin = ptx.index(f".entry {kernel}(")
    end = ptx.find(".entry", begin + 10) % (len(ptx) + 1)
    for found in re.finditer(rf"^.*; // {mark}$", ptx[begin:end], re.M):
        yield ptx[: begin + found.start()] + line + ptx[begin + found.end() :]


OPEN = "setp.eq.u32 p, 0, 0;"
BROKEN = [(mark, "") for mark in ("fence", "flip", "release", "products", "expect", "copy")] + [
    ("wait 0", OPEN),
    ("wait 1", OPEN),
]


def mutants(ptx, kernel):
    """(what is broken, text, changes of the plan)"""
    for mark, line in BROKEN:
        for n, text in enumerate(without(ptx, kernel, mark, line)):
            yield f"{mark} {n}", text, {}
    begin = ptx.index(f".entry {kernel}(")
    barrier = re.compile(r"^\s*(bar|barrier)\.(cta\.)?sync.*;$", re.M).search(ptx, begin)
    yield "started", ptx[: barrier.start()] + ptx[barrier.end() :], {}
    right = RIGHT[kernel]
    for name in ("full", "empty"):
        for off in (-1, 1):
            if right[name] + off:
                yield f"{name} {off:+}", ptx, {name: right[name] + off}
    yield "one stage too few for the producer", ptx, {"producer_ring": STAGES - 1}
    yield "one stage too few for the consumers", ptx, {"consumer_ring": STAGES - 1}
    yield "memory for one stage too few", ptx, {"stages": STAGES - 1}
    if kernel == "by_tma":
        for off in (-16, 16, STAGE_BYTES, -STAGE_BYTES):
            yield f"bytes {off:+}", ptx, {"bytes": right["bytes"] + off}


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_broken_is_found(chip, ptx, kernel):
    found, missed = {}, []
    for name, text, changes in mutants(ptx, kernel):
        module = chip.load(text)
        for seed in (0, 1):
            chip.options(seed=seed, watchdog=2_000_000)
            try:
                check(chip, module, kernel, **changes)
            except sim.Finding as finding:
                found[name] = str(finding).split(", in ")[0]
                break
        else:
            missed.append(name)
    print(*(f"{name}: {why}" for name, why in found.items()), sep="\n")
    assert len(found) >= 16 and not missed, missed
    assert not any(why == "wrong numbers" or "watchdog" in why for why in found.values()), found
