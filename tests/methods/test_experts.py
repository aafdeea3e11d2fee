"""Mixtures of experts: their weights are quantised and adapted like all others, whatever model they are of."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

import models
import peftops
from moe_models import OPTIONS, moe
from peftops.attaching import METHODS, adapted_layers, hosts
from peftops.nn import EXPERTS, ExpertsLinear, kind_of
from peftops.nn.experts import experts_forward, open_experts

every_model = pytest.mark.parametrize("kind", OPTIONS)
KINDS = ["Qwen3Moe", "GptOss", "Llama4"]  # plain; transposed, interleaved, with biases; transposed, without routing
three_models = pytest.mark.parametrize("kind", KINDS)
TARGET = ["gate_up_proj", "down_proj", "o_proj"]
METHODS_OF_EXPERTS = {
    "lora": peftops.LoRAConfig(r=2),
    "rslora": peftops.LoRAConfig(r=2, rslora=True),
    "qlora": peftops.QLoRAConfig(r=2),
    "qalora": peftops.QALoRAConfig(r=2, target=TARGET),
    "qalora-mean": peftops.QALoRAConfig(r=2, pool="mean", target=TARGET),
    "loftq": peftops.LoftQConfig(r=2, iterations=1),
    "lorafa": peftops.LoRAFAConfig(r=2, precondition=True),
    "pissa": peftops.PiSSAConfig(r=2),
    "olora": peftops.OLoRAConfig(r=2),
}
every_method = pytest.mark.parametrize("config", METHODS_OF_EXPERTS.values(), ids=METHODS_OF_EXPERTS)
ids = models.tokens(vocabulary=96)


def shake(model, seed=1):
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)


def attach(model, config, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "r=2 is more than")
        return peftops.attach(model, config, **options)


def experts_of(model):
    return [(path, host) for path, host in adapted_layers(model) if kind_of(host.base) == EXPERTS]


def close(got, want, tolerance=2e-5):
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * want.abs().max().item())


@every_model
def test_more_than_nine_tenths_are_in_codes_and_logits_are_those_of_the_codes(kind):
    model = attach(moe(kind), peftops.QLoRAConfig(r=2))
    summary = peftops.summary(model)
    assert summary.packed > 0.9 * (summary.total - summary.trainable)
    assert not any("experts.gate_up_proj" in name and "bias" not in name for name in summary.left_dense)
    assert any(name.endswith(("gate.weight", "router.weight")) for name in summary.left_dense)
    assert "in codes:" in str(summary) and "dense:" in str(summary)
    assert len(experts_of(model)) == 4 and summary.layers > 8
    from peftops.integrations.quantizer import dequantize

    dense = dequantize(peftops.detach(copy.deepcopy(model)))
    assert not any(isinstance(m, ExpertsLinear) for m in dense.modules())
    if kind != "Llama4":
        dense.set_experts_implementation("eager")
    close(model(ids).logits, dense(ids).logits)


@every_model
def test_training_lowers_the_loss_and_every_factor_learns(kind):
    model = attach(moe(kind), peftops.QLoRAConfig(r=4)).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0], losses
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


@three_models
@every_method
def test_laws_of_methods_hold_for_experts(kind, config):
    base = peftops.detach(attach(moe(kind), config))
    names = list(base.state_dict())
    want = base(ids).logits
    model = attach(copy.deepcopy(base), config)
    if not isinstance(config, peftops.LoftQConfig):
        close(model(ids).logits, want)
    shake(model)
    changed = model(ids).logits
    assert (changed - want).abs().max() > 0.01
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(
        p.grad.abs().sum() > 0 for _, host in experts_of(model) for p in host.adapters.parameters() if p.requires_grad
    )
    with peftops.disabled(model):  # (transformers' product of dense experts has other bits than ours)
        close(model(ids).logits, want)
    attach(model, config, name="second")
    peftops.activate(model, "default")
    assert torch.equal(model(ids).logits, changed)
    peftops.detach(model, "second")
    peftops.merge(model, dense=True)
    close(model(ids).logits, changed)
    merged = peftops.detach(copy.deepcopy(model), merged=True)
    assert not any(isinstance(m, ExpertsLinear) for m in merged.modules())
    close(merged(ids).logits, changed)
    peftops.unmerge(model)
    assert torch.equal(model(ids).logits, changed)
    assert torch.equal(copy.deepcopy(model)(ids).logits, changed)
    peftops.detach(model)
    assert torch.equal(model(ids).logits, want) and list(model.state_dict()) == names
    assert all(torch.equal(value, base.state_dict()[key]) for key, value in model.state_dict().items())


@every_model
def test_detach_leaves_the_parameters_that_were_there(kind):
    model = moe(kind)
    before, order, logits = dict(model.named_parameters()), list(model.state_dict()), model(ids).logits
    attach(model, peftops.LoRAConfig(r=2))
    peftops.detach(model)
    after = dict(model.named_parameters())
    assert list(before) == list(after) and all(after[name] is p for name, p in before.items())
    assert list(model.state_dict()) == order and torch.equal(model(ids).logits, logits)
    assert all("forward" not in vars(m) for m in model.modules())
    with pytest.raises(ValueError, match="dropout is 0.1, and adapters of experts have none"):
        attach(model, peftops.LoRAConfig(dropout=0.1))
    assert [id(p) for p in model.parameters()] == [id(p) for p in before.values()]
    attach(model, peftops.LoRAConfig(r=2, dropout=0.1, target=["o_proj"]))
    assert not experts_of(model) and not any(isinstance(m, ExpertsLinear) for m in model.modules())


def cannot(config_class):
    layers = getattr(METHODS[config_class], "layers", ())
    return EXPERTS not in layers and "target" in config_class.__dataclass_fields__


@pytest.mark.parametrize("config_class", [c for c in METHODS if cannot(c)], ids=lambda c: c.__name__)
def test_a_method_that_cannot_adapt_experts_says_so(config_class):
    model = moe("Qwen3Moe")
    with pytest.warns(UserWarning, match=r"in 3-D tensors that .*experts\.gate_up_proj.* stay as they are"):
        attach(model, config_class())
    assert not experts_of(model)
    with pytest.raises(TypeError, match=r"gate_up_proj, a ExpertsLinear; only linear.* layers are supported"):
        attach(moe("Qwen3Moe"), config_class(target=["gate_up_proj"]))


@three_models
def test_routers_train_by_modules_to_save(kind):
    router = "router" if kind != "Qwen3Moe" else "gate"
    model = attach(moe(kind), peftops.QLoRAConfig(r=2, modules_to_save=[router])).train()
    model(input_ids=ids, labels=ids).loss.backward()
    trained = [name for name, p in model.named_parameters() if p.requires_grad and f".{router}." in name]
    assert trained and all(model.get_parameter(name).grad is not None for name in trained)


@three_models
def test_experts_train_whole(kind):
    """By torch's own product, which has a gradient in the weight."""
    model, plain = moe(kind), moe(kind)
    attach(model, peftops.LoRAConfig(r=2, target=["o_proj"], modules_to_save=["experts"]))
    for m in (model, plain):
        m(input_ids=ids, labels=ids).loss.backward()
    for path, host in experts_of(model):
        grads = dict(host.adapters["default"].named_parameters())
        close(grads["weight"].grad, plain.get_parameter(path).grad)
        if kind == "GptOss":
            close(grads["bias"].grad, plain.get_parameter(f"{path}_bias").grad)


