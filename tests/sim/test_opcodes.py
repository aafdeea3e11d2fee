"""Each instruction against a formula that is written here in NumPy or plain Python, independently of the interpreter.

The formulas follow the PTX ISA manual. Every case runs on 32 lanes of edge cases and random bits.
"""

import ctypes
import struct

import numpy as np
import pytest
import torch

import sim

LANES = 32
REGISTER = {16: "h", 32: "r", 64: "d"}


@pytest.fixture(scope="module")
def device():
    device = sim.simulator()
    if isinstance(device, str):
        pytest.skip(device)
    device.options()
    device.forbid_all()
    return device


def execute(device, code, inputs, out_bits=32, outside=""):
    """Runs ``code``, which reads %x0, %x1 .. (their width is that of each input) and writes %y; y as unsigned."""
    declare, load = [f".reg .b{out_bits} %y;"], []
    for n, values in enumerate(inputs):
        bits = values.dtype.itemsize * 8
        declare.append(f".reg .b{bits} %x{n};")
        load.append(
            f"ld.param.u64 %d1, [in{n}]; mad.wide.u32 %d2, %r1, {bits // 8}, %d1; ld.global.b{bits} %x{n}, [%d2];"
        )
    body = f"""{" ".join(declare)} mov.u32 %r1, %tid.x; {" ".join(load)}
        {code}
        ld.param.u64 %d1, [out]; mad.wide.u32 %d2, %r1, {out_bits // 8}, %d1; st.global.b{out_bits} [%d2], %y; ret;"""
    params = ", ".join([f"u64 in{n}" for n in range(len(inputs))] + ["u64 out"])
    module = device.load(sim.kernel(body, params, outside=outside))
    y = np.zeros(LANES, dtype=f"u{out_bits // 8}")
    for array in inputs:
        device.allow(array, read_only=True)
    device.allow(y)
    device.launch(module, "k", (1,), (LANES,), [*inputs, y])
    return y


