"""Methods on the architectures of transformers, each a tiny random model: none keys on one model's names."""

import copy

import pytest
import torch
from torch import nn

import models
import peftops
from peftops import (
    BitFitConfig,
    BottleneckConfig,
    DoRAConfig,
    GLoRAConfig,
    HeadOnlyConfig,
    IA3Config,
    LLaMAAdapterConfig,
    LongLoRAConfig,
    LoRAConfig,
    LoRAFAConfig,
    MultiLoRAConfig,
    NormTuningConfig,
    OLoRAConfig,
    PiSSAConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    QLoRAConfig,
    ReLoRAConfig,
    SurgicalConfig,
    TiedLoRAConfig,
    TopLayersConfig,
    VeRAConfig,
)
from peftops.attaching.targets import blocks, body_of, head_of
from peftops.nn import NF4Linear

ALL = [models.llama, models.qwen2, models.mistral, models.gemma, models.gpt2, models.bert, models.t5, models.vit]
DECODERS = [models.llama, models.qwen2, models.mistral, models.gemma, models.gpt2]
every_model = pytest.mark.parametrize("build", ALL, ids=lambda b: b.__name__)

CONFIGS = [
    LoRAConfig(r=4),
    DoRAConfig(r=4),
    QLoRAConfig(r=4),
    VeRAConfig(r=8),
    BottleneckConfig(placement="houlsby"),
    BottleneckConfig(placement="parallel"),
    NormTuningConfig(),
    TopLayersConfig(layers=1, head=True),
    HeadOnlyConfig(),
    SurgicalConfig("last"),
    BitFitConfig(),
    ReLoRAConfig(r=4, dropout=0.0, rest=False),
    PromptTuningConfig(tokens=3),
    PrefixTuningConfig(tokens=3),
    IA3Config(),
    GLoRAConfig(r=4),
    TiedLoRAConfig(r=4),
    MultiLoRAConfig(r=2),
    LoRAFAConfig(r=4),
    PiSSAConfig(r=4),
    OLoRAConfig(r=4),
    LongLoRAConfig(r=4),
    LLaMAAdapterConfig(tokens=3, layers=2),
]


@every_model
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: type(c).__name__ + str(getattr(c, "placement", "")))
def test_every_method_trains_every_model_and_comes_off(build, config, tmp_path):
    model, inputs = build(), models.inputs(build)
    if isinstance(config, QLoRAConfig):
        peftops.detach(peftops.attach(model, config))
    before, state = model(**inputs).logits, copy.deepcopy(model.state_dict())
    unsupported = {
        BitFitConfig: (models.llama, models.mistral, models.gemma, models.t5),
        PromptTuningConfig: (models.vit,),
        PrefixTuningConfig: (models.vit, models.bert, models.t5),
        LongLoRAConfig: (models.vit, models.bert, models.t5),
        LLaMAAdapterConfig: (models.vit, models.bert),
    }
    if build in unsupported.get(type(config), ()):
        sentence = "has no biases to train|(PromptTuning|PrefixTuning|LongLoRA) needs|has 0 attentions of transformers"
        with pytest.raises((ValueError, TypeError), match=sentence):
            peftops.attach(model, config)
        return
    peftops.attach(model, config)
    after = model(**inputs).logits
    assert after.shape == before.shape
    if not isinstance(config, PromptTuningConfig | PrefixTuningConfig):
        torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    changed = model(**inputs).logits
    changed.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert not torch.equal(changed, before)
    peftops.save(model, tmp_path)
    fresh = build()
    if isinstance(config, QLoRAConfig):
        peftops.detach(peftops.attach(fresh, config))
    assert torch.equal(peftops.load(fresh, tmp_path)(**inputs).logits, changed)
    peftops.detach(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(**inputs).logits, before)


@every_model
def test_what_the_parts_of_a_model_are(build):
    model = build()
    assert len(blocks(model)) == (4 if build is models.t5 else 2)
    assert head_of(model) == (["classifier"] if build in (models.bert, models.vit) else ["lm_head"])
    assert (body_of(model) == "") == (build is models.t5)


def generated(model, **kw):
    ids = models.tokens()
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=2,
        eos_token_id=None,
        **kw,
    )


def greedy(model, ids, steps=6):
    """The same without a cache, by the model's logits alone."""
    for _ in range(steps):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("build", DECODERS, ids=lambda b: b.__name__)
@pytest.mark.parametrize(
    "config",
    [PromptTuningConfig(tokens=3), PrefixTuningConfig(tokens=3), LoRAConfig(r=4)],
    ids=lambda c: type(c).__name__,
)
def test_generate_with_a_cache_is_the_same_as_without(build, config):
    model = peftops.attach(build(), config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
    want = greedy(model, models.tokens())
    assert torch.equal(generated(model), want)
    assert torch.equal(generated(model, num_beams=1, use_cache=False), want)
    assert generated(model, num_beams=2).shape == want.shape
    with peftops.disabled(model):
        assert torch.equal(generated(model), greedy(model, models.tokens()))


def test_qlora_quantises_the_conv1d_of_gpt2_and_merges_back_into_one():
    model, inputs = models.gpt2(), models.inputs(models.gpt2)
    dense, kinds = model(**inputs).logits, [type(m).__name__ for m in model.modules()]
    peftops.attach(model, QLoRAConfig(r=4))
    assert sum(isinstance(m, NF4Linear) for m in model.modules()) == 8
    assert (model(**inputs).logits - dense).norm() < 0.1 * dense.norm()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    want = model(**inputs).logits
    peftops.merge(model, dense=True)
    peftops.detach(model, merged=True)
    assert [type(m).__name__ for m in model.modules()] == kinds
    torch.testing.assert_close(model(**inputs).logits, want, rtol=1e-4, atol=1e-4)
    plain = models.gpt2()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(**inputs).logits, want, rtol=1e-4, atol=1e-4)
