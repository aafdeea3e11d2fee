"""Several soft prompts in one batch: each row computes what it would alone, trains its own, and generates."""

import pytest
import torch

import models
import peftops
from peftops import LoRAConfig, PrefixTuningConfig, PromptTuningConfig, prompt_per_row

LENGTHS = {"a": 3, "b": 5, "c": 1}
NAMES = ["b", None, "a", "c", "a"]


def prompted(build=models.llama):
    model = build()
    for name, tokens in LENGTHS.items():
        peftops.attach(model, PromptTuningConfig(tokens=tokens, init="random"), name=name)
    return model


def alone(model, name, call):
    if name is None:
        with peftops.disabled(model):
            return call(model)
    peftops.activate(model, name)
    return call(model)


@pytest.mark.parametrize("build", [models.llama, models.gpt2, models.gemma, models.bert], ids=lambda b: b.__name__)
@pytest.mark.parametrize("padded", [False, True])
def test_each_row_computes_what_it_would_alone(build, padded):
    model, ids = prompted(build), models.tokens(5, 7)
    names = ["b" if name is None and build is models.bert else name for name in NAMES]
    inputs = {"input_ids": ids}
    if build is models.bert:
        inputs["token_type_ids"] = ids % 2
    if padded:
        mask = torch.ones(5, 7, dtype=torch.long)
        mask[2, :3] = mask[4, :1] = 0
        inputs["attention_mask"] = mask
    with prompt_per_row(model, names):
        got = model(**inputs).logits
    for i, name in enumerate(names):
        row = {key: value[i : i + 1] for key, value in inputs.items()}
        want = alone(model, name, lambda m, row=row: m(**row).logits)
        real = slice(int((mask[i] == 0).sum()) if padded and build is not models.bert else 0, None)
        torch.testing.assert_close(got[i][real], want[0][real], rtol=1e-4, atol=1e-5)


def test_a_prompt_before_two_segments_is_of_the_first():
    model, ids = models.bert(), models.tokens(2, 7)
    peftops.attach(model, PromptTuningConfig(tokens=3, init="random"))
    (prompt,) = (p for p in model.parameters() if p.requires_grad and p.ndim == 2 and len(p) == 3)
    types = ids % 2
    got = model(input_ids=ids, token_type_ids=types).logits
    embeds = torch.cat([prompt.expand(2, -1, -1), model.get_input_embeddings()(ids)], 1)
    with peftops.disabled(model):
        want = model(inputs_embeds=embeds, token_type_ids=torch.nn.functional.pad(types, (3, 0))).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_prompts_of_the_rows_and_nothing_else():
    model, ids = prompted(), models.tokens(4, 7)
    with prompt_per_row(model, ["a", "c", None, "a"]):
        own = {n: p for n, p in model.named_parameters() if p.requires_grad}
        model(input_ids=ids, labels=ids).loss.backward()
    grads = {n.split(".")[-2]: p.grad for n, p in own.items()}
    assert grads.keys() == {"a", "c"} and grads["a"].any() and grads["c"].any()
    mixed = grads["a"].clone()
    model.zero_grad()
    total = 0
    for i in (0, 3):
        total = total + alone(model, "a", lambda m, i=i: m(input_ids=ids[i : i + 1], labels=ids[i : i + 1]).loss)
    (total / 4).backward()  # the loss is the mean over all four rows
    torch.testing.assert_close({n.split(".")[-2]: p.grad for n, p in own.items()}["a"], mixed, rtol=1e-4, atol=1e-6)


def test_generate_with_a_cache_is_each_rows_own():
    model, ids = prompted(), models.tokens(5, 6)
    mask = torch.ones_like(ids)
    mask[3, :2] = 0
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
    for cache in (True, False):
        with prompt_per_row(model, NAMES):
            got = model.generate(input_ids=ids, attention_mask=mask, use_cache=cache, **how)
        for i, name in enumerate(NAMES):
            row = {"input_ids": ids[i : i + 1], "attention_mask": mask[i : i + 1]}
            want = alone(model, name, lambda m, row=row: m.generate(**row, **how))
            assert torch.equal(got[i : i + 1], want), (name, cache)
    with prompt_per_row(model, NAMES):
        assert model.generate(input_ids=ids, attention_mask=mask, num_beams=2, **how).shape == got.shape


def test_all_is_as_before_afterwards_even_after_an_error():
    model, ids = prompted(), models.tokens(1, 7)
    state, want = list(model.state_dict()), model(ids).logits
    with pytest.raises(RuntimeError), prompt_per_row(model, ["a"]):
        raise RuntimeError
    assert list(model.state_dict()) == state and torch.equal(model(ids).logits, want)
    with prompt_per_row(model, [None]):
        got = model(ids).logits
    assert torch.equal(got, alone(model, None, lambda m: m(ids).logits))


def with_other(config, **kw):
    model = peftops.attach(models.llama(), PromptTuningConfig(tokens=2), name="a")
    return peftops.attach(model, config, name="other")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: prompt_per_row(prompted(), ["z"]), "the model has no adapter named 'z'"),
        (
            lambda: prompt_per_row(prompted(models.bert), ["a", None]),
            "the pooler of BertForSequenceClassification reads",
        ),
        (lambda: prompt_per_row(prompted(), []), "names must not be empty"),
        (
            lambda: prompt_per_row(with_other(LoRAConfig(r=2)), ["a", "other"]),
            "needs prompts of PromptTuning on one body",
        ),
        (
            lambda: prompt_per_row(with_other(PrefixTuningConfig(tokens=2)), ["a", "other"]),
            "and 'other' is PrefixTuning",
        ),
        (
            lambda: prompt_per_row(peftops.attach(models.t5(), PromptTuningConfig(tokens=2), name="a"), ["a"]),
            "on one body",
        ),
    ],
)
def test_bad_input_gets_a_sentence(call, message):
    with pytest.raises((ValueError, TypeError), match=message), call():
        pass


def test_a_batch_of_another_size_is_refused():
    model = prompted()
    with prompt_per_row(model, ["a", "b"]), pytest.raises(ValueError, match="a batch of 3 rows, but 2 names"):
        model(models.tokens(3, 4))
