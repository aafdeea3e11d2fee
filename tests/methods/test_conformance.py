"""Laws that every method obeys. A new file in peftops/methods is tested here without a new test."""

import copy
import dataclasses
import io
import re

import pytest
import torch
from torch import nn

import models
import peftops
from examples import VARIANTS, VECTORS, example_of
from peftops.attaching import METHODS, adapted_layers, hosts
from peftops.nn import AdaptedLayer, NF4Linear, Select

examples = {c.__name__.removesuffix("Config").lower(): example_of(c) for c in METHODS} | VARIANTS
every_method = pytest.mark.parametrize("example", examples.values(), ids=examples)


def methods_that(choose):
    chosen = {name: example for name, example in examples.items() if choose(example)}
    return pytest.mark.parametrize("example", chosen.values(), ids=chosen)


both_biases = pytest.mark.parametrize("bias", [True, False])
x = VECTORS


def shake(model, seed=1):
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)


def base_of(example, bias=True, build=None, **kw):
    """The base as the method leaves it: quantised, for QLoRA."""
    build = build or example.build
    base = build(bias=bias) if build is models.mlp else build(**kw)
    return peftops.detach(peftops.attach(base, example.config))


def adapted(example, bias=True, **kw):
    base = base_of(example, bias, **kw)
    return base, peftops.attach(copy.deepcopy(base), example.config)


def own_parameters(model, name="default"):
    return [p for _, host in hosts(model) if name in host.adapters for p in host.adapters[name].parameters()]


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@methods_that(lambda e: e.starts_as_base)
@both_biases
def test_starts_as_the_base_model(example, bias):
    base, model = adapted(example, bias)
    torch.testing.assert_close(example.run(model), example.run(base), rtol=0, atol=1e-6)


@every_method
def test_only_the_adapter_trains_and_all_of_it(example):
    _, model = adapted(example)
    shake(model)
    example.run(model).square().mean().backward()
    adapter = {id(p) for p in own_parameters(model)}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    for name, parameter in trained.items():
        assert id(parameter) in adapter, name
        assert parameter.dtype == torch.float32 and parameter.grad.abs().sum() > 0, name


@every_method
def test_an_optimizer_step_moves_the_adapter_and_nothing_else(example):
    base, model = adapted(example)
    shake(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    example.run(model).square().mean().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    assert same_state(peftops.detach(model), base)


@methods_that(lambda e: e.merges)
@both_biases
def test_merged_computes_the_same_and_unmerge_is_exact(example, bias):
    base, model = adapted(example, bias)
    shake(model)
    want, state = example.run(model), copy.deepcopy(model.state_dict())
    report = peftops.merge(model, dense=True)
    assert report.change > 0.01 and report.rounding < 1e-6
    torch.testing.assert_close(example.run(model), want, rtol=1e-4, atol=1e-4)
    peftops.unmerge(model)
    assert torch.equal(example.run(model), want)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert same_state(peftops.detach(model), base)


@every_method
def test_detach_leaves_what_was_there_before(example):
    base, model = adapted(example)
    shake(model)
    assert not torch.equal(example.run(model), example.run(base))
    peftops.detach(model)
    assert same_state(model, base) and torch.equal(example.run(model), example.run(base))
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in base.parameters()]
    assert not hasattr(model, "_peftops")


@methods_that(lambda e: not e.merges)
def test_what_cannot_be_merged_says_so_and_stays(example):
    _, model = adapted(example)
    shake(model)
    want = example.run(model)
    with pytest.raises(TypeError, match="cannot be merged into the weights"):
        peftops.merge(model)
    assert torch.equal(example.run(model), want)


@methods_that(lambda e: e.merges)
def test_detach_can_leave_the_merged_weights(example):
    _, model = adapted(example)
    shake(model)
    want = example.run(model)
    peftops.merge(model, dense=True)
    peftops.detach(model, merged=True)
    assert not any(isinstance(m, AdaptedLayer | NF4Linear) for m in model.modules())
    torch.testing.assert_close(example.run(model), want, rtol=1e-4, atol=1e-4)


