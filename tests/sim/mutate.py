"""Breaks the PTX of a CUDA kernel, one instruction at a time, and sees whether the simulator or the reference notices.

    python tests/sim/mutate.py [--mutants 200] [--seed 1]     every kernel; lists the mutants that nothing caught

A mutant drops an instruction, changes an immediate, or swaps two registers of one kind; only instructions that the
unbroken kernel runs in these cases are touched. Each runs the operator through its unmodified launcher on a few shapes,
all checks on. It is caught by a finding, by a result or a number of sectors or bank passes that differs from the
unbroken kernel's, or by not being PTX any more. Survivors need a look: most compute the same in another way.
"""

import argparse
import collections
import contextlib
import functools
import random
import re
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

import sim  # noqa: E402


def quantize(dtype):
    for n, block_size in ((64 * 64, 64), (33 * 35, 32), (3 * 4096 + 77, 4096), (5, 32), (2 * 4096 + 134, 1024)):
        weight = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
        yield from torch.ops.peftops.nf4_quantize(weight, block_size)
        weight[n // 3], weight[n - 1] = float("inf"), float("nan")  # of their blocks no number is known
        packed, absmax = torch.ops.peftops.nf4_quantize(weight, block_size)
        yield from (packed, absmax.nan_to_num(nan=-1.0))


def weights(n, k, block_size, double_quant):
    gen = torch.Generator().manual_seed(n * k)
    packed = torch.randint(0, 256, ((n * k + 1) // 2,), generator=gen, dtype=torch.uint8)
    blocks = -(-n * k // block_size)
    if not double_quant:
        return packed, torch.rand(blocks, generator=gen), None, None, block_size
    code = torch.randint(0, 256, (blocks,), generator=gen, dtype=torch.uint8)
    return packed, code, torch.rand(-(-blocks // 256), generator=gen), torch.rand(1, generator=gen), block_size


def dequantize(dtype):
    # A block of threads does four times 2048 elements; the ragged end is in each of the four.
    ends = ((1, 501, 32, True), (1, 2501, 32, False), (1, 4502, 64, True), (1, 7003, 64, True), (1, 8194, 64, True))
    for n, k, block_size, double_quant in (
        (64, 160, 64, True),
        (33, 35, 32, False),
        (3, 4099, 4096, True),
        (1, 70001, 32, True),
        *ends,
    ):
        yield torch.ops.peftops.nf4_dequantize(*weights(n, k, block_size, double_quant), n, k, dtype)


def layer(m, n, k, r, gen):
    x, bias, u, lora_B = (torch.randn(*s, generator=gen) for s in ((m, k), (n,), (m, r), (n, r)))
    if r > 1:  # small parts of a number that is split show where the large ones cancel
        x[m // 2 :], bias[: n // 2] = 0, 0
        u[m // 2 :, 1] = u[m // 2 :, 0] * (1 + torch.rand(m - m // 2, generator=gen) / 4096)
        lora_B[: n // 2, 1] = -lora_B[: n // 2, 0]
        u[m // 2 : m // 2 + 3, 2:] = 0
    return x, bias, u, lora_B


def linear(dtype, shapes):
    for m, n, k, block_size, r, factor in shapes:
        gen = torch.Generator().manual_seed(m)
        x, bias, u, lora_B = layer(m, n, k, r, gen)
        bias, low_rank = (bias.to(factor), (u, lora_B.to(factor))) if r else (None, (None, None))
        yield torch.ops.peftops.nf4_linear(
            x.to(dtype), *weights(n, k, block_size, m % 2 == 1), n, k, bias, *low_rank, 0.5
        )


def linear_of_many(dtype, shapes):
    """On a GPU so small that the weight is not read again for every 32 rows."""
    sim.simulator().pretend(80, 1)
    try:
        yield from linear(dtype, shapes)
    finally:
        sim.simulator().pretend()


@contextlib.contextmanager
def operands_seen():
    """What torch multiplies meanwhile: a product rounds the small parts of its operands away."""
    seen, library = [], torch.library.Library("aten", "IMPL")

    def mm(left, right, *, out):
        seen.extend((left.clone(), right.clone()))
        return out.copy_(left.float() @ right.float())

    library.impl("mm.out", mm, "CPU", allow_override=True)
    try:
        yield seen
    finally:
        library._destroy()


def by_library(dtype, shapes):
    for m, n, k, block_size, r, factor in shapes:
        gen = torch.Generator().manual_seed(m)
        x, bias, u, lora_B = (torch.randn(*s, generator=gen) for s in ((m, k), (n,), (m, r), (n, r)))
        u[1, ::3] = lora_B[n - 1, ::3] = bias[n - 2] = float("inf")
        low_rank = (u, lora_B.to(factor)) if r else (None, None)
        x, off = x.to(dtype), int(r == 10)  # one that begins between vectors
        x = torch.cat([x.new_zeros(off), x.flatten()])[off:].view(m, k)
        arguments = (x, *weights(n, k, block_size, m % 2 == 1), n, k, bias.to(factor), *low_rank, 0.5)
        with sim.nf4_library("always"), operands_seen() as operands:
            torch.ops.peftops.nf4_linear(*arguments)
        yield from (t.nan_to_num(nan=0.5) for t in operands)


def group_quantize(bits, dtype):
    # Groups of a part of a warp and of several tiles; ends of a warp's tile; constant groups; narrower ranges.
    for n, k, group, symmetric, narrower in ((5, 416, 32, False, 0), (3, 72, 8, True, 2), (2, 2048, 1024, False, 9)):
        weight = torch.randn(n, k, generator=torch.Generator().manual_seed(k)).to(dtype)
        weight[0, :group], weight[-1, -group:], weight[1, 900 % k] = 2.5, 0, 40  # the last in a group's fourth tile
        yield from torch.ops.peftops.group_quantize(weight, bits, group, symmetric, narrower)


def group_weights(n, k, group, bits):
    gen = torch.Generator().manual_seed(n * k)
    packed = torch.randint(0, 256, (n, k // 8 * bits), generator=gen, dtype=torch.uint8)
    scales, zeros = (torch.randn(n, k // group, generator=gen) + shift for shift in (3, 8))
    return packed, scales, zeros, bits, group


def group_dequantize(bits, dtype):
    for n, k, group in ((9, 1016, 8), (3, 4096 + 256, 256), (1, 8, 8), (1, 16400, 16)):
        yield torch.ops.peftops.group_dequantize(*group_weights(n, k, group, bits), dtype)


def group_linear(dtype, bits, shapes):
    for m, n, k, group, r, factor in shapes:
        gen = torch.Generator().manual_seed(m)
        x, bias, u, lora_B = layer(m, n, k, r, gen)
        bias, low_rank = (bias.to(factor), (u, lora_B.to(factor))) if r else (None, (None, None))
        weight = group_weights(n, k, group, bits)
        yield torch.ops.peftops.group_linear(x.to(dtype), *weight, bias, *low_rank, 0.5, False)


def prompts(dtype, shapes, backward):
    for b, heads, kv_heads, s, tokens, d, dv, each in shapes:
        gen = torch.Generator().manual_seed(s)
        lead = (b,) if each else ()
        normal = functools.partial(torch.randn, generator=gen)
        out, query = normal(b, s, heads, dv).transpose(1, 2).to(dtype), normal(b, heads, s, d).to(dtype)
        prompt = query, normal(*lead, kv_heads, tokens, d), normal(*lead, kv_heads, tokens, dv), normal(heads), 0.3
        prompt[3][0] = 0
        if backward:
            yield from torch.ops.peftops.gated_prompt_backward(out, *prompt, True)
        else:
            yield torch.ops.peftops.gated_prompt_add(out, *prompt)


PROMPTS = (
    (2, 4, 2, 35, 10, 40, 33, False),
    (2, 2, 2, 3, 16, 16, 150, True),
    (1, 2, 2, 20, 1, 1, 1, False),
    (1, 2, 1, 40, 7, 33, 140, False),
)
LONG_PROMPTS = ((1, 2, 1, 33, 40, 20, 33, False), (2, 1, 1, 3, 19, 70, 9, True))


def tf32_parts(v):
    """The three that csrc/kernels/cuda/tf32.cuh makes of an fp32 number."""
    rounded = lambda t: ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    whole = rounded(v)
    return whole, rounded(v - whole), v - whole - rounded(v - whole)


def backward(dtype, shapes):
    for m, n, k, block_size, r, p in shapes:
        gen = torch.Generator().manual_seed(m)
        g, v, lora_A = (torch.randn(*s, generator=gen) for s in ((m, n), (m, r), (r, k)))
        if r >= 4:  # in half of the rows only products of small parts are left: all others cancel
            low = slice(m // 2, None)
            g[low], v[low] = 0, 0
            whole, rest, last = tf32_parts(normal := torch.randn(m - m // 2, generator=gen))
            v[low, :4] = torch.stack([normal, -whole, -rest, -last], 1)
            lora_A[1:4] = lora_A[0]
            lora_A[2:4, 1::2] = tf32_parts(lora_A[0])[0][1::2]
            for row in range(0, m // 2, 4):  # infinities in each place of a fragment, and no NaN in place of one
                v[row, row // 4 % 2 * 4 :][:1] = float("inf")
            if not p:
                lora_A[2, 3::16] = lora_A[-1, 4::16] = float("inf")
        v[:1, :1] = float("inf")
        low_rank = (v, lora_A.to(BF16 if p else FP32), p, torch.tensor(m)) if r else (None, None, 0.0, None)
        dx = torch.ops.peftops.nf4_linear_backward(g.to(dtype), *weights(n, k, block_size, m % 2 == 1), k, *low_rank)
        yield dx.nan_to_num(nan=0.5)


def shrink(dtype, shapes):
    for m, k, r, factor, by_rank, p in shapes:
        gen = torch.Generator().manual_seed(m)
        x, f = torch.randn(m, k, generator=gen).to(dtype), torch.randn(r, k, generator=gen).to(factor)
        x[:1, :1] = float("inf")
        f = f if by_rank else f.t().contiguous()
        yield torch.ops.peftops.lora_shrink(x, f, by_rank, 0.5, p, torch.tensor(m)).nan_to_num(nan=0.5)
    # An infinity in each place of a fragment of either operand, one in a row.
    for begin in (0, 2):
        for infinite in (0, 1):
            gen = torch.Generator().manual_seed(begin + infinite)
            operands = [torch.randn(16, 64, generator=gen).to(dtype), torch.randn(16, 64, generator=gen)]
            for row in range(16):
                operands[infinite][row, 16 * (row % 4) + (row // 4 + begin) % 4 + 4 * (row % 3)] = float("inf")
            yield torch.ops.peftops.lora_shrink(*operands, True, 0.5, 0.0, None).nan_to_num(nan=0.5)


def paged(dtype, shapes):
    for lengths, heads, kv_heads, rows, d, dv, size, window in shapes:
        gen = torch.Generator().manual_seed(rows)
        normal = functools.partial(torch.randn, generator=gen)
        each = [-(-length // size) for length in lengths]
        order, table = torch.randperm(sum(each), generator=gen).int(), torch.full((len(lengths), max(each)), -1).int()
        for s, count in enumerate(each):
            table[s, :count] = order[sum(each[:s]) :][:count]
        query = normal(len(lengths), rows, heads, d).transpose(1, 2).to(dtype)
        key, value = (normal(sum(each), kv_heads, size, n).to(dtype) for n in (d, dv))
        for s, count in enumerate(each):  # the largest score is one of the first tokens', or one of the last
            key[table[s, (count - 1) * (s % 2)]] *= 8
        lengths = torch.tensor(lengths).int()
        yield torch.ops.peftops.paged_attention(query, key, value, table, lengths, 0.3, window)


PAGED = (
    ([70, 3, 133], 3, 1, 30, 64, 64, 16, 2**62),
    ([130, 129], 2, 1, 1, 17, 33, 5, 70),
    ([540, 530], 2, 1, 9, 16, 64, 64, 60),  # windows over the end of a part
    ([540, 0, 560, 2], 2, 1, 3, 8, 64, 32, 90),
)

# The kernels, by a part of their mangled names, and the operator calls that reach them.
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
CASES = {
    "8quantizeI13__nv_bfloat16Lb1": functools.partial(quantize, BF16),
    "10dequantizeI13__nv_bfloat16Lb1": functools.partial(dequantize, BF16),
    "8few_rowsI13__nv_bfloat16Li2": functools.partial(
        linear,
        BF16,
        [
            (9, 33, 64 * 3, 64, 3, BF16),
            (15, 70, 64 * 66, 64, 5, FP32),
            (10, 8, 64, 64, 2, FP16),
            (12, 16, 64 * 9, 64, 0, None),
        ],
    ),
    "9many_rowsI6__halfLi1": functools.partial(
        linear_of_many,
        FP16,
        [(120, 250, 64 * 6, 64, 13, FP32), (64, 125, 64 * 2, 128, 0, None), (55, 100, 64 * 5, 64, 6, BF16)],
    ),
    "9many_backI13__nv_bfloat16Li64": functools.partial(
        backward,
        BF16,
        [(67, 104, 160, 64, 11, 0.3), (61, 72, 288, 32, 7, 0.0), (64, 40, 128, 64, 0, 0.0), (50, 8, 64, 1024, 8, 0.5)],
    ),
    "6shrinkI13__nv_bfloat16Li2": functools.partial(
        shrink,
        BF16,
        [
            (19, 600, 13, FP32, True, 0.3),
            (16, 1030, 5, BF16, True, 0.0),
            (3, 70, 16, FP16, False, 0.5),
            (33, 8, 1, FP32, True, 0.0),
        ],
    ),
    "8operandsI13__nv_bfloat16Lb1ENS0_9Nf4Source": functools.partial(
        by_library,
        BF16,
        [  # columns of the low-rank term and the bias, from none to nine a lane, and scales of scales, from one to two
            (9, 66, 192, 32, 130, BF16),
            (15, 11, 1848, 64, 90, FP32),
            (20, 8, 72, 32, 90, FP16),
            (4, 9, 320, 64, 10, FP32),
            (3, 5, 96, 64, 0, FP32),
        ],
    ),
    "8any_rowsIfE": functools.partial(
        linear,
        FP32,
        [(5, 70, 33, 32, 5, BF16), (66, 64, 96, 64, 17, FP32), (2, 3, 35, 64, 1, FP16), (4, 5, 7, 4096, 0, None)],
    ),
    "15quantize_groupsI13__nv_bfloat16Li3ELb1E": functools.partial(group_quantize, 3, BF16),
    "17dequantize_groupsIfLi3ELb1E": functools.partial(group_dequantize, 3, FP32),
    "10group_rowsI13__nv_bfloat16Li4ELi2E": functools.partial(
        group_linear, BF16, 4, [(9, 33, 192, 32, 3, BF16), (15, 34, 64 * 34, 16, 2, FP32), (12, 8, 128, 128, 0, None)]
    ),
    "10add_promptIfLi4E": functools.partial(prompts, FP32, PROMPTS, False),
    "16prompt_gradientsIfLi8E": functools.partial(prompts, FP32, LONG_PROMPTS, True),
    "14paged_by_lanesILi2E": functools.partial(paged, FP32, PAGED),
    "12paged_by_mmaI13__nv_bfloat16Li64E": functools.partial(paged, BF16, PAGED),
    "12gather_parts": functools.partial(paged, FP32, PAGED[3:]),
}

ENTRY = re.compile(r"\.entry\s+(\w+)\(")
REGISTER = re.compile(r"%(?:rd|rs|r|f|p|h)\d+")
COMMUTATIVE = re.compile(r"\b(add|mul|mad|fma|and|or|xor|min|max)\.")
NUMBER = re.compile(r"(?<=[ ,+])\d+(?=[;\],])")


def find_kernel(name):
    """(module, full name, text, where its body begins and ends)"""
    for module, text in enumerate(sim.simulator().texts()):
        for entry in ENTRY.finditer(text):
            if name in entry[1]:
                start = text.index("{", text.index(")", entry.end()))
                depth = 0
                for at in range(start, len(text)):
                    depth += (text[at] == "{") - (text[at] == "}")
                    if depth == 0:
                        return module, entry[1], text, start, at
    raise LookupError(f"no kernel {name}")


def mutants(body, count, seed, covered):
    rng = random.Random(seed)
    lines = body.split("\n")
    broken = [
        i
        for i, line in enumerate(lines)
        if covered(i) and re.match(r"\s*(@!?%p\d+ )?[a-z][\w.:]* .*;", line) and " ret" not in line
    ]
    while count:
        i = rng.choice(broken)
        old = lines[i]
        how = rng.choice(["drop", "number", "swap"])
        if how == "drop":
            new = ""
        elif how == "number":
            numbers = list(NUMBER.finditer(old))
            if not numbers:
                continue
            at = rng.choice(numbers)
            value = int(at[0]) + rng.choice([1, -1, 2, 8, 16])
            new = old[: at.start()] + str(max(value, 0) if value != int(at[0]) else 1) + old[at.end() :]
        else:
            found = list(REGISTER.finditer(old))
            a, b = sorted(rng.sample(found, 2), key=lambda r: r.start()) if len(found) > 1 else (None, None)
            if a is None or a[0] == b[0] or a[0].rstrip("0123456789") != b[0].rstrip("0123456789"):
                continue
            if COMMUTATIVE.search(old) and found[0] not in (a, b) and (len(found) == 3 or b != found[-1]):
                continue  # the same, provably
            new = old[: a.start()] + b[0] + old[a.end() : b.start()] + a[0] + old[b.end() :]
        if new != old:
            count -= 1
            yield i, old.strip(), new.strip(), "\n".join([*lines[:i], new, *lines[i + 1 :]])


def observe(f):
    """The results, and what they cost in sectors, passes over the banks and mma: test_budgets.py checks all three."""
    device = sim.simulator()
    device.forget()
    results = list(f())
    memory = ("global_read", "global_write", "shared_load", "shared_store")
    cost = [[report["mma"], *(list(report[kind].values()) for kind in memory)] for report in device.reports()]
    return results, cost


def judge(f, want):
    try:
        got = observe(f)
    except RuntimeError as error:
        return re.split(r"[:,]", str(error).split(": ", 1)[-1])[0].strip()
    if not all(torch.equal(a, b) for a, b in zip(got[0], want[0], strict=True)):
        return "wrong result"
    return "SURVIVED" if got[1] == want[1] else "wrong cost"


def run(name, count, seed):
    """What became of the mutants of a kernel: a counter of verdicts, and the survivors."""
    f = CASES[name]
    verdicts, survivors = collections.Counter(), []
    with sim.on_cpu_tensors(watchdog=3_000_000) as device:
        module, full_name, text, start, end = find_kernel(name)
        device.replace(module, text)  # afresh: lines that other tests ran are not covered by these cases
        want = observe(f)
        covered = [device.covered(module, full_name, line) for line in range(text.count("\n"))]
        try:
            for line, old, new, body in mutants(text[start:end], count, seed, covered.__getitem__):
                try:
                    device.replace(module, text[:start] + body + text[end:])
                    verdict = judge(f, want)
                except sim.Finding:
                    verdict = "not PTX"
                verdicts[verdict] += 1
                if verdict == "SURVIVED":
                    survivors.append((line, old, new))
        finally:
            device.replace(module, text)
    return verdicts, survivors


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if isinstance(sim.cuda_ops(), str):
        raise SystemExit(sim.cuda_ops())
    for name in CASES:
        verdicts, survivors = run(name, args.mutants, args.seed)
        print(f"\n{name}: {sum(verdicts.values()) - len(survivors)} of {sum(verdicts.values())} caught")
        for verdict, count in verdicts.most_common():
            print(f"  {count:4d} {verdict}")
        for line, old, new in survivors:
            print(f"  survivor, line {line}: {old}  ->  {new or '(dropped)'}")


if __name__ == "__main__":
    main()