def reference(experts, hidden, index, weights):
    """Row by row in float64."""
    names = [name for name in ("gate_up_proj", "up_proj", "down_proj") if hasattr(experts, name)]
    out = hidden.double() * 0 + weights.sum() * 0
    for t, k in ((t, k) for t in range(index.shape[0]) for k in range(index.shape[1])):
        if (e := index[t, k].item()) >= getattr(experts, names[0]).shape[0]:
            continue
        row = hidden[t].double()
        for name in names:
            weight = getattr(experts, name)[e].double()
            row = row @ weight if experts.is_transposed else weight @ row
            row = row + getattr(experts, f"{name}_bias")[e].double() if experts.has_bias else row
            if name != "down_proj":
                row = experts._apply_gate(row) if experts.has_gate else experts.act_fn(row)
        row = experts.post_expert_norm(row) if experts.has_post_expert_norm else row
        out = out.index_add(0, torch.tensor([t]), (row * weights[t, k].double())[None])
    return out


class Experts(nn.Module):
    """A class as transformers' decorator leaves it, of any flags."""

    def __init__(self, *, gate=True, interleaved=False, transposed=False, bias=False, norm=False, experts=5):
        super().__init__()
        self.has_gate, self.has_bias, self.has_post_expert_norm = gate, bias, norm
        self.is_transposed, self.is_concatenated, self._is_expert_parallel = transposed, not interleaved, True
        self.num_experts, self.act_fn = experts, nn.SiLU()
        for name, out, in_ in (("gate_up_proj" if gate else "up_proj", 48 if gate else 24, 32), ("down_proj", 32, 24)):
            shape = (experts, in_, out) if transposed else (experts, out, in_)
            self.register_parameter(name, nn.Parameter(torch.randn(shape) / 5, requires_grad=False))
            if bias:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(experts, out), requires_grad=False))
        if norm:
            self.post_expert_norm = nn.LayerNorm(32, elementwise_affine=False)
        self.forward = lambda *args: experts_forward(self, *args)

    def _apply_gate(self, rows):
        gate, up = rows.chunk(2, -1) if self.is_concatenated else (rows[..., ::2], rows[..., 1::2])
        return self.act_fn(gate) * up


