"""LLaMA-Adapter: which attentions get a prompt, what it starts as, and what is refused."""

import pytest
import torch

import models
import peftops
from peftops import LLaMAAdapterConfig
from peftops.attaching import adapted_layers

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


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"tokens": 0}, "tokens must be a whole number from 1"),
        ({"layers": 0}, "layers must be a whole number from 1"),
        ({"gate": "relu"}, "gate must be one of 'tanh', 'raw', 'peft'"),
    ],
)
def test_wrong_options_get_a_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        LLaMAAdapterConfig(**options)


@pytest.mark.parametrize(
    "build, layers, sentence",
    [
        (models.llama, 3, "layers=3, but LlamaForCausalLM has 2 attentions"),
        (models.llama, None, "layers=None, but LlamaForCausalLM has 2 attentions"),
        (models.mlp, 1, "layers=1, but Sequential has 0 attentions"),
    ],
)
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


def test_v2_trains_norms_scales_and_biases_of_the_whole_model():
    base, model = models.llama(), peftops.attach(models.llama(), LLaMAAdapterConfig(tokens=3, layers=1, v2=True))
    assert torch.equal(model(ids).logits, base(ids).logits)
    kinds = {path: type(layer.adapters["default"]).__name__ for path, layer in adapted_layers(model)}
    linear = [p for p, m in base.named_modules() if isinstance(m, torch.nn.Linear) and p != "lm_head"]
    norms = [p for p, m in base.named_modules() if "RMSNorm" in type(m).__name__]
    assert len(linear) == 14 and len(norms) == 5
    want = dict.fromkeys(linear, "ScaleBias") | dict.fromkeys(norms, "NormTuning")
    assert kinds == want | {"model.layers.1.self_attn": "LLaMAAdapter"}
    adapters = {path: layer.adapters["default"] for path, layer in adapted_layers(model)}
    assert LLaMAAdapterConfig(tokens=3, v2=True).as_built(adapters).layers == 1


@pytest.mark.parametrize("position", ["output", "input"])
def test_v2_computes_the_definition(position):
    """y = s * (W x + b), or W (s * x) + b, folded into plain layers beside the same prompts."""
    config = LLaMAAdapterConfig(tokens=3, layers=2, v2=True, scale_position=position)
    model = peftops.attach(models.qwen2(), config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5)
    plain = models.qwen2()
    own = {path: layer.adapters["default"] for path, layer in adapted_layers(model)}
    with torch.no_grad():
        for path, adapter in own.items():
            layer, kind = plain.get_submodule(path), type(adapter).__name__
            if kind == "NormTuning":
                layer.weight.copy_(adapter.weight)
            elif kind == "ScaleBias":
                bias = adapter.bias + (0 if layer.bias is None else layer.bias)
                scale = adapter.scale
                layer.weight *= scale[:, None] if position == "output" else scale
                layer.bias = torch.nn.Parameter(bias * scale if position == "output" else bias)
        peftops.attach(plain, LLaMAAdapterConfig(tokens=3, layers=2))
        for path, layer in adapted_layers(plain):
            layer.adapters["default"].load_state_dict(own[path].state_dict())
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


def test_pefts_variant_has_neither_images_nor_v2():
    for options in ({"v2": True}, {"image_features": 12}):
        with pytest.raises(ValueError, match="gate='peft' has no images and no v2"):
            LLaMAAdapterConfig(gate="peft", **options)
    with pytest.raises(ValueError, match="scale_position must be one of 'output', 'input'"):
        LLaMAAdapterConfig(scale_position="both")
    with pytest.raises(ValueError, match="image_features must be a whole number from 1"):
        LLaMAAdapterConfig(image_features=0)


def test_another_adapter_finds_the_layers_in_an_adapted_attention(tmp_path):
    """By the names that they have without it: LoRA after LLaMA-Adapter is LoRA."""
    alone = peftops.attach(models.llama(), peftops.LoRAConfig(r=4))
    model = peftops.attach(shaken("tanh"), peftops.LoRAConfig(r=4), name="second")
    assert [p for p, m in adapted_layers(model) if "second" in m.adapters] == [p for p, _ in adapted_layers(alone)]
    assert torch.equal(model(ids).logits, models.llama()(ids).logits)
    assert peftops.summary(model).frozen_bytes == peftops.summary(alone).frozen_bytes
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "second" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    want = model(ids).logits
    assert peftops.merge(model, dense=True).change > 0.01
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-4)
    peftops.unmerge(model)
    peftops.save(model, tmp_path)
    other = peftops.load(shaken("tanh"), tmp_path, name="third")
    assert torch.equal(other(ids).logits, want)
    assert torch.equal(peftops.load(models.llama(), tmp_path)(ids).logits, want)
    peftops.activate(other, "default")
    assert torch.equal(other(ids).logits, shaken("tanh")(ids).logits)
    peftops.detach(model, "default")  # the one outside
    assert torch.equal(model(ids).logits, want)
    base = models.llama()
    peftops.detach(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
