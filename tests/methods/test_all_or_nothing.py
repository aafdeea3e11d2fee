"""Attaching, loading and merging happen whole or not at all, whatever stops them and wherever."""

import copy
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import models
import peftops
from examples import VARIANTS, example_of
from peftops.attaching import METHODS, adapted_layers, hosts
from peftops.integrations.peft_files import WEIGHTS
from peftops.nn import AdaptedLayer, Prompted

examples = {c.__name__.removesuffix("Config").lower(): example_of(c) for c in METHODS} | VARIANTS
every_method = pytest.mark.parametrize("example", examples.values(), ids=examples)


class Seen:
    """All that a model is made of: the very modules, their hooks, what trains, and every number."""

    def __init__(self, model):
        self.modules = dict(model.named_modules())
        self.hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in self.modules.values()]
        self.trains = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
        self.numbers = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.own = set(vars(model))

    def assert_is(self, model):
        now = Seen(model)
        assert now.modules.keys() == self.modules.keys()
        assert all(now.modules[name] is module for name, module in self.modules.items())
        assert (now.hooks, now.trains, now.own) == (self.hooks, self.trains, self.own)
        assert all(same(now.numbers[name], tensor) for name, tensor in self.numbers.items())


def same(a, b):
    return torch.equal(a, b) or torch.allclose(a, b, 0, 0, equal_nan=True)


def interrupt_last(monkeypatch, model, config):
    """The last of the adapters is put in, and then comes Ctrl-C."""
    counted = []
    for kind in (AdaptedLayer, Prompted):
        put = kind.put.__func__
        monkeypatch.setattr(kind, "put", classmethod(lambda cls, *a, put=put: (counted.append(1), put(cls, *a))))
    peftops.attach(copy.deepcopy(model), config)
    last = len(counted)
    counted.clear()
    for kind in (AdaptedLayer, Prompted):
        put = kind.put.__func__

        def interrupted(cls, *a, put=put):
            put(cls, *a)
            if len(counted) == last:
                raise KeyboardInterrupt

        monkeypatch.setattr(kind, "put", classmethod(interrupted))
    return counted


@every_method
@pytest.mark.parametrize("beside", [False, True], ids=["first", "beside another"])
def test_an_interrupted_attach_changes_nothing(example, beside, monkeypatch):
    model = example.build()
    if beside:
        peftops.attach(model, example.config, name="other")
    seen = Seen(model)
    run = example.run(model)
    counted = interrupt_last(monkeypatch, model, example.config)
    with pytest.raises(KeyboardInterrupt):
        peftops.attach(model, example.config)
    assert counted
    seen.assert_is(model)
    assert torch.equal(example.run(model), run)
    monkeypatch.undo()
    peftops.attach(model, example.config)


@every_method
def test_a_file_that_does_not_fit_changes_nothing(example, tmp_path):
    """Neither a tensor too few nor one too many: a dense model stays dense."""
    peftops.save(peftops.attach(example.build(), example.config), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name = sorted(tensors)[-1]
    alone = sum(n.rpartition(".")[0] == name.rpartition(".")[0] for n in tensors) == 1  # without it: one layer less
    few = {n: t for n, t in tensors.items() if n != name}
    for wrong in (
        {**tensors, name: tensors[name].flatten()[:-1]},
        {**tensors, "base_model.model.strange.lora_A.weight": torch.zeros(2, 2)},
        *([] if alone else [few]),
    ):
        save_file(wrong, tmp_path / WEIGHTS)
        model = example.build()
        seen = Seen(model)
        with pytest.raises(ValueError, match=r"does not fit|unexpected tensor|is for another model|lacks|matches no"):
            peftops.load(model, tmp_path)
        seen.assert_is(model)


@every_method
def test_a_weight_that_cannot_be_quantised_is_named(example):
    """Its numbers are found out when others are in codes already."""
    model = example.build()
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and "head" not in name]
    name, layer = linear[-1]
    with torch.no_grad():
        layer.weight.flatten()[0] = float("inf")
    seen = Seen(model)
    try:
        peftops.attach(model, example.config)
    except (ValueError, RuntimeError) as error:
        assert name in str(error)
        seen.assert_is(model)
    else:
        assert not any(isinstance(p, peftops.NF4Tensor | peftops.GroupQuantTensor) for p in model.parameters())


