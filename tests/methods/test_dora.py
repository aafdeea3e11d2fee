"""DoRA on rows that are short, or nothing: real models have such."""

import copy

import pytest
import torch
from torch import nn

import peftops
from peftops import DoRAConfig

x = torch.linspace(-2, 2, 5 * 64).view(5, 64)


def layer(length):
    """A layer of which some rows have about this length."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32))
    with torch.no_grad():
        model[0].weight[3:9] *= length
    return model


@pytest.mark.parametrize("length", [0.0, 1e-44, 1e-42, 1e-38, 1e-30, 1e-20, 1.0, 1e18, 1e25])
def test_it_starts_as_the_base_merges_and_learns_on_rows_of_any_length(length):
    base = layer(length)
    model = peftops.attach(copy.deepcopy(base), DoRAConfig(r=4))
    torch.testing.assert_close(model(x), base(x), rtol=1e-5, atol=1e-6)
    report = peftops.merge(model)
    assert report.change < 1e-5 and report.rounding < 1e-6
    torch.testing.assert_close(model(x), base(x), rtol=1e-5, atol=1e-6)
    peftops.unmerge(model)

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x)[:, :3].square().mean().backward()
        optimizer.step()
    assert all(p.isfinite().all() and p.grad.isfinite().all() for p in parameters) and model(x).isfinite().all()
    want = model(x)
    peftops.merge(model)
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)


def test_a_row_of_zeros_stays_while_others_learn():
    model = peftops.attach(layer(0.0), DoRAConfig(r=4))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = model(x).detach()
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert torch.equal(model(x)[:, 3:9], before[:, 3:9]) and not torch.equal(model(x), before)


def test_rows_that_the_change_takes_away():
    """W + s B A = 0: no direction is left."""
    base = nn.Sequential(nn.Linear(64, 4, bias=False))
    model = peftops.attach(base, DoRAConfig(r=4, alpha=4))
    adapter = model[0].adapters["default"]
    with torch.no_grad():
        adapter.lora_A.copy_(model[0].weight)
        adapter.lora_B.copy_(-torch.eye(4))
    assert model(x).isfinite().all()
    peftops.merge(model)
    assert model(x).isfinite().all()


@pytest.mark.parametrize("quantize", [True, False])
def test_zeros_in_4_bits(quantize):
    base = layer(0.0)
    if quantize:
        base = peftops.detach(peftops.attach(base, peftops.QLoRAConfig(r=4, target=["0"])))
    model = peftops.attach(copy.deepcopy(base), DoRAConfig(r=4, target=["0"]))
    torch.testing.assert_close(model(x), base(x), rtol=1e-5, atol=1e-6)


def test_lengths_keep_their_digits_when_the_model_is_cast():
    model = peftops.attach(layer(1.0), DoRAConfig(r=4))
    adapter = model[0].adapters["default"]
    before = adapter.squares.clone()
    model.to(torch.bfloat16)
    assert torch.equal(adapter.squares, before) and model(x.bfloat16()).dtype == torch.bfloat16
