"""HF PEFT's own AdaptedAttention and ours: same prompts and gates in, same logits and gradients out."""

import pytest
import torch
from torch import nn

import models
import peftops
from peftops import LLaMAAdapterConfig
from peftops.nn.gated_prompt import GatedPrompt

peft = pytest.importorskip("peft")
ids = models.tokens()


class Hosted(nn.Module):
    def __init__(self, base, gated):
        super().__init__()
        self.base, self.gated = base, gated

    def forward(self, *args, **kwargs):
        return self.gated.attend(self.base, *args, **kwargs)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("gate", [0.0, 0.7, -2.0])
def test_the_same_logits_and_gradients(layers, gate):
    """PEFT has one gate a layer, not squashed: all heads' gates set to it, and their gradients summed."""
    theirs = peft.get_peft_model(
        models.llama(), peft.AdaptionPromptConfig(adapter_len=10, adapter_layers=layers, task_type="CAUSAL_LM")
    )
    torch.manual_seed(1)
    ours, pairs = models.llama().requires_grad_(False), []
    for name, module in theirs.named_modules():
        if name.endswith("self_attn") and hasattr(module, "adaption_gate"):
            layer = ours.get_submodule(name.removeprefix("base_model.model.").rpartition(".")[0])
            gated = GatedPrompt(layer.self_attn, 10, "none")
            with torch.no_grad():
                module.adaption_gate.fill_(gate)
                gated.gate.fill_(gate)
                gated.prompt.copy_(module.adaption_prompt[0])
            layer.self_attn = Hosted(layer.self_attn, gated)
            pairs.append((module, gated))
    assert len(pairs) == layers
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    for model in (ours, theirs):
        model(input_ids=ids, labels=ids).loss.backward()
    for module, gated in pairs:
        torch.testing.assert_close(gated.prompt.grad, module.adaption_prompt.grad[0], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(gated.gate.grad.sum(), module.adaption_gate.grad[0], rtol=1e-4, atol=1e-7)


def shake(model):
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("build", [models.llama, models.mistral], ids=lambda build: build.__name__)
@pytest.mark.parametrize("layers", [1, 2])
def test_files_both_ways(build, layers, tmp_path):
    config = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=layers, task_type="CAUSAL_LM")
    theirs = shake(peft.get_peft_model(build(), config)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = peftops.load(build(), tmp_path / "theirs")
    read = model._peftops.configs["default"]
    assert read == LLaMAAdapterConfig(tokens=4, layers=layers, gate="peft")
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)
    assert (model(ids).logits - build()(ids).logits).norm() > 1
    peftops.save(shake(model), tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(build(), tmp_path / "ours").eval()
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    back = peftops.load(build(), tmp_path / "ours")
    assert torch.equal(back(ids).logits, model(ids).logits)


def test_files_of_what_we_compute_otherwise_are_refused(tmp_path):
    """PEFT leaves GPT-2's output projection out of the prompt's way."""
    config = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM")
    peft.get_peft_model(models.gpt2(), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="this adapter needs target_modules='attn', which peftops does not support"):
        peftops.load(models.gpt2(), tmp_path)
