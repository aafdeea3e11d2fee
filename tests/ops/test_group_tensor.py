import copy
import io
import pickle

import pytest
import torch
from torch import nn

import peftops
from peftops import GroupQuantTensor


class Model(nn.Module):
    def __init__(self, seed=0, **kw):
        super().__init__()
        torch.manual_seed(seed)
        self.weight = nn.Parameter(peftops.group_quantize(torch.randn(48, 64), **kw), requires_grad=False)

    def forward(self, x):
        return x @ peftops.group_dequantize(self.weight).float().t()


x = torch.linspace(-1, 1, 5 * 64).view(5, 64)
kinds = pytest.mark.parametrize("kw", [{}, {"bits": 3, "group_size": 16}, {"bits": 8, "symmetric": True}], ids=str)


@kinds
def test_it_stands_for_a_dense_weight(kw):
    for dtype in (torch.float32, torch.bfloat16):
        weight = peftops.group_quantize(torch.randn(48, 64).to(dtype), **kw)
        assert isinstance(weight, torch.Tensor) and isinstance(weight, GroupQuantTensor)
        assert (weight.shape, weight.dtype, weight.device.type) == ((48, 64), dtype, "cpu")
        assert weight.nbytes == sum(t.nbytes for t in (weight.packed, weight.scales, weight.zeros))
        assert not weight.requires_grad
        assert f"GroupQuantTensor(shape=(48, 64), dtype={dtype}, device='cpu', bits={weight.bits}" in repr(weight)
        assert "GroupQuantTensor" in repr(nn.Parameter(weight, False))


@kinds
def test_survives_copying_pickling_saving_and_loading(kw):
    model = Model(**kw)
    want = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), want)
        assert other.weight.packed.data_ptr() != model.weight.packed.data_ptr()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert torch.equal(loaded["weight"], model.weight.data)
    fresh = Model(seed=1, **kw)
    assert not torch.equal(fresh(x), want)
    fresh.load_state_dict(loaded)
    assert torch.equal(fresh(x), want)
    assert torch.equal(model.weight.detach().clone(), model.weight)


def test_loading_another_layout_raises_and_changes_nothing():
    model, before = Model(), Model()(x)
    for other in (Model(group_size=16), Model(bits=8)):
        with pytest.raises(RuntimeError, match=r"GroupQuantTensors of different \(shape, bits, group_size\)"):
            model.load_state_dict(other.state_dict())
    for other in (torch.randn(48, 64), peftops.nf4_quantize(torch.randn(48, 64))):
        with pytest.raises(
            RuntimeError, match=f"only be copied to a GroupQuantTensor, not with a {type(other).__name__}"
        ):
            model.load_state_dict({"weight": other})
    assert torch.equal(model(x), before)
    assert not torch.equal(model.weight.data, torch.zeros(48, 64))


def test_casting_and_moving_leave_the_codes_alone():
    model, codes = Model(), Model().weight.packed
    model.to(torch.bfloat16)
    assert model.weight.dtype == torch.bfloat16 and torch.equal(model.weight.packed, codes)
    assert model.weight.scales.dtype == model.weight.zeros.dtype == torch.float32
    with pytest.raises(TypeError, match="a GroupQuantTensor can stand for float32, bfloat16 or float16, not"):
        model.double()
    moved = model.weight.to("meta")
    assert isinstance(moved, GroupQuantTensor) and moved.device.type == moved.zeros.device.type == "meta"
    assert (moved.shape, moved.bits, moved.group_size) == ((48, 64), 4, 32)


@pytest.mark.parametrize(
    "operation",
    [
        lambda w: w * 2,
        lambda w: w.t(),
        lambda w: w[0],
        lambda w: nn.functional.linear(x, w),
        lambda w: w.mul_(2),
    ],
)
def test_an_operation_that_is_not_supported_raises_a_sentence(operation):
    with pytest.raises(NotImplementedError, match=r"not work on a GroupQuantTensor.*group_linear.*group_dequantize"):
        operation(Model().weight.data)


@kinds
def test_compiles_as_a_parameter_without_a_graph_break(kw):
    model = Model(**kw)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), model(x))


def test_other_zeros_share_codes_and_scales():
    weight = Model().weight.data
    other = weight.with_zeros(weight.zeros + 0.5)
    assert other.packed is weight.packed and other.scales is weight.scales
    shift = 0.5 * weight.scales.repeat_interleave(32, 1)
    torch.testing.assert_close(peftops.group_dequantize(other), peftops.group_dequantize(weight) - shift)
    with pytest.raises(ValueError, match=r"zeros must be float32 \[48, 2\], not torch.float32 \[48, 1\]"):
        weight.with_zeros(weight.zeros[:, :1])


def test_bad_parts():
    codes, one = torch.zeros(4, 64, dtype=torch.int64), torch.ones(4, 2)
    make = lambda codes=codes, scales=one, zeros=one, bits=4: GroupQuantTensor.from_codes(
        codes, scales, zeros, bits=bits
    )
    assert make().group_size == 32
    for bad, message in (
        (dict(bits=5), "bits must be 2, 3, 4 or 8, not 5"),
        (dict(codes=codes.float()), r"integers \[out, in\] or \[experts, out, in\], not torch.float32 \[4, 64\]"),
        (dict(codes=codes[0]), r"codes must be integers \[out, in\] or \[experts, out, in\], not torch.int64 \[64\]"),
        (dict(scales=one[:3]), r"scales must have shape \[4, groups\] with groups a divisor of 64, not \[3, 2\]"),
        (dict(scales=torch.ones(4, 3)), r"a divisor of 64, not \[4, 3\]"),
        (dict(zeros=one[:, :1]), r"zeros must have the shape of scales, \[4, 2\], not \[4, 1\]"),
        (
            dict(scales=torch.ones(4, 16), zeros=torch.ones(4, 16)),
            "group size must be a power of two from 8 to 4096, not 4",
        ),
        (dict(codes=codes + 16), "codes must be from 0 to 15, not from 16 to 16"),
        (dict(codes=codes - 1), "codes must be from 0 to 15, not from -1 to -1"),
        (dict(scales=0 * one), "scales must be finite and not 0"),
        (dict(zeros=one * float("nan")), "zeros finite"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**bad)
