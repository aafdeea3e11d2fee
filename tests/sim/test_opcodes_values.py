"""Arithmetic, bits, comparisons and conversions.

Each instruction against a formula that is written here in NumPy or plain Python, independently of the
interpreter. The formulas follow the PTX ISA manual.
"""

import struct

import numpy as np
import pytest
import torch

import sim
from sim.lanes import LANES, execute, integers, reals, wrap

REGISTER = {16: "h", 32: "r", 64: "d"}

INTEGER = {
    "add.s32": lambda a, b, c: a + b,
    "sub.s32": lambda a, b, c: a - b,
    "mul.lo.s32": lambda a, b, c: a * b,
    "mul.hi.s32": lambda a, b, c: (a * b) >> 32,
    "mul.hi.u32": lambda a, b, c: (a * b) >> 32,
    "mad.lo.s32": lambda a, b, c: a * b + c,
    "mad.hi.u32": lambda a, b, c: ((a * b) >> 32) + c,
    "min.s32": lambda a, b, c: min(a, b),
    "max.s32": lambda a, b, c: max(a, b),
    "min.u32": lambda a, b, c: min(a, b),
    "max.u64": lambda a, b, c: max(a, b),
    "add.s64": lambda a, b, c: a + b,
    "mul.lo.s64": lambda a, b, c: a * b,
    "mul.hi.u64": lambda a, b, c: (a * b) >> 64,
    "mul.hi.s64": lambda a, b, c: (a * b) >> 64,
    "add.u16": lambda a, b, c: a + b,
    "mul.lo.u16": lambda a, b, c: a * b,
    "sub.s16": lambda a, b, c: a - b,
    "div.s32": lambda a, b, c: -1 if b == 0 else (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1),
    "rem.s32": lambda a, b, c: a if b == 0 else abs(a) % abs(b) * (-1 if a < 0 else 1),
    "div.u64": lambda a, b, c: -1 if b == 0 else a // b,
    "rem.u32": lambda a, b, c: a if b == 0 else a % b,
    "neg.s32": lambda a, b, c: -a,
    "abs.s32": lambda a, b, c: abs(a),
    "abs.s64": lambda a, b, c: abs(a),
    "and.b32": lambda a, b, c: a & b,
    "or.b64": lambda a, b, c: a | b,
    "xor.b16": lambda a, b, c: a ^ b,
    "not.b32": lambda a, b, c: ~a,
    "popc.b32": lambda a, b, c: bin(a).count("1"),
    "clz.b32": lambda a, b, c: 32 - a.bit_length(),
    "brev.b32": lambda a, b, c: int(f"{a:032b}"[::-1], 2),
    "bfind.u32": lambda a, b, c: a.bit_length() - 1,
}


@pytest.mark.parametrize("op", INTEGER)
def test_integers(chip, op):
    kind, bits = op.split(".")[-1][0], int(op.split(".")[-1][1:])
    dtype = f"{'i' if kind == 's' else 'u'}{bits // 8}"
    arrays = [integers(dtype, seed) for seed in range(3)]
    name = op.split(".")[0]
    count = 1 if name in ("neg", "abs", "not", "popc", "clz", "brev", "bfind") else 3 if name == "mad" else 2
    got = execute(chip, f"{op} %y, {', '.join(f'%x{n}' for n in range(count))};", arrays, bits)
    want = [INTEGER[op](*(int(array[lane]) for array in arrays)) for lane in range(LANES)]
    assert (got == wrap(want, bits)).all()


WIDE = {
    "mul.wide.s32": "i4",
    "mul.wide.u32": "u4",
    "mad.wide.s32": "i4",
    "mad.wide.u32": "u4",
    "mul.wide.u16": "u2",
    "mul.wide.s16": "i2",
}


