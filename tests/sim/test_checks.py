"""The interpreter finds what is wrong with a kernel: each mistake in a kernel as small as it can be, beside its cure."""

import ctypes

import numpy as np
import pytest

import sim


@pytest.fixture
def device():
    device = sim.simulator()
    if isinstance(device, str):
        pytest.skip(device)
    device.options()
    device.forbid_all()
    yield device
    device.options()


def run(device, body, *, threads=64, blocks=1, shared=512, words=64, read_only=False, dynamic=0, outside=""):
    """Launches ``body`` with %d1 = an array of ``words`` words, %r1 = thread, %r2 = 4 * thread, %r3 = block."""
    array = np.arange(words, dtype="u4")
    device.allow(array, read_only)
    start = "ld.param.u64 %d1, [a]; mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 2; mov.u32 %r3, %ctaid.x; cvt.u64.u32 %d2, %r2; add.s64 %d3, %d1, %d2;"
    module = device.load(sim.kernel(f"{start} {body} ret;", "u64 a", shared=shared, outside=outside))
    return array, device.launch(module, "k", (blocks,), (threads,), [array], dynamic)


NEIGHBOUR = "xor.b32 %r4, %r2, {}; mov.u32 %r5, smem; add.u32 %r6, %r5, %r2; add.u32 %r7, %r5, %r4;"
WRITE, READ = "st.shared.u32 [%r6], %r1;", "ld.shared.u32 %r8, [%r7];"
BARRIER, WARP_BARRIER = "bar.sync 0;", "bar.warp.sync -1;"
INITIALISE = WRITE + BARRIER


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "distance, accesses, cure, what",
    [
        (128, (WRITE, READ), BARRIER, "race: (read after write|write after read) by warp [01] "),
        (4, (WRITE, READ), WARP_BARRIER, "race: read after write by lane [01] of its warp"),
        (128, (WRITE, BARRIER + READ, "st.shared.u32 [%r6], %r8;"), BARRIER, "race: write after read|read after write"),
        (4, (WRITE, "st.shared.u32 [%r7], %r1;"), WARP_BARRIER, "race: write after write by lane"),
    ],
)
def test_races_in_shared_memory(device, seed, distance, accesses, cure, what):
    device.options(seed=seed)
    with pytest.raises(sim.Finding, match=what):
        run(device, NEIGHBOUR.format(distance) + INITIALISE + "".join(accesses))
    run(device, NEIGHBOUR.format(distance) + INITIALISE + cure.join(accesses))


def test_a_warp_barrier_does_not_order_other_warps(device):
    with pytest.raises(sim.Finding, match="race: (read after write|write after read) by warp"):
        run(device, NEIGHBOUR.format(128) + INITIALISE + WRITE + WARP_BARRIER + READ)


def test_races_in_global_memory(device):
    with pytest.raises(sim.Finding, match="race: write after write by another block"):
        run(device, "st.global.u32 [%d3], %r3;", blocks=2)
    with pytest.raises(
        sim.Finding, match="race: write after read by another block|race: read after write by another block"
    ):
        run(
            device,
            "ld.global.u32 %r4, [%d1]; setp.eq.u32 %p1, %r3, 1; @%p1 st.global.u32 [%d1], %r3;",
            blocks=2,
            threads=1,
        )
    with pytest.raises(sim.Finding, match="race: write after write by (warp 0|lane)"):
        run(device, "st.global.u32 [%d1], %r1;")
    run(device, "ld.global.u32 %r4, [%d1];", blocks=4)
    array, _ = run(device, "red.global.add.u32 [%d1], 1;", blocks=4)  # atomics are in order among themselves
    assert array[0] == 256
    run(
        device,
        "st.global.u32 [%d3], %r1; bar.sync 0; xor.b32 %r4, %r2, 128; cvt.u64.u32 %d2, %r4; add.s64 %d3, %d1, %d2; ld.global.u32 %r5, [%d3];",
    )
    device.options(races=False)
    run(device, "st.global.u32 [%d3], %r3;", blocks=2)


def test_bounds_and_alignment(device):
    with pytest.raises(
        sim.Finding,
        match=r"read out of bounds of global memory: 4 bytes, 4 beyond the end of an allocation, lane 31, in k, block \(0, 0, 0\), warp 1",
    ):
        run(device, "ld.global.u32 %r4, [%d3];", words=63)
    with pytest.raises(sim.Finding, match="write out of bounds of global memory"):
        run(device, "st.global.u32 [%d3+-4], %r1;")
    with pytest.raises(sim.Finding, match="misaligned: 4 bytes at a global address that is 2 modulo 4"):
        run(device, "ld.global.u32 %r4, [%d1+2];")
    with pytest.raises(sim.Finding, match="misaligned: 16 bytes"):
        run(device, "ld.global.v4.u32 {%r4, %r5, %r6, %r7}, [%d3];")
    with pytest.raises(sim.Finding, match="shared memory out of bounds: 4 bytes at 512 of 512"):
        run(device, "mov.u32 %r4, smem; st.shared.u32 [%r4+512], %r1;", threads=1)
    with pytest.raises(sim.Finding, match="misaligned: 8 bytes at shared offset 4"):
        run(device, "mov.u32 %r4, smem; st.shared.u64 [%r4+4], %d1;", threads=1)
    with pytest.raises(sim.Finding, match="write to read-only memory"):
        run(device, "st.global.u32 [%d3], %r1;", read_only=True)


