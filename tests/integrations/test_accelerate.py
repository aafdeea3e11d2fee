"""accelerate's own files hold every adapter of a model, those that do not train at the moment too."""

import pytest
import torch

import models
import peftops

accelerate = pytest.importorskip("accelerate")
PAIRS = [
    (peftops.LoRAConfig(r=4), peftops.LoRAConfig(r=2)),
    (peftops.QLoRAConfig(r=4), peftops.LoRAConfig(r=2, target=["q_proj"])),
    (peftops.VeRAConfig(r=4), peftops.TiedLoRAConfig(r=4)),
    (peftops.LoRAConfig(r=4, modules_to_save=["lm_head"]), peftops.IA3Config()),
    (peftops.PromptTuningConfig(tokens=3), peftops.LoRAConfig(r=2)),
]


def with_two(configs, seed):
    model = models.llama()
    torch.manual_seed(seed)
    for name, config in zip(("one", "two"), configs, strict=True):
        peftops.attach(model, config, name=name)  # and it trains, the other one no longer
        for parameter in trained(model):
            torch.nn.init.normal_(parameter, std=0.1)
    peftops.activate(model, "one")
    return model


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("configs", PAIRS, ids=lambda pair: " and ".join(type(c).__name__[:-6] for c in pair))
def test_inactive_adapters_are_saved_and_come_back(configs, tmp_path):
    ids = models.tokens()
    model = with_two(configs, seed=1)
    engine = accelerate.Accelerator(cpu=True)
    prepared, optimizer = engine.prepare(model, torch.optim.AdamW(trained(model), lr=0.01))

    def step(engine, model, optimizer):
        engine.backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()

    step(engine, prepared, optimizer)
    engine.save_state(tmp_path / "state")
    engine.save_model(prepared, tmp_path / "model")

    other = with_two(configs, seed=2)
    again = accelerate.Accelerator(cpu=True)
    resumed, its_optimizer = again.prepare(other, torch.optim.AdamW(trained(other), lr=0.01))
    again.load_state(tmp_path / "state")
    alone = with_two(configs, seed=3)
    accelerate.load_checkpoint_in_model(alone, tmp_path / "model", strict=False)
    for name in ("one", "two"):
        for each in (model, other, alone):
            peftops.activate(each, name)
        want = model(ids).logits
        assert torch.equal(other(ids).logits, want) and torch.equal(alone(ids).logits, want)
    for each in (model, other):
        peftops.activate(each, "one")
    step(engine, prepared, optimizer)
    step(again, resumed, its_optimizer)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
