"""ReLoRA: the function over restarts, the rank they add up to, what an optimizer forgets, the jagged schedule."""

import copy
import io

import pytest
import torch
from torch import nn

import models
import peftops
from peftops import ReLoRAConfig, prune_state, relora_schedule, relora_step
from peftops.attaching import adapted_layers
from peftops.nn import NF4Linear


def trained(build=models.mlp, steps=0, lr=0.02, **options):
    """A model, its optimizer and its losses after so many steps towards a random function."""
    torch.manual_seed(0)
    base = build()
    if build is models.mlp:
        x = torch.randn(64, 64)
        target = x @ torch.randn(64, 32) / 8
        loss_of = lambda m: (m(x) - target).square().mean()
    else:
        ids = models.tokens(4, 12)
        loss_of = lambda m: m(input_ids=ids, labels=ids).loss
    model = peftops.attach(base, ReLoRAConfig(**{"r": 2, "alpha": 4, "dropout": 0.0, "every": 20, **options}))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * relora_schedule(step, 400, every=20, warmup=2, restart_warmup=2)
        loss = loss_of(model)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        relora_step(model, optimizer, step + 1)
    return model, optimizer, losses, loss_of


def factors(model):
    adapters = [layer.adapters["default"] for _, layer in adapted_layers(model)]
    return [a for a in adapters if hasattr(a, "lora_A")]


