"""Activations that are computed again in backward: each block runs twice, and gradients have the same bits."""

import torch

import models
import peftops
from peftops.optim.checkpointing import compute_again


def test_each_block_runs_again_and_gradients_are_the_same():
    model = peftops.attach(models.llama(), peftops.LoRAConfig(r=2)).train()
    runs = []
    for block in model.model.layers:
        block.mlp.register_forward_pre_hook(lambda *_: runs.append(1))

    def gradients():
        runs.clear()
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.autograd.grad(model(models.tokens()).logits.square().mean(), trained)

    want, once = gradients(), len(runs)
    compute_again(model)
    again = gradients()
    assert once == len(model.model.layers) and len(runs) == 2 * once
    assert all(torch.equal(a, b) for a, b in zip(again, want, strict=True))
