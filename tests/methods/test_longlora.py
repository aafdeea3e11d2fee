"""LongLoRA: what sees what, padding, stretched positions, what trains. Full attention is the judge of each group."""

import copy
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

import models
import peftops
from peftops import LongLoRAConfig
from peftops.attaching import adapted_layers
from peftops.nn.shifted_attention import ShiftedAttention, boundaries


def causal(module, query, key, value, mask=None, **options):
    """An attention function as transformers' registry has them; heads share keys."""
    n = query.shape[1] // key.shape[1]
    k, v = (t.repeat_interleave(n, 1) for t in (key, value))
    own = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril() if mask is None else mask
    return F.scaled_dot_product_attention(query, k, v, attn_mask=own).transpose(1, 2), None


def qkv(tokens, heads=4, kv=2, batch=2, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, h, tokens, width, generator=generator, dtype=torch.float64) for h in (heads, kv, kv)]


def rolled(query, key, value, group):
    """The authors' own form, which wraps around."""
    n = query.shape[1] // key.shape[1]
    out = []
    for half in (0, 1):
        q, k, v = (t.chunk(2, 1)[half] for t in (query, key.repeat_interleave(n, 1), value.repeat_interleave(n, 1)))
        shift = half * (group // 2)
        blocks = [t.roll(-shift, 2).unflatten(2, (-1, group)) for t in (q, k, v)]
        out.append(F.scaled_dot_product_attention(*blocks, is_causal=True).flatten(2, 3).roll(shift, 2))
    return torch.cat(out, 1).transpose(1, 2)


@pytest.mark.parametrize(
    "tokens, group",
    [
        (16, 4),
        (16, 8),
        (17, 4),
        (19, 6),
        (7, 3),
        (5, 2),
        (3, 2),
        (1, 2),
        (8, 100),
    ],
)
@pytest.mark.parametrize("shift", [True, False])
def test_each_half_of_the_heads_is_full_attention_of_its_groups(tokens, group, shift):
    q, k, v = qkv(tokens)
    got = ShiftedAttention(group, shift)(causal, None, q, k, v)[0]
    assert got.shape == (2, tokens, 4, 8)
    starts = (group, group // 2) if shift else (group, group)
    for half, start in enumerate(starts):
        ends = sorted({0, tokens, *(e for e in range(start, tokens, group))})
        for a, b in pairwise(ends):
            own = [t[:, t.shape[1] // 2 * half :][:, : t.shape[1] // 2, a:b] for t in (q, k, v)]
            torch.testing.assert_close(got[:, a:b, 2 * half : 2 * half + 2], causal(None, *own)[0], rtol=0, atol=1e-12)


def test_one_group_of_everything_is_full_attention():
    q, k, v = qkv(12)
    full = causal(None, q, k, v)[0]
    torch.testing.assert_close(ShiftedAttention(12, False)(causal, None, q, k, v)[0], full, rtol=0, atol=1e-12)
    torch.testing.assert_close(ShiftedAttention(24, True)(causal, None, q, k, v)[0], full, rtol=0, atol=1e-12)
    assert boundaries(16, 4, 2) == [(0, 2), (2, 6), (6, 10), (10, 14), (14, 16)]


def test_nothing_leaks_from_the_future_where_the_authors_roll_does():
    q, k, v = qkv(16)
    attend = lambda v: ShiftedAttention(4, True)(causal, None, q, k, v)[0]
    same = attend(v)
    torch.testing.assert_close(same[:, 2:], rolled(q, k, v, 4)[:, 2:], rtol=0, atol=1e-12)
    for j in range(16):
        other = v.clone()
        other[:, :, j] += 1
        moved = (attend(other) != same).flatten(2).any(-1)[0].nonzero().flatten()
        assert moved.min() == j and moved.max() < j + 4, j
    other = v.clone()
    other[:, :, -1] += 1
    moved = (rolled(q, k, other, 4) != rolled(q, k, v, 4)).flatten(2).any(-1)[0].nonzero().flatten()
    assert moved.tolist() == [0, 1, 15]


def test_gradients():
    q, k, v = (t.requires_grad_() for t in qkv(7, heads=2, kv=2, batch=1, width=3))
    assert torch.autograd.gradcheck(lambda *t: ShiftedAttention(4, True)(causal, None, *t)[0], (q, k, v))


def training(build, config, seed=1, **options):
    model = peftops.attach(build(), config).train()
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("build", [models.llama, models.qwen2, models.mistral, models.gemma, models.gpt2])
def test_a_model_sees_its_groups_while_it_trains_and_all_else_after(build):
    model = training(build, LongLoRAConfig(r=2, group=4))
    ids = models.tokens(1, 16)
    logits = lambda ids: model(input_ids=ids).logits
    other = ids.clone()
    other[:, 9] = (ids[:, 9] + 7) % 300
    same, changed = logits(ids), logits(other)
    assert torch.equal(same[:, :9], changed[:, :9]) and not torch.equal(same[:, 9:], changed[:, 9:])
    # Two layers reach at most 4 + 2 tokens on: group [8, 12), then shifted [10, 14).
    assert torch.equal(same[:, 14:], changed[:, 14:])
    model.eval()
    assert not torch.equal(logits(ids)[:, 14:], logits(other)[:, 14:])
    want = logits(ids)
    peftops.merge(model)
    model.train()
    torch.testing.assert_close(logits(ids), want, rtol=1e-4, atol=1e-4)  # merged, it attends in full
    peftops.detach(model, merged=True)
    torch.testing.assert_close(logits(ids), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("left", [True, False])
def test_padding_is_hidden_from_the_right_rows(left):
    """Rows of a batch compute what each does alone, and pads get and give nothing."""
    model = training(models.llama, LongLoRAConfig(r=2, group=4))
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, slice(0, 5) if left else slice(7, 12)] = 0
    ids = models.tokens(2, 12)
    out = model(input_ids=ids, attention_mask=mask).logits
    other = torch.where(mask.bool(), ids, (ids + 11) % 300)
    real = mask.bool()
    changed = model(input_ids=other, attention_mask=mask).logits
    torch.testing.assert_close(changed[real], out[real], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(input_ids=ids[:1]).logits[0], out[0], rtol=1e-4, atol=1e-5)
    if not left:
        torch.testing.assert_close(model(input_ids=ids[1:, :7]).logits[0], out[1, :7], rtol=1e-4, atol=1e-5)
    model(input_ids=ids, attention_mask=mask, labels=torch.where(real, ids, -100)).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_it_compiles_and_checkpoints_while_it_trains():
    torch._dynamo.reset()
    model, ids = training(models.llama, LongLoRAConfig(r=2, group=4)), models.tokens(2, 10)
    want = model(input_ids=ids).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input_ids=ids).logits, want, rtol=0, atol=1e-6)
    grads = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_what_trains():
    names = lambda model: {n.replace("adapters.default.", "") for n, p in model.named_parameters() if p.requires_grad}
    layers = [f"model.layers.{i}" for i in (0, 1)]
    lora = {f"{x}.self_attn.{p}_proj.lora_{f}" for x in layers for p in "qkvo" for f in "AB"}
    norms = {"model.norm.weight", *(f"{x}.{n}_layernorm.weight" for x in layers for n in ("input", "post_attention"))}
    model = peftops.attach(models.llama(), LongLoRAConfig(r=2))
    assert names(model) == lora | norms | {"model.embed_tokens.weight"}
    assert names(peftops.attach(models.llama(), LongLoRAConfig(r=2, extras=False))) == lora
    only = peftops.attach(models.llama(), LongLoRAConfig(r=2, extras=False, target=["up_proj"]))
    assert names(only) == {f"{x}.mlp.up_proj.lora_{f}" for x in layers for f in "AB"}


def test_stretched_positions_are_interpolated_and_in_the_config(tmp_path):
    base = models.llama()
    model = peftops.attach(models.llama(), LongLoRAConfig(r=2, length=1100))
    assert model.config.max_position_embeddings == 1100 and model.config.rope_parameters["factor"] == 3.0
    ids = models.tokens(1, 9)
    want = base(input_ids=ids, position_ids=torch.arange(9)[None] / 3).logits
    torch.testing.assert_close(model(input_ids=ids).logits, want, rtol=1e-4, atol=1e-5)
    peftops.save(model, tmp_path / "adapter")
    other = peftops.load(models.llama(), tmp_path / "adapter")
    assert torch.equal(other(input_ids=ids).logits, model(input_ids=ids).logits)
    peftops.attach(model, LongLoRAConfig(r=2, length=1100), name="second")  # no second time
    peftops.detach(model).save_pretrained(tmp_path / "model")
    back = type(model).from_pretrained(tmp_path / "model")
    torch.testing.assert_close(back(input_ids=ids).logits, want, rtol=1e-4, atol=1e-5)
    same = peftops.attach(models.llama(), LongLoRAConfig(r=2, length=512))
    assert same.config.rope_parameters["rope_type"] == "default"


def test_it_learns_in_groups_and_then_attends_in_full():
    ids = torch.arange(3, 35).repeat(4, 1) + torch.arange(4)[:, None] * 40
    model = peftops.attach(models.llama(), LongLoRAConfig(r=8, length=1024))
    loss = lambda: model(input_ids=ids, labels=ids).loss
    before = loss().item()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model.train()
    for _ in range(30):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    model.eval()
    assert loss().item() < 0.8 * before


def eager():
    model = peftops.attach(models.llama(), LongLoRAConfig(r=2)).train()
    model.set_attn_implementation("eager")
    model(models.tokens())


def odd_heads():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=8,
        )
    )


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LongLoRAConfig(group=1), "group must be a whole number from 2, not 1"),
        (lambda: LongLoRAConfig(length=0), "length must be a whole number from 1, not 0"),
        (lambda: LongLoRAConfig(r=0), "r must be a whole number from 1, not 0"),
        (lambda: LongLoRAConfig(target=[]), "target must be"),
        (lambda: peftops.attach(models.mlp(), LongLoRAConfig()), "needs a model of transformers that decodes"),
        (lambda: peftops.attach(models.bert(), LongLoRAConfig()), "needs a model of transformers that decodes"),
        (
            lambda: peftops.attach(odd_heads(), LongLoRAConfig()),
            "splits heads into halves, and num_attention_heads is 3",
        ),
        (lambda: peftops.attach(models.gpt2(), LongLoRAConfig(r=2, length=4096)), "whose rope_type is None"),
        (
            lambda: peftops.attach(
                peftops.attach(models.llama(), peftops.LoRAConfig(r=2), name="a"), LongLoRAConfig(r=2, length=4096)
            ),
            "change the positions of adapters that are already attached",
        ),
        (eager, "needs an attention function of transformers' registry, and 'eager' is not in"),
        (lambda: ShiftedAttention(4, True)(causal, None, *qkv(1)[:1], *qkv(3)[1:]), "1 queries, but 3 keys; call"),
    ],
)
def test_bad_input_gets_a_sentence(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_a_refused_attach_changes_nothing():
    model = models.gpt2()
    state, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    with pytest.raises(TypeError):
        peftops.attach(model, LongLoRAConfig(r=2, length=4096))
    assert [type(m) for m in model.modules()] == kinds and not list(adapted_layers(model))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.config.max_position_embeddings == 128
