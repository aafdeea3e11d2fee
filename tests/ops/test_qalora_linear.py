import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import peftops
import reference
from group_layer import GroupLayer
from numerics import assert_sums
from packed_linear_tests import PackedLinearTests
from strategies import bit_widths, dtypes, grouped_ins, layouts, normal, outs, ranks, rows, seeds, strided

leads = st.one_of(rows.map(lambda m: (m,)), st.sampled_from([(), (2, 3), (1, 0, 4), (2, 1, 9)]))
pools = st.sampled_from(["sum", "mean", "peft"])


class TestQALoRALinear(PackedLinearTests):
    name, layer, drop = "qalora_linear", GroupLayer, {}


@given(
    data=st.data(),
    n=outs,
    group_k=grouped_ins(),
    lead=leads,
    bits=bit_widths,
    dtype=dtypes,
    r=ranks,
    pool=pools,
    bias=st.booleans(),
    layout=layouts,
    seed=seeds,
)
def test_matches_reference(device, data, n, group_k, lead, bits, dtype, r, pool, bias, layout, seed):
    group, k = group_k
    adapter = data.draw(st.sampled_from([dtype, torch.float32]), label="adapter dtype")
    GroupLayer(
        device,
        n,
        k,
        lead,
        dtype,
        seed,
        bits=bits,
        group=group,
        r=r,
        pool=pool,
        adapter=adapter,
        bias=bias,
        layout=layout,
    ).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(300, 320, 576, 32, 24), (70, 288, 544, 16, 300), (257, 96, 40, 8, 2), (3, 40, 12288, 32, 8)]
)
def test_matches_reference_beyond_one_block(device, dtype, shape):
    m, n, k, group, r = shape
    GroupLayer(device, n, k, (m,), dtype, 7, group=group, r=r, bias=True, adapter=torch.float32).check()


def test_the_change_of_the_weight_is_constant_in_each_group(device):
    layer = GroupLayer(device, 24, 96, (96,), torch.float32, 3, group=16, r=4)
    eye = torch.eye(96, device=device)
    with torch.no_grad():
        change = peftops.qalora_linear(eye, layer.weight, lora_A=layer.lora_A, lora_B=layer.lora_B)
        change = change - peftops.group_linear(eye, layer.weight)
    want = (layer.lora_B.double() @ layer.lora_A.double()).repeat_interleave(16, 1).T
    assert_sums(change.float(), want, want.abs() + layer.size.T, 120)


def test_conventions_differ_by_exact_factors(device):
    """By powers of two, so the bits are the same: sum = group_size * mean, and PEFT's = groups * mean."""
    layer = GroupLayer(device, 48, 256, (9,), torch.float32, 3, r=4)
    call = lambda pool, scaling: peftops.qalora_linear(
        layer.x, layer.weight, lora_A=layer.lora_A, lora_B=layer.lora_B, scaling=scaling, pool=pool
    )
    assert torch.equal(call("sum", 1.0), call("mean", 32.0))
    assert torch.equal(call("peft", 1.0), call("mean", 8.0))
    assert not torch.equal(call("sum", 1.0), call("peft", 1.0))


def test_pooling_is_that_of_peft_and_of_the_authors(device):
    """AvgPool1d over the group, times the number of groups in PEFT, from their definitions."""
    x = normal((7, 256), torch.float32, 1, device)
    pooled, _ = torch.ops.peftops.qalora_shrink(x, torch.randn(2, 8, device=device), 32)
    mean = torch.nn.functional.avg_pool1d(x.double()[:, None], 32).squeeze(1)
    assert_sums(pooled / 32, mean, reference.pooled(x.double().abs(), 32) / 32, 33)
    for pool, want in (("sum", 32 * mean), ("mean", mean), ("peft", 8 * mean)):
        torch.testing.assert_close(reference.pooled(x.double(), 32) * reference.pool_factor(pool, 32, 8), want)


def test_identity_at_the_start(device):
    layer = GroupLayer(device, 48, 96, (9,), torch.float32, 3, r=4, bias=True)
    with torch.no_grad():
        layer.lora_B.zero_()
    assert torch.equal(layer(), peftops.group_linear(layer.x, layer.weight, layer.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_keeps_what_is_pooled_and_a_thin_product(device, dtype):
    layer = GroupLayer(device, 256, 128, (100,), dtype, 1, r=8, bias=True, adapter=torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer()
    inputs = [layer.lora_A, layer.lora_B, *layer.weight.parts().values()]
    extra = [t for t in saved if not any(t.data_ptr() == i.data_ptr() for i in inputs)]
    assert sorted((tuple(t.shape), t.dtype) for t in extra) == [((100, 4), torch.float32), ((100, 8), torch.float32)]


@pytest.mark.parametrize("layout", ["plain", "transposed"])
def test_registration(device, layout):
    x = strided(torch.randn(20, 96, device=device), layout)
    torch.library.opcheck(torch.ops.peftops.qalora_shrink.default, (x, torch.randn(4, 3, device=device), 32))
    torch.library.opcheck(torch.ops.peftops.qalora_shrink.default, (x[None], torch.randn(40, 12, device=device), 8))


def test_bad_input(device):
    weight = peftops.group_quantize(torch.randn(64, 96, device=device))
    x, A, B = (torch.randn(*shape, device=device) for shape in ((5, 96), (4, 3), (64, 4)))
    with pytest.raises(ValueError, match="qalora_linear: pool must be one of 'sum', 'mean', 'peft', not 'max'"):
        peftops.qalora_linear(x, weight, lora_A=A, lora_B=B, pool="max")
    with pytest.raises(RuntimeError, match="group_size must be a power of two from 8 to 4096, not 24"):
        torch.ops.peftops.qalora_shrink(x, A, 24)
