import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import peftops
import reference
from numerics import assert_exact
from strategies import block_sizes, dtypes, layouts, normal, seeds, strided

shapes = st.one_of(
    st.tuples(st.integers(1, 40), st.integers(1, 300)),
    st.tuples(st.sampled_from([1, 63, 64, 65, 4095, 4096, 4097, 16384, 16385, 70001])),
    st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 64)),
)


@given(shape=shapes, dtype=dtypes, block_size=block_sizes, layout=layouts, seed=seeds, spread=st.booleans())
def test_matches_reference(device, shape, dtype, block_size, layout, seed, spread):
    weight = normal(shape, dtype, seed)
    if spread:  # blocks of very different size, and many zeros
        weight = weight * torch.exp(4 * normal(shape, dtype, seed + 1)) * (normal(shape, dtype, seed + 2) > 0)
        weight = weight.nan_to_num(posinf=1e4, neginf=-1e4)
    got = peftops.nf4_quantize(strided(weight.to(device), layout), block_size=block_size, double_quant=False)
    packed, absmax = reference.nf4_quantize(weight, block_size)
    assert_exact(got.absmax.cpu(), absmax)
    assert torch.equal(got.packed.cpu(), packed)
    assert (got.shape, got.dtype) == (weight.shape, dtype)


@given(shape=shapes, block_size=block_sizes, seed=seeds)
def test_double_quantisation_matches_reference(device, shape, block_size, seed):
    weight = normal(shape, torch.float32, seed).to(device)
    plain = peftops.nf4_quantize(weight, block_size=block_size, double_quant=False)
    double = peftops.nf4_quantize(weight, block_size=block_size)
    offset = plain.absmax.mean()
    code, scale = reference.nf4_quantize_absmax(plain.absmax.cpu(), offset.cpu())
    assert torch.equal(double.packed, plain.packed)
    assert torch.equal(double._absmax.cpu(), code.to(torch.uint8))
    assert_exact(double._absmax_scale.cpu(), scale)
    assert torch.equal(double._absmax_offset, offset)
    assert_exact(double.absmax.cpu(), reference.nf4_absmax(code, scale, offset.cpu()))


MOST = torch.finfo(torch.float32).max


