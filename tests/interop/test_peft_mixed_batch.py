"""A batch whose rows name adapters of their own: PEFT's adapter_names and multi_lora_linear give equal numbers."""

import pytest
import torch
from torch import nn

import peftops

peft = pytest.importorskip("peft")
RANKS = {"p": 4, "q": 7, "s": 16}


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("first", nn.Linear(96, 64))
    model.add_module("second", nn.Linear(64, 33, bias=False))
    for i, (name, r) in enumerate(RANKS.items()):
        config = peft.LoraConfig(r=r, lora_alpha=8 + i, target_modules=["first", "second"], init_lora_weights=False)
        if i:
            model.add_adapter(name, config)
        else:
            model = peft.get_peft_model(model, config, name)
    return model.eval()


def ours(theirs, **kw):
    layers = {name: getattr(theirs.base_model.model, name) for name in ("first", "second")}
    pool = peftops.AdapterPool({n: (at.in_features, at.out_features) for n, at in layers.items()}, pages=64, **kw)
    for a in RANKS:
        factors = {n: (at.lora_A[a].weight, at.lora_B[a].weight) for n, at in layers.items()}
        pool.add(a, factors, {n: at.scaling[a] for n, at in layers.items()})

    def run(x, index):
        for n, at in layers.items():
            x = peftops.multi_lora_linear(x, at.base_layer.weight, pool.layer(n), index, at.base_layer.bias)
        return x

    return pool, run


@pytest.mark.parametrize("rows", [["p", None, "q", "s", "q", "p", None, "s"], ["q"] * 8, [None] * 8])
def test_mixed_batch_is_that_of_peft(theirs, rows):
    pool, run = ours(theirs)
    x = torch.randn(8, 96)
    with torch.no_grad(), pool.use(rows) as index:
        want = theirs(x, adapter_names=[a or "__base__" for a in rows])
        got = run(x, index)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        with theirs.disable_adapter():
            changed = (got - theirs(x)).abs().amax(1).gt(1e-2)
    assert changed.tolist() == [a is not None for a in rows]


def test_many_tokens_a_row(theirs):
    """PEFT's names are per sample, ours per row of x."""
    pool, run = ours(theirs)
    rows, x = ["s", None, "p"], torch.randn(3, 5, 96)
    with torch.no_grad(), pool.use(rows) as index:
        want = theirs(x, adapter_names=[a or "__base__" for a in rows])
        torch.testing.assert_close(run(x, index[:, None].expand(3, 5)), want, rtol=1e-5, atol=1e-5)


def test_gradients_of_many_adapters_in_one_step_are_those_of_one_by_one(theirs):
    """PEFT trains one adapter at a time; a mixed step of ours is all of them at once."""
    first, pool = theirs.base_model.model.first, peftops.AdapterPool({"first": (96, 64)}, pages=64)
    leaf, base = (lambda t: t.detach().clone().requires_grad_()), first.base_layer.requires_grad_(False)
    leaves = {a: (leaf(first.lora_A[a].weight), leaf(first.lora_B[a].weight)) for a in RANKS}
    for a, pair in leaves.items():
        pool.add(a, {"first": pair}, first.scaling[a], trainable=True)
    rows = ["p", "q", "q", "s", "p"]
    x, g = torch.randn(5, 96), torch.randn(5, 64)
    with pool.use(rows) as index:
        peftops.multi_lora_linear(x, base.weight, pool.layer("first"), index, base.bias).backward(g)
    for a in RANKS:
        mine = torch.tensor([row == a for row in rows])
        theirs.set_adapter(a)
        wanted = torch.autograd.grad(first(x[mine]), (first.lora_A[a].weight, first.lora_B[a].weight), g[mine])
        for got, want in zip(leaves[a], wanted, strict=True):
            torch.testing.assert_close(got.grad, want, rtol=1e-5, atol=1e-4)