def test_two_arguments_may_be_views_of_one_storage(device):
    whole = np.arange(80, dtype="u4")
    module = device.load(sim.kernel("ld.param.u64 %d1, [a]; ld.global.u32 %r4, [%d1]; ret;", "u64 a"))
    read = lambda first: device.launch(module, "k", (1,), (1,), [whole[first:]])
    device.allow(whole[:64], True), device.allow(whole[16:72], True)
    for first in (0, 15, 16, 63, 64, 71):
        read(first)
    with pytest.raises(sim.Finding, match="read out of bounds"):
        read(72)
    device.allow(whole[40:80])  # to be written: what was there is gone
    with pytest.raises(sim.Finding, match="read out of bounds"):
        read(16)


def test_uninitialised_shared_memory(device):
    with pytest.raises(sim.Finding, match="uninitialised shared memory at offset 256"):
        run(
            device,
            "mov.u32 %r4, smem; add.u32 %r4, %r4, %r2; st.shared.u32 [%r4], %r1; bar.sync 0; ld.shared.u32 %r5, [%r4+4];",
        )
    with pytest.raises(sim.Finding, match="uninitialised"):  # what the block before wrote does not count
        run(
            device,
            "mov.u32 %r4, smem; setp.eq.u32 %p1, %r3, 0; @%p1 st.shared.u32 [%r4], 1; ld.shared.u32 %r5, [%r4];",
            threads=1,
            blocks=2,
        )


COPY = "mov.u32 %r4, smem; shl.b32 %r5, %r1, 4; add.u32 %r4, %r4, %r5; cvt.u64.u32 %d4, %r5; add.s64 %d4, %d1, %d4; cp.async.cg.shared.global [%r4], [%d4], 16; "


def test_a_missing_wait(device):
    read = "ld.shared.u32 %r6, [%r4];"
    with pytest.raises(sim.Finding, match="read of a cp.async that was not waited for"):
        run(device, COPY + read, threads=16)
    with pytest.raises(sim.Finding, match="not waited for"):  # waits for all but the last group
        run(device, COPY + "cp.async.commit_group; cp.async.wait_group 1;" + read, threads=16)
    run(device, COPY + "cp.async.commit_group; cp.async.wait_group 0;" + read, threads=16)
    run(device, COPY + "cp.async.wait_all;" + read, threads=16)
    other = "xor.b32 %r4, %r4, 16; " + read
    with pytest.raises(sim.Finding, match="race: read after write"):  # landed, but for others only after a barrier
        run(device, COPY + "cp.async.wait_all;" + other, threads=16)
    run(device, COPY + "cp.async.wait_all; bar.sync 0;" + other, threads=16)
    with pytest.raises(sim.Finding, match="out of bounds of global memory: 16 bytes"):
        run(device, COPY, threads=17)


def test_barriers_and_masks(device):
    with pytest.raises(sim.Finding, match="divergent barrier"):
        run(device, "setp.lt.u32 %p1, %r1, 5; @%p1 bar.sync 0;")
    with pytest.raises(sim.Finding, match="deadlock: a barrier that not all threads reach"):
        run(device, "setp.lt.u32 %p1, %r1, 32; @%p1 bra $first; bar.sync 1; bra.uni $end; $first: bar.sync 2; $end:")
    with pytest.raises(sim.Finding, match="membermask names lanes that have exited"):
        run(device, "setp.gt.u32 %p1, %r1, 7; @%p1 ret; shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1;")
    with pytest.raises(sim.Finding, match="membermask names lanes that do not come here"):
        run(device, "setp.lt.u32 %p1, %r1, 7; @%p1 shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1;", threads=32)
    with pytest.raises(sim.Finding, match="not in its own membermask"):
        run(device, "shfl.sync.bfly.b32 %r4, %r1, 1, 31, 255;")
    with pytest.raises(sim.Finding, match="lane 7 reads lane 8, which is not there"):
        run(device, "setp.lt.u32 %p1, %r1, 8; @%p1 shfl.sync.down.b32 %r4, %r1, 1, 31, 255;", threads=32)
    run(device, "setp.lt.u32 %p1, %r1, 32; @%p1 bar.sync 1, 32; @!%p1 bar.sync 2, 32;")  # a barrier for each half


def test_watchdog_and_trap(device):
    device.options(watchdog=10_000)
    with pytest.raises(sim.Finding, match="watchdog: the kernel does not end"):
        run(device, "$spin: bra.uni $spin;")
    with pytest.raises(sim.Finding, match="trap"):
        run(device, "trap;")


