"""Surgical fine-tuning on a small CNN: which block a shift asks for, and what Auto-RGN and Auto-SNR make of it."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import peftops
from peftops import SurgicalConfig

CLASSES = 8


def images(count, seed, noise=1.2):
    """Patterns of a class, each a sum of colours and waves of its own, in noise."""
    shapes = torch.randn(CLASSES, 3, 4, 4, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    clean = F.interpolate(shapes, size=12, mode="bilinear")[labels]
    return clean + noise * torch.randn(clean.shape, generator=generator), labels


def corrupted(x):
    """A shift of the input: negatives, as of a film."""
    return -x


def relabelled(y):
    """A shift of the output: classes have other names."""
    return (y + 3) % CLASSES


@functools.cache
def trained():
    """Three convolutional blocks and a head, as a list: blocks are what surgical fine-tuning chooses from."""
    torch.manual_seed(0)
    block = lambda in_, out: nn.Sequential(nn.Conv2d(in_, out, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2))
    head = nn.Sequential(nn.Flatten(), nn.Linear(24, CLASSES))
    model = nn.Sequential(block(3, 12), block(12, 16), block(16, 24), head)
    x, y = images(2048, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(150):
        rows = torch.randint(len(x), (256,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    assert accuracy(model, *images(512, 2)) > 0.95
    return model


@torch.no_grad()
def accuracy(model, x, y):
    return (model(x).argmax(1) == y).float().mean().item()


def tuned(blocks, x, y, steps=80, lr=5e-3):
    """Of a few images of the shifted kind, with one rate for all blocks."""
    model = peftops.attach(copy.deepcopy(trained()), SurgicalConfig(blocks))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def test_a_corrupted_input_asks_for_the_first_block_and_other_labels_for_the_last():
    (few, labels), (held, truth) = images(24, 3), images(512, 4)
    untouched = accuracy(trained(), corrupted(held), truth), accuracy(trained(), held, relabelled(truth))
    camera = [accuracy(tuned([i], corrupted(few), labels), corrupted(held), truth) for i in range(4)]
    names = [accuracy(tuned([i], few, relabelled(labels)), held, relabelled(truth)) for i in range(4)]
    assert max(untouched) < 0.2
    assert camera[0] > max(camera[1:]) + 0.1, camera
    assert names[3] == max(names) and names[3] > names[0] + 0.3, names


def weights_for(x, y, auto=peftops.auto_rgn, **how):
    model = peftops.attach(copy.deepcopy(trained()), SurgicalConfig("all"))
    loss = lambda rows: F.cross_entropy(model(x[rows]), y[rows])
    weights = auto(model, loss, torch.arange(len(x)).split(how.pop("size", 8))[:5], **how)
    return model, {int(name.split(".")[0]): w for name, w in weights.items() if name.endswith("weight")}, weights


def test_auto_rgn_turns_to_the_block_that_a_shift_asks_for():
    x, y = images(48, 3)
    model, camera, every = weights_for(corrupted(x), y)
    _, names, _ = weights_for(x, relabelled(y))
    assert max(every.values()) == 1 and min(every.values()) >= 0 and len(camera) == len(names) == 4
    assert camera[0] / camera[3] > 1.2 * names[0] / names[3]  # more than under the other shift
    groups = peftops.weighted_groups(model, every, 0.1)
    assert max(g["lr"] for g in groups) == 0.1
    parameters = dict(model.named_parameters())
    rates = {id(g["params"][0]): g["lr"] for g in groups}
    assert all(rates[id(parameters[name])] == 0.1 * w for name, w in every.items() if w)
    for group in groups:
        group["params"][0].grad = torch.ones_like(group["params"][0])
    before = {name: p.detach().clone() for name, p in parameters.items()}
    torch.optim.SGD(groups).step()  # each parameter moves by its own rate
    for name, w in every.items():
        torch.testing.assert_close(before[name] - parameters[name], torch.full_like(before[name], 0.1 * w))


def test_auto_rgn_is_the_mean_of_relative_gradient_norms():
    x, y = images(40, 3)
    model, _, got = weights_for(x, y)
    loss = lambda rows: F.cross_entropy(model(x[rows]), y[rows])
    want = dict.fromkeys(got, 0.0)
    for rows in torch.arange(40).split(8):
        model.zero_grad()
        loss(rows).backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                want[name] += (p.grad.norm() / p.detach().norm()).item()
    largest = max(want.values())
    assert got == {name: pytest.approx(value / largest, rel=1e-4) for name, value in want.items()}


class Two(nn.Module):
    """Two scalars whose gradients are what the samples say."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(1, 1, bias=False)
        self.b = nn.Linear(1, 1, bias=False)


def test_auto_rgn_foresees_a_change_of_scale_and_auto_snr_knows_mean_and_variance():
    model = Two()
    with torch.no_grad():
        model.a.weight.fill_(2.0), model.b.weight.fill_(0.5)
    loss = lambda g: g[0] * model.a.weight.sum() + g[1] * model.b.weight.sum()
    rgn = peftops.auto_rgn(model, loss, [(1.0, 1.0), (3.0, 1.0)])
    assert rgn == {"a.weight": pytest.approx((0.5 + 1.5) / 2 / 2), "b.weight": 1.0}
    with torch.no_grad():
        model.a.weight *= 10  # and its gradient the same: a tenth of the weight
    assert peftops.auto_rgn(model, loss, [(1.0, 1.0), (3.0, 1.0)])["a.weight"] == pytest.approx(0.05)
    # a: mean 2, variance 1; b: mean 0, so all noise. Then b is the steady one.
    noisy = peftops.auto_snr(model, loss, [(1.0, 1.0), (2.0, -1.0), (3.0, 0.0)])
    assert noisy == {"a.weight": 1.0, "b.weight": 0.0}
    assert peftops.auto_snr(model, loss, [(1.0, 5.0), (2.0, 5.01), (3.0, 5.02)]) == {"a.weight": 0.0, "b.weight": 1.0}
    every = peftops.auto_snr(model, loss, [(1.0, 1.0), (2.0, -1.0), (3.0, 0.0)], threshold=0.0)
    assert every == dict.fromkeys(noisy, 1.0)
    with torch.no_grad():
        model.b.weight.zero_()  # nothing to be relative to
    assert peftops.auto_rgn(model, loss, [(1.0, 1.0)]) == {"a.weight": 1.0, "b.weight": 0.0}
    with pytest.raises(ValueError, match="threshold must be a number in"):
        peftops.auto_snr(model, loss, [], threshold=2)


def test_auto_snr_freezes_what_is_noise_and_only_that():
    x, y = images(24, 3)
    strict = weights_for(x, relabelled(y), auto=peftops.auto_snr, size=1, threshold=0.9)[2]
    model, _, weights = weights_for(x, relabelled(y), auto=peftops.auto_snr, size=1, threshold=0.1)
    assert set(weights.values()) == {0.0, 1.0} and sum(strict.values()) < sum(weights.values())
    assert all(weights[name] >= w for name, w in strict.items())
    frozen = {id(p) for name, p in model.named_parameters() if weights.get(name) == 0.0}
    groups = peftops.weighted_groups(model, weights, 0.1)
    assert frozen and not frozen & {id(g["params"][0]) for g in groups} and all(g["lr"] == 0.1 for g in groups)


def test_only_the_chosen_block_moves():
    x, y = images(16, 3)
    before, model = trained(), tuned([1], x, y, steps=3)
    merged = peftops.detach(peftops.merge(model) and model, merged=True)
    moved = {
        n.split(".")[0]
        for (n, p), q in zip(merged.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(p, q)
    }
    assert moved == {"1"}
