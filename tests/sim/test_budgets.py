"""What each CUDA kernel may cost, counted by the simulator: sectors of global memory, passes over the banks of shared
memory, tensor-core instructions. The numbers are exact, so a budget that fails is a change of the kernel."""

import re

import pytest
import torch

import peftops
import reference
import sim
from numerics import assert_exact, assert_sums, code_error

SECTOR = 32
TABLES = 4 * (16 + 256) // SECTOR + 2  # of NF4's codes and absmax codes, which are read where they lie


@pytest.fixture(params=[0, 1, 2], ids="seed{}".format)
def device(request):
    """The simulator under three schedules."""
    if isinstance(sim.cuda_ops(), str):
        pytest.skip(sim.cuda_ops())
    with sim.on_cpu_tensors(seed=request.param) as device:
        yield device


def launches(device, f):
    device.forget()
    result = f()
    assert device.lib.sim_last_stream() == sim.STREAM  # every launcher passes the current stream on
    reports = device.reports()
    for report in reports:  # a table that lanes look things up in is no constant memory's
        assert report["constant_replays"] == 0, report["kernel"]
    return result, reports


def within(counter, key, factor, of="ideal"):
    assert counter[key] <= factor * counter[of], counter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_quantize(device, dtype):
    weight = torch.randn(128, 512, dtype=dtype)
    packed, (report,) = launches(device, lambda: peftops.nf4_quantize(weight, double_quant=False).packed)
    read, written = report["global_read"], report["global_write"]
    bins, blocks = 32, weight.nbytes // (4 * 256 * 16)  # of threads, which have four packs each
    table = bins * 8 // SECTOR
    assert read["unique"] == weight.nbytes // SECTOR + table
    assert read["sectors"] == weight.nbytes // SECTOR + blocks * bins  # the weight once, a bin at a time
    within(written, "sectors", 1.02)
    assert written["unique"] == packed.nbytes // SECTOR + weight.numel() // 64 * 4 // SECTOR
    within(report["shared_load"], "waves", 1.05)
    within(report["shared_store"], "waves", 1.05)
    assert report["local"] == 0
    _, reports = launches(device, lambda: peftops.nf4_quantize(weight))
    assert len(reports) == 2  # double quantisation takes one more


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4_dequantize(device, dtype, double_quant):
    weight = peftops.nf4_quantize(torch.randn(128, 512), double_quant=double_quant)
    dense, (report,) = launches(device, lambda: peftops.nf4_dequantize(weight, dtype=dtype))
    written = report["global_write"]
    assert written["sectors"] == written["unique"] == dense.nbytes // SECTOR
    read = report["global_read"]
    within(read, "sectors", 1.02)
    parts = sum(-(-t.nbytes // SECTOR) + 1 for t in weight._arguments[1:4] if t is not None)  # and where they lie
    assert read["unique"] <= weight.packed.nbytes // SECTOR + parts + TABLES
    within(report["shared_load"], "waves", 1.05)
    within(report["shared_store"], "waves", 1.05)
    assert report["local"] == 0 and report["divergent"] == 0


def columns_of(report, source, text):
    """The counters of the lines of a kernel file that hold ``text``."""
    lines = [
        n
        for n, line in enumerate((sim.ROOT / "csrc/kernels/cuda" / source).read_text().splitlines(), 1)
        if text in line
    ]
    assert lines, f"{source} has no line with {text}"
    rows = [report["lines"][str(n)] for n in lines if str(n) in report["lines"]]
    return {key: sum(row[key] for row in rows) for key in rows[0]}


def looked_up(report):
    """Sectors of the tables of few_rows, which are in L1 after the first."""
    lines = ("nf4_rows.cuh", "dynamic_map.at[code[i]]"), ("nf4_rows.cuh", "nf4_codes.at[code]")
    return sum(columns_of(report, *line)["sectors"] for line in lines)


@pytest.mark.parametrize("m", [1, 5, 8, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nf4_linear_of_few_rows(device, m, dtype):
    n, k = 96, 4096 + 64  # more chunks than are scaled at a time, and a last one alone
    weight = peftops.nf4_quantize(torch.randn(n, k, dtype=dtype))
    _, (report,) = launches(device, lambda: peftops.nf4_linear(torch.randn(m, k, dtype=dtype), weight))
    stream = columns_of(report, "rows.cuh", "= *reinterpret_cast<const uint2*>(from")
    assert stream["sectors"] == weight.packed.nbytes // SECTOR  # once, and in whole sectors
    assert report["mma"] == n * k // (16 * 16) * -(-m // 8)
    within(columns_of(report, "nf4_rows.cuh", "ld.shared.u32 %0"), "waves", 1.0, "ideal_waves")
    assert report["local"] == 0 and report["atomics"] == 0
    within(report["shared_store"], "waves", 1.01)
    x, once = columns_of(report, "rows.cuh", "x[m][i] = *reinterpret_cast<const uint4*>(from"), m * k * 2 // SECTOR
    outs = 16 if m <= 8 else 32
    assert x["sectors"] == 2 * once * n // outs  # for so many rows of the weight, in halves of sectors
    everything, tables = report["global_read"], looked_up(report)
    assert everything["sectors"] - x["sectors"] - tables <= 1.15 * (everything["unique"] - once)  # absmax and its parts


@pytest.mark.parametrize("m", [1, 16])
def test_nf4_linear_of_few_rows_at_full_size(m):
    """4096 x 4096. Memory delivers the weight, x and y once; what else is asked for, x by every block of threads, the
    caches hold. Without x, requests are within 1.10 of the least that there can be."""
    if isinstance(sim.cuda_ops(), str):
        pytest.skip(sim.cuda_ops())
    n = k = 4096
    packed = torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8)
    code = torch.randint(0, 256, (n * k // 64,), dtype=torch.uint8)
    weight = packed, code, torch.rand(n * k // 64 // 256), torch.rand(1), 64
    x = torch.randn(m, k).bfloat16()
    with sim.on_cpu_tensors() as device:
        y, (report,) = launches(device, lambda: torch.ops.peftops.nf4_linear(x, *weight, n, k, None, None, None, 1.0))
    stream = columns_of(report, "rows.cuh", "= *reinterpret_cast<const uint2*>(from")
    assert stream["sectors"] == packed.nbytes // SECTOR
    assert report["mma"] == n * k // (16 * 16) * -(-m // 8)
    once = sum(-(-t.nbytes // SECTOR) for t in weight[:4])
    of_x = columns_of(report, "rows.cuh", "x[m][i] = *reinterpret_cast<const uint4*>(from")
    outs = 16 if m <= 8 else 32
    assert of_x["sectors"] == 2 * (n // outs) * x.nbytes // SECTOR  # by halves, of which the second is in L1
    read, written = report["global_read"], report["global_write"]
    assert read["sectors"] - of_x["sectors"] - looked_up(report) <= 1.10 * once
    assert read["unique"] <= once + x.nbytes // SECTOR + TABLES + 8  # and where they lie
    assert written["sectors"] == written["unique"] == y.nbytes // SECTOR


@pytest.mark.parametrize("m, n, k, stripes", [(100, 200, 64 * 6, 1), (64 * 127 + 5, 250, 64 * 2, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nf4_linear_of_many_rows(device, m, n, k, stripes, dtype):
    """Whole tiles of 64 rows of x and 128 or, where that makes blocks enough, 256 rows of the weight: on a GPU so small
    that reading the weight for every 32 rows takes longer."""
    r = 4
    device.pretend(80, 1)
    weight = peftops.nf4_quantize(torch.randn(n, k, dtype=dtype))
    x, bias, lora_A, lora_B = (torch.randn(*s, dtype=dtype) for s in ((m, k), (n,), (r, k), (n, r)))
    with torch.no_grad():
        y, reports = launches(device, lambda: peftops.nf4_linear(x, weight, bias, lora_A=lora_A, lora_B=lora_B))
    device.pretend()
    report = reports[-1]
    tiles = -(-m // 64) * -(-n // (128 * stripes))
    # Three of tf32 for eight ranks: u is fp32, lora_B is not. Lines of [x | u] [W ; B]^T by 16 and 8 steps.
    assert report["mma"] == tiles * 8 * (8 * stripes) * (k // 16 + 3 * -(-r // 8))
    assert report["async_copy"]["waves"] == report["async_copy"]["ideal"]
    for file, line in (("nf4_rows.cuh", "ld.shared.u32 %0"), ("nf4_many.cuh", "const uint4 x[2]")):
        within(columns_of(report, file, line), "waves", 1.0, "ideal_waves")
    within(report["shared_store"], "waves", 1.01)
    assert report["local"] == 0
    dense = peftops.nf4_dequantize(weight, dtype=torch.float32).double()
    arguments = [t.double() for t in (x, dense, bias, lora_A, lora_B)]
    want, size = (reference.linear(*(f(t) for t in arguments)) for f in (torch.clone, torch.abs))
    assert_sums(y, want, size, 2 * k + r + 4, code_error(dtype) * x.double().abs() @ dense.abs().T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("r", [0, 16])
def test_nf4_operands(device, dtype, r):
    """What a library multiplies: W decoded, and x where it has more columns than k; both written once."""
    m, n, k = 24, 64, 512
    weight = peftops.nf4_quantize(torch.randn(n, k, dtype=dtype))
    x, u, lora_B = torch.randn(m, k, dtype=dtype), torch.randn(m, r), torch.randn(n, r).to(dtype)
    low_rank = (u, lora_B) if r else (None, None)
    op = torch.ops.peftops.nf4_linear
    with sim.nf4_library("always"):
        _, (report,) = launches(device, lambda: op(x, *weight._arguments, n, k, None, *low_rank, 0.5))
    depth = k + r * (1 if dtype == torch.float32 else 2)
    written, read = report["global_write"], report["global_read"]
    assert written["sectors"] == written["unique"] == (n + (m if r else 0)) * depth * x.element_size() // SECTOR
    parts = sum(-(-t.nbytes // SECTOR) + 1 for t in weight._arguments[1:4] if t is not None)  # and where they lie
    once = (
        weight.packed.nbytes // SECTOR + parts + TABLES + ((x.nbytes + u.nbytes + lora_B.nbytes) // SECTOR if r else 0)
    )
    assert read["unique"] <= once
    extras = 3 * (u.nbytes + lora_B.nbytes) // SECTOR  # by each of their parts
    assert read["sectors"] <= 1.02 * read["ideal"] + extras
    within(report["shared_load"], "waves", 1.05)
    within(report["shared_store"], "waves", 1.05)
    assert report["local"] == report["mma"] == 0


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_quantize(device, dtype, bits):
    weight = torch.randn(32, 512, dtype=dtype)
    quantized, (report,) = launches(device, lambda: torch.ops.peftops.group_quantize(weight, bits, 32, False, 0))
    read, written = report["global_read"], report["global_write"]
    assert read["sectors"] == read["unique"] == weight.nbytes // SECTOR  # the weight once, and nothing else
    within(written, "sectors", 1.02)
    assert written["unique"] == sum(t.nbytes for t in quantized) // SECTOR
    assert report["local"] == report["shared_load"]["waves"] == report["shared_store"]["waves"] == 0
    _, (report,) = launches(device, lambda: torch.ops.peftops.group_quantize(weight, bits, 32, False, 7))
    assert report["global_read"] == read  # narrower ranges are tried in registers


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_dequantize(device, dtype, bits):
    weight = peftops.group_quantize(torch.randn(32, 512), bits=bits)
    dense, (report,) = launches(device, lambda: peftops.group_dequantize(weight, dtype=dtype))
    read, written = report["global_read"], report["global_write"]
    assert written["sectors"] == written["unique"] == dense.nbytes // SECTOR
    within(read, "sectors", 1.02)
    assert read["unique"] == sum(t.nbytes for t in (weight.packed, weight.scales, weight.zeros)) // SECTOR
    assert report["local"] == report["shared_load"]["waves"] == report["shared_store"]["waves"] == 0


@pytest.mark.parametrize("m", [1, 16, 20])
@pytest.mark.parametrize("bits, group", [(2, 128), (3, 64), (4, 32), (4, 128), (8, 32)])
def test_group_linear(device, m, bits, group):
    """Everything that is read, sector by sector: the codes once for every 8 or 16 rows of x."""
    n, k, dtype = 64, 1024, torch.bfloat16
    weight = peftops.group_quantize(torch.randn(n, k), bits=bits, group_size=group)
    _, (report,) = launches(device, lambda: peftops.group_linear(torch.randn(m, k, dtype=dtype), weight))
    columns = {2: 128, 3: 256, 4: 64, 8: 32}[bits]  # of a chunk
    parts = max(1, columns // group)
    codes = weight.packed.nbytes // SECTOR * (3 if bits == 3 else 1)  # three bits: in three loads, two of them from L1
    scales = 2 * -(-weight.scales.nbytes // SECTOR)
    tiles = 1 if m <= 8 or bits == 3 else 2  # of 8 rows of x
    passes = -(-m // (8 * tiles))
    rows = m + passes * tiles - -(-m // 8)  # a tile without rows reads the last one
    x = (1 if bits == 8 else 2) * rows * k * 2 // SECTOR * n // 32  # for every 32 rows of the weight, in halves
    assert report["global_read"]["sectors"] == passes * (codes + scales) + x
    assert report["global_write"]["sectors"] == report["global_write"]["unique"] == m * n * 2 // SECTOR
    assert report["mma"] == passes * n // 32 * k // 16 * parts * tiles * 3  # two stripes of the weight, and ones
    assert report["local"] == report["atomics"] == 0
    within(report["shared_store"], "waves", 1.01)
    within(report["shared_load"], "waves", 1.01)


@pytest.mark.parametrize("group", [8, 32, 1024])
def test_qalora_pooling(device, group):
    x, lora_A = torch.randn(24, 1024, dtype=torch.bfloat16), torch.randn(4, 1024 // group)
    _, reports = launches(device, lambda: torch.ops.peftops.qalora_shrink(x, lora_A, group))
    read = reports[0]["global_read"]
    assert len(reports) == 2 and read["sectors"] == read["unique"] == x.nbytes // SECTOR  # x once, before the product
    within(reports[0]["global_write"], "sectors", 1.02)


def test_qalora_merge(device):
    n, groups, r = 128, 64, 4
    scales, zeros, A, B = (torch.rand(*s) + 1 for s in ((n, groups), (n, groups), (r, groups), (n, r)))
    _, (report,) = launches(device, lambda: torch.ops.peftops.qalora_merge(scales, zeros, A, B, 1.0))
    factors = (A.nbytes * n // 64 + B.nbytes) // SECTOR  # of each tile of 64 x 64
    assert report["global_read"]["sectors"] <= 2 * scales.nbytes // SECTOR + 2 * factors
    written = report["global_write"]
    assert written["sectors"] == written["unique"] == zeros.nbytes // SECTOR


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [10, 30])
def test_gated_prompt(device, dtype, tokens):
    """The query and out are read once, y is written once, whatever the order of heads and rows in memory."""
    b, heads, kv_heads, s, d = 2, 4, 2, 65, 64
    rows = lambda: torch.randn(b, s, heads, d, dtype=dtype).transpose(1, 2)
    out, query, key, value = rows(), rows(), torch.randn(kv_heads, tokens, d), torch.randn(kv_heads, tokens, d)
    y, (report,) = launches(device, lambda: peftops.add_gated_prompt(out, query, key, value, torch.ones(heads)))
    written, blocks = report["global_write"], kv_heads * -(-b * s * 2 // 64)
    assert written["sectors"] == written["unique"] == y.nbytes // SECTOR
    gates = blocks * 8  # the gates of 64 queries, two heads in turn: a sector for each warp, and as much to spare
    prompts = blocks * (key.nbytes + value.nbytes) // kv_heads // SECTOR
    assert report["global_read"]["sectors"] <= 1.05 * (out.nbytes + query.nbytes) // SECTOR + prompts + gates
    within(report["shared_load"], "waves", 1.05)
    within(report["shared_store"], "waves", 1.05)
    assert report["local"] == report["atomics"] == 0


def test_gated_prompt_of_shut_gates(device):
    """Nothing is computed, and in place nothing is moved."""
    query, prompt = torch.randn(1, 2, 70, 32), torch.randn(2, 10, 32)
    y, (report,) = launches(device, lambda: peftops.add_gated_prompt(query, query, prompt, prompt, torch.zeros(2)))
    assert torch.equal(y, query) and report["global_read"]["sectors"] <= query.nbytes // SECTOR + 2 * 4
    call = torch.ops.peftops.gated_prompt_add_
    _, (report,) = launches(device, lambda: call(y, query, prompt, prompt, torch.zeros(2), 1.0))
    assert report["global_write"]["sectors"] == 0


@pytest.mark.parametrize("rows", [1, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paged_attention(device, dtype, rows):
    """Keys and values are read once by each block of threads that has their head, in whole sectors."""
    heads, kv_heads, d, size, lengths = 4, 1, 128, 16, [600, 300]
    each = [-(-length // size) for length in lengths]
    table = torch.arange(2 * max(each), dtype=torch.int32).view(2, -1)
    query = torch.randn(2, heads, rows, d, dtype=dtype)
    key, value = torch.randn(2, 2 * max(each), kv_heads, size, d, dtype=dtype)
    attend = lambda: peftops.paged_attention(query, key, value, table, torch.tensor(lengths).int())
    _, reports = launches(device, attend)
    assert len(reports) == (2 if rows == 1 else 1)  # a part a block of threads for few queries, which are then gathered
    report, tile = reports[0], 64 if dtype == torch.bfloat16 else 16
    tiles = -(-rows * heads // tile)
    sectors = tiles * sum(lengths) * 2 * d * dtype.itemsize // SECTOR
    if rows > 1:  # what was summed of 600 tokens' first part
        sectors += rows * heads * d * 4 // SECTOR
    wanted = {"wanted": sectors + query.nbytes // SECTOR}
    within(report["global_read"] | wanted, "sectors", 1.08, "wanted")  # and tables
    for counter in ("shared_load", "shared_store", "ldmatrix", "async_copy"):
        within(report[counter], "waves", 1.0)
    if dtype == torch.bfloat16:
        chunks = sum(-(-length // 32) for length in lengths) * -(-rows * heads // 16)
        unseen = 2 + 5 if rows > 1 else 0  # the last chunk of a sequence, by as many of its warps
        scores, sums = 4 * d // 16, 2 * 2 * d // 8
        assert report["mma"] == (chunks - unseen) * (scores + sums)
    for report in reports:
        within(report["global_write"], "sectors", 1.5)  # bfloat16: a quad of lanes has half a sector of y
        assert report["local"] == report["atomics"] == 0


def test_group_and_prompt_sums_are_the_same_under_every_schedule():
    if isinstance(sim.cuda_ops(), str):
        pytest.skip(sim.cuda_ops())
    weight = peftops.group_quantize(torch.randn(70, 128))
    A, B = torch.randn(3, 4, requires_grad=True), torch.randn(70, 3, requires_grad=True)
    query, prompt = torch.randn(2, 4, 70, 24, requires_grad=True), torch.randn(2, 40, 24, requires_grad=True)
    gate = torch.randn(4, requires_grad=True)
    x, runs = torch.randn(40, 128, dtype=torch.bfloat16, requires_grad=True), []
    for seed in (0, 1, 2, 3):
        with sim.on_cpu_tensors(seed=seed):
            y = peftops.qalora_linear(x, weight, lora_A=A, lora_B=B)
            added = peftops.add_gated_prompt(query, query, prompt, prompt, gate)
            gradients = torch.autograd.grad(y.sum() + added.square().sum(), (x, A, B, query, prompt, gate))
            runs.append((y, added, *gradients))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_pipelines_have_three_stages_at_least():
    """What a kernel waits for, and what it leaves under way meanwhile."""
    text = (sim.ROOT / "csrc/kernels/cuda/async.cuh").read_text()
    assert int(re.search(r"kStages = (\d+)", text)[1]) >= 3


@pytest.mark.parametrize("m, n, k, tile", [(100, 104, 288, 64), (128 * 43 - 20, 40, 384, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter", [torch.float32, torch.float16])
def test_nf4_linear_backward(device, m, n, k, tile, dtype, adapter):
    """Tiles of 64 or, where that makes blocks enough, 128 rows of dx and 128 columns."""
    if m > 1000 and adapter != dtype:
        pytest.skip("the large one once")
    r, p, seed = 12, 0.25, torch.tensor(7)
    weight = peftops.nf4_quantize(torch.randn(n, k, dtype=dtype))
    g, v, lora_A = torch.randn(m, n, dtype=dtype), torch.randn(m, r), torch.randn(r, k, dtype=adapter)
    op = torch.ops.peftops.nf4_linear_backward
    dx, (report,) = launches(device, lambda: op(g, *weight._arguments, k, v, lora_A, p, seed))
    fragments = -(-m // tile) * -(-k // 128) * (tile // 16) * (128 // 8)
    assert report["mma"] == fragments * (2 * -(-n // 32) + (6 if adapter == torch.float32 else 3) * -(-r // 8))
    for counter in ("ldmatrix", "async_copy"):
        assert report[counter]["waves"] == report[counter]["ideal"], counter
    within(columns_of(report, "nf4_decode.cuh", "lane_of(at, field_at(codes"), "waves", 1.0, "ideal_waves")
    within(report["shared_load"], "waves", 1.05)  # the map of nested absmax values, by chance
    within(report["shared_store"], "waves", 1.0)
    written = report["global_write"]
    assert written["sectors"] == written["unique"] == dx.nbytes // SECTOR  # and no temporary of any size
    assert report["local"] == 0 and report["atomics"] == 0
    dense = peftops.nf4_dequantize(weight, dtype=torch.float32).double()
    keep = reference.dropout_mask(7, m, k, p).double() / (1 - p)
    product = lambda f: f(g.double()) @ f(dense) + (f(v.double()) @ f(lora_A.double())) * keep
    rounding = torch.finfo(dtype).eps / 2 * g.double().abs() @ dense.abs()
    assert_sums(dx, product(torch.clone), product(torch.abs), n + r + 4, rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_thin_products(device, dtype):
    """x and y move once and in whole sectors, and beside them what a block of threads needs: the factor for 16 rows, or
    u for 64 columns. The mma count is that of tiles of 16 x 8, by 8 steps, times the parts of fp32 numbers."""
    m, k, r, op = 48, 512, 16, torch.ops.peftops
    x, factor, u, g = torch.randn(m, k).to(dtype), torch.randn(r, k), torch.randn(m, r), torch.randn(m, k).to(dtype)
    parts = 6 if dtype == torch.float32 else 3
    of = lambda t: t.nbytes // SECTOR

    _, (report,) = launches(device, lambda: op.lora_shrink(x, factor, True, 1.0, 0.0, None))
    assert report["mma"] == m // 16 * r // 8 * k // 8 * parts
    assert report["global_read"]["sectors"] == of(x) + m // 16 * of(factor)
    assert report["global_write"]["sectors"] == of(u)
    y = g.clone()
    _, (report,) = launches(device, lambda: op.lora_expand_(y, u, factor, True, 1.0, 0.0, None))
    assert report["mma"] == m // 16 * k // 8 * r // 8 * 6
    assert report["global_write"]["sectors"] == report["global_write"]["unique"] == of(y)
    d, (report,) = launches(device, lambda: op.lora_gradient(u, x, torch.float32, True, 1.0, 0.0, None))
    assert report["mma"] == k // 8 * m // 8 * parts
    assert report["global_read"]["sectors"] == of(x) + k // 64 * of(u)
    assert report["global_write"]["sectors"] == of(d)
    for kind in ("shared_load", "shared_store"):
        within(report[kind], "waves", 1.0)
    assert report["local"] == 0


def test_multi_lora_launches_once_for_all_segments(device):
    """A batch that decodes: five rows of three adapters. Each factor is read once, in whole sectors."""
    k, n, ranks, rows = 1024, 320, (8, 16, 5), ["a", None, "b", "b", "c"]
    pool = peftops.AdapterPool({"layer": (k, n)}, pages=100, page_size=1024, dtype=torch.bfloat16)
    for name, r in zip("abc", ranks, strict=True):
        pool.add(name, {"layer": (torch.randn(r, k), torch.randn(n, r))}, 1.0)
    layer, x, y = pool.layer("layer"), torch.randn(5, k).bfloat16(), torch.randn(5, n).bfloat16()
    op = torch.ops.peftops
    with pool.use(rows) as index:
        slots = index, layer.storage, *layer.slots
        u, reports = launches(device, lambda: op.multi_lora_add_(y, x, *slots, False, 16))
        assert len(reports) == 2
        factors = sum(ranks) * k * 2 // SECTOR
        used = (4 + 3) * k * 2 // SECTOR  # of x: the rows that have an adapter, and each segment's first once more
        assert reports[0]["mma"] == sum(k // 8 * 2 for _ in ranks)
        assert factors + used <= reports[0]["global_read"]["sectors"] <= 1.2 * (factors + used)  # pages, segments
        written = reports[1]["global_write"]
        assert written["sectors"] == written["unique"] == 4 * n * 2 // SECTOR
        _, (report,) = launches(
            device, lambda: op.multi_lora_gradient(u, x, index, index[[0, 2, 4]], *layer.slots, True, 29)
        )
        assert report["local"] == 0


def test_nf4_linear_is_the_same_under_every_schedule():
    if isinstance(sim.cuda_ops(), str):
        pytest.skip(sim.cuda_ops())
    weight = peftops.nf4_quantize(torch.randn(72, 128))
    A, B = torch.randn(5, 128, requires_grad=True), torch.randn(72, 5, requires_grad=True)
    for m, dtype in ((3, torch.bfloat16), (70, torch.bfloat16), (5, torch.float32)):
        x, runs = torch.randn(m, 128, dtype=dtype, requires_grad=True), []
        for seed in (0, 1, 2, 3):
            with sim.on_cpu_tensors(seed=seed):
                y = peftops.nf4_linear(x, weight, lora_A=A, lora_B=B)
                runs.append((y, *torch.autograd.grad(y.sum(), (x, A, B))))
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_beyond_int32():
    """Offsets are 64 bits wide. Only the last blocks of the grid run, so almost no page of the memory is touched."""
    if isinstance(sim.cuda_ops(), str):
        pytest.skip(sim.cuda_ops())
    elements, tail, block_size = 2**31 + 4096, 8192, 4096
    packed, absmax = torch.empty(elements // 2, dtype=torch.uint8), torch.empty(elements // block_size)
    packed[-tail // 2 :] = torch.randint(0, 256, (tail // 2,), dtype=torch.uint8)
    absmax[-2:] = torch.tensor([2.0, 3.0])
    with sim.on_cpu_tensors(last_blocks=2):
        dense = torch.ops.peftops.nf4_dequantize(packed, absmax, None, None, block_size, 1, elements, torch.bfloat16)
        codes, _ = torch.ops.peftops.nf4_quantize(dense.flatten(), block_size)
    want = reference.nf4_dequantize(packed[-tail // 2 :], absmax[-2:], block_size, torch.Size([tail]))
    assert_exact(dense[0, -tail:], want)
    assert torch.equal(codes[-tail // 2 :], reference.nf4_quantize(want.bfloat16(), block_size)[0])
