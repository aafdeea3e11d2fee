"""How many parameters train, on the shapes of real models. On the meta device, counts need no memory."""

import copy

import pytest
import torch
from torch import nn

import peftops
from peftops import (
    BottleneckConfig,
    DoRAConfig,
    GLoRAConfig,
    IA3Config,
    LLaMAAdapterConfig,
    LongLoRAConfig,
    LoRAConfig,
    LoRAFAConfig,
    MultiLoRAConfig,
    NormTuningConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    QALoRAConfig,
    ReLoRAConfig,
    TiedLoRAConfig,
    TopLayersConfig,
    VeRAConfig,
)

qv = ["q_proj", "v_proj"]


def llama_3b():
    """The shapes of Llama-3.2-3B, for which HF PEFT's benchmark publishes counts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        head_dim=128,
        num_attention_heads=24,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def gpt2_medium():
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        return GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16))


def linear(in_, out, count=1, bias=False):
    with torch.device("meta"):
        return nn.ModuleList([nn.Linear(in_, out, bias=bias) for _ in range(count)])


def _rest_of_llama_3b(qv):
    """Everything in full but q and v, in rank ``qv``; the tied head is a copy of its own."""
    block = 2 * 3072**2 + 2 * 3072 * 1024 + 3 * 3072 * 8192 + 2 * 3072
    low = qv * (3072 + 3072 + 3072 + 1024)
    return 28 * (block - 3072**2 - 3072 * 1024 + low) + 3072 + 2 * 128_256 * 3072


def encoder_block(width):
    """One block with an attention and a feed-forward part."""
    with torch.device("meta"):
        attention = nn.Sequential(nn.Linear(width, width))
        attention.__class__ = type("SelfAttention", (nn.Sequential,), {})
        up, down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        return nn.ModuleList([nn.Sequential(attention, up, down)])


@pytest.mark.parametrize(
    "build, config, count",
    [
        (llama_3b, LoRAConfig(r=32, target=qv), 9_175_040),
        (llama_3b, LoRAConfig(r=64, target=qv), 18_350_080),
        (llama_3b, DoRAConfig(r=32, target=qv), 9_289_728),
        (llama_3b, LoRAFAConfig(r=32, target=qv), 3_670_016),
        (llama_3b, VeRAConfig(r=256, target=qv), 129_024),
        (llama_3b, GLoRAConfig(r=8, target=qv, new_bias=False), 4_587_520),
        (llama_3b, GLoRAConfig(target=qv, A="vector", B="vector", new_bias=False), 229_376),
        (llama_3b, PromptTuningConfig(tokens=200), 614_400),
        (llama_3b, PrefixTuningConfig(tokens=200), 11_468_800),
        (llama_3b, PrefixTuningConfig(tokens=50), 2_867_200),
        (llama_3b, LLaMAAdapterConfig(tokens=100, layers=28, gate="peft"), 8_601_628),
        (llama_3b, NormTuningConfig(), 175_104),
        (llama_3b, MultiLoRAConfig(r=8, n=3, target=qv), 28 * 3 * (8 * (3072 + 3072 + 3072 + 1024) + 3072 + 1024)),
        (llama_3b, LongLoRAConfig(), 28 * 8 * (2 * (3072 + 3072) + 2 * (3072 + 1024)) + 128_256 * 3072 + 57 * 3072),
        (llama_3b, ReLoRAConfig(target=qv), _rest_of_llama_3b(qv=128)),
        (llama_3b, ReLoRAConfig(target=qv, rest=False), 4 * 9_175_040),
        (lambda: linear(64, 96, 2, True), ReLoRAConfig(r=8), 2 * (8 * (64 + 96) + 96)),
        (llama_3b, TopLayersConfig(layers=2), 2 * (2 * 3072**2 + 2 * 3072 * 1024 + 3 * 3072 * 8192 + 2 * 3072) + 3072),
        (gpt2_medium, PrefixTuningConfig(tokens=10), 491_520),
        (gpt2_medium, PrefixTuningConfig(tokens=10, hidden=512), 25_750_016),
        (lambda: linear(4096, 3 * 4096, 32), TiedLoRAConfig(r=8), 524_544),
        (lambda: linear(4096, 3 * 4096, 32), TiedLoRAConfig.tl5(r=8), 131_072),
        (lambda: linear(4096, 3 * 4096, 32), TiedLoRAConfig(r=8, train_A=False, train_B=False), 32 * (8 + 3 * 4096)),
        (lambda: linear(4096, 3 * 4096, 32), LoRAConfig(r=8), 4_194_304),
        (
            lambda: linear(64, 96, 1, True),
            GLoRAConfig(r=4, D="vector", E="vector"),
            2 * 4 * (64 + 96) + 4 * (64 + 1) + 2 * 96,
        ),
        (lambda: linear(64, 96, 2), QALoRAConfig(r=4, group_size=16), 2 * 4 * (64 // 16 + 96)),
        (lambda: linear(64, 96, 2, True), IA3Config(), 2 * 96),
        (lambda: encoder_block(1024), BottleneckConfig(width=24), 49_152 + 24 + 1024),
        (lambda: encoder_block(1024), BottleneckConfig(width=24, placement="houlsby"), 2 * (49_152 + 24 + 1024)),
        (lambda: encoder_block(1024), BottleneckConfig(width=24, placement="parallel"), 49_152 + 24 + 1024),
    ],
)
def test_counts_of_real_shapes(build, config, count):
    model = peftops.attach(build(), config)
    assert peftops.summary(model).trainable == count


@pytest.mark.parametrize("gate, count", [("tanh", 1_229_760), ("raw", 1_229_760), ("peft", 1_228_830)])
def test_llama_adapter_of_llama_7b(gate, count):
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32))
    assert peftops.summary(peftops.attach(model, LLaMAAdapterConfig(gate=gate))).trainable == count


@pytest.mark.parametrize(
    "options, more",
    [
        ({"image_features": 768}, 768 * 4096 + 4096),
        ({"v2": True}, (2 * 32 + 1) * 4096 + 32 * 2 * (4 * 4096 + 2 * 11008 + 4096)),
        ({"v2": True, "scale_position": "input"}, (2 * 32 + 1) * 4096 + 32 * (6 * 4096 + 11008 + 5 * 4096 + 2 * 11008)),
    ],
)
def test_images_and_v2_of_llama_7b(options, more):
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32))
    assert peftops.summary(peftops.attach(model, LLaMAAdapterConfig(**options))).trainable == 1_229_760 + more


def test_five_soft_tokens_of_llama_7b():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1))
    assert peftops.summary(peftops.attach(model, PromptTuningConfig(tokens=5))).trainable == 20_480


def test_a_hundred_soft_tokens_of_t5_xxl():
    from transformers import T5Config, T5ForConditionalGeneration

    with torch.device("meta"):
        model = T5ForConditionalGeneration(T5Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=1, num_heads=64))
    assert peftops.summary(peftops.attach(model, PromptTuningConfig(tokens=100))).trainable == 409_600


def test_lora_of_llama_7b():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32))
    assert peftops.summary(peftops.attach(copy.deepcopy(model), LoRAConfig(r=8, target=qv))).trainable == 4_194_304
    assert peftops.summary(peftops.attach(model, LoRAConfig(r=64))).trainable == 159_907_840