@every_method
def test_disabled_is_the_base(example):
    base, model = adapted(example)
    shake(model)
    want = example.run(model)
    with peftops.disabled(model):
        assert torch.equal(example.run(model), example.run(base))
    assert torch.equal(example.run(model), want)
    with pytest.raises(RuntimeError), peftops.disabled(model):
        raise RuntimeError
    assert torch.equal(example.run(model), want)


@every_method
def test_adapters_side_by_side(example):
    """Each computes what it would alone; switching changes nothing but the choice."""
    base, model = adapted(example)
    shake(model, 1)
    first = example.run(model)
    peftops.attach(model, example.config, name="second")
    if example.starts_as_base:
        torch.testing.assert_close(example.run(model), example.run(base), rtol=0, atol=1e-5)
    torch.manual_seed(2)
    for parameter in own_parameters(model, "second"):
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    second = example.run(model)
    assert not torch.equal(first, second)
    peftops.activate(model, "default")
    assert torch.equal(example.run(model), first)
    peftops.activate(model, "second")
    assert torch.equal(example.run(model), second)
    peftops.detach(model, "second")
    assert torch.equal(example.run(model), first)
    assert same_state(peftops.detach(model), base)


@every_method
def test_only_the_active_adapter_trains(example):
    """As DistributedDataParallel needs it; what trains of an adapter is the same whenever it comes back."""
    _, model = adapted(example)
    trains = lambda: {name for name, p in model.named_parameters() if p.requires_grad}
    first = trains()
    peftops.attach(model, example.config, name="second")
    second = trains()
    assert second and not first & second
    assert {id(p) for p in model.parameters() if p.requires_grad} <= {id(p) for p in own_parameters(model, "second")}
    for name, want in (("default", first), ("second", second), ("second", second), ("default", first)):
        peftops.activate(model, name)
        assert trains() == want
        copied = copy.deepcopy(model)
        peftops.activate(copied, "second")
        assert {name for name, p in copied.named_parameters() if p.requires_grad} == second and trains() == want
    peftops.detach(model, "default")
    assert trains() == second


@every_method
def test_state_dict_round_trip(example):
    _, model = adapted(example)
    shake(model)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    _, other = adapted(example)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(example.run(other), example.run(model))


@every_method
def test_file_round_trip(example, tmp_path):
    base, model = adapted(example)
    shake(model)
    peftops.save(model, tmp_path)
    other = peftops.load(copy.deepcopy(base), tmp_path)
    assert torch.equal(example.run(other), example.run(model))
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    peftops.save(other, tmp_path / "again")
    assert (tmp_path / "again/adapter_model.safetensors").read_bytes() == first["adapter_model.safetensors"]


