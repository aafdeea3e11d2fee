"""LLaMA-Adapter: which attentions get a prompt, what it starts as, and what is refused."""

import pytest
import torch

import models
import peftops
from peftops import LLaMAAdapterConfig
from peftops.methods import adapted_layers

ids = models.tokens()


def shaken(gate):
    model = peftops.attach(models.llama(), LLaMAAdapterConfig(tokens=3, layers=2, gate=gate))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    return model


def test_the_top_attentions_and_the_same_bits_at_first():
    base, model = models.llama(), peftops.attach(models.llama(), LLaMAAdapterConfig(layers=1))
    assert [path for path, _ in adapted_layers(model)] == ["model.layers.1.self_attn"]
    assert torch.equal(model(ids).logits, base(ids).logits)


def test_a_raw_gate_of_tanh_z_is_a_tanh_gate_of_z():
    squashed, raw = shaken("tanh"), shaken("raw")
    assert not torch.allclose(squashed(ids).logits, raw(ids).logits, atol=1e-3)
    with torch.no_grad():
        for _, layer in adapted_layers(raw):
            layer.adapters["default"].gate.tanh_()
    torch.testing.assert_close(squashed(ids).logits, raw(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options, sentence", [
    ({"tokens": 0}, "tokens must be a whole number from 1"), ({"layers": 0}, "layers must be a whole number from 1"),
    ({"gate": "relu"}, "gate must be one of 'tanh', 'raw', 'peft'"),
])  # fmt: skip
def test_wrong_options_get_a_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        LLaMAAdapterConfig(**options)


@pytest.mark.parametrize("build, layers, sentence", [
    (models.llama, 3, "layers=3, but LlamaForCausalLM has 2 attentions"),
    (models.llama, None, "layers=None, but LlamaForCausalLM has 2 attentions"),
    (models.mlp, 1, "layers=1, but Sequential has 0 attentions"),
])  # fmt: skip
def test_a_model_without_so_many_attentions(build, layers, sentence):
    with pytest.raises(ValueError, match=sentence):
        peftops.attach(build(), LLaMAAdapterConfig(layers=layers))


def test_pefts_variant_has_one_gate_a_layer_and_no_biases():
    model = peftops.attach(models.llama(), LLaMAAdapterConfig(tokens=3, layers=2, gate="peft"))
    assert peftops.summary(model).trainable == 2 * (3 * 64 + 1)
    with pytest.raises(TypeError, match="gate='peft' needs attentions with an o_proj without bias, which transformer"):
        peftops.attach(models.gpt2(), LLaMAAdapterConfig(layers=1, gate="peft"))


def test_qlora_after_it_is_refused():
    model = peftops.attach(models.llama(), LLaMAAdapterConfig(layers=1))
    with pytest.raises(ValueError, match="attach it before them"):
        peftops.attach(model, peftops.QLoRAConfig(r=4), name="second")