def test_the_rank_of_what_restarts_add_up_to_exceeds_r_and_the_loss_keeps_falling():
    before = models.mlp()
    model, _, losses, _ = trained(steps=100)
    ends = [losses[i] for i in (19, 39, 59, 79, 99)]
    assert ends == sorted(ends, reverse=True) and ends[-1] < 0.6 * ends[0], ends
    once, _, held, _ = trained(steps=100, every=1000)
    assert losses[-1] < 0.8 * held[-1]  # than without restarts
    for i in (0, 2):
        moved = torch.linalg.svdvals(model[i].base.weight - before[i].weight)
        alone = torch.linalg.svdvals(factors(once)[i // 2].merged(torch.zeros(before[i].weight.shape), None)[0])
        assert (moved > 1e-2 * moved[0]).sum() > 4 and (moved > 1e-4 * moved[0]).sum() <= 5 * 2
        assert (alone > 1e-4 * alone[0]).sum() == 2


@pytest.mark.parametrize("build", [models.mlp, models.llama, models.gpt2])
def test_a_restart_leaves_the_function_and_lets_b_learn_next(build):
    model, optimizer, _, loss_of = trained(build, steps=15)
    want, kept = loss_of(model), [layer.base.weight for _, layer in adapted_layers(model)]
    report = relora_step(model, optimizer, 20)
    assert len(report.layers) == len(factors(model)) and report.change > 1e-4 and report.rounding < 1e-6
    assert loss_of(model).item() == pytest.approx(want.item(), rel=1e-5)
    assert all(a is layer.base.weight for a, (_, layer) in zip(kept, adapted_layers(model), strict=True))
    assert all(a.lora_A.abs().mean() > 0.01 and not a.lora_B.any() for a in factors(model))
    optimizer.zero_grad()
    loss_of(model).backward()
    assert all(a.lora_B.grad.any() for a in factors(model))
    assert relora_step(model, optimizer, 21) is None


def test_a_restart_on_nf4_quantises_again_and_says_so():
    base = peftops.detach(peftops.attach(models.mlp(), peftops.QLoRAConfig()))
    model, optimizer, *_ = trained(lambda: copy.deepcopy(base))
    for a in factors(model):
        nn.init.normal_(a.lora_B, std=0.3)
    x = torch.randn(9, 64)
    want = model(x)
    report = relora_step(model, optimizer, 20)
    assert report.quantized and all(0.02 < e.rounding < 0.4 for e in report.layers.values())
    assert all(isinstance(layer.base, NF4Linear) for _, layer in adapted_layers(model))
    assert 0 < (model(x) - want).norm() < 0.3 * want.norm()


def test_everything_else_trains_in_full_or_nothing_of_it():
    model = trained(models.llama)[0]
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    full = {
        "model.embed_tokens.adapters.default.weight",
        "lm_head.adapters.default.weight",
        "model.norm.adapters.default.weight",
        "model.layers.1.input_layernorm.adapters.default.weight",
    }
    assert full <= names
    linears = {n for n in names if n.endswith(("lora_A", "lora_B"))}
    assert len(linears) == 28 and names - linears == {n for n in names if n.endswith("default.weight")}
    assert {n for n, p in trained(models.llama, rest=False)[0].named_parameters() if p.requires_grad} == linears
    assert sum(a.lora_bias is not None for a in factors(trained()[0])) == 2
    assert all(a.lora_bias is None for a in factors(trained(rest=False)[0]))


@pytest.mark.parametrize("quantized", [False, True])
def test_a_file_holds_the_base_after_restarts(tmp_path, quantized):
    build = models.mlp if not quantized else lambda: peftops.detach(peftops.attach(models.mlp(), peftops.QLoRAConfig()))
    model, *_ = trained(build, steps=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for a in factors(model):
        nn.init.normal_(a.lora_B, std=0.3)
    relora_step(model, optimizer, 20)
    for a in factors(model):
        nn.init.normal_(a.lora_B, std=0.3)
    x = torch.randn(9, 64)
    peftops.save(model, tmp_path)
    other = peftops.load(build(), tmp_path)
    assert torch.equal(other(x), model(x))
    assert other._peftops.configs["default"].restarts == 1
    with pytest.raises(ValueError, match="other adapters of this model need the old base"):
        peftops.load(peftops.attach(build(), peftops.LoRAConfig(r=2), name="a"), tmp_path, name="b")


def test_a_state_dict_is_all_that_a_run_needs_to_go_on():
    model, _, _, loss_of = trained(steps=25)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = trained()[0]
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert loss_of(other).item() == loss_of(model).item()


@pytest.mark.parametrize("how, ratio", [("reset", 0.9), ("random", 0.9), ("magnitude", 0.9), ("magnitude", 0.25)])
def test_what_the_optimizer_forgets(how, ratio):
    parameter, other = nn.Parameter(torch.randn(100, 200)), nn.Parameter(torch.randn(5))
    optimizer = torch.optim.AdamW([parameter, other])
    for _ in range(3):
        (parameter * torch.randn(100, 200)).sum().backward()
        (other * torch.randn(5)).sum().backward()
        optimizer.step()
    before, rest = copy.deepcopy(optimizer.state[parameter]), copy.deepcopy(optimizer.state[other])
    held = optimizer.state[parameter]["exp_avg"]
    prune_state(optimizer, [parameter], how, ratio)
    state = optimizer.state[parameter]
    assert state["step"] == 3 and state["exp_avg"] is held
    assert all(torch.equal(optimizer.state[other][key], rest[key]) for key in rest)
    for key in ("exp_avg", "exp_avg_sq"):
        gone = state[key] == 0
        share = gone.float().mean().item()
        assert share == 1 if how == "reset" else share == pytest.approx(ratio, abs=0.01 if how == "random" else 1e-4)
        assert torch.equal(state[key][~gone], before[key][~gone])
        if how == "magnitude":
            assert before[key][gone].abs().max() <= before[key][~gone].abs().min()


def test_the_jagged_cosine():
    want = {
        0: 0,
        250: 0.5,
        500: 1.0,
        4999: 0.886878,
        5000: 0.0,
        5050: 0.440989,
        5100: 0.881979,
        10100: 0.560874,
        19999: 0.1,
    }
    for step, value in want.items():
        assert relora_schedule(step, 20_000, every=5000) == pytest.approx(value, abs=1e-6), step
    # A run that goes on 1,000 steps after a restart: none at its step 4,000, the first after `every` of its own.
    assert relora_schedule(4000, 20_000, every=5000, offset=1000) == pytest.approx(0.8868298, abs=1e-6)
    assert relora_schedule(9000, 20_000, every=5000, offset=1000) == 0


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ReLoRAConfig(every=0), "every must be a whole number from 1, not 0"),
        (lambda: ReLoRAConfig(prune="zero"), "prune must be one of 'reset', 'random', 'magnitude', not 'zero'"),
        (lambda: ReLoRAConfig(prune_ratio=1), r"prune_ratio must be a number in \[0, 1\), not 1"),
        (lambda: ReLoRAConfig(r=0), "r must be a whole number from 1"),
        (
            lambda: peftops.attach(models.llama(), ReLoRAConfig(r=4, target=["lm_head"])),
            "lm_head shares its weight with",
        ),
        (lambda: relora_schedule(0, 100, every=30, restart_warmup=5, warmup=5), "total must be a multiple of every=30"),
        (lambda: relora_schedule(0, 100, every=50, restart_warmup=5, warmup=5, floor=0), "floor must be above 0"),
        (
            lambda: relora_schedule(0, 100, every=50, restart_warmup=5, warmup=51),
            r"warmup must be a whole number in \[0, 51\)",
        ),
        (lambda: relora_step(peftops.attach(models.mlp(), peftops.LoRAConfig()), None, 1), "needs an active ReLoRA"),
        (lambda: prune_state(None, [], "some"), "how must be one of"),
        (
            lambda: relora_step(peftops.attach(trained()[0], peftops.ReLoRAConfig(r=2), name="b"), None, 1000),
            "must be the only one, and unmerged",
        ),
        (lambda: _merged_and_restarted(), "must be the only one, and unmerged"),
    ],
)
def test_bad_input_gets_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def _merged_and_restarted():
    model, optimizer, *_ = trained()
    peftops.merge(model)
    relora_step(model, optimizer, 20)


def test_what_is_not_finite_or_not_floats_changes_nothing():
    model, optimizer, *_ = trained(steps=5)
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        factors(model)[1].lora_B[0, 0] = float("nan")
    with pytest.raises(ValueError, match="A or B of 2 is not finite; nothing was merged"):
        relora_step(model, optimizer, 20)
    assert torch.equal(model.state_dict()["0.base.weight"], state["0.base.weight"])
    packed = nn.Parameter(torch.randn(4))
    sgd = torch.optim.SGD([packed])
    sgd.state[packed] = {"state1": torch.ones(4, dtype=torch.uint8)}
    with pytest.raises(TypeError, match=r"SGD keeps state1 as torch.uint8 \[4\], which cannot be pruned"):
        prune_state(sgd, [packed])
    assert sgd.state[packed]["state1"].all()