@pytest.mark.parametrize("op", WIDE)
def test_wide_products(chip, op):
    a, b = integers(WIDE[op], 0), integers(WIDE[op], 1)
    bits = 16 * a.dtype.itemsize
    c = integers(f"i{bits // 8}", 2)
    adds = op.startswith("mad")
    got = execute(chip, f"{op} %y, %x0, %x1{', %x2' if adds else ''};", [a, b, c], bits)
    assert (
        got == wrap([int(x) * int(y) + (int(z) if adds else 0) for x, y, z in zip(a, b, c, strict=True)], bits)
    ).all()


def test_shifts(chip):
    n = np.array([0, 1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 255] * 2, dtype="u4")
    for kind, bits in (("u", 16), ("s", 16), ("u", 32), ("s", 32), ("u", 64), ("s", 64)):
        a = integers(f"{'i' if kind == 's' else 'u'}{bits // 8}", 1)
        got = execute(chip, f"shr.{kind}{bits} %y, %x0, %x1;", [a, n], bits)
        assert (got == wrap([int(x) >> int(s) for x, s in zip(a, n, strict=True)], bits)).all()
        got = execute(chip, f"shl.b{bits} %y, %x0, %x1;", [a, n], bits)
        assert (got == wrap([int(x) << int(s) for x, s in zip(a, n, strict=True)], bits)).all()


def test_funnel_shifts(chip):
    low, high, n = integers("u4", 0), integers("u4", 1), integers("u4", 2)
    both = [int(x) | int(y) << 32 for x, y in zip(low, high, strict=True)]
    for mode, limit in (("wrap", lambda s: s & 31), ("clamp", lambda s: min(s, 32))):
        left = execute(chip, f"shf.l.{mode}.b32 %y, %x0, %x1, %x2;", [low, high, n])
        right = execute(chip, f"shf.r.{mode}.b32 %y, %x0, %x1, %x2;", [low, high, n])
        assert (left == wrap([(v << limit(int(s))) >> 32 for v, s in zip(both, n, strict=True)], 32)).all()
        assert (right == wrap([v >> limit(int(s)) for v, s in zip(both, n, strict=True)], 32)).all()


@pytest.mark.parametrize("table", [0x00, 0xE8, 0x96, 0xCA, 0xF8, 0x1B, 0xFF])
def test_lop3(chip, table):
    a, b, c = (integers("u4", s) for s in range(3))
    got = execute(chip, f"lop3.b32 %y, %x0, %x1, %x2, {table};", [a, b, c])
    bit = lambda x, k: int(x) >> k & 1
    for lane in range(LANES):
        want = sum((table >> (4 * bit(a[lane], k) + 2 * bit(b[lane], k) + bit(c[lane], k)) & 1) << k for k in range(32))
        assert got[lane] == want


def test_prmt(chip):
    a, b, pick = (integers("u4", s) for s in range(3))
    got = execute(chip, "prmt.b32 %y, %x0, %x1, %x2;", [a, b, pick])
    for lane in range(LANES):
        source, want = struct.pack("<II", int(a[lane]), int(b[lane])), []
        for nibble in f"{int(pick[lane]) & 0xFFFF:04x}"[::-1]:
            byte = source[int(nibble, 16) & 7]
            want.append((0xFF if byte > 127 else 0) if int(nibble, 16) & 8 else byte)
        assert struct.pack("<I", int(got[lane])) == bytes(want)


def test_bit_fields(chip):
    a, b = integers("u4", 0), integers("u4", 1)
    start = np.array([0, 1, 4, 8, 16, 30, 31, 32] * 4, dtype="u4")
    length = np.repeat(np.array([0, 1, 8, 32], dtype="u4"), 8)
    unsigned = execute(chip, "bfe.u32 %y, %x0, %x1, %x2;", [a, start, length])
    arithmetic = execute(chip, "bfe.s32 %y, %x0, %x1, %x2;", [a, start, length])
    inserted = execute(chip, "bfi.b32 %y, %x0, %x1, %x2, %x3;", [a, b, start, length])
    for lane in range(LANES):
        x, s, n = int(a[lane]), int(start[lane]), int(length[lane])
        sign = 0 if n == 0 else x >> min(s + n - 1, 31) & 1
        bits = [x >> (s + k) & 1 if k < n and s + k < 32 else None for k in range(32)]
        assert unsigned[lane] == sum((bit or 0) << k for k, bit in enumerate(bits))
        assert arithmetic[lane] == sum((sign if bit is None else bit) << k for k, bit in enumerate(bits))
        mask = sum(1 << (s + k) for k in range(n) if s + k < 32)
        assert inserted[lane] == (int(b[lane]) & ~mask) | (x << s & mask)


