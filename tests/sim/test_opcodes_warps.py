"""Memory, shuffles and votes, branches, tensor cores, atomics, barriers; and what the interpreter refuses.

Each instruction against a formula that is written here in NumPy or plain Python, independently of the
interpreter. The formulas follow the PTX ISA manual.
"""

import ctypes

import numpy as np
import pytest
import torch

import sim
from sim.lanes import LANES, execute, integers, wrap


def test_loads_extend_signs(chip):
    a = integers("i4", 1)
    for kind, dtype in (("s8", "i1"), ("u8", "u1"), ("s16", "i2"), ("u16", "u2")):
        got = execute(chip, f"ld.param.u64 %d3, [in0]; mad.wide.u32 %d3, %r1, 4, %d3; ld.global.{kind} %y, [%d3];", [a])
        assert (got.view("i4") == a.astype(dtype)).all()


def test_constants(chip):
    table = ".const .align 4 .f32 table[4] = {0f3F800000, 0f40000000, 0fC0400000, 0f40800000};"
    chip.forget()
    got = execute(
        chip,
        "and.b32 %r2, %r1, 3; mul.wide.u32 %d3, %r2, 4; mov.u64 %d4, table; add.s64 %d3, %d3, %d4; ld.const.f32 %y, [%d3];",
        [],
        outside=table,
    )
    assert (got.view("f4") == np.array([1, 2, -3, 4], "f4")[np.arange(LANES) % 4]).all()
    assert chip.reports()[-1]["constant_replays"] == 3  # four addresses, one after the other


def shuffled(mode, a, step, clamp=31, segment=0):
    out = []
    for lane in range(LANES):
        high, low = (lane & segment) | (clamp & ~segment & 31), lane & segment
        source = {"up": lane - step, "down": lane + step, "bfly": lane ^ step, "idx": low | (step & ~segment & 31)}[
            mode
        ]
        valid = source >= high if mode == "up" else source <= high
        out.append(a[source if valid else lane])
    return np.array(out)


@pytest.mark.parametrize(
    "mode, step, c",
    [
        ("up", 3, 0),
        ("up", 2, 0x1800),
        ("down", 5, 31),
        ("down", 1, 0x1C1F),
        ("bfly", 16, 31),
        ("bfly", 3, 31),
        ("idx", 7, 31),
        ("idx", 2, 0x181F),
    ],
)
def test_shuffles(chip, mode, step, c):
    a = integers("u4", 3)
    got = execute(chip, f"shfl.sync.{mode}.b32 %y, %x0, {step}, {c}, -1;", [a])
    assert (got == shuffled(mode, a, step, c & 31, c >> 8)).all()


def test_votes_and_reductions(chip):
    a = integers("i4", 1)
    positive = sum(1 << lane for lane in range(LANES) if a[lane] > 0)
    assert (execute(chip, "setp.gt.s32 %p1, %x0, 0; vote.sync.ballot.b32 %y, %p1, -1;", [a]) == positive).all()
    for how, want in (("all", False), ("any", True), ("uni", False)):
        got = execute(chip, f"setp.gt.s32 %p1, %x0, 0; vote.sync.{how}.pred %p2, %p1, -1; selp.u32 %y, 1, 0, %p2;", [a])
        assert (got == want).all()
    b = (a % 3).astype("i4")
    same_value = [sum(1 << k for k in range(LANES) if b[k] == b[lane]) for lane in range(LANES)]
    assert (execute(chip, "match.any.sync.b32 %y, %x0, -1;", [b]) == np.array(same_value)).all()
    for how, f in (("add", lambda v: sum(map(int, v))), ("min", min), ("max", max)):
        assert (execute(chip, f"redux.sync.{how}.s32 %y, %x0, -1;", [a]) == wrap([f(a)], 32)[0]).all()
    for how, f in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
        assert (execute(chip, f"redux.sync.{how}.b32 %y, %x0, -1;", [a.view("u4")]) == f.reduce(a.view("u4"))).all()
    assert (execute(chip, "setp.lt.u32 %p1, %r1, 5; @%p1 activemask.b32 %y; @!%p1 mov.u32 %y, 0;", [])[:5] == 31).all()


