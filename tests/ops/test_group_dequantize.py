import pytest
import torch
from hypothesis import given

import peftops
import reference
from numerics import assert_exact
from strategies import bit_widths, dtypes, grouped_ins, normal, outs, seeds


def weight_of(n, k, group, bits, seed, dtype=torch.float32, device="cpu"):
    """Any codes, scales of both signs, zeros far outside the codes."""
    gen = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (n, k), generator=gen)
    scales, zeros = (
        normal((n, k // group), torch.float32, seed + 1),
        30 * normal((n, k // group), torch.float32, seed + 2),
    )
    parts = (t.to(device) for t in (codes, scales, zeros))
    return peftops.GroupQuantTensor.from_codes(*parts, bits=bits, dtype=dtype)


@given(n=outs, group_k=grouped_ins(), bits=bit_widths, dtype=dtypes, seed=seeds)
def test_matches_reference(device, n, group_k, bits, dtype, seed):
    group, k = group_k
    weight = weight_of(n, k, group, bits, seed, dtype, device)
    got = peftops.group_dequantize(weight)
    assert got.dtype == dtype and got.shape == (n, k)
    assert_exact(got.cpu(), reference.group_dequantize(*(t.cpu() for t in (weight.codes, weight.scales, weight.zeros))))
    other = peftops.group_dequantize(weight, dtype=torch.float32)
    assert_exact(got, other)


def test_requantising_what_was_dequantised_changes_no_code(device):
    once = peftops.group_quantize(torch.randn(64, 96, device=device))
    twice = peftops.group_quantize(peftops.group_dequantize(once))
    assert torch.equal(once.codes, twice.codes)


def test_registration(device):
    weight = peftops.group_quantize(torch.randn(8, 96, device=device))
    torch.library.opcheck(torch.ops.peftops.group_dequantize.default, (*weight._arguments, torch.bfloat16))


def test_same_bits_for_any_number_of_threads(device, threads):
    weight = peftops.group_quantize(torch.randn(777, 1024, device=device))
    runs = []
    for n in (1, 2, 3):
        threads(n)
        runs.append(peftops.group_dequantize(weight))
    assert all(torch.equal(runs[0], run) for run in runs)


def test_bad_input(device):
    with pytest.raises(TypeError, match="group_dequantize: weight must be a GroupQuantTensor, not a Tensor"):
        peftops.group_dequantize(torch.randn(4, 32))
    weight = peftops.group_quantize(torch.randn(8, 96, device=device))
    with pytest.raises(RuntimeError, match="dtype must be float32, bfloat16 or float16, not Double"):
        peftops.group_dequantize(weight, dtype=torch.float64)
    packed, scales, zeros, bits, group = weight._arguments
    call = torch.ops.peftops.group_dequantize
    with pytest.raises(RuntimeError, match=r"zeros must have shape \[8, 3\], not \[8, 2\]"):
        call(packed, scales, zeros[:, 1:], bits, group, torch.float32)
    with pytest.raises(RuntimeError, match=r"packed must have shape \[8, 48\], not \[8, 47\]"):
        call(packed[:, 1:], scales, zeros, bits, group, torch.float32)
    with pytest.raises(RuntimeError, match="zeros must be float32"):
        call(packed, scales, zeros.double(), bits, group, torch.float32)
    with pytest.raises(RuntimeError, match=r"scales must have shape \[out, groups\], not \[24\]"):
        call(packed, scales.flatten(), zeros, bits, group, torch.float32)
