"""The names of the tensors in an adapter's file: whatever a model's modules are called, and whatever is around them."""

import copy
import re

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import models
import peftops
from peftops import IA3Config, LoRAConfig, NormTuningConfig, PrefixTuningConfig, TopLayersConfig
from peftops.nn import base_of, module_at, unwrapped

WEIGHTS = "adapter_model.safetensors"
ids = models.tokens()


def shake(model):
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model


def compiled(module):
    return torch.compile(module, backend="eager")


def block_in(wrap):
    def change(model):
        model.model.layers[0] = wrap(model.model.layers[0])
        return model

    return change


@pytest.mark.parametrize(
    "wrap",
    [compiled, nn.DataParallel, block_in(compiled), block_in(checkpoint_wrapper)],
    ids=["compiled", "parallel", "a compiled block", "a checkpointed block"],
)
@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(r=4),
        PrefixTuningConfig(tokens=3),
        TopLayersConfig(layers=2),
        LoRAConfig(r=4, target=["layers.0.mlp.up_proj"]),
    ],
    ids=["lora", "prefix", "layers", "one layer"],
)
def test_wrappers_leave_no_names(tmp_path, wrap, config):
    plain = shake(peftops.attach(models.llama(tied=False), config))
    want = plain(ids).logits
    peftops.save(plain, tmp_path / "plain")

    wrapped = wrap(models.llama(tied=False))
    before = [type(m) for m in wrapped.modules()]
    assert peftops.load(wrapped, tmp_path / "plain") is wrapped
    torch.testing.assert_close(unwrapped(wrapped)(ids).logits, want, rtol=1e-5, atol=1e-5)
    assert peftops.summary(wrapped).layers == peftops.summary(plain).layers
    peftops.save(wrapped, tmp_path / "wrapped")
    assert load_file(tmp_path / "wrapped" / WEIGHTS).keys() == load_file(tmp_path / "plain" / WEIGHTS).keys()
    peftops.detach(wrapped)
    assert [type(m) for m in wrapped.modules()] == before

    around = wrap(copy.deepcopy(plain))  # wrapped with its adapter
    peftops.save(around, tmp_path / "around")
    assert load_file(tmp_path / "around" / WEIGHTS).keys() == load_file(tmp_path / "plain" / WEIGHTS).keys()


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, checkpoint_wrapper])
def test_a_layer_is_found_through_wrappers(wrap):
    adapted = peftops.attach(nn.Sequential(nn.Sequential(nn.Linear(8, 8))), LoRAConfig(r=2))
    layer = adapted[0][0]
    adapted[0][0] = wrap(layer)
    adapted[0] = wrap(adapted[0])
    assert module_at(adapted, "0.0") is layer and base_of(wrap(layer)) is layer.base
    assert module_at(wrap(adapted), "0.0") is layer


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.replace(".model.model.", ".model._orig_mod.model."),
        lambda key: key.replace(".model.model.", ".model.module.model."),
        lambda key: f"module._orig_mod.{key}",
        lambda key: key.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
    ],
    ids=["compiled", "parallel", "outside", "checkpointed"],
)
def test_files_with_names_of_wrappers_are_read(tmp_path, rename):
    model = shake(peftops.attach(models.llama(), LoRAConfig(r=4)))
    peftops.save(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({rename(key): tensor.clone() for key, tensor in tensors.items()}, tmp_path / WEIGHTS)
    assert torch.equal(peftops.load(models.llama(), tmp_path)(ids).logits, model(ids).logits)
    save_file(tensors | {rename(key): tensor.clone() for key, tensor in tensors.items()}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="twice, once under the name of a wrapper"):
        peftops.load(models.llama(), tmp_path)


def test_what_is_in_ddp_already_is_refused(monkeypatch):
    monkeypatch.setattr(nn.parallel.DistributedDataParallel, "__init__", lambda self, m: nn.Module.__init__(self))
    with pytest.raises(ValueError, match="DistributedDataParallel .*attach first"):
        peftops.attach(nn.parallel.DistributedDataParallel(models.llama()), LoRAConfig(r=4))


def with_tensor(tmp_path, name, tensor, config=None):
    model = shake(peftops.attach(models.llama(tied=False), config or LoRAConfig(r=4, target=["embed_tokens"])))
    peftops.save(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS) | {f"base_model.model.{name}": tensor}
    save_file(tensors, tmp_path / WEIGHTS)
    return model


def test_the_models_own_weight_in_a_file_is_compared(tmp_path):
    """PEFT saves the weights of embeddings whose size is no longer that of the model it was loaded from."""
    weight = models.llama(tied=False).model.embed_tokens.weight.detach()
    model = with_tensor(tmp_path, "model.embed_tokens.base_layer.weight", weight.clone())
    assert torch.equal(peftops.load(models.llama(tied=False), tmp_path)(ids).logits, model(ids).logits)

    for other, words in ((weight + 1, "the model has another one"), (weight[:8].clone(), "the model's is .320, 64.")):
        with_tensor(tmp_path, "model.embed_tokens.base_layer.weight", other)
        with pytest.raises(ValueError, match=f"the weight of model.embed_tokens itself.*{words}"):
            peftops.load(models.llama(tied=False), tmp_path)
    with_tensor(tmp_path, "model.other.base_layer.weight", weight.clone())
    with pytest.raises(ValueError, match="this one has no model.other"):
        peftops.load(models.llama(tied=False), tmp_path)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.lora_A.zeros", "model.zeros", "something"])
def test_no_tensor_is_left_out_for_its_name(tmp_path, name):
    with_tensor(tmp_path, name, torch.ones(3))
    with pytest.raises(ValueError, match="unexpected"):
        peftops.load(models.llama(tied=False), tmp_path)


# Names that are ends of one another, and those that files and adapted layers use themselves.
NAMES = st.sampled_from(["a", "b", "ab", "norm", "input_norm", "lora_A", "base", "adapters", "module", "q", "weights"])
TREES = st.recursive(
    st.sampled_from(["linear", "norm"]),
    lambda inner: st.dictionaries(NAMES, inner, min_size=1, max_size=3),
    max_leaves=7,
)


class Tree(nn.Module):
    def __init__(self, children):
        super().__init__()
        for name, child in children.items():
            made = {"linear": lambda: nn.Linear(6, 6), "norm": lambda: nn.LayerNorm(6)}
            self.add_module(name, Tree(child) if isinstance(child, dict) else made[child]())

    def forward(self, x):
        for child in self.children():
            x = x + child(x)
        return x


def choices(tree):
    """Whole names of linear layers and of norms."""
    named = [(name, type(m)) for name, m in tree.named_modules()]
    return [[name for name, kind in named if kind is wanted] for wanted in (nn.Linear, nn.LayerNorm)]


@settings(max_examples=60, deadline=None)
@given(shape=st.dictionaries(NAMES, TREES, min_size=1, max_size=3), data=st.data())
def test_any_tree_of_modules_round_trips(tmp_path_factory, shape, data):
    torch.manual_seed(0)
    base, x = Tree(shape), torch.linspace(-1, 1, 6)[None]
    linear, norms = choices(base)
    configs = []
    if linear:
        chosen = data.draw(st.lists(st.sampled_from(linear), min_size=1, unique=True), "target")
        target, inputs = ("|".join(map(re.escape, names)) for names in (chosen, chosen[:1]))
        saved = data.draw(st.lists(st.sampled_from(linear + norms), max_size=2, unique=True), "modules_to_save")
        configs += [LoRAConfig(r=2, target=target, modules_to_save=saved), IA3Config(target, inputs)]
    if norms:
        configs.append(NormTuningConfig(norms=norms[:1]))
    folder = tmp_path_factory.mktemp("tree")
    for config in configs:
        model = copy.deepcopy(base)
        try:
            peftops.attach(model, config)
        except ValueError as error:
            assert "modules_to_save" in str(error)  # has all that the target means
            continue
        peftops.save(shake(model), folder)
        torch.testing.assert_close(peftops.load(copy.deepcopy(base), folder)(x), model(x), rtol=1e-6, atol=1e-6)
