"""pipeline.cu as nvcc compiles it for sm_90a: right numbers under every schedule, and what is broken in it is found."""

import ctypes
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

import sim

TILE, ROWS, OUT, STAGES, TILES = 64, 32, 128, 3, 7
STAGE_BYTES = 2 * TILE * ROWS
KERNELS = ["by_tma", "by_threads"]
RIGHT = {
    kernel: dict(tiles=TILES, stages=STAGES, producer_ring=STAGES, consumer_ring=STAGES, full=full, empty=8, bytes=STAGE_BYTES)  # fmt: skip
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


@pytest.fixture
def device():
    device = sim.simulator()
    if isinstance(device, str):
        pytest.skip(device)
    device.options()
    device.forbid_all()
    yield device
    device.options()


def tensor_map(device, x, box, swizzle):
    """Of a row-major matrix; 128 bytes."""
    storage = np.zeros(256, np.uint8)
    room = storage[-storage.ctypes.data % 64 :][:128]
    u64s, u32s = lambda *v: (ctypes.c_uint64 * len(v))(*v), lambda *v: (ctypes.c_uint32 * len(v))(*v)
    status = device.lib.sim_tensor_map(
        ctypes.c_void_p(room.ctypes.data), 9, 2, ctypes.c_void_p(x.data_ptr()), u64s(x.shape[1], x.shape[0]),
        u64s(x.shape[1] * 2), u32s(*reversed(box)), u32s(1, 1), swizzle)  # fmt: skip
    if status:
        raise sim.Finding(device.error())
    return room


class Plan(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in RIGHT["by_tma"]]


class Map(ctypes.Structure):
    _fields_ = [("opaque", ctypes.c_uint8 * 128)]


def launch(device, module, kernel, **changes):
    """out^T and what it should be; ``changes`` to the plan."""
    plan = RIGHT[kernel] | changes
    gen = torch.Generator().manual_seed(1)
    x, w = (torch.randn(rows, TILE * TILES, generator=gen).bfloat16() for rows in (ROWS, OUT))
    out = torch.full((OUT, ROWS), torch.nan)
    for t in (x, w, out):
        device.allow(t)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (out, w)]
    source = ctypes.c_void_p(x.data_ptr())
    if kernel == "by_tma":
        source = Map.from_buffer_copy(tensor_map(device, x, (ROWS, TILE), 3).tobytes())
    shared = plan["stages"] * (STAGE_BYTES + 16)
    device.launch(module, kernel, (1,), (384,), [*pointers, source, Plan(**plan)], shared)
    return out, w.double() @ x.double().T


def check(device, module, kernel, **changes):
    out, want = launch(device, module, kernel, **changes)
    if not (out.double() - want).abs().max() < 1e-3:
        raise sim.Finding("wrong numbers")


@pytest.mark.parametrize("kernel", KERNELS)
def test_right_numbers_under_every_schedule(device, ptx, kernel):
    module = device.load(ptx)
    for seed in range(6):
        device.options(seed=seed)
        check(device, module, kernel)
    for stages in (1, 2, 8):  # fewer than tiles, and more
        check(device, module, kernel, stages=stages, producer_ring=stages, consumer_ring=stages)


def without(ptx, kernel, mark, line=""):
    """The text with the n-th marked line of a kernel left out or replaced, for each n."""
    begin = ptx.index(f".entry {kernel}(")
    end = ptx.find(".entry", begin + 10) % (len(ptx) + 1)
    for found in re.finditer(rf"^.*; // {mark}$", ptx[begin:end], re.M):
        yield ptx[: begin + found.start()] + line + ptx[begin + found.end() :]


OPEN = "setp.eq.u32 p, 0, 0;"
BROKEN = [(mark, "") for mark in ("fence", "flip", "release", "products", "expect", "copy")] + [("wait 0", OPEN), ("wait 1", OPEN)]  # fmt: skip


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
def test_what_is_broken_is_found(device, ptx, kernel):
    found, missed = {}, []
    for name, text, changes in mutants(ptx, kernel):
        module = device.load(text)
        for seed in (0, 1):
            device.options(seed=seed, watchdog=2_000_000)
            try:
                check(device, module, kernel, **changes)
            except sim.Finding as finding:
                found[name] = str(finding).split(", in ")[0]
                break
        else:
            missed.append(name)
    print(*(f"{name}: {why}" for name, why in found.items()), sep="\n")
    assert len(found) >= 16 and not missed, missed
    assert not any(why == "wrong numbers" or "watchdog" in why for why in found.values()), found
