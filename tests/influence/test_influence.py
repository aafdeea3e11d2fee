"""EK-FAC against matrices that are inverted as they stand, and what scores must say of data made for it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import models
import peftops
from peftops import Influence, LoRAConfig, LoRAFAConfig

GENERATOR = lambda seed=0: torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=GENERATOR(seed))


def squares(model, batch):
    return 0.5 * (model(batch[0]) - batch[1]).square().sum()


def drawn_squares(model, batch, generator):
    y = model(batch[0])
    return 0.5 * (y - (y.detach() + torch.randn(y.shape, generator=generator))).square().sum()


def regression(config=None, r=3, seed=0):
    """One linear layer of 6 inputs and 4 outputs with a trained-looking adapter."""
    model = peftops.attach(nn.Sequential(nn.Linear(6, 4)), config or LoRAConfig(r=r))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
    return model


def of_squares(model, **options):
    options = dict(sampled_loss=drawn_squares) | options
    return Influence(model, loss=squares, mask=lambda batch: None, **options)


def flat_gradients(model, batch, loss=squares):
    """One row per example, by autograd alone."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for i in range(len(batch[0])):
        one = loss(model, tuple(part[i : i + 1] for part in batch))
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(one, parameters)]))
    return torch.stack(rows).double()


def exact(G, damping, queries, examples):
    return queries @ torch.linalg.solve(G + damping * torch.eye(len(G), dtype=G.dtype), examples.t())


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1].item()


def ranks(x):
    return x.flatten().argsort().argsort().double()


def test_where_ekfac_is_exact_the_numbers_are_those_of_the_inverse():
    """Every input with every gradient: then the Fisher matrix is the Kronecker product of the two covariances."""
    model = regression(LoRAFAConfig(r=3))
    inputs, errors = normal(5, 6), normal(4, 4, seed=1)
    x, e = inputs.repeat_interleave(4, 0), errors.repeat(5, 1)
    pseudo = lambda model, batch, generator: (model(batch[0]) * batch[1]).sum()  # its gradient is e
    batch = (x, e)
    influence = of_squares(model, sampled_loss=pseudo, damping=0.05).fit([batch])
    g = flat_gradients(model, batch, lambda model, b: (model(b[0]) * b[1]).sum())
    G = g.t() @ g / len(g)
    asked, seen = (normal(3, 6, seed=2), normal(3, 4, seed=3)), (normal(7, 6, seed=4), normal(7, 4, seed=5))
    want = exact(G, 0.05, flat_gradients(model, asked), flat_gradients(model, seen))
    got = influence.scores(influence.queries([asked]), [seen])
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


@pytest.mark.parametrize("config", [LoRAConfig(r=3, alpha=5), LoRAFAConfig(r=2), peftops.PiSSAConfig(r=2)], ids=repr)
def test_gradients_are_those_of_autograd(config):
    model, batch = regression(config), (normal(5, 6), normal(5, 4, seed=1))
    got = of_squares(model)._gradients(batch, squares)
    flat = torch.cat([got[m.name].flatten(1) for m in of_squares(model).matrices], 1)
    torch.testing.assert_close(flat.double(), flat_gradients(model, batch), rtol=1e-4, atol=1e-4)


