"""HF PEFT reads our adapters and we read PEFT's: same logits."""

import pytest
import torch
from torch import nn

import models
import peftops
from peftops import LoRAConfig

peft = pytest.importorskip("peft")
ids = models.tokens()

kinds = pytest.mark.parametrize(
    "ours, theirs",
    [
        (LoRAConfig(r=4, target=["q_proj", "v_proj"]), dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])),
        (
            LoRAConfig(r=8, alpha=3.0, rslora=True),
            dict(r=8, lora_alpha=3, use_rslora=True, target_modules="all-linear"),
        ),
        (
            LoRAConfig(r=4, target=r".*layers\.1\..*proj"),
            dict(r=4, lora_alpha=8, target_modules=r".*layers\.1\..*proj"),
        ),
        (
            LoRAConfig(r=4, rank_pattern={"q_proj": 6}, alpha_pattern={"mlp.up_proj": 1.0}, alpha=8.0),
            dict(
                r=4,
                lora_alpha=8,
                rank_pattern={"q_proj": 6},
                alpha_pattern={"mlp.up_proj": 1.0},
                target_modules="all-linear",
            ),
        ),
    ],
    ids=["names", "rslora", "expression", "patterns"],
)


def shake(model):
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)


@kinds
@pytest.mark.parametrize("tied", [True, False])
def test_peft_reads_ours(tmp_path, ours, theirs, tied):
    model = peftops.attach(models.llama(tied=tied), ours)
    shake(model)
    peftops.save(model, tmp_path)
    other = peft.PeftModel.from_pretrained(models.llama(tied=tied), tmp_path)
    torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert config.r == theirs["r"] and config.lora_alpha == theirs["lora_alpha"]


@kinds
def test_we_read_pefts(tmp_path, ours, theirs):
    other = peft.get_peft_model(models.llama(), peft.LoraConfig(task_type="CAUSAL_LM", **theirs))
    shake(other)
    other.eval().save_pretrained(tmp_path)
    model = peftops.load(models.llama(), tmp_path)
    torch.testing.assert_close(model(ids).logits, other(ids).logits, rtol=1e-5, atol=1e-5)
    # and what we write of it, PEFT reads again
    peftops.save(model, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(models.llama(), tmp_path / "again")
    torch.testing.assert_close(again(ids).logits, other(ids).logits, rtol=1e-6, atol=1e-6)


@kinds
def test_the_same_layers_and_gradients(ours, theirs):
    """Same parameters in, same gradients out."""
    other = peft.get_peft_model(models.llama(), peft.LoraConfig(**theirs))
    shake(other)
    model = peftops.attach(models.llama(), ours)
    mine = {n.replace(".adapters.default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    for name, parameter in other.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.").replace(".default.weight", "")
            with torch.no_grad():
                mine.pop(name).copy_(parameter)
    assert not mine
    for m in (model, other):
        m(input_ids=ids, labels=ids).loss.backward()
    grads = {n.replace(".adapters.default", ""): p.grad for n, p in model.named_parameters() if p.requires_grad}
    for name, parameter in other.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.").replace(".default.weight", "")
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_what_we_do_not_support_of_pefts_raises(tmp_path):
    for options in (dict(layer_replication=[[0, 2], [1, 2]]), dict(alora_invocation_tokens=[1])):
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
        other = peft.get_peft_model(models.llama(tied=False), config)
        other.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="which peftops does not support"):
            peftops.load(models.llama(tied=False), tmp_path)