def test_dp4a(chip):
    a, b, c = (integers("u4", s) for s in range(3))
    for ta, tb in (("s32", "s32"), ("u32", "u32"), ("u32", "s32")):
        got = execute(chip, f"dp4a.{ta}.{tb} %y, %x0, %x1, %x2;", [a, b, c])
        bytes_of = lambda v, t: struct.unpack("4b" if t == "s32" else "4B", struct.pack("<I", int(v)))
        want = [
            sum(p * q for p, q in zip(bytes_of(x, ta), bytes_of(y, tb), strict=True)) + int(z)
            for x, y, z in zip(a, b, c, strict=True)
        ]
        assert (got == wrap(want, 32)).all()


def same(got, want):
    """Equal as numbers, NaN as NaN, and zeros of the same sign."""
    got, want = np.asarray(got), np.asarray(want)
    nan = np.isnan(got) & np.isnan(want)
    return bool((nan | ((got == want) & (np.signbit(got) == np.signbit(want)))).all())


FLOAT = {
    "add": (2, lambda a, b: a + b),
    "sub": (2, lambda a, b: a - b),
    "mul": (2, lambda a, b: a * b),
    "neg": (1, lambda a: -a),
    "abs": (1, np.abs),
    "min": (2, np.fmin),
    "max": (2, np.fmax),
    "min.NaN": (2, np.minimum),
    "max.NaN": (2, np.maximum),
}


@pytest.mark.parametrize("op", FLOAT)
@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_floats(chip, op, kind):
    count, f = FLOAT[op]
    dtype = {"f32": "f4", "f16": "f2"}[kind]
    args = [reals(dtype, s) for s in range(count)]
    got = execute(chip, f"{op}.{kind} %y, {', '.join(f'%x{n}' for n in range(count))};", args, 8 * args[0].itemsize)
    with np.errstate(all="ignore"):
        want = f(*args)
        if op in ("min", "max", "min.NaN", "max.NaN"):  # NumPy leaves the sign of a zero open
            ours = np.where((args[0] == 0) & (args[1] == 0), 1, 0).astype(bool)
            zero = np.where(
                np.signbit(args[0]) & np.signbit(args[1]) if "max" in op else np.signbit(args[0]) | np.signbit(args[1]),
                -0.0,
                0.0,
            )
            want = np.where(ours, zero, want).astype(dtype)
    assert same(got.view(dtype), want)


def test_halves_in_pairs(chip):
    a, b, c = (reals("f2", s) for s in range(3))
    pair = lambda x: (np.roll(x, 1).view("u2").astype("u4") << 16) | x.view("u2")
    halves = lambda y: ((y & 0xFFFF).astype("u2").view("f2"), (y >> 16).astype("u2").view("f2"))
    for op, f in (("add", np.add), ("mul", np.multiply), ("sub", np.subtract)):
        low, high = halves(execute(chip, f"{op}.f16x2 %y, %x0, %x1;", [pair(a), pair(b)]))
        with np.errstate(all="ignore"):
            assert same(low, f(a, b)) and same(high, f(np.roll(a, 1), np.roll(b, 1)))
    low, high = halves(execute(chip, "fma.rn.f16x2 %y, %x0, %x1, %x2;", [pair(a), pair(b), pair(c)]))
    with np.errstate(all="ignore"):  # exact in long double, rounded once
        want = (a.astype("f16") * b.astype("f16") + c.astype("f16")).astype("f2")
    assert same(low, want) and same(high, np.roll(want, 1))


def bfloats(seed=0):
    return torch.from_numpy(reals("f4", seed)).bfloat16()


