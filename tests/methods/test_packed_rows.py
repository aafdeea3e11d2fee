"""Several sequences in one row, as padding-free training has them: right, or refused, for every method."""

import pytest
import torch

import models
import peftops
from examples import example_of
from peftops.attaching import METHODS

PROMPTS = (peftops.PromptTuningConfig, peftops.PrefixTuningConfig)
FIRST, OTHER, SECOND = models.tokens(1, 9, seed=1), models.tokens(1, 9, seed=2), models.tokens(1, 5, seed=3)
POSITIONS = torch.cat([torch.arange(9), torch.arange(5)])[None]


def adapted(config_class):
    example = example_of(config_class)
    build = models.qwen2 if config_class is peftops.BitFitConfig else models.llama
    model = peftops.attach(build(), example.config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@torch.no_grad()
def second(model, first, **options):
    """What the second of two sequences gets, packed behind a first one."""
    ids = torch.cat([first, SECOND], 1)
    return model(input_ids=ids, position_ids=POSITIONS, use_cache=False, **options).logits[:, 9:]


@pytest.mark.parametrize("config_class", [c for c in METHODS if c not in PROMPTS])
def test_a_sequence_does_not_see_the_one_before_it(config_class):
    model = adapted(config_class)
    torch.testing.assert_close(second(model, FIRST), model(SECOND).logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second(model, FIRST), second(model, OTHER), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config_class", PROMPTS)
def test_a_prompt_is_refused(config_class):
    model = adapted(config_class)
    with pytest.raises(ValueError, match="position_ids tell of several sequences in a row"):
        second(model, FIRST)
    with pytest.raises(ValueError, match="cu_seq_lens_q tells of several sequences in a row"):
        model(input_ids=SECOND, cu_seq_lens_q=torch.tensor([0, 2, 5]))
    with peftops.disabled(model):
        torch.testing.assert_close(second(model, FIRST), model(SECOND).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config_class", PROMPTS)
def test_one_sequence_with_its_positions_is_not(config_class):
    model, ids = adapted(config_class), models.tokens()
    want = model(input_ids=ids).logits
    positions = torch.arange(7).expand(2, 7)
    assert torch.equal(model(input_ids=ids, position_ids=positions).logits, want)
    # rows of different lengths, filled up in front, have positions that start late and a mask that says so
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    late = (mask.cumsum(1) - 1).clamp(min=0)
    assert model(input_ids=ids, position_ids=late, attention_mask=mask).logits.isfinite().all()
    assert model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False).shape == (2, 10)


def test_groups_that_train_are_refused():
    """LongLoRA's groups would begin where another sequence does, and a sequence learn other than it does alone."""
    model = adapted(peftops.LongLoRAConfig).train()
    with pytest.raises(ValueError, match="position_ids tell of several sequences in a row, and LongLoRA trains on"):
        second(model, FIRST)
    with pytest.raises(ValueError, match="cu_seq_lens_q tells of several sequences in a row, and LongLoRA trains on"):
        model(input_ids=SECOND, cu_seq_lens_q=torch.tensor([0, 2, 5]))
    positions = torch.arange(5)[None]
    assert torch.equal(model(SECOND, position_ids=positions).logits, model(SECOND).logits)


def test_prompts_of_each_row_are_refused_too():
    model = adapted(peftops.PromptTuningConfig)
    with peftops.prompt_per_row(model, ["default"]), pytest.raises(ValueError, match="several sequences in a row"):
        second(model, FIRST)


def test_compiled_it_is_refused_as_it_runs():
    torch._dynamo.reset()
    model = adapted(peftops.PromptTuningConfig)
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(RuntimeError, match="several sequences in a row"):
        second(compiled, FIRST)