def test_agrees_with_the_exact_inverse_of_a_small_network():
    """Two layers, A and B of each: EK-FAC's scores are almost those of the exact inverse of each matrix's own block of
    the Gauss-Newton matrix, and go with those of the whole of it."""
    torch.manual_seed(0)
    model = peftops.attach(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), LoRAConfig(r=2))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.4)
    x = normal(600, 6)
    data = (x, model(x).detach() + normal(600, 4, seed=1))
    influence = of_squares(model).fit([tuple(part[i : i + 100] for part in data) for i in range(0, 600, 100)])
    damping = {name: 0.1 * f.values.mean().item() for name, f in influence.factors.items()}
    asked, seen = (normal(4, 6, seed=2), normal(4, 4, seed=3)), tuple(part[:80] for part in data)
    # The Gauss-Newton matrix of squares: J^T J, over all parameters at once, no labels drawn.
    J = torch.stack([flat_gradients(model, (x,), lambda m, b, k=k: m(b[0])[:, k].sum()) for k in range(4)])
    G = torch.einsum("kni,knj->ij", J, J) / 600
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    by_matrix = torch.cat([torch.full((n,), d) for n, d in zip(sizes, damping.values(), strict=True)]).double()
    q, t = flat_gradients(model, asked), flat_gradients(model, seen)
    blocks = torch.block_diag(*(torch.ones(n, n) for n in sizes)).double()
    by_blocks, whole = (q @ torch.linalg.solve(H + torch.diag(by_matrix), t.t()) for H in (G * blocks, G))
    got, plain = influence.scores(influence.queries([asked]), [seen]), q @ t.t()
    assert correlation(got, by_blocks) > 0.95 and correlation(ranks(got), ranks(by_blocks)) > 0.95
    # A and B pull together, which matrices by themselves do not see; the dot product of gradients sees far less.
    assert correlation(got, whole) > 0.7 > 0.4 > correlation(plain, whole)
    assert correlation(plain, by_blocks) < 0.8


def test_scores_order_examples_as_leaving_them_out_does():
    """Regression on B alone: what the optimum without an example does to a query can be computed."""
    model = regression(LoRAFAConfig(r=3))
    adapter = model[0].adapters["default"]
    x, target = normal(60, 6), normal(60, 4, seed=1)
    asked = (normal(1, 6, seed=2), normal(1, 4, seed=3))
    U = (adapter.scaling * x @ adapter.lora_A.t()).double()
    rest = (target - F.linear(x, model[0].base.weight, model[0].base.bias)).double().detach()
    ridge = 1e-3 * torch.eye(3).double()
    best = lambda keep: torch.linalg.solve(U[keep].t() @ U[keep] + ridge, U[keep].t() @ rest[keep]).t()

    def query_loss(keep):
        with torch.no_grad():
            adapter.lora_B.copy_(best(keep))
            return squares(model, asked).item()

    everything = torch.arange(60)
    change = [query_loss(everything[everything != i]) - query_loss(everything) for i in range(60)]
    with torch.no_grad():
        adapter.lora_B.copy_(best(everything))
    influence = of_squares(model, damping=1e-6).fit([(x, target)] * 20)
    scores = influence.scores(influence.queries([asked]), [(x, target)])[0]
    assert correlation(ranks(scores), ranks(torch.tensor(change))) > 0.95


def test_eigenvalues_keep_the_trace_and_are_the_best_diagonal():
    model, batch = regression(), (normal(50, 6), normal(50, 4, seed=1))
    influence = of_squares(model, sampled_loss=lambda model, b, generator: squares(model, b)).fit([batch])
    g = flat_gradients(model, batch)
    F_ = g.t() @ g / len(g)
    begin = 0
    for f in influence.factors.values():
        n = f.values.numel()
        block = F_[begin : begin + n, begin : begin + n]
        begin += n
        assert f.values.sum().item() == pytest.approx(block.trace().item(), rel=1e-4)
        Q = torch.kron(f.gradients, f.inputs).double()  # row-major [out, in]
        error = lambda values, Q=Q, block=block: (block - Q @ torch.diag(values.double().flatten()) @ Q.t()).norm()
        for other in (0.9 * f.values, f.values + 0.01, f.values.mean().expand_as(f.values)):
            assert error(f.values) < error(other)


def test_much_damping_leaves_the_dot_product_of_gradients():
    model, batch = regression(), (normal(20, 6), normal(20, 4, seed=1))
    influence = of_squares(model, damping=1e7).fit([batch])
    g = flat_gradients(model, batch)
    got = 1e7 * influence.scores(influence.queries([batch]), [batch])
    torch.testing.assert_close(got.double(), g @ g.t(), rtol=1e-3, atol=1e-3)