def test_bfloats(chip):
    a, b, c = (bfloats(s) for s in range(3))
    bits = lambda t: t.view(torch.int16).numpy().view("u2")
    for op, f in (("add", torch.add), ("mul", torch.mul), ("sub", torch.sub)):
        got = execute(chip, f"{op}.bf16 %y, %x0, %x1;", [bits(a), bits(b)], 16)
        assert torch.equal(torch.from_numpy(got.view("i2")).view(torch.bfloat16).nan_to_num(7), f(a, b).nan_to_num(7))
    got = execute(chip, "fma.rn.bf16 %y, %x0, %x1, %x2;", [bits(a), bits(b), bits(c)], 16)
    exact = a.double().numpy().astype("f16") * b.double().numpy() + c.double().numpy()  # long double
    # One rounding from long double: to float64 by cutting off to odd, then torch's rounding of the double.
    rounded = torch.from_numpy(exact.astype("f8"))
    inexact = rounded.numpy().astype("f16") != exact
    want = rounded.bfloat16()
    usable = torch.from_numpy(~inexact)
    ours = torch.from_numpy(got.view("i2")).view(torch.bfloat16)
    assert usable.sum() > 10 and torch.equal(ours[usable].nan_to_num(7), want[usable].nan_to_num(7))


def test_fma_rounds_once(chip):
    a, b, c = (reals("f4", s) for s in range(3))
    got = execute(chip, "fma.rn.f32 %y, %x0, %x1, %x2;", [a, b, c]).view("f4")
    with np.errstate(all="ignore"):
        want = (a.astype("f16") * b.astype("f16") + c.astype("f16")).astype("f4")
    assert same(got, want)
    one, eps = np.full(LANES, 1 + 2.0**-12, "f4"), np.full(LANES, -(1 + 2.0**-11), "f4")
    assert (execute(chip, "fma.rn.f32 %y, %x0, %x0, %x1;", [one, eps]).view("f4") == 2.0**-24).all()
    # In halves: 1 + 2^-10 squared is 1 + 2^-9 + 2^-20, just above a tie that 2^-11 makes, so it must round up.
    h, tie = np.full(LANES, 1 + 2.0**-10, "f2"), np.full(LANES, 2.0**-11, "f2")
    assert (execute(chip, "fma.rn.f16 %y, %x0, %x0, %x1;", [h, tie], 16).view("f2") == 1 + 3 * 2.0**-10).all()


def test_fma_cuts_once(chip):
    a, b, c = (reals("f4", s) for s in range(3))
    got = execute(chip, "fma.rz.f32 %y, %x0, %x1, %x2;", [a, b, c]).view("f4")
    with np.errstate(all="ignore"):
        exact = a.astype("f16") * b.astype("f16") + c.astype("f16")
        near = exact.astype("f4")
        want = np.where(np.abs(near.astype("f16")) > np.abs(exact), np.nextafter(near, np.float32(0)), near)
    assert same(got, want) and not same(got, near)


def test_flush_and_saturate(chip):
    small, x = np.full(LANES, 1e-39, "f4"), reals("f4", 1)
    assert (execute(chip, "add.ftz.f32 %y, %x0, %x0;", [small]) == 0).all()
    assert (execute(chip, "add.f32 %y, %x0, %x0;", [small]) != 0).all()
    got = execute(chip, "add.sat.f32 %y, %x0, 0f00000000;", [x]).view("f4")
    assert same(got, np.where(np.isnan(x), 0, np.clip(x, 0, 1) + 0.0).astype("f4"))


