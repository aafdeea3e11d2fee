"""Instructions by hand on 32 lanes of edge cases and random bits: the tests of single opcodes share these."""

import numpy as np

import sim

LANES = 32


def execute(chip, code, inputs, out_bits=32, outside=""):
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
    module = chip.load(sim.kernel(body, params, outside=outside))
    y = np.zeros(LANES, dtype=f"u{out_bits // 8}")
    for array in inputs:
        chip.allow(array, read_only=True)
    chip.allow(y)
    chip.launch(module, "k", (1,), (LANES,), [*inputs, y])
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
