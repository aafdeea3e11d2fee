"""LQ-LoRA: Fisher information, the decomposition's errors, the budget of bits, and what its files hold."""

import itertools
import json
import sys

import pytest
import torch
from torch import nn

import models
import peftops
from peftops import LQLoRAConfig
from peftops.attaching import adapted_layers
from peftops.factors.lq import Weighing, first_errors, lq_decompose
from peftops.factors.lq_budget import PRECISIONS, Precision, allocate
from peftops.nn import GroupLinear, NF4Linear, dense_matrix
from peftops.nn.layers import dequantized


def weight_of(out=64, in_=128, seed=0):
    return torch.randn(out, in_, generator=torch.Generator().manual_seed(seed)) * 0.05


def importance_of(out=64, in_=128, seed=1):
    """Spread over decades, as Fisher information is, by rows and columns and each element."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns, own = (torch.randn(s, generator=generator) for s in ((out, 1), (1, in_), (out, in_)))
    return (1.5 * rows + 1.5 * columns + 0.5 * own).exp()


def adapters(model):
    return {path: layer.adapters["default"] for path, layer in adapted_layers(model)}


def error(weight, codes, left, right, importance):
    lost = weight - dequantized(codes, torch.float32) - (0 if left is None else left @ right)
    root = torch.ones_like(weight) if importance is None else importance.sqrt()
    return ((root * lost).norm() / (root * weight).norm()).item()


@pytest.mark.parametrize("precision", ["nf4-64", "nf4-256-double", "int2-32", "int3-64", "int4-32", "int8-128"])
@pytest.mark.parametrize("importance", [None, importance_of()], ids=["alike", "fisher"])
def test_it_errs_less_than_plain_codes_and_falls_until_what_is_returned(precision, importance):
    weight, quantize = weight_of(), Precision.parse(precision).quantize
    codes, left, right, errors = lq_decompose(weight, 8, quantize, importance=importance)
    assert error(weight, quantize(weight), None, None, importance) == pytest.approx(errors[0], rel=1e-5)
    assert error(weight, codes, left, right, importance) == pytest.approx(min(errors), rel=1e-4)
    assert min(errors) < 0.99 * errors[0]
    best = errors.index(min(errors))
    assert all(a > b for a, b in itertools.pairwise(errors[1 : best + 1]))
    assert best == len(errors) - 1 or errors[-1] >= errors[-2] or len(errors) == 11
    first = first_errors(weight, 8, [quantize], importance)[0]
    scale = (weight if importance is None else importance.sqrt() * weight).norm().item()
    assert first == pytest.approx((min(errors[:2]) * scale) ** 2, rel=1e-3)


def test_weights_of_rank_one_are_met_exactly_and_constant_ones_change_nothing():
    weight, r = weight_of(), 5
    importance = torch.rand(64, 1).add(0.05) * torch.rand(1, 128).add(0.05)
    left, right = Weighing(importance).factors(weight, r)
    root = importance.sqrt()
    optimum = torch.linalg.svdvals(root * weight)[r:].norm()
    torch.testing.assert_close((root * (weight - left @ right)).norm(), optimum, rtol=1e-4, atol=1e-6)
    plain = torch.mm(*Weighing(None).factors(weight, r))
    assert (root * (weight - plain)).norm() > 1.02 * optimum
    torch.testing.assert_close(torch.mm(*Weighing(torch.full((64, 128), 3.0)).factors(weight, r)), plain)
    dead = importance.clone()
    dead[3], dead[:, 7] = 0, 0  # a row and a column that never got a gradient
    assert all(t.isfinite().all() for t in Weighing(dead).factors(weight, r))
    assert all(t.isfinite().all() for t in Weighing(torch.zeros(64, 128)).factors(weight, r))


def test_fisher_is_the_sum_of_squared_gradients_of_samples():
    model, x, y = models.mlp(), torch.randn(6, 64), torch.randn(6, 32)
    flags = [p.requires_grad_(i % 2 == 0).requires_grad for i, p in enumerate(model.parameters())]
    loss = lambda i: (model(x[i : i + 1]) - y[i : i + 1]).square().sum()
    got = peftops.fisher(model, loss, range(6))
    assert list(got) == ["0", "2"] and [p.requires_grad for p in model.parameters()] == flags
    want = torch.zeros(32, 96)
    for i in range(6):  # of the last layer by hand: the outer product of the error and its input
        hidden = model[:2](x[i])
        want += torch.outer(2 * (model[2](hidden) - y[i]), hidden).square().detach()
    torch.testing.assert_close(got["2"], want, rtol=1e-4, atol=1e-5)
    batched = peftops.fisher(model, lambda _: (model(x) - y).square().sum(), range(1))
    assert not torch.allclose(batched["2"], want, rtol=0.1)
    gpt2 = models.gpt2()
    of = peftops.fisher(gpt2, lambda ids: gpt2(input_ids=ids, labels=ids).loss, [models.tokens()])
    assert all(list(f.shape) == list(dense_matrix(gpt2.get_submodule(p)).shape) for p, f in of.items())


@pytest.mark.parametrize("seed", range(6))
def test_the_allocation_is_that_of_trying_all(seed):
    generator = torch.Generator().manual_seed(seed)
    costs = torch.rand(3, 4, generator=generator).double().tolist()
    sizes = torch.randint(1, 12, (3, 4), generator=generator).double().tolist()
    for budget in (9.0, 14.0, 20.0):
        every = [
            (sum(costs[i][j] for i, j in enumerate(p)), p)
            for p in itertools.product(range(4), repeat=3)
            if sum(sizes[i][j] for i, j in enumerate(p)) <= budget
        ]
        if not every:
            with pytest.raises(ValueError, match="more than the budget of"):
                allocate(costs, sizes, budget)
            continue
        got = allocate(costs, sizes, budget)
        assert sum(costs[i][j] for i, j in enumerate(got)) == pytest.approx(min(every)[0], abs=1e-9)
        assert sum(sizes[i][j] for i, j in enumerate(got)) <= budget


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_the_size_of_a_precision_is_that_of_its_codes(precision):
    codes = precision.quantize(weight_of(48, 256))
    assert precision.size(48 * 256) == 8 * codes.nbytes
    assert Precision.of(codes) == precision == Precision.parse(str(precision))


def wide():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 128))


def bits_of(model):
    bases = [layer.base.weight for _, layer in adapted_layers(model)]
    return 8 * sum(w.nbytes for w in bases) / sum(w.numel() for w in bases)


def total_error(model, dense, importance, plain=False):
    total = 0.0
    for path, a in adapters(model).items():
        weight, base = dense.get_submodule(path).weight.detach(), model.get_submodule(path).base
        got = dense_matrix(base) if plain else a.merged(dense_matrix(base), None)[0]
        total += (importance[path] * (weight - got).square()).sum().item()
    return total


@pytest.mark.parametrize("bits", [3.2, 3.7, 4.26, 4.6])
def test_the_budget_is_kept_and_errors_are_below_nf4_at_the_same_budget(bits):
    dense = wide()
    importance = {p: importance_of(*dense.get_submodule(p).weight.shape, seed=i) for i, p in enumerate("024")}
    importance["4"] *= 100  # a layer that matters more
    model = peftops.attach(wide(), LQLoRAConfig(r=4, alpha=12, bits=bits, fisher=importance))
    assert bits_of(model) <= bits
    errors = total_error(model, dense, importance)
    if bits >= 4.26:  # what NF4 takes here, absmax values doubly quantised
        nf4 = peftops.attach(wide(), LQLoRAConfig(r=4, iterations=0, precisions=dict.fromkeys("024", "nf4-64-double")))
        assert bits_of(nf4) <= 4.26
        assert errors < 0.5 * total_error(nf4, dense, importance, plain=True)
    alike = peftops.attach(wide(), LQLoRAConfig(r=4, alpha=12, bits=bits))
    assert errors < total_error(alike, dense, importance)
    chosen = {path: str(a.precision) for path, a in adapters(model).items()}
    assert Precision.parse(chosen["4"]).size(10**6) >= Precision.parse(chosen["0"]).size(10**6)
    x = torch.randn(8, 128)
    codes = peftops.attach(wide(), LQLoRAConfig(r=4, iterations=0, precisions=chosen))
    assert (alike(x) - dense(x)).norm() < (codes(x) - dense(x)).norm()


def test_files_hold_the_codes_and_load_onto_the_dense_model(tmp_path):
    importance = {p: importance_of(*wide().get_submodule(p).weight.shape) for p in "024"}
    model = peftops.attach(wide(), LQLoRAConfig(r=4, bits=3.5, fisher=importance))
    assert {type(layer.base) for _, layer in adapted_layers(model)} <= {NF4Linear, GroupLinear}
    x = torch.randn(5, 128)
    peftops.save(model, tmp_path)
    other = peftops.load(wide(), tmp_path)
    assert torch.equal(other(x), model(x))
    options = json.loads((tmp_path / "peftops.json").read_text())["options"]
    assert options["precisions"] == {path: str(a.precision) for path, a in adapters(model).items()}
    again = peftops.load(peftops.detach(other), tmp_path)  # onto the same codes
    assert torch.equal(again(x), model(x))
    third = peftops.detach(peftops.attach(wide(), LQLoRAConfig(r=4, iterations=0, precisions=options["precisions"])))
    with pytest.raises(ValueError, match="was trained on other codes than the model has"):
        peftops.load(third, tmp_path)
    fourth = peftops.detach(peftops.attach(wide(), peftops.QLoRAConfig(block_size=32)))
    with pytest.raises(ValueError, match="is quantised to nf4-32-double already, not to"):
        peftops.load(fourth, tmp_path)


@pytest.mark.parametrize(
    "config",
    [peftops.LoRAConfig(r=4), peftops.DoRAConfig(r=4), peftops.LoRAFAConfig(r=4), peftops.VeRAConfig(r=8)],
    ids=lambda c: type(c).__name__,
)
def test_other_methods_train_and_merge_on_whole_number_codes(config):
    whole = LQLoRAConfig(r=4, iterations=0, precisions=dict.fromkeys("024", "int4-32"))
    base = peftops.detach(peftops.attach(wide(), whole))
    model, x = peftops.attach(base, config), torch.randn(5, 128)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    want = model(x)
    want.sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    peftops.merge(model, dense=True)
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
    peftops.unmerge(model)
    with pytest.warns(UserWarning, match="quantising the merged weights again"):
        report = peftops.merge(model)
    assert report.quantized and all(isinstance(layer.base, GroupLinear) for _, layer in adapted_layers(model))
    assert 0 < (model(x) - want).norm() < 0.5 * want.norm()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LQLoRAConfig(bits=0.5), "bits must be a number from 1, not 0.5"),
        (lambda: LQLoRAConfig(iterations=-1), r"iterations must be a whole number in \[0, 1000\), not -1"),
        (lambda: LQLoRAConfig(precisions={"0": "fp4-64"}), "a precision must be like 'nf4-64', 'nf4-64-double' or"),
        (lambda: LQLoRAConfig(precisions={"0": "int3-64-double"}), "a precision must be like"),
        (lambda: LQLoRAConfig(precisions={"0": "nf4"}), "a precision must be like"),
        (lambda: peftops.attach(wide(), LQLoRAConfig(r=4, bits=2)), "which is more than the budget of"),
        (
            lambda: peftops.attach(wide(), LQLoRAConfig(r=4, precisions={"0": "nf4-64"})),
            "precisions has nothing for 2, 4",
        ),
        (
            lambda: peftops.attach(wide(), LQLoRAConfig(r=4, fisher={"0": torch.ones(2, 2)})),
            r"fisher must have a tensor \[128, 128\] for 0",
        ),
        (lambda: peftops.attach(wide(), LQLoRAConfig(r=4, alpha=-1)), "LQ-LoRA needs a scaling above 0"),
        (
            lambda: peftops.attach(peftops.attach(wide(), peftops.LoRAConfig(r=4), name="a"), LQLoRAConfig(r=4)),
            "attach it before them",
        ),
        (lambda: peftops.fisher(wide(), lambda s: s, []), "fisher needs at least one sample"),
        (
            lambda: peftops.fisher(peftops.detach(peftops.attach(wide(), peftops.QLoRAConfig())), lambda s: s, []),
            "codes have no gradient",
        ),
    ],
)
def test_bad_input_gets_a_sentence(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_without_scipy_the_budget_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        peftops.attach(wide(), LQLoRAConfig(r=4))
    model = peftops.attach(wide(), LQLoRAConfig(r=4, precisions=dict.fromkeys("024", "nf4-64")))
    assert bits_of(model) == 4.5