@pytest.mark.parametrize(
    "op, f",
    [
        ("ex2.approx.f32", np.exp2),
        ("lg2.approx.f32", np.log2),
        ("sqrt.rn.f32", np.sqrt),
        ("rcp.rn.f32", lambda x: 1 / x),
        ("rsqrt.approx.f32", lambda x: 1 / np.sqrt(x)),
        ("tanh.approx.f32", np.tanh),
        ("sin.approx.f32", np.sin),
        ("cos.approx.f32", np.cos),
    ],
)
def test_functions(chip, op, f):
    x = np.abs(reals("f4", 1)) if op[0] in "lsr" and op[1] != "i" else reals("f4", 1)
    x = np.where(np.abs(x) > 1e30, 3, x).astype("f4")
    with np.errstate(all="ignore"):
        want = f(x.astype("f8")).astype("f4")
    assert same(execute(chip, f"{op} %y, %x0;", [x]).view("f4"), want)
    chip.options(perturb=True)
    rough = execute(chip, f"{op} %y, %x0;", [x]).view("f4")
    chip.options()
    if "approx" in op:  # it errs, and by little
        finite = np.isfinite(want)
        assert not same(rough, want) and np.allclose(rough[finite], want[finite], rtol=3e-7, atol=0)


COMPARISON = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


@pytest.mark.parametrize("how", COMPARISON)
def test_comparisons(chip, how):
    f = COMPARISON[how]
    for kind, dtype in (("s32", "i4"), ("u32", "u4"), ("u16", "u2"), ("s64", "i8")):
        a, b = integers(dtype, 0), integers(dtype, 1)
        b[::3] = a[::3]
        got = execute(chip, f"setp.{how}.{kind} %p1, %x0, %x1; selp.u32 %y, 1, 0, %p1;", [a, b])
        assert (got == f(a, b)).all()
    a, b = reals("f4", 0), reals("f4", 1)
    b[::3] = a[::3]
    nan = np.isnan(a) | np.isnan(b)
    ordered = execute(chip, f"setp.{how}.f32 %p1, %x0, %x1; selp.u32 %y, 1, 0, %p1;", [a, b])
    unordered = execute(chip, f"setp.{how}u.f32 %p1, %x0, %x1; selp.u32 %y, 1, 0, %p1;", [a, b])
    assert (ordered == (f(a, b) & ~nan)).all() and (unordered == (f(a, b) | nan)).all()
    both = execute(
        chip,
        f"setp.gt.s32 %p3, %r1, 9; setp.{how}.and.f32 %p1|%p2, %x0, %x1, %p3; selp.u32 %r2, 1, 0, %p1; selp.u32 %r3, 2, 0, %p2; or.b32 %y, %r2, %r3;",
        [a, b],
    )
    lane, p = np.arange(LANES) > 9, f(a, b) & ~nan
    assert (both == (p & lane) + 2 * (~p & lane)).all()


def test_predicate_logic(chip):
    got = execute(
        chip,
        """setp.lt.u32 %p1, %r1, 9; and.b32 %r2, %r1, 1; setp.eq.u32 %p2, %r2, 1; mov.u32 %y, 0;
        and.pred %p3, %p1, %p2; @%p3 or.b32 %y, %y, 1; or.pred %p3, %p1, %p2; @%p3 or.b32 %y, %y, 2;
        xor.pred %p3, %p1, %p2; @%p3 or.b32 %y, %y, 4; not.pred %p3, %p1; @%p3 or.b32 %y, %y, 8; @!%p2 or.b32 %y, %y, 16;
        mov.pred %p4, 0; @%p4 or.b32 %y, %y, 32; mov.pred %p4, -1; @%p4 or.b32 %y, %y, 64;""",
        [],
    )
    for lane in range(LANES):
        p, q = lane < 9, lane % 2 == 1
        assert got[lane] == (p and q) + 2 * (p or q) + 4 * (p != q) + 8 * (not p) + 16 * (not q) + 64


def test_packing(chip):
    a, b = integers("u4", 0), integers("u4", 1)
    both = execute(chip, "mov.b64 %y, {%x0, %x1};", [a, b], 64)
    assert (both == (b.astype("u8") << 32 | a)).all()
    high = execute(chip, "mov.b32 {%h1, %h2}, %x0; mov.b32 %y, {%h2, %h1};", [a])
    assert (high == (a << 16 | a >> 16)).all()
    assert (execute(chip, "{ .reg .b16 low; mov.b32 {low, _}, %x0; cvt.u32.u16 %y, low; }", [a]) == a & 0xFFFF).all()


