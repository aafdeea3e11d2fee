"""llama.cpp itself reads what we write: models, their tokenizers and adapters compute what they compute here."""

import json
from urllib import request

import pytest
import torch

import models
import peftops
from proves import proves

llama_cpp = pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")
from test_gguf_model import BUILDS, tokenizer  # noqa: E402

from peftops.integrations.gguf_model import write_gguf  # noqa: E402

PROMPT = [1, 77, 80, 259, 90, 12, 101, 45, 7]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
float32 = llama_cpp.ggml_type.GGML_TYPE_F32


def server(model, adapter=None):
    """llama.cpp over a file, with keys and values in float32."""
    params = llama_cpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.n_gpu_layers = str(model), 256, 1, 0
    params.warmup = params.fit_params = False
    params.verbosity = -1
    params.cache_type_k = params.cache_type_v = float32
    params.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    if adapter:
        params.lora_adapters = [llama_cpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    return llama_cpp.Server(params)


def log_probabilities(server, vocabulary):
    """Of the token after the prompt."""
    asked = dict(prompt=PROMPT, n_predict=1, n_probs=vocabulary, temperature=0.0, post_sampling_probs=False)
    answer = server.handle_completions(asked)
    (found,) = answer["choices"][0]["logprobs"]["content"]
    of = {one["id"]: one["logprob"] for one in found["top_logprobs"]}
    return torch.tensor([of[i] for i in range(vocabulary)])


@torch.no_grad()
def wanted(model):
    return model(torch.tensor([PROMPT])).logits[0, -1].float().log_softmax(0)


@proves("llama.cpp", save="models: `merge --to gguf`")
@pytest.mark.parametrize("build", BUILDS, ids=["llama", "untied", "qwen2", "qwen3", "mistral", "llama3"])
def test_a_model_computes_the_same(tmp_path, build):
    model = build().float()
    write_gguf(model, tokenizer(), tmp_path / "model.gguf")
    found = log_probabilities(server(tmp_path / "model.gguf"), model.config.vocab_size)
    torch.testing.assert_close(found, wanted(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_of_16_bits_computes_nearly_the_same(tmp_path, dtype):
    model = models.llama().to(dtype)
    write_gguf(model, tokenizer(), tmp_path / "model.gguf")
    found = log_probabilities(server(tmp_path / "model.gguf"), model.config.vocab_size)
    torch.testing.assert_close(found, wanted(model.float()), rtol=0, atol=0.05)  # it rounds activations, too


@proves("llama.cpp", save="adapters: `save_gguf`")
@pytest.mark.parametrize("config", [peftops.LoRAConfig(r=4, alpha=3.0, target=ATTENTION), peftops.PiSSAConfig(r=4)])
def test_an_adapter_changes_it_as_it_does_here(tmp_path, config):
    model = models.llama(tied=False)
    write_gguf(model, tokenizer(), tmp_path / "model.gguf")
    without = wanted(model)
    peftops.attach(model, config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    peftops.save_gguf(model, tmp_path / "adapter.gguf")
    want = wanted(model)
    assert (want - without).abs().max() > 0.1
    found = log_probabilities(server(tmp_path / "model.gguf", tmp_path / "adapter.gguf"), model.config.vocab_size)
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_its_tokenizer_makes_the_same_tokens(tmp_path, pre):
    made = tokenizer(pre)
    write_gguf(models.llama(), made, tmp_path / "model.gguf")
    running = server(tmp_path / "model.gguf")
    for text in ("hello, 12345 times", "  two\n\nlines\t", "It's 5 o'clock; HELL's", "ünïcödé 数 🙂", ""):
        asked = json.dumps({"content": text, "add_special": False}).encode()
        post = request.Request(f"{running.listening_address}/tokenize", asked, {"Content-Type": "application/json"})
        with request.urlopen(post) as got:
            assert json.load(got)["tokens"] == made(text, add_special_tokens=False).input_ids, text
