"""The instructions of compute_90 besides wgmma: mbarrier, bulk copies, tensor maps, stmatrix, elect.sync, setmaxnreg."""

import contextlib

import numpy as np
import pytest
import torch

import sim
from sim.hopper import BARRIER, FENCE, LOAD, WRITE, Map, arrive, init, run, tensor_map, wait


def words(array):
    """%r9 of each thread, which ``STORE`` writes over the array."""
    return array.astype(np.int64)


STORE = "st.global.u32 [%d3], %r9;"
TEST = "mbarrier.test_wait{}.shared.b64 %p9, [%r5], {}; selp.u32 %r9, 1, 0, %p9;"


@pytest.mark.parametrize("how", ["state", "parity"])
def test_a_phase_ends_with_its_last_arrival(chip, how):
    ask = TEST.format("", "%d5") if how == "state" else TEST.format(".parity", 0)
    begin = (
        init(3)
        + "@!%p2 bra $end; setp.lt.u32 %p3, %r1, {}; @%p3 mbarrier.arrive.shared.b64 %d5, [%r5]; mov.u64 %d5, 0;"
    )
    for arrivals, over in ((2, 0), (3, 1)):
        array, _ = run(chip, begin.format(arrivals) + ask + STORE + "$end:", 32)
        assert (words(array)[:32] == over).all()
    array, _ = run(
        chip,
        init(3) + "@%p1 mbarrier.arrive.shared.b64 _, [%r5], 3; bar.warp.sync -1;" + TEST.format(".parity", 1) + STORE,
        32,
    )
    assert (words(array)[:32] == 0).all()  # phase 1 goes on
    with pytest.raises(sim.Finding, match="1 arrivals where 0 are missing|4 arrivals where 3 are missing"):
        run(chip, init(3) + "@%p1 mbarrier.arrive.shared.b64 _, [%r5], 4;", 32)


def test_the_first_wait_for_the_other_parity_passes(chip):
    run(chip, init(1) + wait(0, 1, 1), 32)


def test_an_arrival_that_drops_out(chip):
    """The next phase expects one fewer; pending_count tells what a state was."""
    array, _ = run(
        chip,
        init(2)
        + """@!%p1 bra $end; mbarrier.arrive_drop.shared.b64 %d5, [%r5]; mbarrier.arrive.shared.b64 %d6, [%r5];
        mbarrier.arrive.shared.b64 %d7, [%r5]; mbarrier.pending_count.b64 %r10, %d5; mbarrier.pending_count.b64 %r11, %d6;
        mbarrier.pending_count.b64 %r12, %d7; mbarrier.test_wait.shared.b64 %p9, [%r5], %d7; selp.u32 %r13, 1, 0, %p9;
        st.global.v4.u32 [%d1], {%r10, %r11, %r12, %r13}; $end:""",
        32,
    )
    assert words(array)[:4].tolist() == [2, 1, 1, 1]


def test_bytes_end_a_phase_as_arrivals_do(chip):
    body = (
        init(1)
        + """@!%p1 bra $end; mbarrier.arrive.expect_tx.shared.b64 _, [%r5], 48; mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r5], 16;
        mbarrier.complete_tx.shared.b64 [%r5], {}; """
        + TEST.format(".parity", 0)
        + STORE
        + "$end:"
    )
    array, _ = run(chip, body.replace("{}", "64"), 32)
    assert words(array)[0] == 1
    for bytes, what in ((48, "fewer"), (80, "more")):
        with pytest.raises(sim.Finding, match=f"{what} bytes were delivered than expected"):
            run(chip, body.replace("{}", str(bytes)), 32)


def test_a_bulk_copy_and_back(chip):
    body = (
        LOAD
        + wait(0, 0, 1)
        + f"""ld.shared.u32 %r8, [%r6]; add.u32 %r8, %r8, 1000; st.shared.u32 [%r6], %r8; {FENCE} {BARRIER}
        @%p1 cp.async.bulk.global.shared::cta.bulk_group [%d1+512], [%r5+1024], 256; @%p1 cp.async.bulk.commit_group;
        @%p1 cp.async.bulk.wait_group.read 0;"""
    )
    array, _ = run(chip, body, 64)
    assert (words(array)[128:192] == np.arange(64) + 1000).all() and (words(array)[192:] == np.arange(192, 256)).all()
    for copy, what in (
        ("[%r5+1024], [%d1], 24", "misaligned: a bulk copy of 24 bytes"),
        ("[%r5+1032], [%d1], 32", "misaligned"),
        ("[%r5+1024], [%d1+1008], 32", "out of bounds of global memory"),
        ("[%r5+4080], [%d1], 32", "shared memory out of bounds"),
    ):
        with pytest.raises(sim.Finding, match=what):
            run(chip, init(1) + f"@%p1 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes {copy}, [%r5];")


@pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
@pytest.mark.parametrize("column, row", [(0, 0), (24, 5), (-3, 2), (8, -4)])
def test_a_box_of_a_tensor_map(chip, swizzle, column, row):
    """A box of bf16 at any place of a matrix: zeros outside of it, and chunks permuted as wgmma reads them."""
    rows, width = 8, 8 << swizzle
    x = torch.arange(1, 12 * 40 + 1, dtype=torch.int16).view(12, 40)
    chip.allow(x)
    out = np.zeros(rows * width, "i2")
    chip.allow(out)
    body = f"""ld.param.u64 %d1, [out]; mov.u32 %r1, %tid.x; mov.u32 %r5, smem; setp.eq.u32 %p1, %r1, 0; {init(1)}
        mov.u64 %d4, map; cvta.param.u64 %d4, %d4; mov.u32 %r10, {column}; mov.u32 %r11, {row};
        @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r5], {out.nbytes};
        @%p1 cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r5+1024], [%d4, {{%r10, %r11}}], [%r5];
        {wait(0, 0, 1)} mov.u32 %r2, 0;
        $next: mad.lo.u32 %r2, %r1, 2, 0; $more: add.u32 %r3, %r5, %r2; ld.shared.u16 %h1, [%r3+1024]; cvt.u64.u32 %d5, %r2;
        add.s64 %d5, %d1, %d5; st.global.u16 [%d5], %h1; add.u32 %r2, %r2, 64; setp.lt.u32 %p3, %r2, {out.nbytes}; @%p3 bra $more; ret;"""
    ptx = sim.kernel(body, "u64 out, u64 map", shared=4096).replace(".param .u64 map", ".param .align 64 .b8 map[128]")
    plan = Map.from_buffer_copy(tensor_map(chip, x, (rows, width), swizzle).tobytes())
    chip.launch(chip.load(ptx), "k", (1,), (32,), [out, plan])
    bytes_of_row = 2 * width
    for r in range(rows):
        for c in range(width):
            at = r * bytes_of_row + 2 * c
            at ^= (at // 128) % (bytes_of_row // 16) * 16 if swizzle else 0
            inside = 0 <= row + r < 12 and 0 <= column + c < 40
            assert out[at // 2] == (x[row + r, column + c] if inside else 0), (r, c)


def test_tensor_maps_that_do_not_exist(chip):
    x = torch.zeros(16, 40, dtype=torch.int16)
    for rows, columns, swizzle, what in (
        (8, 64, 2, "wider than the swizzle"),
        (8, 4, 0, "rows of a box of 8 bytes"),
        (300, 8, 0, "a box of 300"),
    ):
        with pytest.raises(sim.Finding, match=what):
            tensor_map(chip, x, (rows, columns), swizzle)
    with pytest.raises(sim.Finding, match="stride 78"):
        tensor_map(chip, torch.zeros(16, 39, dtype=torch.int16), (8, 8), 0)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_stmatrix_is_the_way_back_of_ldmatrix(chip, count, trans):
    registers = "{" + ", ".join(f"%r{20 + k}" for k in range(count)) + "}"
    matrix = f"sync.aligned.m8n8.x{count}{trans}.shared.b16"
    body = f"""mad.lo.u32 %r7, %r1, 16, %r5; {" ".join(f"st.shared.u32 [%r6+{128 * k}], %r1; ld.global.u32 %r{10 + k}, [%d3+{128 * k}]; st.shared.u32 [%r6+{128 * k}], %r{10 + k};" for k in range(4))}
        bar.warp.sync -1; ldmatrix.{matrix} {registers}, [%r7+1024]; bar.warp.sync -1; stmatrix.{matrix} [%r7+2048], {registers};
        bar.warp.sync -1; {" ".join(f"ld.shared.u32 %r9, [%r6+{1024 + 128 * k}]; st.global.u32 [%d3+{128 * k}], %r9;" for k in range(count))}"""
    array, _ = run(chip, body, 32)
    assert (array == np.arange(256)).all()
    plain = f"""mad.lo.u32 %r7, %r1, 16, %r5; stmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 [%r7+1024], {{%r1}}; bar.warp.sync -1;
        ld.shared.u32 %r9, [%r6]; {STORE}"""
    array, _ = run(chip, plain, 32)
    matrix = np.zeros((8, 8), "u2")
    for lane in range(32):  # the low half of each lane's register is its number, the high half zero
        at = lane // 4, 2 * (lane % 4)
        matrix[at[::-1] if trans else at] = lane
    assert (array[:32].view("u2").reshape(8, 8) == matrix).all()


def test_elect_chooses_one_lane(chip):
    array, _ = run(chip, "mov.u32 %r9, 7; elect.sync %r9|%p3, -1; @%p3 add.u32 %r9, %r9, 100; " + STORE, 64)
    assert (words(array)[:64] == ([100] + [0] * 31) * 2).all()
    array, _ = run(
        chip,
        "setp.gt.u32 %p4, %r1, 4; mov.u32 %r9, 7; @%p4 elect.sync _|%p3, -32; @%p4 selp.u32 %r9, 1, 0, %p3;" + STORE,
        32,
    )
    assert (words(array)[:32] == [7] * 5 + [1] + [0] * 26).all()


@pytest.mark.parametrize(
    "code, what",
    [
        ("setmaxnreg.dec.sync.aligned.u32 40;", None),
        ("@%p5 setmaxnreg.dec.sync.aligned.u32 40; @!%p5 setmaxnreg.inc.sync.aligned.u32 256;", None),
        ("setmaxnreg.dec.sync.aligned.u32 44;", "no multiple of 8"),
        ("setmaxnreg.dec.sync.aligned.u32 16;", "from 24 to 256"),
        ("setmaxnreg.inc.sync.aligned.u32 40;", "a lane has (248|255) registers already"),
        ("setmaxnreg.inc.sync.aligned.u32 256;", "deadlock"),
        ("@%p2 setmaxnreg.dec.sync.aligned.u32 40;", "warps of a group do not do the same"),
    ],
)
def test_setmaxnreg_shifts_registers_between_warpgroups(chip, code, what):
    body = "setp.lt.u32 %p5, %r1, 128;" + code
    with pytest.raises(sim.Finding, match=what) if what else contextlib.nullcontext():
        run(chip, body, 256)


def test_more_registers_than_setmaxnreg_leaves(chip):
    many = range(30)
    body = "setmaxnreg.dec.sync.aligned.u32 {}; " + " ".join(f"ld.global.u32 %r{20 + k}, [%d3+{4 * k}];" for k in many)
    body += "mov.u32 %r9, 0;" + " ".join(f"add.u32 %r9, %r9, %r{20 + k};" for k in many) + "bar.sync 0;" + STORE
    run(chip, body.replace("{}", "40"), 128)
    with pytest.raises(sim.Finding, match="registers are in use where setmaxnreg leaves 24"):
        run(chip, body.replace("{}", "24"), 128)


def test_two_phases_before_a_waiting_warp_looked(chip):
    """Parity cannot tell them apart: the warp may wait for ever on hardware."""
    two = (
        "@%p2 bra $arrive; "
        + wait(0, 0, 1)
        + "bra.uni $end; $arrive: @%p1 "
        + arrive(8)
        + wait(8, 0, 2)
        + "@%p1 "
        + arrive(0)
        + "@%p1 "
        + arrive(0)
        + "$end:"
    )
    chip.options(seed=3)
    findings = 0
    for seed in range(12):
        chip.options(seed=seed)
        try:
            run(chip, init(1, 1) + two, 64)
        except sim.Finding as finding:
            assert "two phases went by before the warp" in str(finding) or "deadlock" in str(finding)
            findings += 1
    assert findings > 6


def test_named_barriers_hand_on_what_came_before(chip):
    array, _ = run(
        chip,
        f"@!%p2 bra $second; {WRITE} bar.arrive 1, 64; bar.sync 2, 64; bra.uni $end; $second: bar.sync 1, 64; ld.shared.u32 %r9, [%r6+-128]; bar.arrive 2, 64; {STORE} $end:",
        64,
    )
    assert (words(array)[32:64] == np.arange(32)).all()
    with pytest.raises(sim.Finding, match="barrier 1: 64 threads arrive where 32 are expected|deadlock"):
        run(chip, "@%p2 bar.arrive 1, 32; @!%p2 bar.sync 1, 32;", 64)


def test_waits_of_hardware_that_say_nothing_here(chip):
    run(
        chip,
        "griddepcontrol.wait; griddepcontrol.launch_dependents; fence.mbarrier_init.release.cluster; ld.param.u64 %d4, [a]; prefetch.tensormap [%d4];",
        32,
    )
