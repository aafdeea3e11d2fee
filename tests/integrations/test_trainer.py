"""Every method trains with transformers' own Trainer, and comes back from its files."""

import copy

import pytest
import safetensors.torch
import torch

import models
import peftops
from examples import example_of
from peftops.attaching import METHODS
from peftops.integrations.peft_files import WEIGHTS

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")

METHOD_OF = {config.__name__.removesuffix("Config").lower(): config for config in METHODS}


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        ids = models.tokens(4, 9)[i]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def trainer_of(model, folder, steps=2, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=0.05,
        use_cpu=True,
        report_to=[],
        logging_strategy="no",
        disable_tqdm=True,
        seed=0,
        **{"per_device_train_batch_size": 2, "save_strategy": "no"} | options,
    )
    return transformers.Trainer(model=model, args=arguments, train_dataset=Rows())


def of(method):
    """A model for the method, its base as the method leaves it, and its options."""
    config = METHOD_OF[method]
    options = example_of(config).config
    build = models.qwen2 if method == "bitfit" else models.llama
    model = peftops.attach(build(), options)
    return peftops.detach(copy.deepcopy(model)), model


@pytest.mark.parametrize("method", sorted(METHOD_OF))
def test_two_steps_and_back_from_files(method, tmp_path):
    """From the adapter's files, and from the checkpoint that Trainer writes by itself: training goes on with the same
    bits."""
    base, model = of(method)
    start = copy.deepcopy(model)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer_of(model, tmp_path / "trainer", save_strategy="steps", save_steps=1).train()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in frozen.items()), "something frozen has changed"
    changed = [name for name, p in trained.items() if not torch.equal(after[name], p)]
    assert changed, "nothing has learnt"
    assert not list((tmp_path / "trainer/checkpoint-1").glob("model*")), "the base, under names that nobody reads"
    assert (tmp_path / "trainer/checkpoint-1" / WEIGHTS).exists()
    peftops.save(model, tmp_path / "adapter")
    fresh = peftops.load(base, tmp_path / "adapter")
    ids = models.tokens(2, 9, seed=7)
    with torch.no_grad():
        want, got = model.eval()(ids).logits, fresh.eval()(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    trainer_of(start, tmp_path / "trainer").train(resume_from_checkpoint=str(tmp_path / "trainer/checkpoint-1"))
    for name, parameter in start.named_parameters():
        assert torch.equal(parameter, after[name]), name


def test_a_checkpoint_of_another_base_or_method_is_refused(tmp_path):
    """Trainer by itself leaves out what it does not find, and only warns."""
    model = peftops.attach(models.llama(), peftops.QLoRAConfig(r=4))
    trainer_of(model, tmp_path, save_strategy="steps", save_steps=1).train()
    for config, message in [
        (peftops.QLoRAConfig(r=4, block_size=128), r"was made with other options: block_size=64 \(here 128\)"),
        (peftops.QLoRAConfig(r=8), r"was made with other options: r=4 \(here 8\)"),
        (peftops.LoRAConfig(r=4), "is of QLoRAConfig, and the model's adapter of LoRAConfig"),
    ]:
        other = peftops.attach(models.llama(), config)
        with pytest.raises(ValueError, match=message):
            trainer_of(other, tmp_path, steps=3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_state_dicts_of_codes(tmp_path):
    """Also of what has two names: a tied head that trains whole, and factors that all layers share."""
    file = tmp_path / "model.safetensors"
    for config in (
        peftops.QLoRAConfig(r=4),
        peftops.LoRAConfig(r=4, modules_to_save=["lm_head"]),
        peftops.LoRAConfig(r=4, target=["embed_tokens"]),
        peftops.VeRAConfig(r=4),
    ):
        model, other = (peftops.attach(models.llama(seed=seed), config) for seed in (0, 1))
        safetensors.torch.save_model(model, file)
        loaded = other.load_state_dict(safetensors.torch.load_file(file), strict=False)
        assert not loaded.unexpected_keys
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_accumulation_and_checkpointing(tmp_path):
    """Trainer's own switches: the adapter learns the same from two small batches as from one of both."""
    results = []
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    for options in ({"per_device_train_batch_size": 4}, parts):
        torch.manual_seed(0)
        model = peftops.attach(models.llama(), peftops.LoRAConfig(r=4))
        trainer_of(model, tmp_path, steps=1, optim="sgd", **options).train()
        results.append([p.detach() for p in model.parameters() if p.requires_grad])
    assert any(p.any() for p in results[0][1::2]), "B is still 0"
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