@every_method
def test_compiles_without_a_graph_break(example):
    torch._dynamo.reset()  # or it counts the models of other tests as recompilations
    _, model = adapted(example)
    shake(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(example.run(compiled), example.run(model), rtol=0, atol=0)
    example.run(compiled).sum().backward()


@every_method
def test_bf16_base_with_float32_adapter(example):
    base = base_of(example).to(torch.bfloat16)
    model = peftops.attach(base, example.config)
    shake(model)
    y = model(x.bfloat16()) if example.build is models.mlp else example.run(model)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@methods_that(lambda e: e.merges)
def test_what_is_cast_with_its_adapter_merges(example):
    """``model.to(bfloat16)`` casts the factors, too."""
    _, model = adapted(example)
    shake(model)
    model.to(torch.bfloat16)
    run = lambda: (model(x.bfloat16()) if example.build is models.mlp else example.run(model)).float()
    want = run()
    peftops.merge(model, dense=True)
    assert (run() - want).norm() < 0.02 * want.norm()


@every_method
def test_autocast_of_a_float32_model(example):
    """As ``Trainer(bf16=True)`` runs it: all gradients arrive, and what is computed is about the same."""
    _, model = adapted(example)
    shake(model)
    want = example.run(model)
    with torch.autocast("cpu", torch.bfloat16):
        y = example.run(model)
    assert (y.float() - want).norm() < 0.1 * want.norm()
    y.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():  # nothing that was kept under autocast is taken for what is computed without
        with torch.autocast("cpu", torch.bfloat16):
            example.run(model)
        torch.testing.assert_close(example.run(model), want, rtol=1e-4, atol=1e-4)


@every_method
def test_gradient_checkpointing_gives_the_same_gradients(example):
    _, model = adapted(example, build=models.llama if example.build is models.mlp else example.build)
    shake(model)
    ids = models.tokens()
    grads = []
    # What blocks share, as the images that LLaMA-Adapter projects, cannot be differentiated block by block.
    shared = getattr(example.config, "image_features", None) is not None
    for reentrant in (None, False) if shared else (None, False, True):
        model.zero_grad()
        if reentrant is not None:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.train()
        if reentrant:
            model.enable_input_require_grads()  # which this way needs, whatever the adapters
        with example.images(model):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for again in grads[1:]:
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(grads[0], again, strict=True))


@every_method
def test_survives_a_deep_copy(example):
    _, model = adapted(example)
    shake(model)
    copied = copy.deepcopy(model)
    assert torch.equal(example.run(copied), example.run(model))
    with peftops.disabled(copied):  # its switch is its own
        assert not torch.equal(example.run(copied), example.run(model))
    peftops.detach(copied)
    assert hasattr(model, "_peftops")