def integers(dtype, seed=0):
    info, rng = np.iinfo(dtype), np.random.default_rng(seed)
    edges = [0, 1, 2, 3, info.max, info.max - 1, info.min, info.min + 1, info.max // 2, 7, 31, 32, 33, 63, 64, 255]
    random = rng.integers(info.min, info.max, LANES - len(edges), dtype=dtype, endpoint=True)
    wrapped = [e & (2 ** (8 * info.dtype.itemsize) - 1) for e in edges]
    return np.roll(np.concatenate([np.array(wrapped, info.dtype.str.replace("i", "u")).view(dtype), random]), seed * 5)


def reals(dtype, seed=0):
    rng = np.random.default_rng(seed)
    edges = [0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, np.inf, -np.inf, np.nan, 6e-8, 1e-40, 65504.0, 3e38, -2.0, 1 / 3]
    values = np.concatenate(
        [np.array(edges), rng.standard_normal(LANES - len(edges)) * 10.0 ** rng.integers(-4, 5, LANES - len(edges))]
    )
    with np.errstate(over="ignore", under="ignore"):
        return np.roll(values.astype(dtype), seed * 5)


def wrap(values, bits):
    return np.array([int(v) & ((1 << bits) - 1) for v in values], dtype=f"u{bits // 8}")


def signed(v, bits):
    v = int(v) & ((1 << bits) - 1)
    return v - (1 << bits) if v >> (bits - 1) else v


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
def test_integers(device, op):
    kind, bits = op.split(".")[-1][0], int(op.split(".")[-1][1:])
    dtype = f"{'i' if kind == 's' else 'u'}{bits // 8}"
    arrays = [integers(dtype, seed) for seed in range(3)]
    name = op.split(".")[0]
    count = 1 if name in ("neg", "abs", "not", "popc", "clz", "brev", "bfind") else 3 if name == "mad" else 2
    got = execute(device, f"{op} %y, {', '.join(f'%x{n}' for n in range(count))};", arrays, bits)
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
def test_wide_products(device, op):
    a, b = integers(WIDE[op], 0), integers(WIDE[op], 1)
    bits = 16 * a.dtype.itemsize
    c = integers(f"i{bits // 8}", 2)
    adds = op.startswith("mad")
    got = execute(device, f"{op} %y, %x0, %x1{', %x2' if adds else ''};", [a, b, c], bits)
    assert (
        got == wrap([int(x) * int(y) + (int(z) if adds else 0) for x, y, z in zip(a, b, c, strict=True)], bits)
    ).all()


def test_shifts(device):
    n = np.array([0, 1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 255] * 2, dtype="u4")
    for kind, bits in (("u", 16), ("s", 16), ("u", 32), ("s", 32), ("u", 64), ("s", 64)):
        a = integers(f"{'i' if kind == 's' else 'u'}{bits // 8}", 1)
        got = execute(device, f"shr.{kind}{bits} %y, %x0, %x1;", [a, n], bits)
        assert (got == wrap([int(x) >> int(s) for x, s in zip(a, n, strict=True)], bits)).all()
        got = execute(device, f"shl.b{bits} %y, %x0, %x1;", [a, n], bits)
        assert (got == wrap([int(x) << int(s) for x, s in zip(a, n, strict=True)], bits)).all()


def test_funnel_shifts(device):
    low, high, n = integers("u4", 0), integers("u4", 1), integers("u4", 2)
    both = [int(x) | int(y) << 32 for x, y in zip(low, high, strict=True)]
    for mode, limit in (("wrap", lambda s: s & 31), ("clamp", lambda s: min(s, 32))):
        left = execute(device, f"shf.l.{mode}.b32 %y, %x0, %x1, %x2;", [low, high, n])
        right = execute(device, f"shf.r.{mode}.b32 %y, %x0, %x1, %x2;", [low, high, n])
        assert (left == wrap([(v << limit(int(s))) >> 32 for v, s in zip(both, n, strict=True)], 32)).all()
        assert (right == wrap([v >> limit(int(s)) for v, s in zip(both, n, strict=True)], 32)).all()


@pytest.mark.parametrize("table", [0x00, 0xE8, 0x96, 0xCA, 0xF8, 0x1B, 0xFF])
def test_lop3(device, table):
    a, b, c = (integers("u4", s) for s in range(3))
    got = execute(device, f"lop3.b32 %y, %x0, %x1, %x2, {table};", [a, b, c])
    bit = lambda x, k: int(x) >> k & 1
    for lane in range(LANES):
        want = sum((table >> (4 * bit(a[lane], k) + 2 * bit(b[lane], k) + bit(c[lane], k)) & 1) << k for k in range(32))
        assert got[lane] == want


def test_prmt(device):
    a, b, pick = (integers("u4", s) for s in range(3))
    got = execute(device, "prmt.b32 %y, %x0, %x1, %x2;", [a, b, pick])
    for lane in range(LANES):
        source, want = struct.pack("<II", int(a[lane]), int(b[lane])), []
        for nibble in f"{int(pick[lane]) & 0xFFFF:04x}"[::-1]:
            byte = source[int(nibble, 16) & 7]
            want.append((0xFF if byte > 127 else 0) if int(nibble, 16) & 8 else byte)
        assert struct.pack("<I", int(got[lane])) == bytes(want)


def test_bit_fields(device):
    a, b = integers("u4", 0), integers("u4", 1)
    start = np.array([0, 1, 4, 8, 16, 30, 31, 32] * 4, dtype="u4")
    length = np.repeat(np.array([0, 1, 8, 32], dtype="u4"), 8)
    unsigned = execute(device, "bfe.u32 %y, %x0, %x1, %x2;", [a, start, length])
    arithmetic = execute(device, "bfe.s32 %y, %x0, %x1, %x2;", [a, start, length])
    inserted = execute(device, "bfi.b32 %y, %x0, %x1, %x2, %x3;", [a, b, start, length])
    for lane in range(LANES):
        x, s, n = int(a[lane]), int(start[lane]), int(length[lane])
        sign = 0 if n == 0 else x >> min(s + n - 1, 31) & 1
        bits = [x >> (s + k) & 1 if k < n and s + k < 32 else None for k in range(32)]
        assert unsigned[lane] == sum((bit or 0) << k for k, bit in enumerate(bits))
        assert arithmetic[lane] == sum((sign if bit is None else bit) << k for k, bit in enumerate(bits))
        mask = sum(1 << (s + k) for k in range(n) if s + k < 32)
        assert inserted[lane] == (int(b[lane]) & ~mask) | (x << s & mask)


def test_dp4a(device):
    a, b, c = (integers("u4", s) for s in range(3))
    for ta, tb in (("s32", "s32"), ("u32", "u32"), ("u32", "s32")):
        got = execute(device, f"dp4a.{ta}.{tb} %y, %x0, %x1, %x2;", [a, b, c])
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
def test_floats(device, op, kind):
    count, f = FLOAT[op]
    dtype = {"f32": "f4", "f16": "f2"}[kind]
    args = [reals(dtype, s) for s in range(count)]
    got = execute(device, f"{op}.{kind} %y, {', '.join(f'%x{n}' for n in range(count))};", args, 8 * args[0].itemsize)
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


def test_halves_in_pairs(device):
    a, b, c = (reals("f2", s) for s in range(3))
    pair = lambda x: (np.roll(x, 1).view("u2").astype("u4") << 16) | x.view("u2")
    halves = lambda y: ((y & 0xFFFF).astype("u2").view("f2"), (y >> 16).astype("u2").view("f2"))
    for op, f in (("add", np.add), ("mul", np.multiply), ("sub", np.subtract)):
        low, high = halves(execute(device, f"{op}.f16x2 %y, %x0, %x1;", [pair(a), pair(b)]))
        with np.errstate(all="ignore"):
            assert same(low, f(a, b)) and same(high, f(np.roll(a, 1), np.roll(b, 1)))
    low, high = halves(execute(device, "fma.rn.f16x2 %y, %x0, %x1, %x2;", [pair(a), pair(b), pair(c)]))
    with np.errstate(all="ignore"):  # exact in long double, rounded once
        want = (a.astype("f16") * b.astype("f16") + c.astype("f16")).astype("f2")
    assert same(low, want) and same(high, np.roll(want, 1))


def bfloats(seed=0):
    return torch.from_numpy(reals("f4", seed)).bfloat16()


def test_bfloats(device):
    a, b, c = (bfloats(s) for s in range(3))
    bits = lambda t: t.view(torch.int16).numpy().view("u2")
    for op, f in (("add", torch.add), ("mul", torch.mul), ("sub", torch.sub)):
        got = execute(device, f"{op}.bf16 %y, %x0, %x1;", [bits(a), bits(b)], 16)
        assert torch.equal(torch.from_numpy(got.view("i2")).view(torch.bfloat16).nan_to_num(7), f(a, b).nan_to_num(7))
    got = execute(device, "fma.rn.bf16 %y, %x0, %x1, %x2;", [bits(a), bits(b), bits(c)], 16)
    exact = a.double().numpy().astype("f16") * b.double().numpy() + c.double().numpy()  # long double
    # One rounding from long double: to float64 by cutting off to odd, then torch's rounding of the double.
    rounded = torch.from_numpy(exact.astype("f8"))
    inexact = rounded.numpy().astype("f16") != exact
    want = rounded.bfloat16()
    usable = torch.from_numpy(~inexact)
    ours = torch.from_numpy(got.view("i2")).view(torch.bfloat16)
    assert usable.sum() > 10 and torch.equal(ours[usable].nan_to_num(7), want[usable].nan_to_num(7))


def test_fma_rounds_once(device):
    a, b, c = (reals("f4", s) for s in range(3))
    got = execute(device, "fma.rn.f32 %y, %x0, %x1, %x2;", [a, b, c]).view("f4")
    with np.errstate(all="ignore"):
        want = (a.astype("f16") * b.astype("f16") + c.astype("f16")).astype("f4")
    assert same(got, want)
    one, eps = np.full(LANES, 1 + 2.0**-12, "f4"), np.full(LANES, -(1 + 2.0**-11), "f4")
    assert (execute(device, "fma.rn.f32 %y, %x0, %x0, %x1;", [one, eps]).view("f4") == 2.0**-24).all()
    # In halves: 1 + 2^-10 squared is 1 + 2^-9 + 2^-20, just above a tie that 2^-11 makes, so it must round up.
    h, tie = np.full(LANES, 1 + 2.0**-10, "f2"), np.full(LANES, 2.0**-11, "f2")
    assert (execute(device, "fma.rn.f16 %y, %x0, %x0, %x1;", [h, tie], 16).view("f2") == 1 + 3 * 2.0**-10).all()


def test_fma_cuts_once(device):
    a, b, c = (reals("f4", s) for s in range(3))
    got = execute(device, "fma.rz.f32 %y, %x0, %x1, %x2;", [a, b, c]).view("f4")
    with np.errstate(all="ignore"):
        exact = a.astype("f16") * b.astype("f16") + c.astype("f16")
        near = exact.astype("f4")
        want = np.where(np.abs(near.astype("f16")) > np.abs(exact), np.nextafter(near, np.float32(0)), near)
    assert same(got, want) and not same(got, near)


def test_flush_and_saturate(device):
    small, x = np.full(LANES, 1e-39, "f4"), reals("f4", 1)
    assert (execute(device, "add.ftz.f32 %y, %x0, %x0;", [small]) == 0).all()
    assert (execute(device, "add.f32 %y, %x0, %x0;", [small]) != 0).all()
    got = execute(device, "add.sat.f32 %y, %x0, 0f00000000;", [x]).view("f4")
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
def test_functions(device, op, f):
    x = np.abs(reals("f4", 1)) if op[0] in "lsr" and op[1] != "i" else reals("f4", 1)
    x = np.where(np.abs(x) > 1e30, 3, x).astype("f4")
    with np.errstate(all="ignore"):
        want = f(x.astype("f8")).astype("f4")
    assert same(execute(device, f"{op} %y, %x0;", [x]).view("f4"), want)
    device.options(perturb=True)
    rough = execute(device, f"{op} %y, %x0;", [x]).view("f4")
    device.options()
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
def test_comparisons(device, how):
    f = COMPARISON[how]
    for kind, dtype in (("s32", "i4"), ("u32", "u4"), ("u16", "u2"), ("s64", "i8")):
        a, b = integers(dtype, 0), integers(dtype, 1)
        b[::3] = a[::3]
        got = execute(device, f"setp.{how}.{kind} %p1, %x0, %x1; selp.u32 %y, 1, 0, %p1;", [a, b])
        assert (got == f(a, b)).all()
    a, b = reals("f4", 0), reals("f4", 1)
    b[::3] = a[::3]
    nan = np.isnan(a) | np.isnan(b)
    ordered = execute(device, f"setp.{how}.f32 %p1, %x0, %x1; selp.u32 %y, 1, 0, %p1;", [a, b])
    unordered = execute(device, f"setp.{how}u.f32 %p1, %x0, %x1; selp.u32 %y, 1, 0, %p1;", [a, b])
    assert (ordered == (f(a, b) & ~nan)).all() and (unordered == (f(a, b) | nan)).all()
    both = execute(
        device,
        f"setp.gt.s32 %p3, %r1, 9; setp.{how}.and.f32 %p1|%p2, %x0, %x1, %p3; selp.u32 %r2, 1, 0, %p1; selp.u32 %r3, 2, 0, %p2; or.b32 %y, %r2, %r3;",
        [a, b],
    )
    lane, p = np.arange(LANES) > 9, f(a, b) & ~nan
    assert (both == (p & lane) + 2 * (~p & lane)).all()


def test_predicate_logic(device):
    got = execute(
        device,
        """setp.lt.u32 %p1, %r1, 9; and.b32 %r2, %r1, 1; setp.eq.u32 %p2, %r2, 1; mov.u32 %y, 0;
        and.pred %p3, %p1, %p2; @%p3 or.b32 %y, %y, 1; or.pred %p3, %p1, %p2; @%p3 or.b32 %y, %y, 2;
        xor.pred %p3, %p1, %p2; @%p3 or.b32 %y, %y, 4; not.pred %p3, %p1; @%p3 or.b32 %y, %y, 8; @!%p2 or.b32 %y, %y, 16;
        mov.pred %p4, 0; @%p4 or.b32 %y, %y, 32; mov.pred %p4, -1; @%p4 or.b32 %y, %y, 64;""",
        [],
    )
    for lane in range(LANES):
        p, q = lane < 9, lane % 2 == 1
        assert got[lane] == (p and q) + 2 * (p or q) + 4 * (p != q) + 8 * (not p) + 16 * (not q) + 64


def test_packing(device):
    a, b = integers("u4", 0), integers("u4", 1)
    both = execute(device, "mov.b64 %y, {%x0, %x1};", [a, b], 64)
    assert (both == (b.astype("u8") << 32 | a)).all()
    high = execute(device, "mov.b32 {%h1, %h2}, %x0; mov.b32 %y, {%h2, %h1};", [a])
    assert (high == (a << 16 | a >> 16)).all()
    assert (execute(device, "{ .reg .b16 low; mov.b32 {low, _}, %x0; cvt.u32.u16 %y, low; }", [a]) == a & 0xFFFF).all()


def test_conversions_between_integers(device):
    a = integers("i4", 0)
    for kind, dtype in (("s8", "i1"), ("u8", "u1"), ("s16", "i2"), ("u16", "u2")):
        assert (execute(device, f"cvt.s32.{kind} %y, %x0;", [a]).view("i4") == a.astype(dtype).astype("i4")).all()
        info = np.iinfo(dtype)
        assert (execute(device, f"cvt.sat.{kind}.s32 %y, %x0;", [a]).view("i4") == np.clip(a, info.min, info.max)).all()
    assert (execute(device, "cvt.s64.s32 %y, %x0;", [a], 64).view("i8") == a).all()
    assert (execute(device, "cvt.u64.u32 %y, %x0;", [a], 64) == a.view("u4")).all()


def test_conversions_of_floats(device):
    x = reals("f4", 0)
    with np.errstate(all="ignore"):
        assert same(execute(device, "cvt.rn.f16.f32 %y, %x0;", [x], 16).view("f2"), x.astype("f2"))
        assert same(execute(device, "cvt.f64.f32 %y, %x0;", [x], 64).view("f8"), x.astype("f8"))
        for mode, f in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
            whole = np.nan_to_num(f(x.astype("f8")), nan=0, posinf=2.0**40, neginf=-(2.0**40))
            got = execute(device, f"cvt.{mode}.s32.f32 %y, %x0;", [x]).view("i4")
            assert (got == np.clip(whole, -(2**31), 2**31 - 1)).all()
            got = execute(device, f"cvt.{mode}.u32.f32 %y, %x0;", [x])
            assert (got == np.clip(whole, 0, 2**32 - 1)).all()
            assert same(execute(device, f"cvt.{mode}.f32.f32 %y, %x0;", [x]).view("f4"), f(x))
    rounded = torch.from_numpy(x).bfloat16()
    got = torch.from_numpy(execute(device, "cvt.rn.bf16.f32 %y, %x0;", [x], 16).view("i2")).view(torch.bfloat16)
    assert torch.equal(got.nan_to_num(7), rounded.nan_to_num(7))
    pair = execute(device, "cvt.rn.bf16x2.f32 %y, %x0, %x1;", [x, np.roll(x, 1)])  # the first source is the high half
    assert same((pair & 0xFFFF0000).view("f4"), rounded.float().numpy()) and same(
        (pair << 16).view("f4"), np.roll(rounded.float().numpy(), 1)
    )
    half = reals("f2", 3)
    assert same(execute(device, "cvt.f32.f16 %y, %x0;", [half]).view("f4"), half.astype("f4"))
    for kind, dtype in (("s32", "i4"), ("u32", "u4"), ("s64", "i8"), ("u64", "u8")):
        n = integers(dtype, 2)
        assert same(execute(device, f"cvt.rn.f32.{kind} %y, %x0;", [n]).view("f4"), n.astype("f4"))


def test_every_half_converts_both_ways(device):
    h = np.arange(65536, dtype="u2")
    module = device.load(
        sim.kernel(
            """ld.param.u64 %d1, [a]; ld.param.u64 %d2, [b]; mov.u32 %r1, %ctaid.x; mov.u32 %r2, %tid.x;
        mad.lo.u32 %r1, %r1, 256, %r2; mad.wide.u32 %d1, %r1, 2, %d1; mad.wide.u32 %d2, %r1, 4, %d2;
        ld.global.b16 %h1, [%d1]; cvt.f32.f16 %f1, %h1; st.global.f32 [%d2], %f1; cvt.rn.f16.f32 %h2, %f1; st.global.b16 [%d1], %h2; ret;""",
            "u64 a, u64 b",
        )
    )
    back, wide = h.copy(), np.zeros(65536, "f4")
    device.allow(back), device.allow(wide)
    device.launch(module, "k", (256,), (256,), [back, wide])
    assert same(wide, h.view("f2").astype("f4")) and same(back.view("f2"), h.view("f2"))


def test_loads_extend_signs(device):
    a = integers("i4", 1)
    for kind, dtype in (("s8", "i1"), ("u8", "u1"), ("s16", "i2"), ("u16", "u2")):
        got = execute(
            device, f"ld.param.u64 %d3, [in0]; mad.wide.u32 %d3, %r1, 4, %d3; ld.global.{kind} %y, [%d3];", [a]
        )
        assert (got.view("i4") == a.astype(dtype)).all()


def test_constants(device):
    table = ".const .align 4 .f32 table[4] = {0f3F800000, 0f40000000, 0fC0400000, 0f40800000};"
    device.forget()
    got = execute(
        device,
        "and.b32 %r2, %r1, 3; mul.wide.u32 %d3, %r2, 4; mov.u64 %d4, table; add.s64 %d3, %d3, %d4; ld.const.f32 %y, [%d3];",
        [],
        outside=table,
    )
    assert (got.view("f4") == np.array([1, 2, -3, 4], "f4")[np.arange(LANES) % 4]).all()
    assert device.reports()[-1]["constant_replays"] == 3  # four addresses, one after the other


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
def test_shuffles(device, mode, step, c):
    a = integers("u4", 3)
    got = execute(device, f"shfl.sync.{mode}.b32 %y, %x0, {step}, {c}, -1;", [a])
    assert (got == shuffled(mode, a, step, c & 31, c >> 8)).all()


def test_votes_and_reductions(device):
    a = integers("i4", 1)
    positive = sum(1 << lane for lane in range(LANES) if a[lane] > 0)
    assert (execute(device, "setp.gt.s32 %p1, %x0, 0; vote.sync.ballot.b32 %y, %p1, -1;", [a]) == positive).all()
    for how, want in (("all", False), ("any", True), ("uni", False)):
        got = execute(
            device, f"setp.gt.s32 %p1, %x0, 0; vote.sync.{how}.pred %p2, %p1, -1; selp.u32 %y, 1, 0, %p2;", [a]
        )
        assert (got == want).all()
    b = (a % 3).astype("i4")
    same_value = [sum(1 << k for k in range(LANES) if b[k] == b[lane]) for lane in range(LANES)]
    assert (execute(device, "match.any.sync.b32 %y, %x0, -1;", [b]) == np.array(same_value)).all()
    for how, f in (("add", lambda v: sum(map(int, v))), ("min", min), ("max", max)):
        assert (execute(device, f"redux.sync.{how}.s32 %y, %x0, -1;", [a]) == wrap([f(a)], 32)[0]).all()
    for how, f in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
        assert (execute(device, f"redux.sync.{how}.b32 %y, %x0, -1;", [a.view("u4")]) == f.reduce(a.view("u4"))).all()
    assert (
        execute(device, "setp.lt.u32 %p1, %r1, 5; @%p1 activemask.b32 %y; @!%p1 mov.u32 %y, 0;", [])[:5] == 31
    ).all()


def test_divergence_and_switch_tables(device):
    loop = execute(
        device,
        """mov.u32 %y, 0; mov.u32 %r2, 0; $again: setp.ge.u32 %p1, %r2, %r1; @%p1 bra $done;
        add.u32 %y, %y, %r2; add.u32 %r2, %r2, 1; bra.uni $again; $done:""",
        [],
    )
    assert (loop == [lane * (lane - 1) // 2 for lane in range(LANES)]).all()
    table = execute(
        device,
        """and.b32 %r2, %r1, 3; mov.u32 %y, 99; $table: .branchtargets $zero, $one, $two, $three; brx.idx %r2, $table;
        $zero: mov.u32 %y, 10; bra.uni $end; $one: mov.u32 %y, 11; bra.uni $end; $two: mov.u32 %y, 12; bra.uni $end;
        $three: mov.u32 %y, 13; $end:""",
        [],
    )
    assert (table == 10 + np.arange(LANES) % 4).all()


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix(device, trans):
    a = np.arange(256, dtype="u2")
    body = f"""ld.param.u64 %d1, [a]; ld.param.u64 %d2, [o]; mov.u32 %r1, %tid.x; mad.wide.u32 %d1, %r1, 16, %d1;
      mad.wide.u32 %d2, %r1, 16, %d2; ld.global.v4.u32 {{%r2, %r3, %r4, %r5}}, [%d1]; mov.u32 %r6, smem; mad.lo.u32 %r7, %r1, 16, %r6;
      st.shared.v4.u32 [%r7], {{%r2, %r3, %r4, %r5}}; bar.warp.sync 0xffffffff;
      ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r2, %r3, %r4, %r5}}, [%r7]; st.global.v4.u32 [%d2], {{%r2, %r3, %r4, %r5}}; ret;"""
    out = np.zeros((LANES, 4, 2), "u2")
    device.allow(a), device.allow(out)
    device.launch(device.load(sim.kernel(body, "u64 a, u64 o", shared=512)), "k", (1,), (LANES,), [a, out])
    matrices = a.reshape(4, 8, 8)
    for lane in range(LANES):
        for q in range(4):
            for e in range(2):  # the fragment table of the PTX ISA
                row, col = lane // 4, 2 * (lane % 4) + e
                assert out[lane, q, e] == (matrices[q, col, row] if trans else matrices[q, row, col])


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("k", [8, 16])
@pytest.mark.parametrize("sums", ["f32", "f16"])
def test_mma(device, kind, k, sums):
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
        device.allow(array)
    report = device.launch(device.load(sim.kernel(body, "u64 a, u64 b, u64 c")), "k", (1,), (LANES,), [fa, fb, fc])
    want = a.double() @ b.double() + c.double()
    for lane in range(LANES):
        for i in range(4):
            assert abs(float(fc[lane, i]) - float(want[place(lane, i)])) <= (1e-6 if sums == "f32" else 5e-3)
    assert report["mma"] == 1


def test_mma_of_tf32(device):
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
        device.allow(array)
    report = device.launch(device.load(sim.kernel(body, "u64 a, u64 b, u64 c")), "k", (1,), (LANES,), [fa, fb, fc])
    cut = lambda t: (t.view(torch.int32) & ~0x1FFF).view(torch.float32).double()
    want = cut(a) @ cut(b) + c.double()
    got = torch.tensor([[float(v) for v in row] for row in fc])
    assert all(
        abs(got[lane, i] - want[g + i // 2 * 8, 2 * t + i % 2]) < 1e-6
        for lane, (g, t) in enumerate(lanes)
        for i in range(4)
    )
    assert report["mma"] == 1


def test_cp_async(device):
    source = np.concatenate([integers("u4", s) for s in range(4)])
    got = execute(
        device,
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
def test_atomics(device, op):
    values = integers("i4" if ".s" in op else "u4", 2)
    cell = np.zeros(1, values.dtype) + values[5]
    body = f"""ld.param.u64 %d1, [a]; ld.param.u64 %d2, [o]; mov.u32 %r1, %tid.x; mad.wide.u32 %d1, %r1, 4, %d1;
        ld.global.u32 %r2, [%d1]; red.global.{op} [%d2], %r2; ret;"""
    first = cell.copy()
    device.allow(values), device.allow(cell)
    device.launch(device.load(sim.kernel(body, "u64 a, u64 o")), "k", (1,), (LANES,), [values, cell])
    assert int(cell[0]) & 0xFFFFFFFF == int(ATOMIC[op]([int(v) for v in [*values, *first]])) & 0xFFFFFFFF


def test_float_atomics_and_cas(device):
    cell, old = np.array([1.0], "f4"), np.zeros(LANES, "u4")
    body = """ld.param.u64 %d1, [a]; ld.param.u64 %d2, [o]; mov.u32 %r1, %tid.x; mad.wide.u32 %d2, %r1, 4, %d2;
        red.global.add.f32 [%d1], 0f3F000000; add.u32 %r3, %r1, 1; atom.global.cas.b32 %r2, [%d1+4], %r1, %r3; st.global.u32 [%d2], %r2; ret;"""
    pair = np.array([1.0, 0.0], "f4")
    device.allow(pair), device.allow(old)
    device.launch(device.load(sim.kernel(body, "u64 a, u64 o")), "k", (1,), (LANES,), [pair, old])
    assert pair[0] == 17 and pair.view("u4")[1] == LANES and (old == np.arange(LANES)).all() and cell[0] == 1


def test_barrier_reductions(device):
    out = np.zeros((64, 3), "u4")
    body = """ld.param.u64 %d1, [o]; mov.u32 %r1, %tid.x; mad.wide.u32 %d1, %r1, 12, %d1; setp.lt.u32 %p1, %r1, 40;
        barrier.red.popc.u32 %r2, 0, %p1; barrier.red.and.pred %p2, 0, %p1; barrier.red.or.pred %p3, 0, %p1;
        selp.u32 %r3, 1, 0, %p2; selp.u32 %r4, 1, 0, %p3;
        st.global.u32 [%d1], %r2; st.global.u32 [%d1+4], %r3; st.global.u32 [%d1+8], %r4; ret;"""
    device.allow(out)
    device.launch(device.load(sim.kernel(body, "u64 o")), "k", (1,), (64,), [out])
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
def test_what_is_not_known_is_refused(device, code):
    with pytest.raises(sim.Finding, match="unsupported|unknown"):
        device.launch(device.load(sim.kernel(code + " ret;", "u64 a")), "k", (1,), (32,), [ctypes.c_uint64(0)])
