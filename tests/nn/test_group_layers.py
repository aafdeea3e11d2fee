from functools import partial

import pytest
import torch
from torch import nn

import peftops
from peftops.nn import GroupConv2d, GroupLinear, NF4Linear
from peftops.nn.low_rank import low_rank


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_computes_with_the_weight_it_stands_for(bias):
    dense = nn.Linear(96, 40, bias=bias)
    layer = GroupLinear.from_dense(dense, bits=8, group_size=16)
    assert isinstance(layer, nn.Linear) and (layer.in_features, layer.out_features) == (96, 40)
    x = torch.randn(3, 7, 96)
    want = nn.functional.linear(x, peftops.group_dequantize(layer.weight), dense.bias)
    torch.testing.assert_close(layer(x), want)
    assert torch.equal(layer(x), peftops.group_linear(x, layer.weight, layer.bias))
    assert not any(p.requires_grad for p in layer.parameters())
    assert "in_features=96, out_features=40" in repr(layer) and "bits=8, group_size=16" in repr(layer)
    other = GroupLinear.from_dense(nn.Linear(96, 40, bias=bias), bits=8, group_size=16)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize(
    "kind, quantize, op",
    [
        (GroupLinear, partial(peftops.group_quantize, group_size=128), peftops.group_linear),
        (NF4Linear, peftops.nf4_quantize, peftops.nf4_linear),
    ],
    ids=["group", "nf4"],
)
def test_int8_is_asked_for(kind, quantize, op):
    layer = kind(quantize(torch.randn(40, 256)), compute="int8")
    x, A, B = torch.randn(9, 256), torch.randn(2, 256), torch.randn(40, 2)
    want = op(x, layer.weight, compute="int8")
    assert torch.equal(layer(x), want)
    assert torch.equal(layer.with_codes(layer.weight, None)(x), want)  # an option of the layer, not of its codes
    assert torch.equal(low_rank(layer, x, A, B, 1.0), op(x, layer.weight, lora_A=A, lora_B=B, compute="int8"))


@pytest.mark.parametrize(
    "kernel",
    [
        {"kernel_size": 1},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 1, "padding": 1},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (2, 4), "stride": (2, 1)},
        {"kernel_size": 3, "dilation": 2, "padding": (0, 3)},
    ],
    ids=str,
)
@pytest.mark.parametrize("batch", [(2,), ()])
def test_a_convolution_is_that_of_the_weight_it_stands_for(kernel, batch):
    conv = nn.Conv2d(32, 24, **kernel)
    layer = GroupConv2d.from_dense(conv, bits=8, group_size=32)
    x = torch.randn(*batch, 32, 9, 11, requires_grad=True)
    dense = nn.Conv2d(32, 24, **kernel)
    with torch.no_grad():
        dense.weight.copy_(peftops.group_dequantize(layer.weight).view_as(conv.weight))
        dense.bias.copy_(conv.bias)
    y, want = layer(x), dense(x)
    torch.testing.assert_close(y, want)
    g = torch.randn_like(want)
    torch.testing.assert_close(*(torch.autograd.grad(t, x, g)[0] for t in (y, want)))
    assert set(layer.state_dict()) == {"weight.packed", "weight.scales", "weight.zeros", "bias"}


def test_bad_convolutions():
    with pytest.raises(ValueError, match=r"weight must have shape \[24, 32\], not \[24, 64\]"):
        GroupConv2d(nn.Conv2d(32, 24, 1), peftops.group_quantize(torch.randn(24, 64)))
    for how in ({"groups": 2}, {"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}):
        layer = GroupConv2d.from_dense(nn.Conv2d(64, 32, 3, **how))
        with pytest.raises(ValueError, match="only convolutions with one group and a number of zeros for padding"):
            layer(torch.randn(1, 64, 8, 8))


METHODS = [
    peftops.LoRAConfig(r=4),
    peftops.LoRAConfig(r=4, dropout=0.1),
    peftops.DoRAConfig(r=4),
    peftops.IA3Config(),
    peftops.VeRAConfig(r=8),
    peftops.MultiLoRAConfig(r=4),
    peftops.TiedLoRAConfig(r=4),
    peftops.GLoRAConfig(r=4),
    peftops.LoRAFAConfig(r=4),
]


@pytest.mark.filterwarnings("ignore:.*layers merged")
@pytest.mark.parametrize("config", METHODS, ids=lambda config: type(config).__name__)
def test_methods_train_on_a_group_quantised_base_and_merge(config):
    torch.manual_seed(0)
    layer = GroupLinear.from_dense(nn.Linear(64, 48), bits=8, group_size=16)
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(48, 5))
    x = torch.randn(30, 64)
    before = model(x)
    peftops.attach(model, config)
    assert torch.allclose(model(x), before, atol=1e-5)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    target = torch.randn(30, 5)
    losses = []
    for _ in range(20):
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    want = model(x).detach()
    report = peftops.merge(model)
    assert isinstance(model[0].base, GroupLinear) and report.quantized and report.rounding < 0.01
    torch.testing.assert_close(model(x), want, atol=0.05, rtol=0)  # 8 bits, rounded again
    peftops.unmerge(model)
    assert torch.equal(model(x), want)
    peftops.merge(model, dense=True)
    assert type(model[0].base) is nn.Linear
    torch.testing.assert_close(model(x), want, atol=1e-5, rtol=1e-5)


def test_qlora_leaves_a_group_quantised_base_alone():
    model = nn.Sequential(GroupLinear.from_dense(nn.Linear(64, 48)), nn.Linear(48, 32))
    peftops.attach(model, peftops.QLoRAConfig(r=4))
    assert isinstance(model[0].base, GroupLinear) and isinstance(model[1].base, peftops.nn.NF4Linear)
    assert peftops.summary(model).frozen_bytes == sum(layer.base.weight.nbytes for layer in model)
    model(torch.randn(3, 64)).sum().backward()
