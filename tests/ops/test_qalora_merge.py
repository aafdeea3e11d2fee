import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import peftops
import reference
from group_layer import GroupLayer
from numerics import assert_sums
from strategies import bit_widths, dtypes, grouped_ins, normal, outs, ranks, seeds

pools = st.sampled_from(["sum", "mean", "peft"])


def merged_layer(layer):
    """The layer with the adapter in its zeros."""
    merged = GroupLayer.__new__(GroupLayer)
    merged.__dict__.update(layer.__dict__)
    merged.weight = peftops.qalora_merge(
        layer.weight, layer.lora_A, layer.lora_B, scaling=layer.scaling, pool=layer.pool
    )
    merged.lora_A = merged.lora_B = None
    codes, scales, zeros = (t.double() for t in (merged.weight.codes, merged.weight.scales, merged.weight.zeros))
    merged.dense = reference.group_dequantize(codes, scales, zeros)
    merged.size = reference.group_dequantize(codes, scales, -zeros.abs())
    return merged


@given(n=outs, group_k=grouped_ins(), bits=bit_widths, dtype=dtypes, r=ranks, pool=pools, seed=seeds)
def test_matches_reference(device, n, group_k, bits, dtype, r, pool, seed):
    group, k = group_k
    layer = GroupLayer(device, n, k, (2,), dtype, seed, bits=bits, group=group, r=r, pool=pool)
    weight = layer.weight
    merged = peftops.qalora_merge(weight, layer.lora_A, layer.lora_B, scaling=0.375, pool=pool)
    scales, zeros, A, B = (t.detach().double() for t in (weight.scales, weight.zeros, layer.lora_A, layer.lora_B))
    want = reference.qalora_merge(scales, zeros, A, B, 0.375, pool, group)
    size = zeros.abs() + (reference.qalora_merge(scales, 0 * zeros, A.abs(), -B.abs(), 0.375, pool, group))
    assert_sums(merged.zeros, want, size, r + 4)
    assert merged.packed is weight.packed and merged.scales is weight.scales  # so bit-unchanged
    assert (merged.shape, merged.dtype, merged.bits, merged.group_size) == (weight.shape, dtype, bits, group)


@given(n=outs, group_k=grouped_ins(), bits=bit_widths, r=ranks, pool=pools, seed=seeds)
def test_merging_is_exact_in_float64(n, group_k, bits, r, pool, seed):
    """The definitions themselves: merged and unmerged forward differ by 1e-12 of what is summed."""
    group, k = group_k
    codes, scales, zeros = reference.group_quantize(normal((n, k), torch.float32, seed), bits, group, False)
    scales, zeros = scales.double(), zeros.double()
    x, A, B = (normal(s, torch.float64, seed + i) for i, s in enumerate(((3, k), (r, k // group), (n, r))))
    unmerged = x @ reference.group_dequantize(codes, scales, zeros).T + reference.qalora(x, A, B, 0.375, pool, group)
    new = reference.qalora_merge(scales, zeros, A, B, 0.375, pool, group)
    merged = x @ reference.group_dequantize(codes, scales, new).T
    size = x.abs() @ reference.group_dequantize(codes, scales, -new.abs()).T
    assert ((merged - unmerged).abs() <= 1e-12 * size.clamp(min=1)).all()


@given(
    n=outs,
    group_k=grouped_ins(),
    m=st.sampled_from([1, 4, 9]),
    bits=bit_widths,
    dtype=dtypes,
    r=ranks,
    pool=pools,
    seed=seeds,
)
def test_merged_equals_unmerged_to_rounding(device, n, group_k, m, bits, dtype, r, pool, seed):
    """Against the float64 result of the unmerged layer, with nothing allowed but rounding and that of zeros."""
    group, k = group_k
    layer = GroupLayer(device, n, k, (m,), dtype, seed, bits=bits, group=group, r=r, pool=pool, bias=True)
    merged = merged_layer(layer)
    want, _ = layer.reference()
    size = merged.magnitudes()[0] + layer.magnitudes()[0]
    assert_sums(merged(), want, size, k + r + 12, merged.narrow_forward())
    assert_sums(layer(), want, size, k + r + 12, layer.narrow_forward())


def test_merging_twice_and_back(device):
    layer = GroupLayer(device, 48, 96, (9,), torch.float32, 3, r=4)
    there = peftops.qalora_merge(layer.weight, layer.lora_A, layer.lora_B)
    back = peftops.qalora_merge(there, layer.lora_A, layer.lora_B, scaling=-1.0)
    bound = 4 * 2.0**-24 * (layer.weight.zeros.abs() + 2 * (there.zeros - layer.weight.zeros).abs())
    assert ((back.zeros - layer.weight.zeros).abs() <= bound).all()


def test_constant_groups_take_a_change_too(device):
    weight = peftops.group_quantize(torch.zeros(4, 64, device=device))
    A, B = torch.ones(1, 2, device=device), torch.full((4, 1), 0.25, device=device)
    merged = peftops.qalora_merge(weight, A, B)
    assert torch.equal(peftops.group_dequantize(merged), torch.full((4, 64), 0.25, device=device))


def test_registration(device):
    scales, zeros = torch.rand(16, 6, device=device) + 1, torch.randn(16, 6, device=device)
    A, B = torch.randn(4, 6, device=device), torch.randn(16, 4, device=device)
    torch.library.opcheck(torch.ops.peftops.qalora_merge.default, (scales, zeros, A, B, 0.5))
    torch.library.opcheck(torch.ops.peftops.qalora_merge.default, (scales, zeros, A.t().contiguous().t(), B, 0.5))


def test_same_bits_for_any_number_of_threads(device, threads):
    layer = GroupLayer(device, 777, 1024, (1,), torch.float32, 1, r=20)
    runs = []
    for n in (1, 2, 3):
        threads(n)
        runs.append(peftops.qalora_merge(layer.weight, layer.lora_A, layer.lora_B).zeros)
    assert all(torch.equal(runs[0], run) for run in runs)


def test_bad_input(device):
    weight = peftops.group_quantize(torch.randn(64, 96, device=device))
    A, B = torch.randn(4, 3, device=device), torch.randn(64, 4, device=device)
    call = peftops.qalora_merge
    with pytest.raises(TypeError, match="qalora_merge: weight must be a GroupQuantTensor, not a NF4Tensor"):
        call(peftops.nf4_quantize(torch.randn(64, 96)), A, B)
    with pytest.raises(ValueError, match=r"qalora_merge: lora_A must have shape \[r, 3\], not \[4, 2\]"):
        call(weight, A[:, 1:], B)
    with pytest.raises(ValueError, match=r"lora_B must have shape \[64, 4\], not \[63, 4\]"):
        call(weight, A, B[1:])
    with pytest.raises(ValueError, match="pool must be one of 'sum', 'mean', 'peft', not 'average'"):
        call(weight, A, B, pool="average")
    with pytest.raises(RuntimeError, match="lora_B must be float32, bfloat16 or float16, not Double"):
        call(weight, A, B.double())
    with pytest.raises(ValueError, match="a merged zero is not finite"):
        call(weight, A * float("nan"), B)
    zeros = torch.zeros(64, 2, device=device)
    with pytest.raises(RuntimeError, match=r"zeros must have shape \[64, 3\], not \[64, 2\]"):
        torch.ops.peftops.qalora_merge(weight.scales, zeros, A, B, 1.0)
