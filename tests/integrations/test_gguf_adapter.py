"""Adapters in GGUF: read back by gguf's own reader, they are what merging changes of llama.cpp's own tensors."""

import pytest
import torch
from torch import nn

import models
import peftops
from gguf_file import write_gguf
from proves import proves

gguf = pytest.importorskip("gguf")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]  # which write_gguf writes in float32


def shaken(model):
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model


def tensors(path):
    """As numpy has them; gguf's shapes are the other way round."""
    return {t.name: torch.tensor(t.data) for t in gguf.GGUFReader(path).tensors}


def field(path, key):
    return gguf.GGUFReader(path).fields[key].contents()


@proves("llama.cpp", save="adapters: `save_gguf`")
@pytest.mark.parametrize(
    "build, config",
    [
        (models.llama, peftops.LoRAConfig(r=4, target=ATTENTION)),
        (models.mistral, peftops.LoRAConfig(r=4, alpha=3.0, rslora=True, target=ATTENTION)),
        (
            models.llama,
            peftops.LoRAConfig(r=4, target=ATTENTION, rank_pattern={"k_proj": 3}, alpha_pattern={"v_proj": 5}),
        ),
        (models.llama, peftops.LoRAConfig(r=4, alpha=0.0, target=ATTENTION)),
        (models.llama, peftops.PiSSAConfig(r=4, target=ATTENTION)),
        (models.llama, peftops.MultiLoRAConfig(r=2, target=ATTENTION)),
    ],
    ids=["lora", "rslora", "patterns", "alpha 0", "pissa", "multilora"],
)
def test_it_is_what_merging_changes(tmp_path, build, config):
    base, file = tmp_path / "base.gguf", tmp_path / "adapter.gguf"
    model = build()
    write_gguf(base, model)
    shaken(peftops.attach(model, config))
    peftops.save_gguf(model, file)
    peftops.merge(model)
    write_gguf(tmp_path / "merged.gguf", peftops.detach(model, merged=True))
    before, after, adapter = tensors(base), tensors(tmp_path / "merged.gguf"), tensors(file)
    assert field(file, "general.type") == "adapter" and field(file, "adapter.type") == "lora"
    assert field(file, "general.architecture") == "llama"
    alpha, found = field(file, "adapter.lora.alpha"), set()
    assert alpha != 0  # llama.cpp would not scale
    for name, weight in before.items():
        if f"{name}.lora_a" in adapter:
            A, B = adapter[f"{name}.lora_a"], adapter[f"{name}.lora_b"]
            torch.testing.assert_close(weight + alpha / len(A) * B @ A, after[name], rtol=1e-5, atol=1e-6)
            found |= {f"{name}.lora_a", f"{name}.lora_b"}
    assert found == adapter.keys() and len(found) == 16


def test_other_layers_and_kinds_of_models(tmp_path):
    model = shaken(peftops.attach(models.qwen2(), peftops.QLoRAConfig(r=2)))
    peftops.save_gguf(model, tmp_path / "adapter.gguf")
    got = tensors(tmp_path / "adapter.gguf")
    layers, adapters = model.model.layers, {"blk.1.ffn_down": "mlp.down_proj", "blk.0.attn_q": "self_attn.q_proj"}
    assert field(tmp_path / "adapter.gguf", "general.architecture") == "qwen2" and len(got) == 28
    for name, path in adapters.items():  # no rows change places in a qwen2
        adapter = layers[int(name[4])].get_submodule(path).adapters["default"]
        assert torch.equal(got[f"{name}.weight.lora_a"], adapter.lora_A)
        assert torch.equal(got[f"{name}.weight.lora_b"], adapter.lora_B)


@pytest.mark.parametrize(
    "build, config, message",
    [
        (models.llama, peftops.DoRAConfig(r=2), "as LoRA has them, and model.layers.0.* has a DoRA; merge it"),
        (models.qwen2, peftops.LoRAConfig(r=2, bias="lora_only"), "has a LoRA with biases"),
        (models.llama, peftops.LoRAConfig(r=2, modules_to_save=["lm_head"]), "lm_head has a Select"),
        (models.llama, peftops.LoRAConfig(r=2, target=["embed_tokens"]), "model.embed_tokens is a Embedding"),
        (models.gpt2, peftops.LoRAConfig(r=2), "a GGUF of gpt2 is not known here; llama, mistral"),
        (models.mlp, peftops.LoRAConfig(r=2), "a GGUF of Sequential is not known here"),
    ],
)
def test_what_has_no_place_there_is_refused(tmp_path, build, config, message):
    model = peftops.attach(build(), config)
    with pytest.raises(TypeError, match=message):
        peftops.save_gguf(model, tmp_path / "adapter.gguf")
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_none_and_names_that_are_not_there(tmp_path):
    model = peftops.attach(models.llama(), peftops.LoRAConfig(r=2))
    with pytest.raises(ValueError, match="no adapter named 'x'; it has default"):
        peftops.save_gguf(model, tmp_path / "a.gguf", name="x")
    model.model.layers[1].mlp.up_proj.adapters["default"].lora_B.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="blk.1.ffn_up.weight.lora_b holds NaN or infinity"):
        peftops.save_gguf(model, tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())
