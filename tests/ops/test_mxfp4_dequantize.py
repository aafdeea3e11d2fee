import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import peftops
import reference
from mxfp4_layer import pack, random_weight, unpack
from numerics import assert_exact
from strategies import dtypes, seeds

some_rows, blocks = st.sampled_from([1, 3, 17, 40]), st.sampled_from([1, 2, 3, 5, 17])


@given(n=some_rows, k=blocks.map(lambda b: 32 * b), dtype=dtypes, seed=seeds)
def test_matches_reference(device, n, k, dtype, seed):
    """Any code under any scale, infinities of what no dtype holds and NaN included."""
    weight = random_weight(n, k, seed, dtype, device, low=0, high=256)
    got = peftops.mxfp4_dequantize(weight)
    want = reference.mxfp4_dequantize(unpack(weight.blocks.cpu()), weight.scales.cpu())
    assert got.dtype == dtype and got.shape == (n, k)
    assert_exact(got.cpu(), want)
    assert torch.equal(got.cpu().signbit() & ~want.isnan(), want.signbit() & ~want.isnan())  # of zeros, too
    assert_exact(peftops.mxfp4_dequantize(weight, dtype=torch.float32).cpu(), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_code_under_each_scale(device, dtype):
    """All 4096 pairs of them, in one weight."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(256, 2)
    scales = torch.arange(256, dtype=torch.uint8)[:, None]
    weight = peftops.MXFP4Tensor.from_blocks(pack(codes).to(device), scales.to(device), dtype=dtype)
    got = peftops.mxfp4_dequantize(weight).cpu()
    assert_exact(got, reference.mxfp4_dequantize(codes, scales))
    assert got[255].isnan().all() and got[:255].isfinite().any(1).all() and got[127, 8].signbit()
    if dtype == torch.float32:
        assert got[0, 1] == 2.0**-128 and got[254, 2] == 2.0**127 and got[254, 7].isinf()


def test_transformers_reads_the_same(device):
    """Their own way from ``*_blocks`` and ``*_scales`` to numbers, which are transposed."""
    convert = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    weight = random_weight(48, 96, 3, torch.bfloat16)
    theirs = convert(weight.blocks.view(1, 48, 3, 16), weight.scales.view(1, 48, 3))
    assert torch.equal(theirs[0].T, peftops.mxfp4_dequantize(weight))


def test_requantising_what_was_dequantised_changes_no_number(device):
    once = peftops.mxfp4_quantize(torch.randn(64, 96, device=device))
    twice = peftops.mxfp4_quantize(peftops.mxfp4_dequantize(once))
    assert torch.equal(once, twice)


def test_registration(device):
    weight = random_weight(8, 96, 1, device=device)
    torch.library.opcheck(torch.ops.peftops.mxfp4_dequantize.default, (*weight._arguments, torch.bfloat16))


def test_same_bits_for_any_number_of_threads(device, threads):
    weight = random_weight(77, 1024, 1, device=device)
    runs = []
    for n in (1, 2, 3):
        threads(n)
        runs.append(peftops.mxfp4_dequantize(weight))
    assert all(torch.equal(runs[0], run) for run in runs)


def test_bad_input(device):
    with pytest.raises(TypeError, match="mxfp4_dequantize: weight must be an MXFP4Tensor, not a Tensor"):
        peftops.mxfp4_dequantize(torch.randn(4, 32))
    weight = random_weight(8, 96, 1, device=device)
    with pytest.raises(RuntimeError, match="dtype must be float32, bfloat16 or float16, not Double"):
        peftops.mxfp4_dequantize(weight, dtype=torch.float64)
    call, (codes, scales) = torch.ops.peftops.mxfp4_dequantize, weight._arguments
    with pytest.raises(RuntimeError, match=r"blocks must have shape \[8, 48\], not \[8, 47\]"):
        call(codes[:, 1:], scales, torch.float32)
    with pytest.raises(RuntimeError, match=r"scales must have shape \[out, in / 32\], not \[24\]"):
        call(codes, scales.flatten(), torch.float32)
    with pytest.raises(RuntimeError, match="scales must be uint8"):
        call(codes, scales.float(), torch.float32)
    make = peftops.MXFP4Tensor.from_blocks
    for wrong, sentence in (
        (lambda: make(codes.view(8, 3, 16).int(), scales), "from_blocks: blocks must be uint8, not torch.int32"),
        (lambda: make(codes, scales.view(-1)), r"from_blocks: scales must be \[out, in / 32\] or .*, not \[24\]"),
        (lambda: make(codes[:, :32], scales), r"from_blocks: blocks must have shape \[8, 3, 16\] or \[8, 48\] beside"),
    ):
        with pytest.raises(ValueError, match=sentence):
            wrong()