FLAGS = [
    {},
    {"gate": False},
    {"transposed": True},
    {"bias": True},
    {"norm": True},
    {"interleaved": True, "transposed": True, "bias": True},
    {"gate": False, "transposed": True, "bias": True, "norm": True},
]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda f: "-".join(f) or "plain")
@pytest.mark.parametrize("tokens, k", [(1, 1), (1, 3), (0, 2), (7, 2), (20, 5)])
def test_forward_of_every_kind_of_experts(flags, tokens, k):
    """Routing of any kind: an expert that nobody asks for, one that everybody does, and sentinels."""
    torch.manual_seed(tokens + k)
    experts = Experts(**flags)
    hidden, weights = torch.randn(tokens, 32, requires_grad=True), torch.rand(tokens, k, requires_grad=True)
    uneven = torch.stack([torch.randperm(5)[:k] for _ in range(tokens)]) if tokens else torch.zeros(0, k).long()
    for index in (uneven, torch.full_like(uneven, 2), torch.full_like(uneven, 5), uneven.where(uneven > 2, 5)):
        want = reference(experts, hidden, index, weights)
        got = experts(hidden, index, weights)
        assert got.dtype == hidden.dtype
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
        for a, b in zip(*(torch.autograd.grad(y.sum(), (hidden, weights)) for y in (got, want)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
        opened = copy.deepcopy(experts)
        del opened.forward
        open_experts(opened)
        assert torch.equal(opened(hidden, index, weights), got)


@pytest.mark.parametrize("kind", [k for k in OPTIONS if k != "Llama4"])
def test_the_registered_implementation_is_the_models_own(kind):
    model = moe(kind).requires_grad_(False)
    model.set_experts_implementation("eager")
    want = model(ids).logits
    model.set_experts_implementation("peftops")
    close(model(ids).logits, want)
    half = model.to(torch.bfloat16)
    got = half(ids).logits
    half.set_experts_implementation("grouped_mm")
    close(got.float(), half(ids).logits.float(), 0.02)


@three_models
def test_checkpointing_pickles_and_autocast(kind):
    model = attach(moe(kind), peftops.QLoRAConfig(r=2))
    shake(model)
    want = model(ids).logits.detach()
    grads = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*grads, strict=True))
    model.eval()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = attach(moe(kind), peftops.QLoRAConfig(r=2))
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(ids).logits, want)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(ids).logits.float() - want).norm() < 0.1 * want.norm()


@three_models
def test_generates_as_it_computes(kind):
    model = attach(moe(kind), peftops.QLoRAConfig(r=2))
    shake(model)
    row = ids[:1]
    made = model.generate(row, max_new_tokens=4, do_sample=False, pad_token_id=2, eos_token_id=None)
    for _ in range(4):
        row = torch.cat([row, model(row).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, row)


def test_compiles_without_a_graph_break():
    torch._dynamo.reset()
    experts = Experts()
    del experts.forward
    open_experts(experts)
    hidden, index, weights = torch.randn(6, 32), torch.tensor([[0, 3]] * 6), torch.rand(6, 2)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden, index, weights), experts(hidden, index, weights))


def test_a_failed_attach_leaves_experts_as_they_were(monkeypatch):
    model = moe("GptOss")
    before, logits = list(model.named_parameters()), model(ids).logits
    quantize, calls = peftops.ops.nf4_quantize, []

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return quantize(*args, **kwargs)

    monkeypatch.setattr(peftops.ops, "nf4_quantize", fail)  # where a format looks for it
    with pytest.raises(KeyboardInterrupt):
        attach(model, peftops.QLoRAConfig(r=2))
    assert len(calls) == 7
    assert [(name, id(p)) for name, p in model.named_parameters()] == [(name, id(p)) for name, p in before]
    assert torch.equal(model(ids).logits, logits) and not list(hosts(model))
