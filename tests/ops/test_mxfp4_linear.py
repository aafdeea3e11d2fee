import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import peftops
import reference
from mxfp4_layer import MXFP4Layer, random_weight
from numerics import FP32, assert_sums, segment_max, takes_int8
from packed_linear_tests import (
    Int8Tests,
    PackedLinearTests,
    check_by_library,
    check_what_is_not_finite,
    on_any_cuda,
)
from strategies import dtypes, layouts, outs, ranks, rows, seeds, strided

ins = st.sampled_from([32, 64, 96, 160, 288, 576])
leads = st.one_of(rows.map(lambda m: (m,)), st.sampled_from([(), (2, 3), (1, 0, 4), (2, 1, 9)]))


class TestMXFP4Linear(PackedLinearTests, Int8Tests):
    name, layer = "mxfp4_linear", MXFP4Layer


@given(data=st.data(), n=outs, k=ins, lead=leads, dtype=dtypes, bias=st.booleans(), layout=layouts, seed=seeds)
def test_matches_reference(device, data, n, k, lead, dtype, bias, layout, seed):
    r = data.draw(st.one_of(st.just(0), ranks), label="r")
    adapter = data.draw(st.sampled_from([dtype, torch.float32]), label="adapter dtype")
    weight = random_weight(n, k, seed, dtype, device, low=118, high=126)
    MXFP4Layer(device, n, k, lead, dtype, seed, weight=weight, r=r, adapter=adapter, bias=bias, layout=layout).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(300, 320, 576), (270, 288, 544), (2, 40, 9024), (3, 40, 12288), (1, 46, 4160)])
def test_matches_reference_beyond_one_block(device, dtype, shape):
    """More rows, columns and depth than one task, panel, packed piece of x and stage of scales hold."""
    m, n, k = shape
    MXFP4Layer(device, n, k, (m,), dtype, 7, r=24, bias=True, adapter=torch.float32).check()


@pytest.mark.parametrize("k", [64, 96, 192, 4032])
@pytest.mark.parametrize("n", [2, 33])
def test_one_row_against_rows_in_pairs(device, n, k):
    """Rows of the weight that end in the middle of a strip are read two at a time, if there are two."""
    layer = MXFP4Layer(device, n, k, (1,), torch.float32, n + k, bias=True)
    layer.check()
    for column in (0, k - 1):  # no lane of another row multiplies an infinity by nothing
        with torch.no_grad():
            layer.x.zero_()[0, column] = torch.inf
        assert torch.equal(layer().double().nan_to_num(nan=7.0), layer.reference()[0].nan_to_num(nan=7.0))


@given(n=outs, k=ins, m=rows, dtype=dtypes, r=ranks, p=st.sampled_from([0.05, 0.5]), seed=seeds)
def test_dropout_matches_reference(device, n, k, m, dtype, r, p, seed):
    layer = MXFP4Layer(device, n, k, (m,), dtype, seed, r=r, bias=True)
    torch.manual_seed(seed)
    drawn = int(torch.randint(0, 2**62, (), device=device))  # what the op will draw
    keep = reference.dropout_mask(drawn, m, k, p).double().to(device) / (1 - p)
    torch.manual_seed(seed)
    layer.check(keep, dropout_p=p, training=True)


@pytest.mark.parametrize("m", [1, 3, 9, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("k", [320, 96])
def test_what_is_not_finite_comes_through(device, m, dtype, bad, k):
    check_what_is_not_finite(MXFP4Layer(device, 64, k, (m,), dtype, 5, r=4, adapter=torch.float32), bad)


def test_a_nan_scale_spoils_its_row_and_columns_only(device):
    blocks, scales = peftops.mxfp4_quantize(torch.randn(64, 64, device=device))._arguments
    scales[20, 1] = 255
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for m, int8 in ((1, False), (8, False), (20, False), (20, True)):
            x = torch.randn(m, 64, device=device).to(dtype)
            y = torch.ops.peftops.mxfp4_linear(x, blocks, scales, None, None, None, 1.0, int8)
            assert y[:, 20].isnan().all() and y.isnan().sum() == m
            dx = torch.ops.peftops.mxfp4_linear_backward(x, blocks, scales, None, None, 0.0, None)
            assert dx[:, 32:].isnan().all() and dx[:, :32].isfinite().all()


@pytest.mark.parametrize("m", [1, 9])
@pytest.mark.parametrize("scale", [0, 1, 20, 230])
def test_extreme_scales(device, m, scale):
    """The smallest numbers and nearly the largest, whose products with x are in range."""
    weight = random_weight(40, 96, 3, device=device, low=scale, high=scale + 1)
    layer = MXFP4Layer(device, 40, 96, (m,), torch.float32, 1, weight=weight)
    with torch.no_grad():
        layer.x.mul_(2.0 ** (100 if scale < 127 else -100)), layer.g.mul_(2.0 ** (100 if scale < 127 else -100))
    layer.check()


@pytest.mark.parametrize("layout", ["plain", "transposed"])
def test_registration(device, layout):
    layer = MXFP4Layer(device, 64, 96, (20,), torch.float32, 1)
    x, g = strided(layer.x.detach(), layout), strided(layer.g, layout)
    u, v, seed = torch.randn(20, 4, device=device), torch.randn(20, 4, device=device), torch.tensor(3, device=device)
    A, B = torch.randn(4, 96, device=device), torch.randn(64, 4, device=device)
    weight, op = layer.weight._arguments, torch.ops.peftops
    torch.library.opcheck(op.mxfp4_linear.default, (x, *weight, None, u, B, 0.5, False))
    torch.library.opcheck(op.mxfp4_linear.default, (x, *weight, None, None, None, 1.0, True))
    torch.library.opcheck(op.mxfp4_linear_backward.default, (g, *weight, v, A, 0.5, seed))


@on_any_cuda
@given(
    n=outs, k=ins, m=rows, dtype=dtypes, r=st.sampled_from([0, 3, 16]), bias=st.booleans(), layout=layouts, seed=seeds
)
def test_by_library_matches_reference(device, n, k, m, dtype, r, bias, layout, seed):
    check_by_library(MXFP4Layer(device, n, k, (m,), dtype, seed, r=r, bias=bias, adapter=torch.float32, layout=layout))


def int8_error(layer):
    """What rounding x to int8 may add: half a step of each row's block."""
    if not takes_int8(layer.x):
        return layer.narrow_forward()
    step = segment_max(layer.x.detach().double(), -1, 32) / 127
    return (step / 2 * (1 + 4 * FP32)) @ layer.size.T


@given(n=outs, k=ins, m=rows, dtype=dtypes, bias=st.booleans(), seed=seeds)
def test_int8_matches_reference(device, n, k, m, dtype, bias, seed):
    layer = MXFP4Layer(device, n, k, (m,), dtype, seed, bias=bias)
    y, (want, _), (size, _) = layer(compute="int8"), layer.reference(), layer.magnitudes()
    # Codes are shifted by the zero 12 of 0 to 24: what is added up is no more than 13 halves of a scale.
    if takes_int8(layer.x):
        scale = segment_max(torch.where(layer.dense == 0, 0.0, layer.size), 1, 32)
        size = size + 13 * layer.x.detach().double().abs() @ scale.T
    assert_sums(y, want, size, k + 8, int8_error(layer))
