"""The methods that HF PEFT has, too: the same parameters give the same logits, and files go both ways."""

import pytest
import torch
from torch import nn

import models
import peftops
from peftops import (
    DoRAConfig,
    GLoRAConfig,
    IA3Config,
    LoRAConfig,
    LoRAFAConfig,
    MultiLoRAConfig,
    NormTuningConfig,
    OLoRAConfig,
    PiSSAConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeRAConfig,
)
from peftops.attaching import hosts

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

qv = ["q_proj", "v_proj"]
gpt = ["c_attn", "c_proj"]


def dora():
    return peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=qv)


BOTH = [
    (models.llama, DoRAConfig(r=4, target=qv), dora),
    (models.qwen2, DoRAConfig(r=4, target=qv), dora),
    (models.gpt2, LoRAConfig(r=4, target=gpt), lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=gpt)),
    (
        models.llama,
        LoRAConfig(r=4, target=["embed_tokens", "q_proj"]),
        lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=["embed_tokens", "q_proj"]),
    ),
    (models.llama, VeRAConfig(r=16, target=qv), lambda: peft.VeraConfig(r=16, target_modules=qv)),
    (models.gpt2, VeRAConfig(r=16, target=["c_attn"]), lambda: peft.VeraConfig(r=16, target_modules=["c_attn"])),
    (models.llama, GLoRAConfig(r=4, target=qv, new_bias=False), lambda: peft.GloraConfig(r=4, target_modules=qv)),
    (models.qwen2, GLoRAConfig(r=4, target=qv), lambda: peft.GloraConfig(r=4, target_modules=qv)),
    (
        models.qwen2,
        GLoRAConfig(target=qv, A="vector", B="vector", C="vector", D="vector", E="vector"),
        lambda: peft.GloraConfig(target_modules=qv, config_A_B="vector", config_C="vector", config_D_E="vector"),
    ),
    (
        models.qwen2,
        IA3Config(target=["k_proj", "v_proj", "down_proj"], feedforward=["down_proj"]),
        lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    (
        models.bert,
        LoRAConfig(r=4, target=["query"], modules_to_save=["classifier"]),
        lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query"], task_type="SEQ_CLS"),
    ),
    (
        models.llama,
        LoRAConfig(r=4, target=qv, modules_to_save=["lm_head", "layers.1.mlp"]),
        lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=qv, modules_to_save=["lm_head", "layers.1.mlp"]),
    ),
    (
        models.bert,
        VeRAConfig(r=16, target=["query", "value"], modules_to_save=["classifier"]),
        lambda: peft.VeraConfig(r=16, target_modules=["query", "value"], task_type="SEQ_CLS"),
    ),
    (
        models.bert,
        IA3Config(target=["key", "value"], modules_to_save=["classifier"]),
        lambda: peft.IA3Config(target_modules=["key", "value"], feedforward_modules=[], task_type="SEQ_CLS"),
    ),
    (
        models.llama,
        NormTuningConfig(["input_layernorm", "norm"]),
        lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    ),
    (models.gpt2, NormTuningConfig(["ln_1"]), lambda: peft.LNTuningConfig(target_modules=["ln_1"])),
    (models.llama, PromptTuningConfig(tokens=4), lambda: peft.PromptTuningConfig(num_virtual_tokens=4)),
    (models.gpt2, PromptTuningConfig(tokens=4), lambda: peft.PromptTuningConfig(num_virtual_tokens=4)),
    (
        models.bert,
        PromptTuningConfig(tokens=4, modules_to_save=["classifier"]),
        lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="SEQ_CLS"),
    ),
    (
        models.t5,
        PromptTuningConfig(tokens=4),
        lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="SEQ_2_SEQ_LM"),
    ),
    (
        models.llama,
        PrefixTuningConfig(tokens=4, modules_to_save=["lm_head"]),
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, modules_to_save=["lm_head"]),
    ),
    (
        models.llama,
        NormTuningConfig(["input_layernorm", "norm"], modules_to_save=["lm_head"]),
        lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"], modules_to_save=["lm_head"]),
    ),
    (models.llama, PrefixTuningConfig(tokens=4), lambda: peft.PrefixTuningConfig(num_virtual_tokens=4)),
    (models.gpt2, PrefixTuningConfig(tokens=4), lambda: peft.PrefixTuningConfig(num_virtual_tokens=4)),
]
both = pytest.mark.parametrize("build, ours, theirs", BOTH, ids=lambda v: getattr(v, "__name__", type(v).__name__))


def shake(model):
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)


def logits(model, build):
    inputs = models.inputs(build)
    out = model(**inputs).logits
    return out[:, -inputs["input_ids"].shape[1] :]  # PEFT leaves the prompt's own positions in