def test_an_example_is_its_own_best_explanation():
    model, batch = regression(), (normal(30, 6), normal(30, 4, seed=1))
    influence = of_squares(model).fit([batch])
    scores = influence.scores(influence.queries([batch]), [batch])
    own = influence.self_influence([batch])
    assert (own > 0).all() and torch.allclose(own, scores.diagonal(), rtol=1e-4)
    assert torch.allclose(scores, scores.t(), rtol=1e-3, atol=1e-5)
    cosine = scores / (own[:, None] * own).sqrt()
    assert (cosine <= 1.0001).all() and torch.equal(cosine.argmax(1), torch.arange(30))


@pytest.mark.parametrize("damping", [None, 0.0, 0.05, 10.0])
def test_an_examples_own_influence_is_damped_as_scores_are(damping):
    model, batch = regression(), (normal(30, 6), normal(30, 4, seed=1))
    influence = of_squares(model, damping=damping).fit([batch])
    own, scores = influence.self_influence([batch]), influence.scores(influence.queries([batch]), [batch])
    torch.testing.assert_close(own, scores.diagonal(), rtol=1e-4, atol=0)
    if damping == 10.0:
        assert (own < of_squares(model, damping=0.05).fit([batch]).self_influence([batch]) / 2).all()


def test_an_a_whose_b_is_zero_says_nothing():
    model, batch = peftops.attach(nn.Sequential(nn.Linear(6, 4)), LoRAConfig(r=3)), (normal(9, 6), normal(9, 4, seed=1))
    influence = of_squares(model).fit([batch])
    queries = influence.queries([batch])
    assert not queries["0.lora_A"].any() and queries["0.lora_B"].any()
    assert influence.scores(queries, [batch]).isfinite().all()


# Language models


def encoded(rows, length=None):
    """A batch, padded on the left with an id like any other, of rows whose last three ids are the targets."""
    longest = length or max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), 9), torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full((len(rows), longest), -100)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :], mask[i, longest - len(row) :] = torch.tensor(row), 1
        labels[i, -3:] = torch.tensor(row[-3:])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}


@pytest.fixture(scope="module")
def trained():
    """A tiny LLaMA that learnt: 5 planted rows answer a sign with a fixed phrase, 35 others answer at random."""
    model = peftops.attach(models.llama(), LoRAConfig(r=4))
    draw = lambda n, seed: torch.randint(3, 300, (n,), generator=GENERATOR(seed)).tolist()
    planted = [[*draw(3, i), 310, 311, 312, 313, 314] for i in range(5)]
    others = [draw(6 + i % 4, 50 + i) for i in range(35)]
    rows = others[:20] + planted + others[20:]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(8):
        (peftops.influence.language.loss(model, encoded(rows)) / 120).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, rows


def test_planted_examples_come_first(trained):
    model, rows = trained
    batches = [encoded(rows[i : i + 10]) for i in range(0, 40, 10)]
    influence = Influence(model).fit(batches)
    query = encoded([[7, 8, 310, 311, 312, 313, 314]])
    scores = influence.scores(influence.queries([query]), batches)[0]
    alike = scores / influence.self_influence(batches).sqrt()
    for score in (scores, alike):
        assert sorted(score.topk(5).indices.tolist()) == [20, 21, 22, 23, 24] and (score[20:25] > 0).all()


def test_padding_and_batching_change_nothing(trained):
    model, rows = trained
    same_labels = lambda model, batch, generator: peftops.influence.language.loss(model, batch)
    result = []
    for batches in ([encoded(rows[:8])], [encoded(rows[:5], 17), encoded(rows[5:8], 12)]):
        influence = Influence(model, sampled_loss=same_labels).fit(batches)
        scores = influence.scores(influence.queries([encoded(rows[:2], 11)]), batches)
        result.append((scores, [f.values for f in influence.factors.values()]))
    (a, factors_a), (b, factors_b) = result
    torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3 * a.abs().max().item())
    for x, y in zip(factors_a, factors_b, strict=True):
        torch.testing.assert_close(x.sum(), y.sum(), rtol=1e-3, atol=1e-8)