@every_method
@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), 3e38], ids=str)
def test_a_start_that_is_not_finite_is_refused(example, bad):
    """Made of a weight (its singular vectors, the lengths of its rows) or a copy of it: it could never train."""
    model = example.build()
    chosen = [path for path, _ in hosts(peftops.attach(copy.deepcopy(model), example.config))]
    layers = {path: module for path, module in model.named_modules() if path in chosen and hasattr(module, "weight")}
    name = [*layers, "2"][0]
    with torch.no_grad():
        layers.get(name, nn.Linear(4, 4)).weight.fill_(bad)
    seen = Seen(model)
    try:
        peftops.attach(model, example.config)
    except ValueError as error:
        assert re.match(rf"(.* of )?{re.escape(name)}(:|,| must)", str(error)) and name in layers
        assert re.search("not finite|NaN or an infinity|too large|infinity", str(error))
        seen.assert_is(model)
    else:
        starts = [p for _, host in hosts(model) for p in host.adapters.parameters()]
        assert all(p.isfinite().all() for p in starts)


DECOMPOSING = [
    peftops.PiSSAConfig(r=4),
    peftops.PiSSAConfig(r=4, iterations=4),
    peftops.OLoRAConfig(r=4),
    peftops.LoftQConfig(r=4, iterations=1),
    peftops.LQLoRAConfig(r=4, iterations=1),
    peftops.DoRAConfig(r=4),
]


@pytest.mark.parametrize("config", DECOMPOSING, ids=lambda c: f"{type(c).__name__}-{c.r}")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_that_cannot_be_decomposed_is_named(config, bad, dtype):
    model = models.llama().to(dtype)
    *_, (name, layer) = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and "head" not in n]
    with torch.no_grad():
        layer.weight[-1, -3:] = bad
    seen = Seen(model)
    how = "too large for float32" if bad == 3e38 else "not finite"
    with pytest.raises(ValueError, match=f"starts from the weight of {name}, which is {how}"):
        peftops.attach(model, config)
    seen.assert_is(model)


@pytest.mark.parametrize("wrong", ["nan", "negative", "small", "int"])
@pytest.mark.parametrize("of", ["LQLoRA fisher", "LQLoRA moments", "LoftQ moments"])
def test_statistics_that_cannot_be_are_refused(of, wrong):
    """Numbers that a method weighs a decomposition by; with some of them a search would never end."""
    method, option = of.split()
    shape = (16, 64) if option == "fisher" else (64, 64)
    good = torch.ones(shape) if option == "fisher" else torch.eye(64)
    given = {"nan": good * float("nan"), "negative": -good, "small": good[:8, :8], "int": good.int()}[wrong]
    if (option, wrong) == ("fisher", "int"):
        return  # counts are as good
    model = nn.Sequential(nn.Linear(64, 16))
    seen = Seen(model)
    with pytest.raises(ValueError, match=f"{option} (of 0 must be|must have a tensor .* for 0)"):
        peftops.attach(model, getattr(peftops, f"{method}Config")(r=4, iterations=1, **{option: {"0": given}}))
    seen.assert_is(model)


def test_a_name_of_one_part_is_named():
    """ "2" occurs in many sentences, "elements 64 to 127" among them."""
    model = models.mlp()
    with torch.no_grad():
        model[2].weight[1, 2] = float("nan")
    with pytest.raises(ValueError, match="^2: nf4_quantize: weight holds a NaN"):
        peftops.attach(model, peftops.QLoRAConfig(r=4))


@pytest.mark.parametrize(
    "config",
    [peftops.QLoRAConfig(r=4), peftops.QALoRAConfig(r=4, group_size=16), peftops.LoRAConfig(r=4)],
    ids=lambda c: type(c).__name__,
)
def test_a_merge_that_fails_merges_nothing(config):
    """The last layer cannot be merged: the ones before it are as they were, and the message names it."""
    model = peftops.attach(models.llama(), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    *_, (path, layer) = adapted_layers(model)
    merge = layer.adapters["default"].merge_into

    def fails(*args, **kw):
        merge(*args, **kw)
        raise RuntimeError("out of memory")

    layer.adapters["default"].merge_into = fails
    seen, run = Seen(model), model(models.tokens()).logits
    with pytest.raises(RuntimeError, match=f"{path}: out of memory"):
        peftops.merge(model)
    seen.assert_is(model)
    assert not any(layer.is_merged for _, layer in adapted_layers(model))
    assert torch.equal(model(models.tokens()).logits, run)
    del layer.adapters["default"].merge_into
    peftops.merge(model, dense=True)


@every_method
@pytest.mark.parametrize("training", [True, False])
def test_a_merged_layer_trains_as_the_one_it_stands_for(example, training):
    if not example.merges:
        return
    model = peftops.attach(example.build(), example.config).train(training)
    peftops.merge(model, dense=True)
    assert {module.training for module in model.modules()} == {training}