def test_warps_that_wait_for_each_other_in_memory_go_on(device):
    """A spin on a flag: the scheduler is fair, whatever the seed."""
    for seed in (0, 1, 5):
        device.options(seed=seed)
        run(
            device,
            """setp.lt.u32 %p1, %r1, 32; @!%p1 bra $set; $spin: atom.global.or.b32 %r4, [%d1], 0; setp.eq.u32 %p2, %r4, 0;
            @%p2 bra $spin; bra.uni $end; $set: atom.global.exch.b32 %r4, [%d1], 1; $end:""",
        )


def test_launch_limits(device):
    for blocks, threads, shared in (
        ((1,), (1025,), 0),
        ((1,), (0,), 0),
        ((0,), (32,), 0),
        ((1, 65536), (32,), 0),
        ((1,), (1, 1, 65), 0),
        ((1,), (32,), 300_000),
    ):
        with pytest.raises(sim.Finding, match="threads|grid|shared"):
            device.launch(device.load(sim.kernel("ret;", "u64 a")), "k", blocks, threads, [ctypes.c_uint64(0)], shared)
    with pytest.raises(sim.Finding, match="no kernel nothing"):
        device.launch(device.load(sim.kernel("ret;", "u64 a")), "nothing", (1,), (1,), [])


def test_counters(device):
    """Against numbers worked out by hand."""
    _, aligned = run(device, "ld.global.u32 %r4, [%d3];", threads=32)
    assert aligned["global_read"]["ideal"] == 4 and aligned["global_read"]["sectors"] in (4, 5)  # where the array lies
    _, strided = run(
        device, "mul.wide.u32 %d4, %r1, 32; add.s64 %d4, %d1, %d4; ld.global.u32 %r4, [%d4];", threads=32, words=256
    )
    assert strided["global_read"]["sectors"] == 32 and strided["global_read"]["ideal"] == 4
    store = lambda stride: f"mov.u32 %r4, smem; mad.lo.u32 %r4, %r1, {stride}, %r4; st.shared.u32 [%r4], %r1;"
    for stride, waves in ((4, 1), (8, 2), (16, 4), (128, 32), (132, 1), (20, 1)):
        _, report = run(device, store(stride), threads=32, shared=8192)
        assert report["shared_store"] == {"waves": waves, "ideal": 1}, stride
    _, wide = run(
        device,
        "mov.u32 %r4, smem; mad.lo.u32 %r4, %r1, 16, %r4; st.shared.v4.u32 [%r4], {%r1, %r1, %r1, %r1};",
        threads=32,
    )
    assert wide["shared_store"] == {"waves": 4, "ideal": 4}
    _, one = run(
        device,
        "mov.u32 %r4, smem; setp.eq.u32 %p1, %r1, 0; @%p1 st.shared.u32 [%r4], 1; bar.sync 0; ld.shared.u32 %r5, [%r4];",
        threads=32,
    )
    assert one["shared_load"] == {"waves": 1, "ideal": 1}  # one word for all
    _, branches = run(device, "setp.lt.u32 %p1, %r1, 5; @%p1 bra $end; add.u32 %r4, %r1, 1; $end:", threads=64)
    assert (branches["branches"], branches["divergent"]) == (2, 1)
    _, table = run(
        device,
        ".loc 1 17 3\n add.u32 %r4, %r1, 1; .loc 1 18 3\n setp.lt.u32 %p1, %r1, 5; @%p1 add.u32 %r4, %r1, 1;",
        threads=32,
    )
    assert (table["lines"]["17"]["issued"], table["lines"]["18"]["lanes"]) == (1, 32 + 5 + 32)  # and the return


def test_counters_do_not_depend_on_the_schedule(device):
    reports = []
    for seed in (0, 1, 2):
        device.options(seed=seed)
        reports.append(
            run(device, NEIGHBOUR.format(128) + WRITE + BARRIER + READ, threads=256, shared=1024, words=256)[1]
        )
    assert reports[0] == reports[1] == reports[2]


def test_local_memory_is_counted(device):
    _, report = run(
        device,
        ".local .align 4 .b8 own[16]; mov.u64 %d4, own; st.local.u32 [%d4+4], %r1; ld.local.u32 %r5, [%d4+4]; st.global.u32 [%d3], %r5;",
    )
    assert report["local"] == 4
    with pytest.raises(sim.Finding, match="out of bounds of local memory"):
        run(device, ".local .align 4 .b8 own[16]; mov.u64 %d4, own; ld.local.u32 %r5, [%d4+16];")


def test_the_report_as_a_table(device):
    run(device, ".loc 1 17 3\n st.global.u32 [%d3], %r1;")
    header, columns, *rows = device.table().splitlines()
    assert "grid 1 x 1 x 1, block 64 x 1 x 1, 512 bytes of shared memory" in header and "sectors" in columns
    assert rows[-1].split()[:2] == ["17", "4"]  # two warps, the store and the return
