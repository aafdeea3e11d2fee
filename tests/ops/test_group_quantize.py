import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import peftops
import reference
from numerics import FP32, assert_exact
from strategies import bit_widths, dtypes, grouped_ins, layouts, normal, seeds, strided

some_rows = st.sampled_from([1, 2, 3, 5, 16, 17])


@given(
    n=some_rows,
    group_k=grouped_ins(),
    bits=bit_widths,
    symmetric=st.booleans(),
    dtype=dtypes,
    layout=layouts,
    seed=seeds,
    spread=st.booleans(),
)
def test_matches_reference(device, n, group_k, bits, symmetric, dtype, layout, seed, spread):
    group, k = group_k
    weight = normal((n, k), dtype, seed)
    if spread:  # groups of very different size, far from zero, too
        size = torch.exp(3 * normal((n, k // group), torch.float32, seed + 1)).repeat_interleave(group, 1)
        weight = (weight * size + 20 * normal((n, 1), torch.float32, seed + 2)).to(dtype)
        low, high = weight.unflatten(1, (-1, group)).float().aminmax(dim=-1)
        if (low == high).any():
            return
    got = peftops.group_quantize(strided(weight.to(device), layout), bits=bits, group_size=group, symmetric=symmetric)
    codes, scales, zeros = reference.group_quantize(weight, bits, group, symmetric)
    assert_exact(got.scales.cpu(), scales)
    assert_exact(got.zeros.cpu(), zeros)
    assert torch.equal(got.codes.cpu(), codes)
    assert got.packed.shape == (n, k * bits // 8) and (got.shape, got.dtype) == (weight.shape, dtype)


@given(n=some_rows, group_k=grouped_ins(), bits=bit_widths, seed=seeds, offset=st.sampled_from([0.0, 3.0, -1000.0]))
def test_the_error_is_half_a_scale_at_most_and_extremes_are_met(device, n, group_k, bits, seed, offset):
    group, k = group_k
    weight = normal((n, k), torch.float32, seed, device) + offset
    got = peftops.group_quantize(weight, bits=bits, group_size=group)
    dense = peftops.group_dequantize(got)
    by_group = lambda t: t.unflatten(1, (-1, group))
    # Beyond the half step: the rounding of zeros, as seen by the weight.
    rounding = 6 * FP32 * (weight.abs() + by_group(weight).abs().amax(-1).repeat_interleave(group, 1))
    assert ((dense - weight).abs() <= got.scales.repeat_interleave(group, 1) / 2 + rounding).all()
    for extreme in (torch.amin, torch.amax):
        at = extreme(by_group(weight), -1)
        assert ((extreme(by_group(dense), -1) - at).abs() <= by_group(rounding).amax(-1)).all()


@given(bits=bit_widths, seed=seeds)
def test_packing_is_one_string_of_bits(device, bits, seed):
    """The first code in the lowest bits, across bytes: Python's own integers tell."""
    codes = torch.randint(0, 2**bits, (3, 48), generator=torch.Generator().manual_seed(seed))
    one = torch.ones(3, 3)
    weight = peftops.GroupQuantTensor.from_codes(codes, one, 0 * one, bits=bits)
    for row, packed in zip(codes.tolist(), weight.packed, strict=True):
        number = sum(code << bits * i for i, code in enumerate(row))
        assert number.to_bytes(48 * bits // 8, "little") == bytes(packed.tolist())
    assert torch.equal(weight.codes, codes.to(torch.uint8))
    assert torch.equal(peftops.group_dequantize(weight), codes.float())  # and the kernel reads it so


def test_ties_go_to_even(device):
    weight = torch.tensor([[0.0, 15.0, 0.5, 1.5, 2.5, 3.5, 14.5, 13.5]], device=device)
    codes = peftops.group_quantize(weight, group_size=8).codes
    assert codes.tolist() == [[0, 15, 0, 2, 2, 4, 14, 14]]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [0.0, 3.25, -1e-3, 1e-33, -1e30, 1e-40])
def test_constant_groups(device, symmetric, value):
    """Exact if asymmetric; in any case with a scale, so that a merge can move the zero."""
    weight = torch.full((2, 64), value, device=device)
    weight[1, :32] = torch.linspace(-1, 1, 32)
    got = peftops.group_quantize(weight, symmetric=symmetric)
    dense = peftops.group_dequantize(got).cpu()
    assert (got.scales > 0).all() and got.zeros.isfinite().all()
    # A float32 below 1e-30 becomes 0; a symmetric code has no constant but 0.
    want = value if abs(value) >= 1e-30 else 0.0
    error = (dense[0] - want).abs().max()
    assert error == 0 if not symmetric or want == 0 else error <= got.scales[0, 0] / 2 * (1 + 4 * FP32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [8, 32])
def test_a_weight_that_is_not_finite_raises_and_says_where(device, bad, dtype, symmetric, group):
    weight = torch.randn(5, 128).to(dtype)
    weight[3, 69] = bad
    begin = 69 // group * group
    with pytest.raises(ValueError, match=rf"NaN or an infinity.*row 3, columns {begin} to {begin + group - 1}$"):
        peftops.group_quantize(weight.to(device), symmetric=symmetric, group_size=group)
    packed, scales, zeros = torch.ops.peftops.group_quantize(weight.to(device), 4, group, symmetric, 0)
    dense = torch.ops.peftops.group_dequantize(packed, scales, zeros, 4, group, torch.float32)
    assert dense[3, begin : begin + group].isnan().all() and dense.isnan().sum() == group


def test_a_span_beyond_float32_raises(device):
    weight = torch.zeros(1, 32, device=device)
    weight[0, 0], weight[0, 1] = 3e38, -3e38
    with pytest.raises(ValueError, match="span beyond float32"):
        peftops.group_quantize(weight)


def test_bits_per_weight(device):
    weight = torch.randn(64, 512, device=device)
    size = lambda **kw: 8 * peftops.group_quantize(weight, **kw).nbytes / weight.numel()
    assert [size(bits=b) for b in (2, 3, 4, 8)] == [4.0, 5.0, 6.0, 10.0]  # two float32 for 32 codes: 2 bits
    assert size(group_size=128) == 4.5


def test_bad_input(device):
    weight = torch.randn(8, 64, device=device)
    for bits in (0, 1, 5, 16, -4):
        with pytest.raises(RuntimeError, match=f"group_quantize: bits must be 2, 3, 4 or 8, not {bits}"):
            peftops.group_quantize(weight, bits=bits)
    for group in (0, 4, 24, 8192, -32):
        with pytest.raises(RuntimeError, match=f"group_size must be a power of two from 8 to 4096, not {group}"):
            peftops.group_quantize(weight, group_size=group)
    with pytest.raises(RuntimeError, match="in_features must be a multiple of group_size 64, but is 96"):
        peftops.group_quantize(torch.randn(8, 96, device=device), group_size=64)
    with pytest.raises(RuntimeError, match=r"weight must have two dims, \[out, in\], not shape \[2, 1, 4, 32\]"):
        peftops.group_quantize(torch.randn(2, 1, 4, 32, device=device))
    with pytest.raises(ValueError, match="group_quantize: clip must be 'none' or 'mse', not 'gptq'"):
        peftops.group_quantize(weight, clip="gptq")
    for narrower in (-1, 64):
        with pytest.raises(RuntimeError, match=f"narrower must be from 0 to 63, not {narrower}"):
            torch.ops.peftops.group_quantize(weight, 4, 32, False, narrower)
    with pytest.raises(ValueError, match=r"weight is empty, shape \(0, 64\)"):
        peftops.group_quantize(weight[:0])
    for dtype, name in ((torch.float64, "Double"), (torch.int32, "Int")):
        with pytest.raises(RuntimeError, match=f"weight must be float32, bfloat16 or float16, not {name}"):
            peftops.group_quantize(weight.to(dtype))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_registration(device, bits):
    weight = torch.randn(8, 96, device=device)
    torch.library.opcheck(torch.ops.peftops.group_quantize.default, (weight, bits, 32, False, 0))
    torch.library.opcheck(torch.ops.peftops.group_quantize.default, (torch.randn(96, 8).t(), bits, 32, True, 31))


def test_same_bits_for_any_number_of_threads(device, threads):
    weight = torch.randn(777, 1024, device=device)
    runs = []
    for n in (1, 2, 3):
        threads(n)
        runs.append(peftops.group_quantize(weight))
    assert all(torch.equal(runs[0], run) for run in runs)


@given(n=some_rows, group_k=grouped_ins(), bits=bit_widths, symmetric=st.booleans(), dtype=dtypes, seed=seeds)
def test_clipping_finds_the_best_of_its_ranges(device, n, group_k, bits, symmetric, dtype, seed):
    """Every candidate tried in plain PyTorch: none is better, by more than the rounding of a sum of squares."""
    group, k = group_k
    weight = normal((n, k), dtype, seed)
    got = peftops.group_quantize(weight.to(device), bits=bits, group_size=group, symmetric=symmetric, clip="mse")
    w, top = weight.float().unflatten(1, (-1, group)), 2**bits - 1
    _, widest, first = reference.group_quantize(weight, bits, group, symmetric)
    width = 1 - torch.arange(32)[:, None, None] / 64
    scales = widest * width
    zeros = first.expand_as(scales) if symmetric else top / 2 - (top / 2 - first) / width
    zeros = torch.cat([first[None], zeros[1:]])  # the extremes' own, as they are
    codes = (w * (1 / scales)[..., None] + zeros[..., None]).round().clamp(0, top)
    errors = ((codes - zeros[..., None]) * scales[..., None] - w).double().square().sum(-1)
    dense = peftops.group_dequantize(got, dtype=torch.float32).cpu().unflatten(1, (-1, group))
    error = (dense - w).double().square().sum(-1)
    assert (error <= errors.amin(0) * (1 + 1e-4) + 1e-12).all()
    chosen = (got.scales.cpu() == scales) & (got.zeros.cpu() == zeros)
    assert chosen.any(0).all()
    index = chosen.double().argmax(0)[None]
    assert torch.equal(
        got.codes.cpu(), codes.gather(0, index[..., None].expand(1, *codes.shape[1:]))[0].flatten(1).byte()
    )


def test_clipping_pays(device):
    """A normal weight in few bits: less error than by the extremes, the more so the fewer bits there are."""
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)).to(device)
    error = lambda bits, clip: (
        (peftops.group_dequantize(peftops.group_quantize(weight, bits=bits, clip=clip)) - weight).norm() / weight.norm()
    )
    gain = [(error(bits, "mse") / error(bits, "none")).item() for bits in (2, 3, 4, 8)]
    assert gain == sorted(gain) and gain[0] < 0.9 and gain[2] < 0.99 and gain[3] <= 1