def test_conversions_between_integers(chip):
    a = integers("i4", 0)
    for kind, dtype in (("s8", "i1"), ("u8", "u1"), ("s16", "i2"), ("u16", "u2")):
        assert (execute(chip, f"cvt.s32.{kind} %y, %x0;", [a]).view("i4") == a.astype(dtype).astype("i4")).all()
        info = np.iinfo(dtype)
        assert (execute(chip, f"cvt.sat.{kind}.s32 %y, %x0;", [a]).view("i4") == np.clip(a, info.min, info.max)).all()
    assert (execute(chip, "cvt.s64.s32 %y, %x0;", [a], 64).view("i8") == a).all()
    assert (execute(chip, "cvt.u64.u32 %y, %x0;", [a], 64) == a.view("u4")).all()


def test_conversions_of_floats(chip):
    x = reals("f4", 0)
    with np.errstate(all="ignore"):
        assert same(execute(chip, "cvt.rn.f16.f32 %y, %x0;", [x], 16).view("f2"), x.astype("f2"))
        assert same(execute(chip, "cvt.f64.f32 %y, %x0;", [x], 64).view("f8"), x.astype("f8"))
        for mode, f in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
            whole = np.nan_to_num(f(x.astype("f8")), nan=0, posinf=2.0**40, neginf=-(2.0**40))
            got = execute(chip, f"cvt.{mode}.s32.f32 %y, %x0;", [x]).view("i4")
            assert (got == np.clip(whole, -(2**31), 2**31 - 1)).all()
            got = execute(chip, f"cvt.{mode}.u32.f32 %y, %x0;", [x])
            assert (got == np.clip(whole, 0, 2**32 - 1)).all()
            assert same(execute(chip, f"cvt.{mode}.f32.f32 %y, %x0;", [x]).view("f4"), f(x))
    rounded = torch.from_numpy(x).bfloat16()
    got = torch.from_numpy(execute(chip, "cvt.rn.bf16.f32 %y, %x0;", [x], 16).view("i2")).view(torch.bfloat16)
    assert torch.equal(got.nan_to_num(7), rounded.nan_to_num(7))
    pair = execute(chip, "cvt.rn.bf16x2.f32 %y, %x0, %x1;", [x, np.roll(x, 1)])  # the first source is the high half
    assert same((pair & 0xFFFF0000).view("f4"), rounded.float().numpy()) and same(
        (pair << 16).view("f4"), np.roll(rounded.float().numpy(), 1)
    )
    half = reals("f2", 3)
    assert same(execute(chip, "cvt.f32.f16 %y, %x0;", [half]).view("f4"), half.astype("f4"))
    for kind, dtype in (("s32", "i4"), ("u32", "u4"), ("s64", "i8"), ("u64", "u8")):
        n = integers(dtype, 2)
        assert same(execute(chip, f"cvt.rn.f32.{kind} %y, %x0;", [n]).view("f4"), n.astype("f4"))


def test_every_half_converts_both_ways(chip):
    h = np.arange(65536, dtype="u2")
    module = chip.load(
        sim.kernel(
            """ld.param.u64 %d1, [a]; ld.param.u64 %d2, [b]; mov.u32 %r1, %ctaid.x; mov.u32 %r2, %tid.x;
        mad.lo.u32 %r1, %r1, 256, %r2; mad.wide.u32 %d1, %r1, 2, %d1; mad.wide.u32 %d2, %r1, 4, %d2;
        ld.global.b16 %h1, [%d1]; cvt.f32.f16 %f1, %h1; st.global.f32 [%d2], %f1; cvt.rn.f16.f32 %h2, %f1; st.global.b16 [%d1], %h2; ret;""",
            "u64 a, u64 b",
        )
    )
    back, wide = h.copy(), np.zeros(65536, "f4")
    chip.allow(back), chip.allow(wide)
    chip.launch(module, "k", (256,), (256,), [back, wide])
    assert same(wide, h.view("f2").astype("f4")) and same(back.view("f2"), h.view("f2"))
