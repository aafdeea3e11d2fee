import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import peftops
import reference
from mxfp4_layer import unpack
from strategies import dtypes, layouts, normal, seeds, strided

some_rows, blocks = st.sampled_from([1, 2, 3, 16, 17]), st.sampled_from([1, 2, 3, 5, 17])


@given(
    n=some_rows,
    k=blocks.map(lambda b: 32 * b),
    dtype=dtypes,
    layout=layouts,
    seed=seeds,
    power=st.sampled_from([-200, -120, -20, 0, 0, 0, 12, 100]),
)
def test_matches_reference(device, n, k, dtype, layout, seed, power):
    """Blocks of all sizes, subnormal numbers among them."""
    weight = (
        normal((n, k), torch.float64, seed)
        * torch.exp(normal((n, k // 32), torch.float64, seed + 1)).repeat_interleave(32, 1)
        * 2.0**power
    )
    weight = weight.to(dtype).nan_to_num(posinf=1.0, neginf=-1.0)
    got = peftops.mxfp4_quantize(strided(weight.to(device), layout))
    codes, scales = reference.mxfp4_quantize(weight)
    assert torch.equal(got.scales.cpu(), scales) and torch.equal(unpack(got.blocks.cpu()), codes)
    assert got.blocks.shape == (n, k // 2) and (got.shape, got.dtype) == (weight.shape, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sign", [1, -1])
def test_ties_and_what_lies_beside_them(device, dtype, sign):
    """The middle of two numbers goes to the even code, its neighbours to the nearer number, and 6 is the most."""
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=dtype)
    beside = [torch.nextafter(middles, torch.full_like(middles, to)) for to in (0, 8)]
    row = torch.cat([middles, *beside, torch.tensor([4.0, 6.0, 7.0, 7.5, 0.0, -0.0], dtype=dtype)])
    row = sign * torch.nn.functional.pad(row, (0, 5))
    got = peftops.mxfp4_quantize(row[None].to(device))
    assert got.scales.item() == 127
    want = [0, 2, 2, 4, 4, 6, 6, 0, 1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6, 7, 6, 7, 7, 7]
    codes = unpack(got.blocks.cpu())[0]
    assert (codes[:25] & 7).tolist() == want
    assert torch.equal(codes >> 3, row.signbit().to(torch.uint8))  # signs stay, those of zeros too


@given(seed=seeds, dtype=dtypes)
def test_the_error_is_half_a_step_or_what_is_beyond_six(device, seed, dtype):
    weight = normal((8, 96), dtype, seed, device)
    got = peftops.mxfp4_quantize(weight)
    dense, scale = peftops.mxfp4_dequantize(got, dtype=torch.float32).double(), 2.0 ** (got.scales.double() - 127)
    v, error = weight.double() / scale.repeat_interleave(32, 1), (dense - weight.double()).abs()
    step = torch.where(v.abs() < 2, 0.5, torch.where(v.abs() < 4, 1.0, 2.0))
    most = torch.maximum(step / 2, v.abs() - 6)
    assert (error / scale.repeat_interleave(32, 1) <= most).all() and (v.abs() < 8).all()


def test_the_error_on_normal_weights_is_the_one_that_is_stated():
    weight = torch.randn(512, 4096, generator=torch.Generator().manual_seed(0))
    for quantize, share in ((peftops.mxfp4_quantize, "11.5"), (peftops.nf4_quantize, "9.2")):
        error = (quantize(weight).dequantize() - weight).norm() / weight.norm()
        assert f"{100 * error:.{len(share.split('.')[1])}f}" == share and f"{share} %" in peftops.mxfp4_quantize.__doc__


def test_registration(device):
    torch.library.opcheck(torch.ops.peftops.mxfp4_quantize.default, (torch.randn(8, 96, device=device),))


def test_same_bits_for_any_number_of_threads(device, threads):
    weight, runs = torch.randn(77, 1024, device=device), []
    for n in (1, 2, 3):
        threads(n)
        runs.append(peftops.mxfp4_quantize(weight))
    assert all(torch.equal(runs[0], run) for run in runs)


def test_bad_input(device):
    with pytest.raises(ValueError, match=r"mxfp4_quantize: weight is empty, shape \(0, 32\)"):
        peftops.mxfp4_quantize(torch.zeros(0, 32, device=device))
    for bad in (float("nan"), float("inf"), -float("inf")):
        weight = torch.randn(8, 96, device=device)
        weight[5, 40] = bad
        with pytest.raises(ValueError, match="holds a NaN or an infinity, the first in row 5, columns 32 to 63"):
            peftops.mxfp4_quantize(weight)
        blocks, scales = torch.ops.peftops.mxfp4_quantize(weight)
        assert scales[5].tolist()[1] == 255 and (scales == 255).sum() == 1 and not blocks[5, 16:32].any()
    with pytest.raises(RuntimeError, match="mxfp4_quantize: in_features must be a multiple of 32, but is 33"):
        peftops.mxfp4_quantize(torch.randn(4, 33, device=device))
    with pytest.raises(RuntimeError, match=r"weight must have two dims, \[out, in\], not shape \[64\]"):
        peftops.mxfp4_quantize(torch.randn(64, device=device))
    with pytest.raises(RuntimeError, match="weight must be float32, bfloat16 or float16, not Double"):
        peftops.mxfp4_quantize(torch.randn(4, 32, device=device).double())
