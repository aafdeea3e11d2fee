import pytest
import torch
from torch import nn

import peftops
from peftops.nn import GroupConv2d, GroupLinear


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


def test_int8_is_asked_for():
    layer = GroupLinear(peftops.group_quantize(torch.randn(40, 256), group_size=128), compute="int8")
    x = torch.randn(9, 256)
    assert torch.equal(layer(x), peftops.group_linear(x, layer.weight, compute="int8"))


@pytest.mark.parametrize("kernel", [{"kernel_size": 1}, {"kernel_size": 1, "stride": 2},
                                    {"kernel_size": 1, "padding": 1},
                                    {"kernel_size": 3, "padding": 1}, {"kernel_size": (2, 4), "stride": (2, 1)},
                                    {"kernel_size": 3, "dilation": 2, "padding": (0, 3)}], ids=str)  # fmt: skip
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
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_bad_convolutions():
    with pytest.raises(ValueError, match=r"weight must have shape \[24, 32\], not \[24, 64\]"):
        GroupConv2d(nn.Conv2d(32, 24, 1), peftops.group_quantize(torch.randn(24, 64)))
    for how in ({"groups": 2}, {"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}):
        layer = GroupConv2d.from_dense(nn.Conv2d(64, 32, 3, **how))
        with pytest.raises(ValueError, match="only convolutions with one group and a number of zeros for padding"):
            layer(torch.randn(1, 64, 8, 8))
