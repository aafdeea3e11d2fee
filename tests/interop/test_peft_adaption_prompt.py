"""HF PEFT's own AdaptedAttention and ours: same prompts and gates in, same logits and gradients out."""

import pytest
import torch
from torch import nn

import models
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