def test_divergence_and_switch_tables(chip):
    loop = execute(
        chip,
        """mov.u32 %y, 0; mov.u32 %r2, 0; $again: setp.ge.u32 %p1, %r2, %r1; @%p1 bra $done;
        add.u32 %y, %y, %r2; add.u32 %r2, %r2, 1; bra.uni $again; $done:""",
        [],
    )
    assert (loop == [lane * (lane - 1) // 2 for lane in range(LANES)]).all()
    table = execute(
        chip,
        """and.b32 %r2, %r1, 3; mov.u32 %y, 99; $table: .branchtargets $zero, $one, $two, $three; brx.idx %r2, $table;
        $zero: mov.u32 %y, 10; bra.uni $end; $one: mov.u32 %y, 11; bra.uni $end; $two: mov.u32 %y, 12; bra.uni $end;
        $three: mov.u32 %y, 13; $end:""",
        [],
    )
    assert (table == 10 + np.arange(LANES) % 4).all()


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix(chip, trans):
    a = np.arange(256, dtype="u2")
    body = f"""ld.param.u64 %d1, [a]; ld.param.u64 %d2, [o]; mov.u32 %r1, %tid.x; mad.wide.u32 %d1, %r1, 16, %d1;
      mad.wide.u32 %d2, %r1, 16, %d2; ld.global.v4.u32 {{%r2, %r3, %r4, %r5}}, [%d1]; mov.u32 %r6, smem; mad.lo.u32 %r7, %r1, 16, %r6;
      st.shared.v4.u32 [%r7], {{%r2, %r3, %r4, %r5}}; bar.warp.sync 0xffffffff;
      ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r2, %r3, %r4, %r5}}, [%r7]; st.global.v4.u32 [%d2], {{%r2, %r3, %r4, %r5}}; ret;"""
    out = np.zeros((LANES, 4, 2), "u2")
    chip.allow(a), chip.allow(out)
    chip.launch(chip.load(sim.kernel(body, "u64 a, u64 o", shared=512)), "k", (1,), (LANES,), [a, out])
    matrices = a.reshape(4, 8, 8)
    for lane in range(LANES):
        for q in range(4):
            for e in range(2):  # the fragment table of the PTX ISA
                row, col = lane // 4, 2 * (lane % 4) + e
                assert out[lane, q, e] == (matrices[q, col, row] if trans else matrices[q, row, col])


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("k", [8, 16])
@pytest.mark.parametrize("sums", ["f32", "f16"])
def test_mma(chip, kind, k, sums):
    if kind == "bf16" and sums == "f16":
        pytest.skip("no such instruction")
    gen = torch.Generator().manual_seed(k)
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[kind]
    a, b = (torch.randn(*shape, generator=gen).to(dtype) for shape in ((16, k), (k, 8)))
    c = torch.randn(16, 8, generator=gen).to(torch.float32 if sums == "f32" else torch.float16)
    bits = lambda t: t.view(torch.int16).numpy()
    fa, fb = np.zeros((LANES, k // 2), "i2"), np.zeros((LANES, k // 4), "i2")
    fc = np.zeros((LANES, 4), "f4" if sums == "f32" else "f2")
    place = lambda lane, i: ((lane >> 2) + (0 if i < 2 else 8), (lane & 3) * 2 + (i & 1))  # of accumulator i
    for lane in range(LANES):
        g, t = lane >> 2, lane & 3
        for i in range(k // 2):
            fa[lane, i] = bits(a)[g if i % 4 < 2 else g + 8, t * 2 + (i & 1) + (8 if i >= 4 else 0)]
        for i in range(k // 4):
            fb[lane, i] = bits(b)[t * 2 + (i & 1) + (8 if i >= 2 else 0), g]
        for i in range(4):
            fc[lane, i] = c[place(lane, i)]
    registers = lambda n, first: "{" + ", ".join(f"%r{first + i}" for i in range(n)) + "}"
    na, nb, nc = k // 4, k // 8, 4 if sums == "f32" else 2
    load = lambda name, n, first: (
        f"ld.param.u64 %d1, [{name}]; mad.wide.u32 %d1, %r1, {4 * n}, %d1; "
        + " ".join(f"ld.global.u32 %r{first + i}, [%d1+{4 * i}];" for i in range(n))
    )
    body = f"""mov.u32 %r1, %tid.x; {load("a", na, 10)} {load("b", nb, 20)} {load("c", nc, 30)}
        mma.sync.aligned.m16n8k{k}.row.col.{sums}.{kind}.{kind}.{sums} {registers(nc, 40)}, {registers(na, 10)}, {registers(nb, 20)}, {registers(nc, 30)};
        {" ".join(f"st.global.u32 [%d1+{4 * i}], %r{40 + i};" for i in range(nc))} ret;"""
    for array in (fa, fb, fc):
        chip.allow(array)
    report = chip.launch(chip.load(sim.kernel(body, "u64 a, u64 b, u64 c")), "k", (1,), (LANES,), [fa, fb, fc])
    want = a.double() @ b.double() + c.double()
    for lane in range(LANES):
        for i in range(4):
            assert abs(float(fc[lane, i]) - float(want[place(lane, i)])) <= (1e-6 if sums == "f32" else 5e-3)
    assert report["mma"] == 1


def test_mma_of_tf32(chip):
    """One element a register, of which eleven bits count."""
    gen = torch.Generator().manual_seed(8)
    a, b, c = (torch.randn(*shape, generator=gen) for shape in ((16, 8), (8, 8), (16, 8)))
    lanes = [(lane >> 2, lane & 3) for lane in range(LANES)]
    fa = np.array([[a[g + 8 * (i % 2), t + i // 2 * 4] for i in range(4)] for g, t in lanes], "f4")
    fb = np.array([[b[t + 4 * i, g] for i in range(2)] for g, t in lanes], "f4")
    fc = np.array([[c[g + i // 2 * 8, 2 * t + i % 2] for i in range(4)] for g, t in lanes], "f4")
    load = lambda name, n, first: (
        f"ld.param.u64 %d1, [{name}]; mad.wide.u32 %d1, %r1, {4 * n}, %d1; "
        + " ".join(f"ld.global.u32 %r{first + i}, [%d1+{4 * i}];" for i in range(n))
    )
    body = f"""mov.u32 %r1, %tid.x; {load("a", 4, 10)} {load("b", 2, 20)} {load("c", 4, 30)}
        mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {{%r30, %r31, %r32, %r33}}, {{%r10, %r11, %r12, %r13}}, {{%r20, %r21}}, {{%r30, %r31, %r32, %r33}};
        {" ".join(f"st.global.u32 [%d1+{4 * i}], %r{30 + i};" for i in range(4))} ret;"""
    for array in (fa, fb, fc):
        chip.allow(array)
    report = chip.launch(chip.load(sim.kernel(body, "u64 a, u64 b, u64 c")), "k", (1,), (LANES,), [fa, fb, fc])
    cut = lambda t: (t.view(torch.int32) & ~0x1FFF).view(torch.float32).double()
    want = cut(a) @ cut(b) + c.double()
    got = torch.tensor([[float(v) for v in row] for row in fc])
    assert all(
        abs(got[lane, i] - want[g + i // 2 * 8, 2 * t + i % 2]) < 1e-6
        for lane, (g, t) in enumerate(lanes)
        for i in range(4)
    )
    assert report["mma"] == 1


def test_cp_async(chip):
    source = np.concatenate([integers("u4", s) for s in range(4)])
    got = execute(
        chip,
        """mov.u32 %r2, smem; mad.lo.u32 %r3, %r1, 16, %r2; mad.wide.u32 %d3, %r1, 16, 0; ld.param.u64 %d4, [in0]; add.s64 %d3, %d3, %d4;
        setp.lt.u32 %p1, %r1, 8; selp.u32 %r4, 16, 4, %p1; cp.async.ca.shared.global [%r3], [%d3], 16, %r4; cp.async.commit_group;
        cp.async.wait_group 0; ld.shared.v2.u32 {%r5, %r6}, [%r3+8]; add.u32 %y, %r5, %r6;""",
        [source],
        outside=".shared .align 16 .b8 smem[512];",
    )
    rows = source.reshape(LANES, 4)
    assert (got[:8] == rows[:8, 2] + rows[:8, 3]).all() and (got[8:] == 0).all()  # what is not copied is zero


ATOMIC = {
    "add.u32": lambda v: sum(v),
    "min.s32": min,
    "max.s32": max,
    "and.b32": lambda v: np.bitwise_and.reduce(v),
    "or.b32": lambda v: np.bitwise_or.reduce(v),
    "xor.b32": lambda v: np.bitwise_xor.reduce(v),
}


@pytest.mark.parametrize("op", ATOMIC)
def test_atomics(chip, op):
    values = integers("i4" if ".s" in op else "u4", 2)
    cell = np.zeros(1, values.dtype) + values[5]
    body = f"""ld.param.u64 %d1, [a]; ld.param.u64 %d2, [o]; mov.u32 %r1, %tid.x; mad.wide.u32 %d1, %r1, 4, %d1;
        ld.global.u32 %r2, [%d1]; red.global.{op} [%d2], %r2; ret;"""
    first = cell.copy()
    chip.allow(values), chip.allow(cell)
    chip.launch(chip.load(sim.kernel(body, "u64 a, u64 o")), "k", (1,), (LANES,), [values, cell])
    assert int(cell[0]) & 0xFFFFFFFF == int(ATOMIC[op]([int(v) for v in [*values, *first]])) & 0xFFFFFFFF


def test_float_atomics_and_cas(chip):
    cell, old = np.array([1.0], "f4"), np.zeros(LANES, "u4")
    body = """ld.param.u64 %d1, [a]; ld.param.u64 %d2, [o]; mov.u32 %r1, %tid.x; mad.wide.u32 %d2, %r1, 4, %d2;
        red.global.add.f32 [%d1], 0f3F000000; add.u32 %r3, %r1, 1; atom.global.cas.b32 %r2, [%d1+4], %r1, %r3; st.global.u32 [%d2], %r2; ret;"""
    pair = np.array([1.0, 0.0], "f4")
    chip.allow(pair), chip.allow(old)
    chip.launch(chip.load(sim.kernel(body, "u64 a, u64 o")), "k", (1,), (LANES,), [pair, old])
    assert pair[0] == 17 and pair.view("u4")[1] == LANES and (old == np.arange(LANES)).all() and cell[0] == 1


def test_barrier_reductions(chip):
    out = np.zeros((64, 3), "u4")
    body = """ld.param.u64 %d1, [o]; mov.u32 %r1, %tid.x; mad.wide.u32 %d1, %r1, 12, %d1; setp.lt.u32 %p1, %r1, 40;
        barrier.red.popc.u32 %r2, 0, %p1; barrier.red.and.pred %p2, 0, %p1; barrier.red.or.pred %p3, 0, %p1;
        selp.u32 %r3, 1, 0, %p2; selp.u32 %r4, 1, 0, %p3;
        st.global.u32 [%d1], %r2; st.global.u32 [%d1+4], %r3; st.global.u32 [%d1+8], %r4; ret;"""
    chip.allow(out)
    chip.launch(chip.load(sim.kernel(body, "u64 o")), "k", (1,), (64,), [out])
    assert (out == [40, 0, 1]).all()


@pytest.mark.parametrize(
    "code",
    [
        "tcgen05.wait::ld.sync.aligned;",
        "add.rz.f32 %f1, %f2, %f3;",
        "mov.u32 %r1, %clusterid.x;",
        "mov.u32 %r1, nowhere;",
        "foo.b32 %r1;",
    ],
)
def test_what_is_not_known_is_refused(chip, code):
    with pytest.raises(sim.Finding, match="unsupported|unknown"):
        chip.launch(chip.load(sim.kernel(code + " ret;", "u64 a")), "k", (1,), (32,), [ctypes.c_uint64(0)])
