import copy
import io
import pickle

import pytest
import torch
from torch import nn

import peftops
from peftops import NF4Tensor


class Model(nn.Module):
    def __init__(self, seed=0, **kw):
        super().__init__()
        torch.manual_seed(seed)
        self.weight = nn.Parameter(peftops.nf4_quantize(torch.randn(48, 64), **kw), requires_grad=False)
        self.A, self.B = nn.Parameter(torch.randn(4, 64)), nn.Parameter(torch.randn(48, 4))

    def forward(self, x):
        return peftops.nf4_linear(x, self.weight, lora_A=self.A, lora_B=self.B)


x = torch.linspace(-1, 1, 5 * 64).view(5, 64)
kinds = pytest.mark.parametrize("kw", [{}, {"double_quant": False}, {"block_size": 128}], ids=str)


@kinds
def test_it_stands_for_a_dense_weight(kw):
    for dtype in (torch.float32, torch.bfloat16):
        weight = peftops.nf4_quantize(torch.randn(48, 64).to(dtype), **kw)
        assert isinstance(weight, torch.Tensor) and isinstance(weight, NF4Tensor)
        assert (weight.shape, weight.dtype, weight.device.type) == ((48, 64), dtype, "cpu")
        assert weight.packed.dtype == torch.uint8 and weight.packed.shape == (48 * 32,)
        assert weight.absmax.dtype == torch.float32 and weight.absmax.shape == (48 * 64 // weight.block_size,)
        assert weight.double_quant == kw.get("double_quant", True)
        assert weight.nbytes == sum(t.nbytes for t in weight.parts().values()) < 48 * 64
        assert not weight.requires_grad
        assert "NF4Tensor(shape=(48, 64)" in repr(weight) and "NF4Tensor" in repr(nn.Parameter(weight, False))


def test_high_nibble_first():
    weight = torch.zeros(1, 64)
    weight[0, 0], weight[0, 1] = 1.0, -1.0
    assert peftops.nf4_quantize(weight).packed[0] == 0xF0


@kinds
def test_survives_copying_pickling_saving_and_loading(kw):
    model = Model(**kw)
    want = model(x)
    assert isinstance(model.weight, nn.Parameter) and type(model.weight) is type(model.weight.data)
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
    with pytest.raises(RuntimeError, match=r"different \(shape, block_size, double_quant\)"):
        model.load_state_dict(Model(block_size=128).state_dict())
    with pytest.raises(RuntimeError, match="can only be copied to an NF4Tensor, not with a Tensor"):
        model.load_state_dict({**model.state_dict(), "weight": torch.randn(48, 64)})
    assert torch.equal(model(x), before)


def test_casting_a_model_changes_what_it_stands_for_and_not_the_codes():
    model, codes = Model(), Model().weight.packed
    model.to(torch.bfloat16)
    assert model.weight.dtype == torch.bfloat16 and torch.equal(model.weight.packed, codes)
    assert model(x.bfloat16()).dtype == torch.bfloat16
    assert peftops.nf4_dequantize(model.weight).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="can stand for float32, bfloat16 or float16, not torch.float64"):
        model.double()


def test_moves_between_devices():
    moved = Model().weight.to("meta")
    assert isinstance(moved, NF4Tensor) and moved.device.type == moved.packed.device.type == "meta"
    assert (moved.shape, moved.block_size, moved.double_quant) == ((48, 64), 64, True)
    if torch.cuda.is_available():
        model = Model()
        assert torch.equal(model.cuda().cpu()(x), Model()(x))


@pytest.mark.parametrize(
    "operation",
    [
        lambda w: w * 2,
        lambda w: w + w,
        lambda w: w.t(),
        lambda w: w[0],
        lambda w: w.sum(),
        lambda w: w.view(2, -1),
        lambda w: x @ w,
        lambda w: nn.functional.linear(x, w),
        lambda w: w.mul_(2),
        lambda w: torch.cat([w, w]),
    ],
)
def test_an_operation_that_is_not_supported_raises_a_sentence(operation):
    with pytest.raises(NotImplementedError, match=r"does not work on an NF4Tensor.*nf4_linear.*nf4_dequantize"):
        operation(Model().weight.data)


@pytest.mark.parametrize("kw", [{}, {"double_quant": False}], ids=str)
def test_compiles_as_a_parameter_without_a_graph_break(kw):
    model = Model(**kw)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), model(x))
    compiled(x).sum().backward()
    grad, model.A.grad = model.A.grad, None
    model(x).sum().backward()
    assert torch.equal(model.A.grad, grad)


def test_trains_next_to_an_optimizer():
    model = Model()
    codes = model.weight.packed.clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2 and torch.equal(model.weight.packed, codes)