@every_method
def test_learns_what_another_adapter_computes(example):
    base, teacher = adapted(example)
    shake(teacher)
    target = example.run(teacher).detach()
    model = peftops.attach(base, example.config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=example.lr)
    losses = []
    for _ in range(60 if example.build is models.mlp else 30):
        loss = (example.run(model) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2, losses[::10]


@methods_that(lambda e: e.on_nf4)
def test_on_an_nf4_base(example):
    """Whatever the method, it works on a base in 4 bits, and merging into it reports what that costs."""
    base = base_of(examples["qlora"], build=example.build)
    model = peftops.attach(copy.deepcopy(base), example.config)
    shake(model)
    want = example.run(model)
    assert not torch.equal(want, example.run(base))
    want.sum().backward()
    if example.merges and example.requantizes:
        with pytest.warns(UserWarning, match="quantising the merged weights again errs by"):
            report = peftops.merge(model)
        assert report.quantized
        again = {path: error for path, error in report.layers.items() if error.quantized}
        # Of NF4: 5% to 20% of the merged weight, whose size the change bounds. A row that has only changed in length
        # gets nearly its old codes again, so methods without a product of factors have no lower bound.
        least = 0.05 if hasattr(example.config, "r") else 0
        for path, error in again.items():
            size = abs(1 - error.change), 1 + error.change
            assert least * size[0] < error.rounding < 0.2 * size[1], f"{path}: {error}"
        assert f"{len(report.layers)} layers merged" in str(report)
        assert all(isinstance(layer.base, NF4Linear) == (path in again) for path, layer in adapted_layers(model))
        got = example.run(model)
        assert not torch.equal(got, want) and (got - want).norm() < 0.5 * want.norm()
        peftops.unmerge(model)
        assert torch.equal(example.run(model), want)
    assert same_state(peftops.detach(model), base)


@methods_that(lambda e: not e.on_nf4)
def test_codes_that_it_cannot_change_are_refused(example):
    base = base_of(examples["qlora"], build=example.build)
    state, kinds = copy.deepcopy(base.state_dict()), [type(m) for m in base.modules()]
    with pytest.raises((TypeError, ValueError), match="quantised|a NF4Linear"):
        peftops.attach(base, example.config)
    assert not hasattr(base, "_peftops") and [type(m) for m in base.modules()] == kinds
    assert all(torch.equal(value, state[key]) for key, value in base.state_dict().items())


@methods_that(lambda e: hasattr(e.config, "alpha"))
@pytest.mark.parametrize("alpha", [0, -3.0])
def test_any_scaling_computes_or_is_refused(example, alpha):
    """One of 0 is none, and one below 0 a sign; some methods divide by it, or take its root."""
    model = example.build()
    kinds = [type(m) for m in model.modules()]
    try:
        peftops.attach(model, dataclasses.replace(example.config, alpha=alpha))
    except ValueError as error:
        assert re.match(".* needs a scaling above 0, and alpha makes that of [a-z0-9_.]+ (0|-)", str(error))
        assert [type(m) for m in model.modules()] == kinds and not hasattr(model, "_peftops")
        return
    y = example.run(model)
    y.sum().backward()
    assert y.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@methods_that(lambda e: hasattr(e.config, "r") and type(e.config) is not peftops.VeRAConfig)  # whose rank may be any
def test_a_rank_above_a_layers_size_is_allowed_and_said_once(example, tmp_path):
    """As in HF PEFT. It computes, merges and goes through a file as any other does."""
    config = dataclasses.replace(example.config, r=100)
    said = r"r=100 is more than [a-z0-9_.]+ can use and \d+ other layers: its weight is \d+ x \d+"
    with pytest.warns(UserWarning) as caught:
        model = peftops.attach(example.build(), config)
    assert [bool(re.match(said, str(w.message))) for w in caught] == [True]
    if example.starts_as_base and not config.quantizes and type(config) is not peftops.QALoRAConfig:
        torch.testing.assert_close(example.run(model), example.run(example.build()), rtol=1e-4, atol=1e-4)
    shake(model)
    want = example.run(model)
    peftops.save(model, tmp_path)
    torch.testing.assert_close(example.run(peftops.load(example.build(), tmp_path)), want, rtol=1e-4, atol=1e-3)
    if example.merges:
        peftops.merge(model, dense=True)
        torch.testing.assert_close(example.run(model), want, rtol=1e-3, atol=1e-3)


def narrower(example):
    """A model of other sizes than the one of an example."""
    if example.build is models.mlp:
        return nn.Sequential(nn.Linear(32, 96), nn.Tanh(), nn.Linear(96, 64))
    small = example.build().config
    small.update({"hidden_size": 32, "head_dim": 8})
    return type(example.build())(small).eval()


@every_method
def test_a_file_of_another_base_is_refused_and_changes_nothing(example, tmp_path):
    _, model = adapted(example)
    peftops.save(model, tmp_path)
    other = peftops.detach(peftops.attach(narrower(example), example.config))  # quantised, if the method does that
    state = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="does not fit|is for another model|quantised to .* already"):
        peftops.load(other, tmp_path)
    assert not hasattr(other, "_peftops") and all(torch.equal(v, state[k]) for k, v in other.state_dict().items())


@every_method
def test_a_module_trains_whole_beside_it(example, tmp_path):
    """``modules_to_save``, in place of what the method would do there; in the same file, and gone with the adapter."""
    part = "2" if example.build is models.mlp else "layers.1.mlp.up_proj"
    config = dataclasses.replace(example.config, modules_to_save=[part])
    base = models.mlp() if example.build is models.mlp else example.build()
    model = peftops.attach(copy.deepcopy(base), config)
    path, layer = next((path, layer) for path, layer in adapted_layers(model) if path.endswith(part))
    assert type(layer.adapters["default"]) is Select and torch.equal(layer.base.weight, base.get_submodule(path).weight)
    shake(model)
    before = example.run(model)
    peftops.save(model, tmp_path)
    again = peftops.load(copy.deepcopy(base), tmp_path)
    assert torch.allclose(example.run(again), before, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        layer.adapters["default"].weight.zero_()
    assert not torch.equal(example.run(model), before)
    peftops.detach(model)
    assert torch.equal(model.get_submodule(path).weight, base.get_submodule(path).weight)
