"""Weights that a configuration ties, once an adapter of one of them has been merged."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import models
import peftops
from peftops import HeadOnlyConfig, LoRAConfig

ids = models.tokens()
one_side = pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(r=4, target=["q_proj", "lm_head"]),
        LoRAConfig(r=4, target=["embed_tokens"]),
        LoRAConfig(r=4, target=["embed_tokens", "lm_head"]),
        LoRAConfig(r=4, modules_to_save=["lm_head"]),
        LoRAConfig(r=4, modules_to_save=["embed_tokens"]),
        HeadOnlyConfig(),
    ],
    ids=["head", "embedding", "both", "whole head", "whole embedding", "head only"],
)


def merged(model, config):
    peftops.attach(model, config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    peftops.merge(model)
    return peftops.detach(model, merged=True)


@one_side
def test_what_was_merged_is_what_is_read(tmp_path, config):
    from transformers import AutoModelForCausalLM

    model = merged(models.llama(tied=True), config)
    want = model(ids).logits
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    for read in (peftops.load_model(tmp_path, quantize=False), AutoModelForCausalLM.from_pretrained(tmp_path)):
        torch.testing.assert_close(read(ids).logits, want, rtol=0, atol=1e-5)
        read.tie_weights()
        torch.testing.assert_close(read(ids).logits, want, rtol=0, atol=1e-5)
    model.tie_weights()
    assert torch.equal(model(ids).logits, want)


def test_a_merge_that_leaves_the_tie_alone_leaves_it(tmp_path):
    model = merged(models.llama(tied=True), LoRAConfig(r=4))
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = peftops.load_model(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.parametrize("target", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_an_encoder_decoder_whose_configuration_ties_three_weights(tmp_path, target):
    """Its configuration also scales the outputs by it."""
    from transformers import T5ForConditionalGeneration

    model = merged(models.t5(), LoRAConfig(r=4, target=target))
    want = model(**models.inputs(models.t5)).logits
    model.tie_weights()
    assert torch.equal(model(**models.inputs(models.t5)).logits, want)
    model.save_pretrained(tmp_path)
    again = T5ForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**models.inputs(models.t5)).logits, want, rtol=0, atol=1e-4)


def edited(tmp_path, change):
    """The file of a tied model, edited; its configuration ties still."""
    models.llama(tied=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tensors


def test_no_tensor_of_a_file_is_overwritten_by_a_tie(tmp_path):
    tensors = edited(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    model = peftops.load_model(tmp_path, quantize=False)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(model.get_parameter(name), tensors[name])
    assert not model.config.tie_word_embeddings


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
        lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}),
    ],
    ids=["the same twice", "the other name"],
)
def test_a_file_that_names_a_tied_weight_otherwise(tmp_path, change):
    edited(tmp_path, change)
    model = peftops.load_model(tmp_path, quantize=False)
    assert torch.equal(model(ids).logits, models.llama(tied=True)(ids).logits)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings


def test_a_copy_keeps_its_tie():
    model = models.llama(tied=True)
    before = copy.deepcopy(model)
    merged(model, HeadOnlyConfig())
    before.tie_weights()
    assert before.config.tie_word_embeddings and before.lm_head.weight is before.model.embed_tokens.weight
