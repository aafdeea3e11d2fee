from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import peftops
import reference
from group_layer import GroupLayer
from numerics import FP32, assert_sums, segment_max, takes_int8
from packed_linear_tests import (
    Int8Tests,
    PackedLinearTests,
    check_by_library,
    check_what_is_not_finite,
    on_any_cuda,
)
from strategies import bit_widths, dtypes, grouped_ins, layouts, normal, outs, ranks, rows, seeds, strided

leads = st.one_of(rows.map(lambda m: (m,)), st.sampled_from([(), (2, 3), (1, 0, 4), (2, 1, 9)]))


class TestGroupLinear(PackedLinearTests, Int8Tests):
    name, layer = "group_linear", partial(GroupLayer, pool=None)


@given(
    n=outs,
    group_k=grouped_ins(),
    lead=leads,
    bits=bit_widths,
    dtype=dtypes,
    bias=st.booleans(),
    layout=layouts,
    offset=st.sampled_from([0.0, 0.0, 5.0, -300.0]),
    seed=seeds,
)
def test_matches_reference(device, n, group_k, lead, bits, dtype, bias, layout, offset, seed):
    group, k = group_k
    GroupLayer(device, n, k, lead, dtype, seed, bits=bits, group=group, bias=bias, layout=layout, offset=offset).check()


@given(
    n=outs,
    group_k=grouped_ins(),
    lead=leads,
    bits=bit_widths,
    dtype=dtypes,
    adapter=dtypes,
    r=ranks,
    bias=st.booleans(),
    layout=layouts,
    seed=seeds,
)
def test_matches_reference_with_a_low_rank_term(device, n, group_k, lead, bits, dtype, adapter, r, bias, layout, seed):
    group, k = group_k
    GroupLayer(
        device,
        n,
        k,
        lead,
        dtype,
        seed,
        bits=bits,
        group=group,
        bias=bias,
        layout=layout,
        r=r,
        pool=None,
        adapter=adapter,
    ).check()


@given(n=outs, group_k=grouped_ins(), m=rows, dtype=dtypes, r=ranks, p=st.sampled_from([0.1, 0.5]), seed=seeds)
def test_dropout_matches_reference(device, n, group_k, m, dtype, r, p, seed):
    group, k = group_k
    layer = GroupLayer(device, n, k, (m,), dtype, seed, group=group, r=r, pool=None)
    torch.manual_seed(seed)
    drawn = torch.randint(0, 2**62, (), device=device).item()
    keep = reference.dropout_mask(drawn, m, k, p).double().to(device) / (1 - p)
    torch.manual_seed(seed)
    layer.check(keep, dropout_p=p, training=True)
    if not r:
        assert torch.equal(layer(dropout_p=p, training=True), layer())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [
        (300, 320, 576, 32),
        (270, 288, 544, 16),
        (257, 96, 40, 8),
        (2, 40, 9088, 64),
        (3, 40, 12288, 4096),
        (20, 40, 8192, 4096),
    ],
)
def test_matches_reference_beyond_one_block(device, dtype, shape):
    """More rows, columns, depth and group than one task, panel and packed piece of x hold."""
    m, n, k, group = shape
    GroupLayer(device, n, k, (m,), dtype, 7, group=group, bias=True).check()


@pytest.mark.parametrize(
    "bits, group, k",
    [
        (2, 32, 256),
        (2, 64, 384),
        (2, 256, 256),
        (3, 64, 512),
        (3, 512, 512),
        (4, 16, 2112),
        (4, 32, 320),
        (4, 64, 192),
        (4, 1024, 1024),
        (8, 8, 1056),
        (8, 16, 96),
        (8, 128, 384),
    ],
)
@pytest.mark.parametrize("m, dtype", [(1, torch.bfloat16), (9, torch.half), (16, torch.bfloat16), (35, torch.half)])
def test_whole_chunks_of_every_width(device, bits, group, k, m, dtype):
    """What CUDA multiplies on tensor cores: groups of a chunk, a half, a quarter; more than are staged at once."""
    GroupLayer(device, 37, k, (m,), dtype, 3, bits=bits, group=group, bias=True, offset=2.0).check()