def test_the_loss_is_that_of_transformers(trained):
    model, rows = trained
    batch = encoded(rows[:4], 15)
    with torch.no_grad():
        want = 12 * model(**batch).loss
        torch.testing.assert_close(peftops.influence.language.loss(model, batch), want)
        draws = [peftops.influence.language.sampled_loss(model, batch, GENERATOR(i)).item() for i in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_layers_with_the_same_input_share_its_eigenvectors(trained):
    model, rows = trained
    factors = Influence(model).fit([encoded(rows[:4])]).factors
    of = lambda layer: factors[f"model.layers.0.{layer}.lora_A"].inputs
    assert of("self_attn.q_proj") is of("self_attn.k_proj") is of("self_attn.v_proj")
    assert of("mlp.gate_proj") is of("mlp.up_proj") is not of("self_attn.q_proj")


def test_it_leaves_the_model_as_it_was(trained):
    model, rows = trained
    model.train()
    before = copy.deepcopy(model.state_dict())
    Influence(model).fit([encoded(rows[:4])])
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
    model.eval()


def test_dropout_is_off(trained):
    _, rows = trained
    results = []
    for dropout, training in ((0.0, False), (0.5, True)):
        model = peftops.attach(models.llama(), LoRAConfig(r=4, dropout=dropout)).train(training)
        torch.manual_seed(3)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
        influence = Influence(model).fit([encoded(rows[:4])])
        results.append(influence.self_influence([encoded(rows[:4])]))
    assert torch.equal(*results)


def test_on_four_bits(trained):
    _, rows = trained
    model = peftops.attach(models.llama(), peftops.QLoRAConfig(r=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    influence = Influence(model).fit([encoded(rows[:6])])
    own = influence.self_influence([encoded(rows[:6])])
    assert own.shape == (6,) and (own > 0).all()


def test_bad_input():
    model, batch = regression(), (normal(4, 6), normal(4, 4))
    with pytest.raises(ValueError, match="Sequential has no adapters; attach one first"):
        of_squares(nn.Sequential(nn.Linear(6, 4)))
    with pytest.raises(TypeError, match=r"A and B of linear layers, as LoRA trains them; 0 has DoRA's"):
        of_squares(peftops.attach(nn.Sequential(nn.Linear(6, 4)), peftops.DoRAConfig(r=2)))
    with pytest.raises(TypeError, match=r"model\.embed_tokens has LoRA's"):
        Influence(peftops.attach(models.llama(tied=False), LoRAConfig(r=2, target=["embed_tokens"])))
    frozen = regression()
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing of the active adapter trains"):
        of_squares(frozen)
    with pytest.raises(ValueError, match=r"damping must be at least 0.* not -1"):
        of_squares(model, damping=-1)
    with pytest.raises(ValueError, match="at least one batch to fit"):
        of_squares(model).fit([])
    with pytest.raises(ValueError, match=r"fit\(batches\) comes first"):
        of_squares(model).queries([batch])
    with pytest.raises(ValueError, match="all gradients of the data are 0"):
        of_squares(model, sampled_loss=lambda model, b, g: 0 * model(b[0]).sum()).fit([batch])
    influence = of_squares(model).fit([batch])
    with pytest.raises(ValueError, match="at least one query"):
        influence.queries([])
    with pytest.raises(ValueError, match="needs input_ids and labels; this one has input_ids"):
        Influence(peftops.attach(models.llama(), LoRAConfig(r=2))).fit([{"input_ids": models.tokens()}])
    untargeted = {"input_ids": models.tokens(), "labels": torch.full((2, 7), -100)}
    with pytest.raises(ValueError, match="has no targets: all of its labels are -100"):
        Influence(peftops.attach(models.llama(), LoRAConfig(r=2))).fit([untargeted])
    folded = peftops.attach(nn.Sequential(nn.Flatten(0, 1), nn.Linear(6, 4)), LoRAConfig(r=2))
    with pytest.raises(ValueError, match=r"1\.lora_A has 8 rows for a batch of 4 examples"):
        of_squares(folded, sampled_loss=lambda m, b, g: m(b[0]).sum()).fit([(normal(4, 2, 6), None)])
