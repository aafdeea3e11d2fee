"""What is particular to a method: its formula, its start, its memory, its mistakes."""

import pytest
import torch
from torch import nn

import models
import peftops
from peftops import (
    BottleneckConfig,
    DoRAConfig,
    GLoRAConfig,
    HeadOnlyConfig,
    LoRAConfig,
    LoRAFAConfig,
    MultiLoRAConfig,
    NormTuningConfig,
    OLoRAConfig,
    PiSSAConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    SurgicalConfig,
    TiedLoRAConfig,
    TopLayersConfig,
    VeRAConfig,
)
from peftops.attaching import hosts
from peftops.ops import NF4Tensor


def adapters(model):
    return [host.adapters["default"] for _, host in hosts(model)]


def shake(model, std=0.2):
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=std)


def saved_bytes(model, x):
    """Of the tensors that autograd keeps for backward, parameters left out, each storage once."""
    parts = [t for p in model.parameters() for t in (p.parts().values() if isinstance(p, NF4Tensor) else [p])]
    own, kept = {t.untyped_storage().data_ptr() for t in parts}, {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    return sum(kept.values()), y


@pytest.mark.parametrize("config, width", [(LoRAConfig(r=8), 1024 + 8), (LoRAFAConfig(r=8), 8)])
@pytest.mark.parametrize("quantized", [False, True])
def test_lora_fa_keeps_x_at_and_not_x(config, width, quantized):
    model = nn.Sequential(nn.Linear(1024, 512))
    if quantized:
        peftops.detach(peftops.attach(model, peftops.QLoRAConfig()))
    peftops.attach(model, config)
    x = torch.randn(64, 1024, requires_grad=True)
    count, y = saved_bytes(model, x)
    assert count == 64 * width * 4
    y.sum().backward()
    assert x.grad is not None


def test_lora_fa_has_loras_gradients_and_projects_them_if_told_to():
    x = torch.randn(16, 64)
    grads = {}
    for name, config in {
        "lora": LoRAConfig(r=4),
        "fa": LoRAFAConfig(r=4),
        "pre": LoRAFAConfig(r=4, precondition=True),
    }.items():
        torch.manual_seed(0)
        model = peftops.attach(nn.Sequential(nn.Linear(64, 48)), config)
        adapter = adapters(model)[0]
        y = model(x)
        g = torch.cos(y.detach())
        (y * g).sum().backward()
        grads[name] = adapter.lora_B.grad
    torch.testing.assert_close(grads["fa"], grads["lora"], rtol=1e-5, atol=1e-6)
    A, full = adapter.lora_A.detach(), g.t() @ x
    torch.testing.assert_close(
        adapter.scaling * grads["pre"] @ A, full @ torch.linalg.pinv(A) @ A, rtol=1e-3, atol=1e-3
    )


def test_dora_rows_have_the_length_m():
    model = peftops.attach(models.mlp(), DoRAConfig(r=4))
    shake(model)
    lengths = [a.magnitude.abs() for a in adapters(model)]
    peftops.merge(model)
    for (_, layer), want in zip(hosts(model), lengths, strict=True):
        torch.testing.assert_close(layer.base.weight.norm(dim=1), want, rtol=1e-4, atol=1e-5)


def test_pissa_starts_from_the_best_of_rank_r_and_olora_from_an_orthonormal_basis():
    linear = nn.Linear(64, 48)
    adapter = adapters(peftops.attach(nn.Sequential(linear), PiSSAConfig(r=4)))[0]
    rest = linear.weight - adapter.scaling * adapter.lora_B @ adapter.lora_A
    singular = torch.linalg.svdvals(linear.weight)
    torch.testing.assert_close(torch.linalg.svdvals(rest)[0], singular[4], rtol=1e-3, atol=1e-4)
    adapter = adapters(peftops.attach(nn.Sequential(nn.Linear(64, 48)), OLoRAConfig(r=4)))[0]
    torch.testing.assert_close(adapter.lora_B.t() @ adapter.lora_B, torch.eye(4), rtol=1e-4, atol=1e-5)


def test_tied_factors_are_one_and_their_gradient_is_the_sum():
    build = lambda: nn.Sequential(*[nn.Linear(32, 32) for _ in range(3)])
    model = peftops.attach(build(), TiedLoRAConfig(r=4))
    first, *others = adapters(model)
    assert all(a.tied_A is first.tied_A and a.tied_B is first.tied_B for a in others)
    shake(model)
    untied = peftops.attach(build(), TiedLoRAConfig(r=4, tie_A=False, tie_B=False))
    untied.load_state_dict(model.state_dict())
    x = torch.randn(7, 32)
    for m in (model, untied):
        m(x).square().sum().backward()
    total = sum(a.tied_A.grad for a in adapters(untied))
    torch.testing.assert_close(first.tied_A.grad, total, rtol=1e-4, atol=1e-4)


def test_multilora_moves_its_scalings_first():
    model = peftops.attach(models.mlp(), MultiLoRAConfig(r=4))
    model(torch.randn(5, 64)).square().sum().backward()
    for a in adapters(model):
        assert a.lora_A.any() and a.lora_B.any() and a.scalings.grad.any()
        assert not a.lora_A.grad.any() and not a.lora_B.grad.any()


def test_glora_runs_in_all_its_kinds_and_merges_in_each():
    import itertools

    x, weight = torch.randn(3, 16), ("lora", "vector", "constant", "none")
    for kinds in itertools.product(weight, weight, (*weight[:2], "none"), weight[1:], weight[1:]):
        if set(kinds) == {"none"}:
            continue
        model = peftops.attach(
            nn.Sequential(nn.Linear(16, 12)), GLoRAConfig(r=2, **dict(zip("ABCDE", kinds, strict=True)))
        )
        shake(model)
        want = model(x)
        peftops.merge(model)
        torch.testing.assert_close(model(x), want, rtol=1e-3, atol=1e-4)


def test_a_prompt_of_real_embeddings_is_the_same_as_the_tokens():
    base, ids, more = models.llama(), models.tokens(1, 4), models.tokens(1, 6, seed=1)
    want = base(torch.cat([ids, more], 1)).logits[:, 4:]
    model = peftops.attach(models.llama(), PromptTuningConfig(tokens=4))
    with torch.no_grad():
        adapters(model)[0].prompt.copy_(base.get_input_embeddings()(ids)[0])
    torch.testing.assert_close(model(more).logits, want, rtol=1e-4, atol=1e-5)


def test_a_prefix_of_real_keys_and_values_is_the_same_as_the_tokens():
    from peftops.prompts.prefix_cache import prefilled

    base, ids, more = models.llama(), models.tokens(1, 4), models.tokens(1, 6, seed=1)
    want = base(torch.cat([ids, more], 1)).logits[:, 4:]
    model = peftops.attach(models.llama(), PrefixTuningConfig(tokens=4))
    with torch.no_grad():
        pairs = prefilled(base, ids)
        adapters(model)[0].flat.copy_(torch.stack(pairs).permute(2, 0, 1, 3).flatten(1))
    torch.testing.assert_close(model(more).logits, want, rtol=1e-4, atol=1e-5)


def test_a_prefix_by_an_mlp_is_folded_as_it_is_saved(tmp_path):
    model = peftops.attach(models.llama(), PrefixTuningConfig(tokens=4, hidden=8))
    shake(model)
    peftops.save(model, tmp_path)
    back = peftops.load(models.llama(), tmp_path)
    torch.testing.assert_close(back(models.tokens()).logits, model(models.tokens()).logits, rtol=1e-5, atol=1e-5)


def test_nothing_is_kept_below_the_top_layers():
    ids = models.tokens()
    one, two = (_kept(peftops.attach(models.llama(), TopLayersConfig(layers=n)), ids) for n in (1, 2))
    assert one < 0.7 * two


def _kept(model, ids):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        model(ids)
    return sum(kept)


def test_auto_rgn_and_snr():
    model = peftops.attach(models.mlp(), SurgicalConfig("all"))
    x = torch.randn(40, 64)
    loss = lambda rows: model(rows).square().mean()
    weights = peftops.auto_rgn(model, loss, x.split(8))
    assert max(weights.values()) == 1.0 and all(0 <= w <= 1 for w in weights.values())
    assert weights == peftops.auto_rgn(model, loss, x.split(8))
    groups = peftops.weighted_groups(model, weights, 0.1)
    assert max(g["lr"] for g in groups) == 0.1 and len(groups) == 4
    snr = peftops.auto_snr(model, loss, x.split(1))
    assert set(snr.values()) == {0.0, 1.0}
    for call in (lambda: peftops.auto_rgn(model, loss, []), lambda: peftops.auto_snr(model, loss, [x])):
        with pytest.raises(ValueError, match="needs at least"):
            call()


def test_loraplus_groups():
    model = peftops.attach(models.mlp(), DoRAConfig(r=4))
    slow, fast, vectors = peftops.loraplus_groups(model, 1e-3, ratio=8, weight_decay=0.1)
    assert [len(g["params"]) for g in (slow, fast, vectors)] == [2, 2, 2]
    assert (slow["lr"], fast["lr"], vectors["weight_decay"]) == (1e-3, 8e-3, 0.0)
    with pytest.raises(ValueError, match="nothing trains"):
        peftops.loraplus_groups(models.llama().requires_grad_(False), 1e-3)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TopLayersConfig(layers=-1), "layers must be a whole number from 0, not -1"),
        (
            lambda: peftops.attach(models.llama(), TopLayersConfig(layers=3)),
            "layers=3, but LlamaForCausalLM has 2 blocks",
        ),
        (lambda: peftops.attach(models.llama(), SurgicalConfig([2])), "or numbers below 2, not"),
        (lambda: BottleneckConfig(placement="serial"), "placement must be one of 'houlsby', 'pfeiffer', 'parallel'"),
        (lambda: PromptTuningConfig(tokens=0), "tokens must be a whole number from 1, not 0"),
        (lambda: PromptTuningConfig(init="text"), "init='text' needs a text"),
        (lambda: PrefixTuningConfig(init="none"), "init must be one of"),
        (lambda: GLoRAConfig(C="constant"), "C must be one of"),
        (lambda: TiedLoRAConfig(train_B=False, train_v=False), "train_B or train_v must be True"),
        (lambda: NormTuningConfig(""), "norms must be 'all', names or a regular expression"),
        (lambda: peftops.attach(models.mlp(), NormTuningConfig()), "Sequential has no norms to train"),
        (lambda: peftops.attach(models.mlp(), BottleneckConfig()), "is not a transformer block"),
        (
            lambda: peftops.attach(models.llama(), VeRAConfig(target=["embed_tokens"])),
            "only linear layers are supported",
        ),
        (
            lambda: peftops.attach(
                peftops.detach(peftops.attach(models.llama(), peftops.QLoRAConfig())), SurgicalConfig()
            ),
            "is quantised, and codes cannot be trained",
        ),
    ],
)
def test_bad_input_gets_a_sentence(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_files_of_another_version_or_method(tmp_path):
    import json

    peftops.save(peftops.attach(models.llama(), HeadOnlyConfig()), tmp_path)
    with pytest.raises(ValueError, match="does not fit|unexpected"):
        peftops.load(models.llama(vocabulary=300), tmp_path)
    own = json.loads((tmp_path / "peftops.json").read_text())
    (tmp_path / "peftops.json").write_text(json.dumps({**own, "version": 99}))
    with pytest.raises(ValueError, match="version 99, made by a newer peftops"):
        peftops.load(models.llama(), tmp_path)
