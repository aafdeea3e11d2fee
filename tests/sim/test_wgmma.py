"""wgmma against NumPy: every type, many widths, A from registers and from shared memory, every layout of a descriptor.

The images of shared memory are built from the layouts that the PTX manual draws, independently of the interpreter.
"""

import ctypes

import numpy as np
import pytest
import torch

import sim

KINDS = {"bf16": (torch.bfloat16, 2), "f16": (torch.float16, 2), "tf32": (torch.float32, 4)}
SWIZZLE = {0: 0, 128: 1, 64: 2, 32: 3}  # bytes of a row of the pattern: its code in a descriptor
START = 1024


def swizzled(address, width):
    """16-byte chunks of a row of ``width`` bytes change places by the number of the 128-byte line they are in."""
    return address ^ ((address // 128) % (width // 16) * 16) if width else address


def image(matrix, width, transposed, leading, stride, size):
    """The bytes of shared memory that hold ``matrix`` [rows, K] for a descriptor with these strides."""
    rows, k = matrix.shape
    memory, item = np.zeros(size, np.uint8), matrix.itemsize
    per = 16 // item
    for r in range(rows):
        for c in range(k):
            if transposed:  # contiguous along the rows of B's transpose
                u, within = divmod(r, per)
                if width:
                    atom = width // 16
                    at = u % atom * 16 + u // atom * leading + c % 8 * width + c // 8 * stride
                else:
                    at = u * stride + c % 8 * 16 + c // 8 * leading
            else:
                kk, within = divmod(c, per)
                at = r % 8 * (width or 16) + r // 8 * stride + kk * (16 if width else leading)
            at = swizzled(START + at, width) - START + within * item
            memory[at : at + item] = matrix[r : r + 1, c].view(np.uint8)
    return memory


def strides(rows, k, item, width, transposed):
    """Leading and stride offsets of a dense matrix."""
    if not transposed:
        return (rows * 16, 128) if not width else (16, 8 * width)
    blocks = rows * item // (width or 16)
    return (blocks * 128, 128) if not width else (k * width, 8 * width)


def descriptor(start, leading, stride, width):
    return start >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32 | SWIZZLE[width] << 62


def wgmma(
    chip,
    kind,
    sums,
    a,
    b,
    c,
    *,
    a_width=None,
    a_transposed=False,
    width=128,
    transposed=False,
    scale="%p1",
    signs=(1, 1),
):
    """D = C + A B for a [64, K], b [N, K], c [64, N]; ``a_width`` None: A from registers."""
    dtype, item = KINDS[kind]
    n, k = b.shape
    host = lambda t: (t.to(dtype).view(torch.int16) if item == 2 else t.float().view(torch.int32)).numpy()
    place = lambda m, w, t: (
        image(host(m), w, t, *strides(len(m), k, item, w, t), 32768),
        strides(len(m), k, item, w, t),
    )
    memory, (leading, stride) = place(b, width, transposed)
    b_desc, a_desc = descriptor(START, leading, stride, width), 0
    if a_width is not None:  # behind B, from a multiple of 1024 on, as the pattern wants it
        a_image, (leading, stride) = place(a, a_width, a_transposed)
        memory[16384:] = a_image[:16384]
        a_desc = descriptor(START + 16384, leading, stride, a_width)
    fragment = np.zeros((128, 4), "u4")
    per, raw = 4 // item, host(a)
    for t in range(128):
        w, g, q = t // 32, t % 32 // 4, t % 4
        for r in range(4):
            row, column = 16 * w + g + 8 * (r % 2), per * (q + 4 * (r // 2))
            fragment[t, r] = np.ascontiguousarray(raw[row, column : column + per]).view("u4")[0]
    half, count = sums == "f16", n // 4 if sums == "f16" else n // 2
    where = [
        [(16 * (t // 32) + t % 32 // 4 + 8 * (i // 2 % 2), i // 4 * 8 + 2 * (t % 4) + i % 2) for i in range(n // 2)]
        for t in range(128)
    ]
    rows, columns = np.array(where).transpose(2, 0, 1)
    cells = c.numpy()[rows, columns].astype("f2" if half else "f4")
    io = np.ascontiguousarray(cells).view("u4").reshape(128, count)
    names = ", ".join(f"%s{i}" for i in range(count))
    source = "{%a0, %a1, %a2, %a3}" if a_width is None else "%d10"
    flags = [int(transposed)] if a_width is None else [int(a_transposed), int(transposed)]
    flags = "".join(f", {f}" for f in flags) if kind != "tf32" else ""
    body = f""".reg .b32 %s<128>; .reg .b32 %a<4>; mov.u32 %r1, %tid.x; setp.eq.u32 %p1, 0, 0; setp.ne.u32 %p2, 0, 0;
        ld.param.u64 %d1, [m]; ld.param.u64 %d2, [io]; ld.param.u64 %d3, [f]; ld.param.u64 %d9, [bd]; ld.param.u64 %d10, [ad];
        shl.b32 %r2, %r1, 4;
        $fill: cvt.u64.u32 %d4, %r2; add.s64 %d5, %d1, %d4; ld.global.v4.u32 {{%r10, %r11, %r12, %r13}}, [%d5];
        mov.u32 %r3, smem; add.u32 %r3, %r3, %r2; st.shared.v4.u32 [%r3+{START}], {{%r10, %r11, %r12, %r13}};
        add.u32 %r2, %r2, 2048; setp.lt.u32 %p3, %r2, 32768; @%p3 bra $fill;
        mad.wide.u32 %d6, %r1, 16, %d3; ld.global.v4.u32 {{%a0, %a1, %a2, %a3}}, [%d6];
        mad.wide.u32 %d7, %r1, {4 * count}, %d2; {" ".join(f"ld.global.b32 %s{i}, [%d7+{4 * i}];" for i in range(count))}
        fence.proxy.async; bar.sync 0; wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n{n}k{k}.{sums}.{kind}.{kind} {{{names}}}, {source}, %d9, {scale}, {signs[0]}, {signs[1]}{flags};
        wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
        {" ".join(f"st.global.b32 [%d7+{4 * i}], %s{i};" for i in range(count))} ret;"""
    for array in (memory, io, fragment):
        chip.allow(array)
    module = chip.load(sim.kernel(body, "u64 m, u64 io, u64 f, u64 bd, u64 ad", shared=START + 32768))
    arguments = [memory, io, fragment, ctypes.c_uint64(b_desc), ctypes.c_uint64(a_desc)]
    report = chip.launch(module, "k", (1,), (128,), arguments)
    assert report["wgmma"] == 16  # four warps: fence, product, commit, wait
    out = torch.zeros(64, n)
    out[rows, columns] = torch.from_numpy(io.view("f2" if half else "f4").astype("f4").reshape(128, n // 2))
    return out


def operands(kind, n, seed=0):
    gen = torch.Generator().manual_seed(seed)
    dtype, item = KINDS[kind]
    k = 32 // item
    a, b = (torch.randn(s, k, generator=gen).to(dtype).float() for s in (64, n))
    if kind == "tf32":
        a, b = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (a, b))
    return a, b, torch.randn(64, n, generator=gen)


def close(got, want, sums="f32"):
    ulp = 2**-24 if sums == "f32" else 2**-11
    return (got.double() - want).abs().max() <= 2 * ulp * want.abs().max()


@pytest.mark.parametrize("n", [8, 16, 40, 136, 256])
@pytest.mark.parametrize("kind, sums", [("bf16", "f32"), ("f16", "f32"), ("f16", "f16"), ("tf32", "f32")])
def test_widths_and_types(chip, kind, sums, n):
    a, b, c = operands(kind, n)
    c = c.half().float() if sums == "f16" else c
    want = c.double() + a.double() @ b.double().T
    assert close(wgmma(chip, kind, sums, a, b, c), want, sums)


@pytest.mark.parametrize("width", SWIZZLE)
@pytest.mark.parametrize("transposed", [False, True])
def test_layouts(chip, width, transposed):
    """B in each layout beside A in each; every element of B is read from its place."""
    a, b, c = operands("bf16", 128, seed=width)
    want = c.double() + a.double() @ b.double().T
    for a_width in (None, *SWIZZLE):
        for a_transposed in (False, True) if a_width is not None else (False,):
            got = wgmma(
                chip,
                "bf16",
                "f32",
                a,
                b,
                c,
                a_width=a_width,
                a_transposed=a_transposed,
                width=width,
                transposed=transposed,
            )
            assert close(got, want), (a_width, a_transposed)
    if not transposed:
        a, b, c = operands("tf32", 32)
        assert close(
            wgmma(chip, "tf32", "f32", a, b, c, a_width=width, width=width), c.double() + a.double() @ b.double().T
        )


def test_scales_and_signs(chip):
    a, b, c = operands("bf16", 24)
    product = a.double() @ b.double().T
    assert close(wgmma(chip, "bf16", "f32", a, b, c, scale="%p2"), product)
    assert close(wgmma(chip, "bf16", "f32", a, b, c, scale="0"), product)
    assert close(wgmma(chip, "bf16", "f32", a, b, c, scale="1", signs=(-1, 1)), c.double() - product)
    assert close(wgmma(chip, "bf16", "f32", a, b, c, signs=(-1, -1)), c.double() + product)


def test_perturbed_sums(chip):
    a, b, c = operands("bf16", 64)
    exact = wgmma(chip, "bf16", "f32", a, b, c)
    chip.options(perturb=True)
    cut = wgmma(chip, "bf16", "f32", a, b, c)
    chip.options()
    assert (exact != cut).any() and (cut.abs() <= exact.abs()).all()
    assert ((exact.view(torch.int32) - cut.view(torch.int32)).abs() <= 1).all()


@pytest.mark.parametrize(
    "code",
    [
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1, %f2, %f3}, %d1, %d2, 1, 1, 1, 0, 0;",  # registers
        "wgmma.mma_async.sync.aligned.m64n12k16.f32.bf16.bf16 {%f1, %f2, %f3, %f4}, %d1, %d2, 1, 1, 1, 0, 0;",
        "wgmma.mma_async.sync.aligned.m64n8k32.s32.s8.s8 {%f1, %f2, %f3, %f4}, %d1, %d2, 1;",
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16.sparse {%f1, %f2, %f3, %f4}, %d1, %d2, 1, 1, 1, 0, 0;",
    ],
)
def test_shapes_that_do_not_exist_are_refused(chip, code):
    with pytest.raises(sim.Finding, match="unsupported"):
        chip.load(sim.kernel(code + " ret;", "u64 a"))