@both
def test_peft_reads_ours(tmp_path, build, ours, theirs):
    model = peftops.attach(build(), ours)
    shake(model)
    peftops.save(model, tmp_path)
    other = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
    torch.testing.assert_close(logits(other, build), logits(model, build), rtol=1e-4, atol=1e-5)


@both
def test_we_read_pefts(tmp_path, build, ours, theirs):
    config = theirs()
    config.task_type = config.task_type or "CAUSAL_LM"
    other = peft.get_peft_model(build(), config).eval()
    shake(other)
    other.save_pretrained(tmp_path)
    model = peftops.load(build(), tmp_path)
    assert type(model._peftops.configs["default"]) is type(ours)
    torch.testing.assert_close(logits(model, build), logits(other, build), rtol=1e-4, atol=1e-5)
    # and the same gradients
    for m in (model, other):
        logits(m, build).square().sum().backward()
    size = lambda m: sum(p.grad.double().square().sum() for p in m.parameters() if p.requires_grad)
    torch.testing.assert_close(size(model), size(other), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        PiSSAConfig(r=4, target=qv),
        PiSSAConfig(r=4, target=qv, rslora=True, alpha=3.0),
        OLoRAConfig(r=4, target=qv),
        MultiLoRAConfig(r=2, target=qv),
        LoRAFAConfig(r=4, target=qv),
        PiSSAConfig(r=4, target=qv, rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 5.0}),
        MultiLoRAConfig(r=2, target=qv, rank_pattern={"v_proj": 3}, alpha_pattern={"v_proj": 5.0}),
    ],
    ids=lambda c: type(c).__name__,
)
def test_what_is_lora_once_trained_is_lora_to_peft(tmp_path, config):
    model = peftops.attach(models.llama(), config)
    shake(model)
    peftops.save(model, tmp_path)
    other = peft.PeftModel.from_pretrained(models.llama(), tmp_path)
    torch.testing.assert_close(logits(other, models.llama), logits(model, models.llama), rtol=1e-4, atol=1e-5)
    back = peftops.load(models.llama(), tmp_path)
    assert type(back._peftops.configs["default"]) is type(config)
    (tmp_path / "peftops.json").unlink()
    again = peftops.load(models.llama(), tmp_path)
    assert type(again._peftops.configs["default"]) is LoRAConfig
    torch.testing.assert_close(logits(again, models.llama), logits(model, models.llama), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "init, config", [("pissa", PiSSAConfig(r=4, target=qv)), ("olora", OLoRAConfig(r=4, target=qv))]
)
def test_starts_from_the_factors_that_peft_starts_from(init, config):
    other = peft.get_peft_model(
        models.llama(), peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=init, target_modules=qv)
    )
    model = peftops.attach(models.llama(), config)
    for path, layer in hosts(model):
        a, b = layer.adapters["default"].lora_A, layer.adapters["default"].lora_B
        theirs = other.base_model.model.get_submodule(path)
        want = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
        # PEFT's OLoRA starts from Q and R themselves, whatever the scaling; so does ours
        torch.testing.assert_close(b @ a, want, rtol=1e-4, atol=1e-5)


def test_a_prefix_that_peft_made_by_an_mlp(tmp_path):
    config = peft.PrefixTuningConfig(
        num_virtual_tokens=4,
        prefix_projection=True,
        encoder_hidden_size=8,
        task_type="CAUSAL_LM",
        token_dim=32,
        num_attention_heads=2,
        num_layers=2,
    )
    other = peft.get_peft_model(models.llama(), config).eval()
    want = logits(other, models.llama)
    other.save_pretrained(tmp_path)
    model = peftops.load(models.llama(), tmp_path)
    torch.testing.assert_close(logits(model, models.llama), want, rtol=1e-4, atol=1e-5)


def test_vera_draws_the_projections_that_peft_draws():
    other = peft.get_peft_model(models.llama(), peft.VeraConfig(r=16, target_modules=qv))
    model = peftops.attach(models.llama(), VeRAConfig(r=16, target=qv))
    adapter = next(layer for _, layer in hosts(model)).adapters["default"]
    assert torch.equal(adapter.vera_A, other.base_model.vera_A["default"])
    assert torch.equal(adapter.vera_B, other.base_model.vera_B["default"])


def test_convolutions(tmp_path):
    torch.manual_seed(0)
    build = lambda: (
        torch.manual_seed(0),
        nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 1)),
    )[1]
    x = torch.randn(2, 3, 9, 9)
    model = peftops.attach(build(), LoRAConfig(r=2, target=["0", "2"]))
    shake(model)
    peftops.save(model, tmp_path)
    other = peft.PeftModel.from_pretrained(build(), tmp_path)
    torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-5)
    want = model(x)
    peftops.merge(model)
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
