"""Attention over pages: right, indifferent to whatever it must not see, and the same bits however a prompt is cut."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import peftops
import reference
import sim
from numerics import FP32, assert_sums
from strategies import dtypes, normal, seeds

head_dims = st.sampled_from([1, 3, 8, 16, 17, 33, 64])
lengths_of = st.lists(st.sampled_from([0, 1, 2, 15, 16, 31, 32, 33, 64, 70]), min_size=1, max_size=3)


def int32(values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def inputs(
    device,
    lengths,
    heads=4,
    kv_heads=2,
    rows=1,
    d=16,
    dv=16,
    page_size=16,
    dtype=torch.float32,
    page_dtype=None,
    seed=0,
):
    """Pages in random order, with NaN wherever no sequence has a token."""
    draw = torch.Generator().manual_seed(seed)
    each = [-(-length // page_size) for length in lengths]
    order = torch.randperm(sum(each) + 2, generator=draw).tolist()
    table = torch.full((len(lengths), max([*each, 1])), 2**30, dtype=torch.int32)
    pages = [normal((len(order), kv_heads, page_size, n), page_dtype or dtype, seed + n) for n in (d, dv)]
    empty = torch.ones(len(order), page_size, dtype=torch.bool)
    for s, length in enumerate(lengths):
        for i in range(each[s]):
            table[s, i] = order.pop()
            empty[table[s, i], : length - i * page_size] = False
    for t in pages:
        t.masked_fill_(empty[:, None, :, None], torch.nan)
    given = normal((len(lengths), heads, rows, d), dtype, seed + 5), *pages, table, int32(lengths)
    return tuple(t.to(device) for t in given)


def check(query, keys, values, table, lengths, **options):
    """A score errs by d + 4 of its sum of magnitudes, and by 3 more as the largest is subtracted; exponentiated, that
    is relative, and exp2 adds 4. Each 32 tokens rescale what was summed before. The tensor cores of CUDA multiply
    16-bit values by weights of two numbers of their dtype, which err by 2^-18."""
    y = peftops.paged_attention(query, keys, values, table, lengths, **options)
    clean = [t.double().nan_to_num() for t in (keys, values)]
    table = table.clamp(max=len(keys) - 1)
    want = reference.paged_attention(query.double(), *clean, table, lengths, **options)
    size = query.double().abs().amax((-1, -2)).amax() * clean[0].abs().amax() * query.shape[-1]
    size = size * abs(options.get("scale") or query.shape[-1] ** -0.5)
    most = max([1, *lengths.tolist()])
    steps = -(-most // 32) + 1
    eps = torch.expm1(FP32 * ((query.shape[-1] + 8 + 3 * steps) * size + 6 + 8 * steps))
    if (sim.active or query.is_cuda) and query.dtype == keys.dtype != torch.float32:
        eps = eps + 2.0**-18
    magnitude = reference.paged_attention(query.double(), clean[0], clean[1].abs(), table, lengths, **options)
    assert_sums(y, want, magnitude, most, 2 * eps * magnitude + 2.0**-90)
    return y


@given(
    lengths=lengths_of,
    group=st.sampled_from([1, 2, 5]),
    kv_heads=st.sampled_from([1, 3]),
    d=head_dims,
    dv=head_dims,
    rows=st.sampled_from([1, 2, 7, 33]),
    page_size=st.sampled_from([1, 5, 16, 32, 64]),
    dtype=dtypes,
    page_dtype=dtypes,
    window=st.sampled_from([None, 1, 7, 32, 1000]),
    scale=st.sampled_from([None, 0.3]),
    seed=seeds,
)
def test_matches_the_reference(
    device, lengths, group, kv_heads, d, dv, rows, page_size, dtype, page_dtype, window, scale, seed
):
    given = inputs(device, lengths, group * kv_heads, kv_heads, rows, d, dv, page_size, dtype, page_dtype, seed)
    y = check(*given, window=window, scale=scale)
    for s, length in enumerate(lengths):
        assert not y[s, :, : max(0, rows - length)].any(), "padding"


def test_is_the_attention_of_torch(device):
    query, keys, values, table, lengths = inputs(device, [50], rows=50)
    wide = [t[table[0].long()].transpose(0, 1).flatten(1, 2)[None, :, :50] for t in (keys, values)]
    want = F.scaled_dot_product_attention(query, *wide, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(peftops.paged_attention(query, keys, values, table, lengths), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_however_a_prompt_is_cut(device, window, dtype):
    query, keys, values, table, _ = inputs(device, [75], heads=6, rows=75, dtype=dtype)
    whole = peftops.paged_attention(query, keys, values, table, int32([75], device), window=window)
    for size in (1, 7, 32):
        for end in range(size, 76, size):
            piece = slice(end - size, end)
            part = peftops.paged_attention(query[:, :, piece], keys, values, table, int32([end], device), window=window)
            assert torch.equal(part, whole[:, :, piece])


@pytest.mark.parametrize("window", [None, 600])
@pytest.mark.parametrize("dtype, d", [(torch.float32, 8), (torch.bfloat16, 8), (torch.float16, 72)], ids=str)
def test_long_sequences(device, dtype, d, window):
    """Few queries have other blocks of threads than many on CUDA, and the same parts. One ends where a part does."""
    query, keys, values, table, _ = inputs(device, [1100, 512], rows=20, heads=2, kv_heads=1, d=d, dtype=dtype)
    whole = check(query, keys, values, table, int32([1100, 512], device), window=window)
    for row in (0, 7, 19):
        lengths = int32([1100 - 19 + row, 512 - 19 + row], device)
        one = check(query[:, :, row : row + 1], keys, values, table, lengths, window=window)
        assert torch.equal(one[:, :, 0], whole[:, :, row])


@pytest.mark.parametrize("d, dv", [(40, 72), (130, 200), (512, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wide_heads(device, d, dv, dtype):
    """As many columns as each of CUDA's kernels is made for, over two chunks of tokens."""
    check(*inputs(device, [70, 1], rows=2, d=d, dv=dv, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("most", [2, 40], ids=lambda pages: f"{pages}-pages")  # one part, and two
@pytest.mark.parametrize("rows", [1, 3])
def test_cuda_makes_nan_of_what_is_out_of_range(dtype, most, rows):
    """The host cannot know it without waiting, and the kernel does not go there."""
    if isinstance(sim.cuda_ops(), str):
        pytest.skip(sim.cuda_ops())
    query, keys, values, table, _ = inputs("cpu", [9, 20, 20, 20, 20], rows=rows, dtype=dtype)
    table = torch.cat([table, torch.zeros(5, most - 2, dtype=torch.int32)], 1)
    table[2, 1], table[3, 0] = len(keys), -7
    lengths = int32([9, 20, 20, 20, 16 * most + 1])
    with sim.on_cpu_tensors():
        y = peftops.paged_attention(query, keys, values, table, lengths)
        lengths[4] = -1
        again = peftops.paged_attention(query, keys, values, table, lengths)
    assert y[:2].isfinite().all() and y[2:].isnan().all()
    assert again[:2].isfinite().all() and again[2:].isnan().all()


def test_the_same_bits_in_any_company_and_any_pages(device):
    query, keys, values, table, lengths = inputs(device, [40, 3, 64], rows=2)
    y = peftops.paged_attention(query, keys, values, table, lengths)
    for s, length in enumerate(lengths.tolist()):
        own = table[s : s + 1, : -(-length // 16)].long()[0]
        moved = peftops.paged_attention(
            query[s : s + 1],
            keys[own].contiguous(),
            values[own].contiguous(),
            torch.arange(len(own), dtype=torch.int32, device=device)[None],
            lengths[s : s + 1],
        )
        assert torch.equal(moved[0], y[s])


def test_sequences_share_pages(device):
    query, keys, values, table, _ = inputs(device, [32])
    both = peftops.paged_attention(query.repeat(2, 1, 1, 1), keys, values, table.repeat(2, 1), int32([32, 20], device))
    assert torch.equal(both[:1], peftops.paged_attention(query, keys, values, table, int32([32], device)))
    assert torch.equal(both[1:], peftops.paged_attention(query, keys, values, table, int32([20], device)))


def test_pages_may_lie_in_a_larger_storage(device):
    query, keys, values, table, lengths = inputs(device, [40, 9], rows=3)
    storage = keys.new_full((len(keys), 3, 2, *keys.shape[1:]), torch.nan)  # of three layers
    storage[:, 1, 0], storage[:, 1, 1] = keys, values
    want = peftops.paged_attention(query, keys, values, table, lengths)
    assert torch.equal(peftops.paged_attention(query, storage[:, 1, 0], storage[:, 1, 1], table, lengths), want)
    tokens_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (keys, values)]
    views = query.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(peftops.paged_attention(views, *tokens_first, table, lengths), want)


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("of", ["keys", "values"])
def test_a_nan_stays_in_its_sequence(device, of, bad):
    """The sequence before leaves its tokens in the memory that the next one, which is shorter, works in."""
    query, keys, values, table, lengths = inputs(device, [40, 9])
    {"keys": keys, "values": values}[of][table[bad, 0]] = torch.nan
    y = peftops.paged_attention(query, keys, values, table, lengths)
    assert y[1 - bad].isfinite().all() and y[bad].isnan().all()


def test_same_bits_for_any_number_of_threads(device, threads):
    given = inputs(device, [300, 17, 64, 200], heads=8, rows=40, d=64, dv=64)
    results = []
    for n in (1, 2, 3):
        threads(n)
        results.append(peftops.paged_attention(*given))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_empty(device):
    for lengths, rows in (([0, 0], 2), ([5], 0)):
        y = peftops.paged_attention(*inputs(device, lengths, rows=rows))
        assert y.shape == (len(lengths), 4, rows, 16) and not y.any()
    query, keys, values, table, lengths = inputs(device, [5])
    assert peftops.paged_attention(query[:0], keys, values, table[:0], lengths[:0]).shape == (0, 4, 1, 16)


def test_opcheck_and_compile():
    given = inputs("cpu", [9, 20], rows=2)
    torch.library.opcheck(torch.ops.peftops.paged_attention.default, (*given, 0.25, 8))
    compiled = torch.compile(peftops.paged_attention, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*given, window=8), peftops.paged_attention(*given, window=8))


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(query=torch.zeros(2, 4, 16)), "query must have shape [batch, heads, rows, d], not [2, 4, 16]"),
        (dict(query=torch.zeros(2, 3, 1, 16)), "2 heads of pages do not divide 3 query heads"),
        (dict(query=torch.zeros(2, 4, 1, 8)), "key_pages must have shape [6, 2, 16, 8], not [6, 2, 16, 16]"),
        (dict(query=torch.zeros(2, 4, 1, 16, dtype=torch.float64)), "query must be float32, bfloat16 or float16"),
        (
            dict(key_pages=torch.zeros(2, 2, 16)),
            "pages must have shape [pages, kv_heads, page_size, d], not [2, 2, 16]",
        ),
        (dict(value_pages=torch.zeros(6, 2, 8, 16)), "value_pages must have shape [6, 2, 16, 16], not [6, 2, 8, 16]"),
        (dict(value_pages=torch.zeros(6, 2, 16, 16).half()), "key_pages and value_pages must have one dtype"),
        (dict(value_pages=torch.zeros(6, 2, 16, 513)), "a head must have 1 to 512 dims, not 513"),
        (dict(value_pages=torch.zeros(6, 2, 16, 16).mT), "the last dim of value_pages must be contiguous"),
        (dict(block_table=int32([[0], [6]])), "block_table has page 6 for sequence 1, but the pages are 0 to 5"),
        (dict(block_table=int32([[0], [-1]])), "block_table has page -1 for sequence 1"),
        (dict(block_table=torch.zeros(2, 1, dtype=torch.int64)), "block_table must be Int, not Long"),
        (dict(block_table=int32([[0]])), "block_table must have shape [2, most pages of a sequence], not [1, 1]"),
        (dict(lengths=int32([1, 17])), "lengths must be from 0 to 16, which 1 pages hold, not 17"),
        (dict(lengths=int32([-1, 1])), "lengths must be from 0 to 16, which 1 pages hold, not -1"),
        (dict(lengths=int32([1])), "lengths must have shape [2], not [1]"),
        (dict(window=0), "window must be at least 1, not 0"),
    ],
)
def test_bad_input(change, sentence):
    pages = torch.zeros(6, 2, 16, 16)
    good = dict(
        query=torch.zeros(2, 4, 1, 16),
        key_pages=pages,
        value_pages=pages,
        block_table=int32([[0], [5]]),
        lengths=int32([3, 16]),
    )
    assert peftops.paged_attention(**good).shape == (2, 4, 1, 16)
    with pytest.raises(RuntimeError) as caught:
        peftops.paged_attention(**{**good, **change})
    assert str(caught.value).startswith(f"paged_attention: {sentence}")


@pytest.mark.parametrize("which", range(3))
def test_a_gradient_that_there_is_not_is_an_error(which):
    given = list(inputs("cpu", [5]))
    given[which].requires_grad_()
    name = ("query", "key_pages", "value_pages")[which]
    with pytest.raises(RuntimeError, match=f"paged_attention: {name} requires a gradient, but this op has none"):
        peftops.paged_attention(*given)
    with torch.no_grad():
        assert peftops.paged_attention(*given).shape == (1, 4, 1, 16)