@pytest.mark.parametrize("m", [1, 3, 9, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("k, group", [(320, 8), (104, 8), (320, 32)])
def test_what_is_not_finite_comes_through(device, m, dtype, bad, k, group):
    layer = GroupLayer(device, 64, k, (m,), dtype, 5, group=group, r=4, pool=None, adapter=torch.float32)
    check_what_is_not_finite(layer, bad, peftops.group_dequantize(layer.weight, dtype=torch.float32).double())


def test_a_nan_group_spoils_its_row_and_columns_only(device):
    packed, scales, zeros, bits, group = peftops.group_quantize(torch.randn(64, 64, device=device))._arguments
    scales[20, 1] = float("nan")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for m, int8 in ((1, False), (8, False), (20, False), (20, True)):
            x = torch.randn(m, 64, device=device).to(dtype)
            y = torch.ops.peftops.group_linear(x, packed, scales, zeros, bits, group, None, None, None, 1.0, int8)
            assert y[:, 20].isnan().all() and y.isnan().sum() == m
            dx = torch.ops.peftops.group_linear_backward(x, packed, scales, zeros, bits, group, None, None)
            assert dx[:, 32:].isnan().all() and dx[:, :32].isfinite().all()


@pytest.mark.parametrize("layout", ["plain", "transposed"])
def test_registration(device, layout):
    layer = GroupLayer(device, 64, 96, (20,), torch.float32, 1)
    x, g = strided(layer.x.detach(), layout), strided(layer.g, layout)
    u, v = torch.randn(20, 4, device=device), torch.randn(20, 4, device=device)
    A, B = torch.randn(4, 3, device=device), torch.randn(64, 4, device=device)
    weight = layer.weight._arguments
    op = torch.ops.peftops
    torch.library.opcheck(op.group_linear.default, (x, *weight, None, u, B, 0.5, False))
    torch.library.opcheck(op.group_linear.default, (x, *weight, None, None, None, 1.0, True))
    torch.library.opcheck(op.group_linear_backward.default, (g, *weight, v, A))


def test_bad_input(device):
    weight = peftops.group_quantize(torch.randn(64, 96, device=device))
    v, A = torch.randn(7, 4, device=device), torch.randn(4, 5, device=device)
    with pytest.raises(RuntimeError, match=r"lora_A must have shape \[4, groups\] with groups a divisor of 96"):
        torch.ops.peftops.group_linear_backward(torch.randn(7, 64, device=device), *weight._arguments, v, A)
    with pytest.raises(RuntimeError, match=r"the last dim of g must be 64, but its shape is \[7, 63\]"):
        torch.ops.peftops.group_linear_backward(torch.randn(7, 63, device=device), *weight._arguments, None, None)


@on_any_cuda
@given(
    n=outs,
    group_k=grouped_ins(),
    m=rows,
    bits=bit_widths,
    dtype=dtypes,
    r=st.sampled_from([0, 3, 16]),
    pool=st.sampled_from([None, "sum"]),
    bias=st.booleans(),
    layout=layouts,
    seed=seeds,
)
def test_by_library_matches_reference(device, n, group_k, m, bits, dtype, r, pool, bias, layout, seed):
    group, k = group_k
    check_by_library(
        GroupLayer(
            device,
            n,
            k,
            (m,),
            dtype,
            seed,
            bits=bits,
            group=group,
            r=r,
            pool=pool,
            bias=bias,
            adapter=torch.float32,
            layout=layout,
        )
    )


@on_any_cuda
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_by_library_beyond_one_block(device, bits, dtype):
    """More packs than a lane decodes at a time, in rows of whole words and in ragged ones."""
    for m, n, k in ((70, 320, 2112), (3, 33, 8232)):
        check_by_library(GroupLayer(device, n, k, (m,), dtype, 7, bits=bits, group=8, r=4, pool=None))


@given(m=rows, n=outs, group_k=grouped_ins(), bits=bit_widths, dtype=dtypes, seed=seeds)
def test_backward_of_a_repeated_factor(device, m, n, group_k, bits, dtype, seed):
    """dx = g W + v A', also where A's columns are repeated another number of times than a group is long."""
    group, k = group_k
    layer = GroupLayer(device, n, k, (m,), dtype, seed, bits=bits, group=group)
    for pool in {1, 8, group, 8 * (k // group)}:  # the last need not be a power of two
        v, A = normal((m, 3), torch.float32, seed + 7, device), normal((3, k // pool), torch.float32, seed + 8, device)
        dx = torch.ops.peftops.group_linear_backward(layer.g, *layer.weight._arguments, v, A)
        repeated = A.double().repeat_interleave(pool, 1)
        want = layer.g.double() @ layer.dense + v.double() @ repeated
        size = layer.g.double().abs() @ layer.size + v.double().abs() @ repeated.abs()
        assert_sums(dx, want, size, n + 11, layer.narrow_backward())


def int8_fits(layer):
    return takes_int8(layer.x, codes=layer.weight.bits == 4) and layer.weight.group_size >= 32


def int8_error(layer):
    """What rounding x to int8 may add: half a step of each row's segment."""
    if not int8_fits(layer):
        return layer.narrow_forward()
    step = segment_max(layer.x.detach().double(), -1, min(layer.weight.group_size, 128)) / 127
    return (step / 2 * (1 + 4 * FP32)) @ layer.dense.abs().T


@given(
    n=outs,
    group_k=grouped_ins(),
    m=rows,
    bits=bit_widths,
    dtype=dtypes,
    bias=st.booleans(),
    layout=layouts,
    offset=st.sampled_from([0.0, 0.0, 5.0]),
    seed=seeds,
)
def test_int8_matches_reference(device, n, group_k, m, bits, dtype, bias, layout, offset, seed):
    group, k = group_k
    layer = GroupLayer(device, n, k, (m,), dtype, seed, bits=bits, group=group, bias=bias, layout=layout, offset=offset)
    y = layer(compute="int8")
    want, _ = layer.reference()
    size, _ = layer.magnitudes()
    assert_sums(y, want, size, k + 8, int8_error(layer))


@given(n=st.sampled_from([1, 33, 96]), group_k=grouped_ins(), bits=bit_widths, seed=seeds)
def test_int8_is_exact_where_x_is_whole(device, n, group_k, bits, seed):
    """With a maximum of 127 in every 32 columns nothing is rounded: what remains is fp32."""
    group, k = group_k
    layer = GroupLayer(device, n, k, (9,), torch.float32, seed, bits=bits, group=group)
    with torch.no_grad():
        layer.x.copy_((20 * layer.x).round().clamp(-127, 127))
        layer.x[:, :: min(group, 32)] = 127
    assert_sums(layer(compute="int8"), *(f()[0] for f in (layer.reference, layer.magnitudes)), k + 8)


@pytest.mark.parametrize("group", [32, 128])
def test_int8_error_is_what_the_docstring_says(device, group):
    layer = GroupLayer(device, 512, 2048, (16,), torch.float32, 3, group=group)
    with torch.no_grad():
        want = layer.x.double() @ layer.dense.T
        error = ((layer(compute="int8").double() - want).norm() / want.norm()).item()
    if not int8_fits(layer):
        assert error < 1e-5
    else:
        assert 0.003 < error < (0.0055 if group == 32 else 0.0075)
