"""What code that knows nothing of adapters does to a model that has them."""

import copy

import pytest
import torch
from torch import nn

import models
import peftops
from peftops import HeadOnlyConfig, LoRAConfig, NormTuningConfig
from peftops.attaching import adapted_layers

ids = models.tokens()
on_vocabulary = pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(r=4, target=["lm_head"]),
        LoRAConfig(r=4, target=["embed_tokens"]),
        HeadOnlyConfig(),
        LoRAConfig(r=4, modules_to_save=["embed_tokens"]),
        LoRAConfig(r=4, target=["embed_tokens", "lm_head"]),
    ],
    ids=["head", "embedding", "head only", "whole embedding", "both"],
)


def trained(model, config):
    peftops.attach(model, config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model


@on_vocabulary
@pytest.mark.parametrize("tied", [True, False])
def test_weights_can_be_tied_again(config, tied):
    base = models.llama(tied=tied)
    model = trained(copy.deepcopy(base), config)
    want = model(ids).logits
    model.tie_weights()
    assert torch.equal(model(ids).logits, want)
    peftops.detach(model)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert torch.equal(model(ids).logits, base(ids).logits)


def test_a_merged_weight_is_not_tied_away():
    model = trained(models.llama(tied=True), HeadOnlyConfig())
    peftops.merge(model)
    with pytest.raises(ValueError, match="merged into this weight; unmerge it"):
        model.tie_weights()


@on_vocabulary
@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_with_adapters_is_not_resized(config, tied):
    model = trained(models.llama(tied=tied), config)
    want = model(ids).logits
    with pytest.raises(ValueError, match="resize_token_embeddings before you attach"):
        model.resize_token_embeddings(328)
    assert torch.equal(model(ids).logits, want)
    with pytest.raises(ValueError, match="resize_token_embeddings before you attach"):
        copy.deepcopy(model).resize_token_embeddings(328)
    peftops.detach(model).resize_token_embeddings(328, mean_resizing=False)
    assert model(ids).logits.shape[-1] == 328


def test_one_that_has_none_is(tmp_path):
    model = trained(models.llama(), LoRAConfig(r=4))
    want = model(ids).logits
    model.resize_token_embeddings(328, mean_resizing=False)
    assert torch.equal(model(ids).logits[..., :320], want)
    peftops.save(model, tmp_path)
    assert torch.equal(peftops.load(models.llama(), tmp_path)(ids).logits, want)


@pytest.mark.parametrize(
    "build, config",
    [
        (models.llama, LoRAConfig(r=2)),
        (models.gpt2, LoRAConfig(r=2)),
        (models.bert, NormTuningConfig()),
        (models.llama, LoRAConfig(r=2, target=["embed_tokens"])),
        (models.llama, peftops.LLaMAAdapterConfig(layers=1)),
        (models.vit, LoRAConfig(r=2, target=["projection"])),
        (models.llama, peftops.QLoRAConfig(r=2)),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_any_attribute_can_be_asked_for(build, config):
    for path, layer in adapted_layers(peftops.attach(build(), config)):
        for name in ("weight", "bias", "in_features", "out_features", "num_embeddings", "anything"):
            assert hasattr(layer, name) in (True, False), path
        if hasattr(layer.base, "in_features"):
            assert (layer.in_features, layer.out_features) == (layer.base.in_features, layer.base.out_features)


@pytest.mark.parametrize("name", ["", "a.b", "training", "keys", "forward", "_modules", "T_destination", None, 3])
def test_names_that_modules_have_already_are_refused(name):
    model = models.mlp()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="an adapter's name must be plain"):
        peftops.attach(model, LoRAConfig(r=2), name=name)
    assert not hasattr(model, "_peftops") and model.state_dict().keys() == state.keys()


@pytest.mark.parametrize("name", ["default", "base", "adapters", "weight", "lora_A", "a b", "ä", "0"])
def test_other_names_are_not(name, tmp_path):
    model = peftops.attach(models.mlp(), LoRAConfig(r=2), name=name)
    torch.manual_seed(0)
    nn.init.normal_(next(p for n, p in model.named_parameters() if "lora_B" in n))
    x = torch.ones(1, 64)
    peftops.save(model, tmp_path)
    assert torch.equal(peftops.load(models.mlp(), tmp_path, name=name)(x), model(x))
