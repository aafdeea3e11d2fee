"""Laws that every method obeys. A new file in peftops/methods is tested here without a new test."""

import copy
import io

import pytest
import torch
from torch import nn

import models
import peftops
from peftops.methods import METHODS, adapted_layers
from peftops.nn import NF4Linear

every_method = pytest.mark.parametrize("config_class", METHODS, ids=lambda c: c.__name__.removesuffix("Config").lower())
both_biases = pytest.mark.parametrize("bias", [True, False])
x = torch.linspace(-2, 2, 5 * 64).view(5, 64)


def shake(model, seed=1):
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)


def base_of(config_class, bias=True, build=models.mlp, **kw):
    """The base as the method leaves it: quantised, for QLoRA."""
    base = build(bias=bias) if build is models.mlp else build(**kw)
    return peftops.detach(peftops.attach(base, config_class()))


def adapted(config_class, bias=True, **kw):
    base = base_of(config_class, bias, **kw)
    return base, peftops.attach(copy.deepcopy(base), config_class())


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@every_method
@both_biases
def test_starts_as_the_base_model(config_class, bias):
    base, model = adapted(config_class, bias)
    torch.testing.assert_close(model(x), base(x), rtol=0, atol=1e-6)


@every_method
def test_only_the_adapter_trains_and_all_of_it(config_class):
    _, model = adapted(config_class)
    shake(model)
    model(x).square().mean().backward()
    adapter = {id(p) for _, layer in adapted_layers(model) for p in layer.adapters.parameters()}
    assert adapter
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in adapter), name
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == (id(parameter) in adapter), name


@every_method
@both_biases
def test_merged_computes_the_same_and_unmerge_is_exact(config_class, bias):
    base, model = adapted(config_class, bias)
    shake(model)
    want, state = model(x), copy.deepcopy(model.state_dict())
    report = peftops.merge(model, dense=True)
    assert report.change > 0.01 and report.rounding < 1e-6
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
    peftops.unmerge(model)
    assert torch.equal(model(x), want)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert same_state(peftops.detach(model), base)


@every_method
def test_detach_leaves_what_was_there_before(config_class):
    base, model = adapted(config_class)
    shake(model)
    assert not torch.equal(model(x), base(x))
    peftops.detach(model)
    assert same_state(model, base) and torch.equal(model(x), base(x))
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in base.parameters()]
    assert not hasattr(model, "_peftops")


@every_method
def test_detach_can_leave_the_merged_weights(config_class):
    _, model = adapted(config_class)
    shake(model)
    want = model(x)
    peftops.merge(model, dense=True)
    peftops.detach(model, merged=True)
    assert all(type(m) is nn.Linear for m in model if hasattr(m, "weight"))
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)


@every_method
def test_disabled_is_the_base(config_class):
    base, model = adapted(config_class)
    shake(model)
    want = model(x)
    with peftops.disabled(model):
        assert torch.equal(model(x), base(x))
    assert torch.equal(model(x), want)
    with pytest.raises(RuntimeError), peftops.disabled(model):
        raise RuntimeError
    assert torch.equal(model(x), want)


@every_method
def test_adapters_side_by_side(config_class):
    """Each computes what it would alone; switching changes nothing but the choice."""
    base, model = adapted(config_class)
    shake(model, 1)
    first = model(x)
    peftops.attach(model, config_class(), name="second")
    torch.testing.assert_close(model(x), base(x), rtol=0, atol=1e-6)
    torch.manual_seed(2)
    for _, layer in adapted_layers(model):
        for parameter in layer.adapters["second"].parameters():
            nn.init.normal_(parameter, std=0.2)
    second = model(x)
    assert not torch.equal(first, second)
    peftops.activate(model, "default")
    assert torch.equal(model(x), first)
    peftops.activate(model, "second")
    assert torch.equal(model(x), second)
    peftops.detach(model, "second")
    assert torch.equal(model(x), first)
    assert same_state(peftops.detach(model), base)


@every_method
def test_state_dict_round_trip(config_class):
    _, model = adapted(config_class)
    shake(model)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    _, other = adapted(config_class)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x), model(x))


@every_method
def test_file_round_trip(config_class, tmp_path):
    base, model = adapted(config_class)
    shake(model)
    peftops.save(model, tmp_path)
    other = peftops.load(copy.deepcopy(base), tmp_path)
    assert torch.equal(other(x), model(x))
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    peftops.save(other, tmp_path / "again")
    assert (tmp_path / "again/adapter_model.safetensors").read_bytes() == first["adapter_model.safetensors"]


@every_method
def test_compiles_without_a_graph_break(config_class):
    _, model = adapted(config_class)
    shake(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)
    compiled(x).sum().backward()


@every_method
def test_bf16_base_with_float32_adapter(config_class):
    base = base_of(config_class).to(torch.bfloat16)
    model = peftops.attach(base, config_class())
    shake(model)
    y = model(x.bfloat16())
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@every_method
def test_gradient_checkpointing_gives_the_same_gradients(config_class):
    _, model = adapted(config_class, build=models.llama)
    shake(model)
    ids = models.tokens()
    grads = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*grads, strict=True))


@every_method
def test_survives_a_deep_copy(config_class):
    _, model = adapted(config_class)
    shake(model)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), model(x))
    with peftops.disabled(copied):  # its switch is its own
        assert not torch.equal(copied(x), model(x))
    peftops.detach(copied)
    assert hasattr(model, "_peftops")


@every_method
def test_trains(config_class):
    _, model = adapted(config_class)
    target = torch.sin(torch.arange(5 * 32.0)).view(5, 32)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(60):
        loss = (model(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 3


@every_method
def test_on_an_nf4_base(config_class):
    """Whatever the method, it works on a base in 4 bits, and merging into it reports what that costs."""
    base = base_of(peftops.QLoRAConfig)
    model = peftops.attach(copy.deepcopy(base), config_class())
    shake(model)
    want = model(x)
    with pytest.warns(UserWarning, match="quantising the merged weights again errs by"):
        report = peftops.merge(model)
    assert report.quantized and 0.05 < report.rounding / (1 + report.change) < 0.2
    assert "2 layers merged" in str(report)
    assert all(isinstance(layer.base, NF4Linear) for _, layer in adapted_layers(model))
    assert not torch.equal(model(x), want) and (model(x) - want).norm() < 0.5 * want.norm()
    peftops.unmerge(model)
    assert torch.equal(model(x), want)
    assert same_state(peftops.detach(model), base)
