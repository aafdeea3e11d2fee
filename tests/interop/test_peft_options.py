"""Options of HF PEFT that put more into its files than A and B: what loads computes the same, and is written again."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import models
import peftops
from peftops.integrations.peft_files import CONFIG, WEIGHTS

peft = pytest.importorskip("peft")
ids = models.tokens(vocabulary=12)  # so that rows of single tokens matter


def untied():
    return models.llama(tied=False)


def resized():
    model = untied()
    torch.manual_seed(5)
    model.resize_token_embeddings(330, mean_resizing=False)
    return model


def theirs(build, **options):
    """A model of PEFT's, with random numbers in whatever trains."""
    model = peft.get_peft_model(build(), peft.LoraConfig(r=2, **{"target_modules": ["q_proj"]} | options))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


CASES = {
    "all biases": (models.qwen2, dict(bias="all", target_modules=["q_proj", "o_proj"])),
    "biases of lora": (models.qwen2, dict(bias="lora_only", target_modules=["q_proj", "o_proj"])),
    "all biases of gpt2": (models.gpt2, dict(bias="all", target_modules=["c_attn"], modules_to_save=["ln_f"])),
    "both kinds of bias": (
        models.bert,
        dict(bias="all", lora_bias=True, target_modules=["query", "value"], modules_to_save=["classifier"]),
    ),
    "a bias of B": (models.qwen2, dict(lora_bias=True)),
    "a bias of B alone": (untied, dict(lora_bias=True)),
    "a bias of convolutions": (models.vit, dict(bias="lora_only", target_modules=["projection"])),
    "rows of tied tokens": (models.qwen2, dict(trainable_token_indices=[5, 3])),
    "rows of both": (untied, dict(trainable_token_indices={"embed_tokens": [3, 5], "lm_head": [1]})),
    "tied modules": (models.qwen2, dict(ensure_weight_tying=True, modules_to_save=["embed_tokens"])),
    "tied factors": (models.qwen2, dict(ensure_weight_tying=True, target_modules=["embed_tokens"])),
}


@pytest.mark.parametrize("build, options", CASES.values(), ids=CASES)
def test_it_loads_exactly_and_goes_back(tmp_path, build, options):
    logits = lambda model: model(**models.inputs(build) | ({} if build is models.vit else {"input_ids": ids})).logits
    other = theirs(build, **options)
    other.save_pretrained(tmp_path / "theirs")
    want = logits(other)
    model = peftops.load(build(), tmp_path / "theirs")
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5)
    assert (want - logits(build())).abs().max() > 1e-3
    peftops.save(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(build(), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(again), want, rtol=1e-5, atol=1e-5)
    if build is not models.vit:
        peftops.merge(model)
        torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", [models.qwen2, untied], ids=["tied", "untied"])
def test_embeddings_that_were_saved_beside(tmp_path, build):
    """As the model has them they are no adapter's; others are a part of it."""
    other = theirs(build)
    other.save_pretrained(tmp_path, save_embedding_layers=True)
    assert peftops.load(build(), tmp_path)._peftops.configs["default"].modules_to_save == ()
    torch.manual_seed(3)
    nn.init.normal_(other.get_input_embeddings().weight, std=0.1)
    other.save_pretrained(tmp_path, save_embedding_layers=True)
    model = peftops.load(build(), tmp_path)
    torch.testing.assert_close(model(ids).logits, other(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_resized_vocabulary_says_what_to_do(tmp_path):
    other = theirs(resized)
    nn.init.normal_(other.get_input_embeddings().weight, std=0.1)
    other.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(ValueError, match=r"save_embedding_layers.*call model.resize_token_embeddings\(330\)"):
        peftops.load(untied(), tmp_path)
    model = peftops.load(resized(), tmp_path)
    torch.testing.assert_close(model(ids).logits, other(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("indices", [None, 3, [3], [3, 320], [3, -1], ["a", "b"], {"lm_head": [3, 5]}], ids=repr)
def test_rows_that_do_not_fit_are_refused_by_the_options_name(tmp_path, indices):
    theirs(untied, trainable_token_indices=[3, 5]).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(fields | {"trainable_token_indices": indices}))
    model = untied()
    with pytest.raises(ValueError, match="trainable_token_indices"):
        peftops.load(model, tmp_path)
    assert not hasattr(model, "_peftops")


def test_rows_beside_another_adapter_are_refused(tmp_path):
    theirs(untied, trainable_token_indices=[3, 5]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.zeros(2, 320)
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="trainable_token_indices of model.embed_tokens: it has another adapter"):
        peftops.load(untied(), tmp_path)


@pytest.mark.parametrize("config", [peftops.DoRAConfig, peftops.PiSSAConfig, peftops.LongLoRAConfig])
def test_methods_without_a_place_for_biases_say_so(config):
    for options in (dict(bias="all"), dict(lora_bias=True)):
        with pytest.raises(ValueError, match=f"{next(iter(options))}=.*has no biases of its own"):
            peftops.attach(models.qwen2(), config(**options))


def test_experts_have_no_biases():
    from moe_models import moe

    with pytest.raises(ValueError, match="lora_bias=True is not for experts"):
        peftops.attach(moe("Qwen3Moe"), peftops.LoRAConfig(r=2, lora_bias=True))


@pytest.mark.parametrize("how", ["linear", "cat", "svd", "ties", "dare_linear", "magnitude_prune"])
def test_adapters_that_pefts_weighting_made_are_plain_ones(tmp_path, how):
    """``add_weighted_adapter`` leaves one LoRA, whatever it was made of."""
    other = theirs(untied)
    other.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    dense = {} if how in ("linear", "cat", "svd") else {"density": 0.5}
    other.add_weighted_adapter(["default", "second"], [0.7, 0.4], "both", combination_type=how, **dense)
    other.set_adapter("both")
    other.save_pretrained(tmp_path, selected_adapters=["both"])
    model = peftops.load(untied(), tmp_path / "both")
    torch.testing.assert_close(model(ids).logits, other(ids).logits, rtol=1e-5, atol=1e-5)
