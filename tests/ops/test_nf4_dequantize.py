import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import peftops
import reference
from numerics import assert_exact
from strategies import block_sizes, dtypes, normal, seeds

shapes = st.one_of(
    st.tuples(st.integers(1, 40), st.integers(1, 300)),
    st.tuples(st.sampled_from([1, 2, 31, 32, 33, 16383, 16384, 16385, 70001])),
)


@given(shape=shapes, dtype=dtypes, out=dtypes, block_size=block_sizes, double_quant=st.booleans(), seed=seeds)
def test_matches_reference(device, shape, dtype, out, block_size, double_quant, seed):
    weight = peftops.nf4_quantize(normal(shape, dtype, seed, device), block_size=block_size, double_quant=double_quant)
    got = peftops.nf4_dequantize(weight, dtype=out)
    assert (got.shape, got.dtype) == (weight.shape, out)
    assert_exact(got, reference.nf4_dequantize(weight.packed, weight.absmax, block_size, weight.shape))
    assert peftops.nf4_dequantize(weight).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_like_torch_over_the_whole_range(device, dtype):
    """From subnormal to overflow, every lane."""
    absmax = torch.exp2(torch.linspace(-149, 127, 64 * 37)) * torch.linspace(1, 2, 64 * 37)
    absmax[5], absmax[17], absmax[33] = float("inf"), float("nan"), 0.0
    packed = torch.randint(0, 256, (absmax.numel() * 16,), dtype=torch.uint8)
    arguments = packed.to(device), absmax.to(device), None, None, 32, absmax.numel(), 32
    got = torch.ops.peftops.nf4_dequantize(*arguments, dtype)
    assert_exact(got.cpu(), reference.nf4_dequantize(packed, absmax, 32, torch.Size([absmax.numel(), 32])))


def test_dynamic_map(device):
    """All 256 values, sorted, with an exact zero: bitsandbytes' own, to the rounding of torch.linspace."""
    code = torch.arange(256, dtype=torch.uint8, device=device)
    ones, zero = torch.ones(1, device=device), torch.zeros(1, device=device)
    got = torch.ops.peftops.nf4_absmax(code, ones, zero).cpu()
    want = reference.dynamic_map()
    assert got[127] == 0 and got[255] == 1 and (got.diff() > 0).all()
    assert (got - want).abs().max() <= 2**-24 and ((got - want).abs() <= 2**-23 * want.abs()).all()


def test_bad_input(device):
    weight = peftops.nf4_quantize(torch.randn(8, 64, device=device))
    with pytest.raises(TypeError, match="weight must be an NF4Tensor, not a Tensor"):
        peftops.nf4_dequantize(torch.randn(8, 64))
    with pytest.raises(RuntimeError, match="dtype must be float32, bfloat16 or float16, not Double"):
        peftops.nf4_dequantize(weight, dtype=torch.float64)
    packed, absmax, scale, offset, block_size = weight._arguments
    op = torch.ops.peftops.nf4_dequantize
    with pytest.raises(RuntimeError, match="packed must have 512 elements, not 256"):
        op(packed, absmax, scale, offset, block_size, 16, 64, torch.float32)
    with pytest.raises(RuntimeError, match="absmax must have 8 elements, not 7"):
        op(packed, absmax[:7], scale, offset, block_size, 8, 64, torch.float32)
    with pytest.raises(RuntimeError, match="absmax must be Byte, not Float"):
        op(packed, absmax.float(), scale, offset, block_size, 8, 64, torch.float32)
    with pytest.raises(RuntimeError, match="absmax must be Float, not Byte"):
        op(packed, absmax, None, None, block_size, 8, 64, torch.float32)
    with pytest.raises(RuntimeError, match="absmax_scale and absmax_offset belong together"):
        op(packed, absmax, scale, None, block_size, 8, 64, torch.float32)


def test_registration(device):
    weight = peftops.nf4_quantize(torch.randn(8, 100, device=device))
    torch.library.opcheck(torch.ops.peftops.nf4_dequantize.default, (*weight._arguments, 8, 100, torch.bfloat16))
    torch.library.opcheck(torch.ops.peftops.nf4_absmax.default, weight._arguments[1:4])
