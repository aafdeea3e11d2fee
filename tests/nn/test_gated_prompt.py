"""A prompt beside the attention of any decoder of transformers, without a word about whose it is."""

import copy
import inspect

import pytest
import torch
import transformers
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import models
import reference
from peftops import LLaMAAdapterConfig, LongLoRAConfig, LoRAConfig, attach, detach
from peftops.nn import gated_prompt
from peftops.nn.gated_prompt import GatedPrompt, check_attention, is_attention
from peftops.nn.prompt import cache_name

SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 2,
}
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=4),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),  # biases
    "qwen3": lambda: transformers.Qwen3Config(**SMALL),  # norms of query and key
    "phi3": lambda: transformers.Phi3Config(**SMALL),  # one projection for all three
    "wide heads": lambda: transformers.LlamaConfig(**{**SMALL, "head_dim": 32, "attention_bias": True}),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4),  # no rotation
}
any_model = pytest.mark.parametrize("kind", MODELS)
ids = models.tokens()


class Hosted(nn.Module):
    def __init__(self, base, **options):
        super().__init__()
        self.base, self.gated = base, GatedPrompt(base, **{"tokens": 10, "gate_activation": "tanh", **options})

    def forward(self, *args, **kwargs):
        return self.gated.attend(self.base, *args, **kwargs)


def build(kind, **options):
    """A model, and the same with a prompt in each attention."""
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(MODELS[kind]()).eval()
    model = copy.deepcopy(base)
    for name, module in list(model.named_modules()):
        if is_attention(module):
            check_attention(module, name)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Hosted(module, **options))
    assert len(prompts(model)) == 2
    return base, model


def prompts(model):
    return [m for m in model.modules() if isinstance(m, GatedPrompt)]


def shake(model, seed=1):
    torch.manual_seed(seed)
    for gated in prompts(model):
        nn.init.normal_(gated.gate)
    return model


@any_model
def test_starts_as_the_base_bit_for_bit(kind):
    base, model = build(kind)
    assert torch.equal(model(ids).logits, base(ids).logits)
    shake(model)
    assert not torch.equal(model(ids).logits, base(ids).logits)


def eager(prompt, base, module, query, key, value, mask, scaling, **kwargs):
    """Both softmaxes written out, for queries as the model hands them to an attention function."""
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    scores = query @ key.mT * scaling
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool).tril() if mask is None else mask
    scores = scores.masked_fill(~visible, -torch.inf) if visible.dtype == torch.bool else scores + visible
    out = torch.softmax(scores, -1) @ value
    return reference.gated_prompt(out, query, *prompt, base.gated.gate, scale=scaling).transpose(1, 2), None


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "wide heads"])
def test_computes_the_definition(kind):
    """K_a = P Wk^T + bk and V_a = P Wv^T + bv of the layer's own weights, unrotated; queries as they meet words."""
    _, model = build(kind)
    shake(model)
    want_model = copy.deepcopy(model)
    call = lambda module, *args, **kw: module.definition(module, *args, **kw)
    transformers.AttentionInterface.register("definition", call)
    ALL_MASK_ATTENTION_FUNCTIONS.register("definition", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    for layer in want_model.model.layers:
        hosted = layer.self_attn
        attention = hosted.base

        def definition(*args, hosted=hosted, attention=attention, dropout=0.0, **kwargs):
            heads = lambda t: t.unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)
            prompt = [heads(project(hosted.gated.prompt)) for project in (attention.k_proj, attention.v_proj)]
            return eager(prompt, hosted, *args, **kwargs)

        attention.definition, layer.self_attn = definition, attention
    want_model.config._attn_implementation = "definition"
    torch.testing.assert_close(model(ids).logits, want_model(ids).logits, rtol=1e-4, atol=1e-5)


@any_model
def test_everything_learns(kind):
    _, model = build(kind)
    shake(model)
    model(input_ids=ids, labels=ids).loss.backward()
    for gated in prompts(model):
        assert (gated.prompt.grad != 0).float().mean() > 0.9 and (gated.gate.grad != 0).all()


@any_model
def test_decoding_with_a_cache_equals_the_full_forward(kind):
    _, model = build(kind)
    shake(model)
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        want = model(ids).logits
        steps = [model(ids[:, i : i + 1], **{cache_name(model): cache}).logits for i in range(ids.shape[1])]
    torch.testing.assert_close(torch.cat(steps, 1), want, rtol=1e-4, atol=1e-5)


def test_kept_keys_follow_what_they_are_made_of():
    _, model = build("llama")
    shake(model)
    fresh = lambda: copy.deepcopy(model)(ids).logits.detach()  # with a graph nothing is kept
    with torch.no_grad():
        assert torch.equal(model(ids).logits, fresh()) and prompts(model)[0]._kept._made
        prompts(model)[0].prompt.mul_(2)
        assert torch.equal(model(ids).logits, fresh())
        attach(model, LoRAConfig(target=["k_proj"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        before = model(ids).logits
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)
        after = model(ids).logits
    assert torch.equal(after, model(ids).logits) and not torch.equal(before, after)


def test_other_models_do_not_notice():
    base, model = build("llama")
    want = base(ids).logits
    shake(model)(ids)
    assert torch.equal(base(ids).logits, want)


def test_bf16_and_checkpointing():
    _, model = build("llama")
    shake(model)
    grads = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()(input_ids=ids, labels=ids).loss.backward()
        grads.append([g.prompt.grad.clone() for g in prompts(model)])
    assert all(map(torch.equal, *grads))
    _, model = build("llama")
    for hosted in model.model.layers:
        hosted.self_attn.base.bfloat16()
    model.bfloat16()
    for gated in prompts(shake(model)):
        gated.float()
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    assert model(ids).logits.dtype == torch.bfloat16
    assert all(g.prompt.grad.dtype == g.gate.grad.dtype == torch.float32 for g in prompts(model))


def test_what_cannot_take_a_prompt_says_so():
    base, model = build("llama")
    with pytest.raises(TypeError, match="mlp, a LlamaMLP, is not a causal attention of transformers"):
        check_attention(base.model.layers[0].mlp, "mlp")
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"'eager' is not in it; call model.set_attn_implementation\('sdpa'\)"):
        model(ids)
    model.set_attn_implementation("sdpa")
    model(ids)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_compiles_without_a_graph_break(kind):
    _, model = build(kind)
    shake(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids).logits, model(ids).logits)
    compiled(ids).logits.sum().backward()


@pytest.mark.parametrize("config", [LLaMAAdapterConfig(tokens=3, layers=1), LongLoRAConfig(r=2)], ids=["LLaMA", "Long"])
def test_the_registry_is_as_it_was_when_the_last_one_has_left(config, monkeypatch):
    registry = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    name = models.llama().config._attn_implementation
    plain = inspect.unwrap(registry[name])  # (other tests may have left models)
    monkeypatch.setitem(registry, name, plain)
    monkeypatch.setattr(gated_prompt, "_USERS", {})
    first, second = (attach(models.llama(), config).train() for _ in range(2))
    assert registry[name] is plain
    copied = copy.deepcopy(first)
    for model in (first, second, copied):
        model(ids)
    assert registry[name] is not plain
    want = second(ids).logits
    for model in (copied, first):
        detach(model)
        assert registry[name] is not plain and torch.equal(second(ids).logits, want)
    detach(second)
    assert registry[name] is plain
    second(ids)
    assert registry[name] is plain