@pytest.mark.parametrize("rows", [1, 4, 300, 700])
@pytest.mark.parametrize("kind", ["all", "one", "half", "random", "beside zeros"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_near_the_largest_number_stay_finite(device, rows, kind, dtype):
    """Whose sum of absmax overflows, and of which a code's value might; and as near as any: no absmax is off by more
    than half a code of the widest decade and what is left below the largest number."""
    weight = MOST * (2 * torch.rand(rows, 64, generator=torch.Generator().manual_seed(rows)) - 1)
    if kind == "all":
        weight = torch.full((rows, 64), MOST)
    elif kind == "one":
        weight = weight / 1e4
        weight[0, 3] = MOST
    elif kind == "half":
        weight[::2] /= 2
        weight[1::2, 5] = -MOST
    elif kind == "beside zeros":
        weight[rows // 3 :] = 0
    weight = weight.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    got = peftops.nf4_quantize(weight.to(device))
    plain = peftops.nf4_quantize(weight.to(device), double_quant=False).absmax.cpu()
    offset, absmax = got._absmax_offset.cpu(), got.absmax.cpu()
    assert offset.isfinite() and absmax.isfinite().all() and peftops.nf4_dequantize(got).isfinite().all()
    code, scale = reference.nf4_quantize_absmax(plain, offset)
    assert torch.equal(got._absmax.cpu().long(), code) and torch.equal(got._absmax_scale.cpu(), scale)
    assert ((absmax.double() - plain.double()).abs() <= 0.0143 * scale.max().double()).all()


def test_every_value_around_every_midpoint(device):
    """Ties and their neighbours: strictly above a midpoint is the upper code, the midpoint itself the lower."""
    midpoints = (reference.NF4[:-1] + reference.NF4[1:]) / 2
    up, down = torch.tensor(2.0), torch.tensor(-2.0)
    values = torch.cat([midpoints, torch.nextafter(midpoints, up), torch.nextafter(midpoints, down), reference.NF4])
    values = torch.cat([values, torch.linspace(-1, 1, 4096 - values.numel() - 1), torch.ones(1)])
    got = peftops.nf4_quantize(values.to(device), block_size=4096, double_quant=False)
    assert torch.equal(got.packed.cpu(), reference.nf4_quantize(values, 4096)[0])


def test_code_is_the_quantiles_of_a_normal_distribution(device):
    """The construction of the QLoRA paper: 8 positive and 7 negative quantiles, and 0."""
    quantile = lambda p: 2**0.5 * torch.erfinv(2 * p - 1)
    edge = 1 - (1 / 32 + 1 / 30) / 2
    half = torch.tensor(0.5, dtype=torch.float64)
    positive = quantile(torch.linspace(edge, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -quantile(torch.linspace(edge, 0.5, 8, dtype=torch.float64)[:-1])
    want = torch.cat([negative, 0 * half[None], positive]).sort().values / positive.max()
    codes = torch.arange(16, dtype=torch.uint8)
    got = torch.ops.peftops.nf4_dequantize(
        (codes * 16 + codes).to(device), torch.ones(1, device=device), None, None, 32, 1, 32, torch.float32
    )
    assert (got.cpu()[0, ::2] - want).abs().max() < 2e-7
    assert torch.equal(got[0, ::2], got[0, 1::2])
    assert torch.equal(got.cpu()[0, ::2], reference.NF4)


def test_zero_blocks_stay_zero(device):
    weight = torch.zeros(3, 64)
    weight[1] = 1.0
    got = peftops.nf4_quantize(weight.to(device), double_quant=False)
    assert got.absmax.tolist() == [0.0, 1.0, 0.0]
    assert got.packed[:32].tolist() == [0x77] * 32
    assert torch.equal(peftops.nf4_dequantize(got).cpu(), weight)
    everything = peftops.nf4_quantize(torch.zeros(300, 64, device=device))  # double-quantised: all absmax are 0
    assert not peftops.nf4_dequantize(everything).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_weight_that_is_not_finite_raises_and_says_where(device, bad, dtype, double_quant):
    weight = torch.randn(5, 100).to(dtype)
    weight[3, 5] = bad  # element 305: block 4 of 64
    with pytest.raises(ValueError, match=r"NaN or an infinity.*elements 256 to 319"):
        peftops.nf4_quantize(weight.to(device), double_quant=double_quant)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_block_that_is_not_finite_never_becomes_plausible_numbers(device, bad):
    weight = torch.randn(4, 64)
    weight[2, 63] = bad
    packed, absmax = torch.ops.peftops.nf4_quantize(weight.to(device), 64)
    assert absmax.isnan().tolist() == [False, False, True, False]
    dense = torch.ops.peftops.nf4_dequantize(packed, absmax, None, None, 64, 4, 64, torch.float32).cpu()
    assert dense[2].isnan().all() and dense[[0, 1, 3]].isfinite().all()


def test_requantising_what_was_dequantised_changes_nothing(device):
    weight = torch.randn(64, 96, device=device)
    once = peftops.nf4_quantize(weight, double_quant=False)
    twice = peftops.nf4_quantize(peftops.nf4_dequantize(once), double_quant=False)
    assert torch.equal(once.packed, twice.packed) and torch.equal(once.absmax, twice.absmax)


def test_bits_per_weight(device):
    weight = torch.randn(512, 512, device=device)
    bits = lambda **kw: 8 * peftops.nf4_quantize(weight, **kw).nbytes / weight.numel()
    assert bits() == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=32 / weight.numel())  # and one offset
    assert bits() <= 4.13
    assert bits(double_quant=False) == 4.5


@pytest.mark.parametrize("block_size", [0, 16, 48, 63, 8192, -64])
def test_bad_block_size(device, block_size):
    with pytest.raises(RuntimeError, match=rf"block_size must be a power of two from 32 to 4096, not {block_size}"):
        peftops.nf4_quantize(torch.randn(8, 64, device=device), block_size=block_size)


def test_bad_weight(device):
    with pytest.raises(ValueError, match=r"weight is empty, shape \(0, 64\)"):
        peftops.nf4_quantize(torch.empty(0, 64, device=device))
    with pytest.raises(RuntimeError, match="weight must be float32, bfloat16 or float16, not Double"):
        peftops.nf4_quantize(torch.randn(8, 64, dtype=torch.float64, device=device))
    with pytest.raises(RuntimeError, match="weight must be float32, bfloat16 or float16, not Int"):
        peftops.nf4_quantize(torch.ones(8, 64, dtype=torch.int32, device=device))


def test_registration(device):
    weight = torch.randn(8, 100, device=device)
    torch.library.opcheck(torch.ops.peftops.nf4_quantize.default, (weight, 64))
    torch.library.opcheck(torch.ops.peftops.nf4_quantize.default, (weight.t(), 64))
    absmax = torch.rand(300, device=device)
    torch.library.opcheck(torch.ops.peftops.nf4_quantize_absmax.default, (absmax, absmax.mean()))


def test_same_bits_for_any_number_of_threads(device, threads):
    weight = torch.randn(777, 1031, device=device)
    runs = []
    for n in (1, 2, 3):
        threads(n)
        runs.append(peftops.nf4_quantize(weight))
    assert all(torch.equal(runs[0], run) for run in runs)
