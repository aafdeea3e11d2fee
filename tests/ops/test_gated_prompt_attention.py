"""The results: the prompt's part and all gradients against float64, and against LLaMA-Adapter's and PEFT's formulas."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import peftops
import reference
from gated_prompt import NAMES, inputs, laid_out
from numerics import FP32, assert_sums
from strategies import dtypes, normal, seeds

layouts = st.sampled_from(["heads first", "rows first", "slice of qkv", "broken rows", "unaligned"])
head_dims = st.sampled_from([1, 3, 8, 15, 16, 17, 20, 32, 33, 64, 100])
token_counts = st.sampled_from([1, 2, 9, 10, 15, 16, 17, 31, 32, 33, 70])
row_counts = st.sampled_from([0, 1, 2, 5, 15, 16, 17, 33])


def check(leaves, g, tanh=True, scale=None):
    """y and every gradient against float64.

    In units of 2^-24: a score errs by d + 4 of its sum of magnitudes S, and by 2 S more when the largest is
    subtracted, and again for each chunk of at least 16 tokens. Exponentiated, those are relative errors, and exp2
    itself adds 4; so a p before normalisation errs by eps below, relatively, and after it by twice that, with what
    sums of K such add. Where p enters a difference of t = g . value and its mean, the mean has such an error, too.
    """
    y = peftops.add_gated_prompt(**leaves, gate_activation="tanh" if tanh else "none", scale=scale)
    grads = dict(zip(NAMES, torch.autograd.grad(y, leaves.values(), g), strict=True))
    exact = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
    want_y = reference.gated_prompt(**exact, tanh=tanh, scale=scale)
    want = dict(zip(NAMES, torch.autograd.grad(want_y, exact.values(), g.double()), strict=True))

    out, query, key, value, gate = (t.detach().double() for t in leaves.values())
    g = g.double()
    b, heads, s, d = query.shape
    kv_heads, k, dv = key.shape[-3], key.shape[-2], value.shape[-1]
    scale = d**-0.5 if scale is None else scale
    wide = [t.expand(b, *t.shape[-3:]).repeat_interleave(heads // kv_heads, 1) for t in (key, value)]
    key, value = wide
    weight = (gate.tanh() if tanh else gate).reshape(-1, 1, 1).abs()
    size = abs(scale) * (query.abs() @ key.abs().mT).amax(-1, keepdim=True)
    chunks = -(-k // 16)
    eps = torch.expm1(FP32 * ((d + 6 + 2 * chunks) * size + 5 + 6 * chunks))
    # exp2 is 0 below 2^-126. Added to p, 2^-100 makes room for that in eps * p.
    p = torch.softmax(scale * query @ key.mT, -1) + 2.0**-100
    t = g.abs() @ value.abs().mT
    mean = (p * t).sum(-1, keepdim=True)
    e = abs(scale) * weight * p * (t + mean)

    def over_queries(x):  # summed over the queries that see a prompt
        x = x.unflatten(1, (kv_heads, heads // kv_heads)).sum(2)
        return x if leaves["prompt_key"].dim() == 4 else x.sum(0)

    def over_heads(x):  # summed over the queries of a gate
        x = x.sum((0, 2, 3))
        return x if gate.numel() > 1 else x.sum(0, keepdim=True)

    part = weight * (p @ value.abs())
    queries = b * s * heads
    assert_sums(y, want_y, out.abs() + part, 2 * k + 10, 2 * eps * part)
    assert torch.equal(grads["out"].double(), g)
    assert_sums(grads["query"], want["query"], e @ key.abs(), 4 * k + 2 * dv + 20, 4 * eps * (e @ key.abs()))
    size, extra = over_queries(e.mT @ query.abs()), over_queries((4 * eps * e).mT @ query.abs())
    assert_sums(grads["prompt_key"], want["prompt_key"], size, queries + 3 * k + 2 * dv + 20, extra)
    size, extra = (over_queries((x * weight * p).mT @ g.abs()) for x in (1, 2 * eps))
    assert_sums(grads["prompt_value"], want["prompt_value"], size, queries + 2 * k + 20, extra)
    slope = 1 - weight**2 + 8 * FP32 if tanh else torch.ones_like(weight)  # 1 - tanh^2 errs absolutely
    assert_sums(
        grads["gate"],
        want["gate"],
        over_heads(slope * mean),
        queries + 2 * k + dv + 10,
        over_heads(slope * 2 * eps * mean) + 8 * FP32 * tanh * over_heads(mean),
    )


@given(
    b=st.integers(0, 3),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 4]),
    s=row_counts,
    k=token_counts,
    d=head_dims,
    dv=head_dims,
    dtype=dtypes,
    mixed=st.booleans(),
    each=st.booleans(),
    scalar=st.booleans(),
    tanh=st.booleans(),
    scale=st.sampled_from([None, 0.3, 2.0]),
    how=layouts,
    seed=seeds,
)
def test_matches_reference(device, b, kv_heads, group, s, k, d, dv, dtype, mixed, each, scalar, tanh, scale, how, seed):
    prompt_dtype = torch.float32 if mixed else dtype
    leaves = inputs(
        device,
        b,
        kv_heads * group,
        kv_heads,
        s,
        k,
        d,
        dv,
        dtype,
        prompt_dtype=prompt_dtype,
        each=each,
        scalar=scalar,
        how=how,
        seed=seed,
    )
    check(leaves, laid_out(normal((b, kv_heads * group, s, dv), dtype, seed + 5, device), how), tanh, scale)


@pytest.mark.parametrize(
    "b, heads, kv_heads, s, k, d, dv",
    [
        (2, 4, 2, 700, 10, 64, 64),  # several blocks of queries
        (2, 20, 10, 40, 40, 64, 32),  # several blocks of heads; a prompt of several chunks
        (1, 3, 3, 21, 20, 600, 1024),  # wide heads, and chunks of 16
        (1, 1, 1, 1100, 33, 24, 20),
    ],
    ids=str,
)
@pytest.mark.parametrize("each", [False, True])
def test_matches_reference_beyond_one_block(device, b, heads, kv_heads, s, k, d, dv, each):
    leaves = inputs(device, b, heads, kv_heads, s, k, d, dv, torch.float32, each=each, how="rows first")
    check(leaves, normal((b, heads, s, dv), torch.float32, 9, device))


def test_scores_of_any_size(device):
    """Where most p underflow, and where all are equal."""
    leaves = inputs(device, 1, 2, 2, 40, 50, 64, 16, torch.float32, how="rows first")
    g = normal((1, 2, 40, 16), torch.float32, 9, device)
    check(leaves, g, scale=20.0)
    check(leaves, g, scale=0.0)
    check(leaves, g, scale=-1.0)


def test_a_shift_of_all_scores_changes_nothing(device):
    leaves = inputs(device, 1, 1, 1, 8, 10, 16, 16, torch.float32)
    with torch.no_grad():
        leaves["query"][..., 0] = 1.0
        before = peftops.add_gated_prompt(**leaves)
        leaves["prompt_key"][..., 0] += 400.0
        after = peftops.add_gated_prompt(**leaves)
    assert (before - after).abs().max() < 1e-3 and not torch.equal(before, leaves["out"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_a_shut_gate_leaves_attention_bit_for_bit(device, dtype, grad):
    query, key, value = (laid_out(normal((2, 4, 19, 24), dtype, i, device), "rows first") for i in range(3))
    prompt = torch.full((4, 10, 24), torch.nan, device=device)
    gate = torch.zeros(4, device=device, requires_grad=grad)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    want = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    got = peftops.gated_prompt_attention(query, key, value, prompt, prompt, gate, is_causal=True)
    assert torch.equal(got.view(bits), want.view(bits)) and got.stride() == want.stride()
    want[0, 0, 0], want[0, 0, 1] = -0.0, torch.nan
    assert torch.equal(peftops.add_gated_prompt(want, query, prompt, prompt, gate).view(bits), want.view(bits))
    want = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    # and a single gate that is shut leaves its head alone
    gate = torch.tensor([1.0, 0.0, -1.0, 0.0], device=device)
    prompt = normal((4, 10, 24), torch.float32, 4, device)
    got = peftops.gated_prompt_attention(query, key, value, prompt, prompt, gate, is_causal=True)
    assert torch.equal(got[:, 1::2].view(bits), want[:, 1::2].view(bits))
    assert (got[:, ::2] != want[:, ::2]).float().mean() > 0.9


def test_at_shut_gates_only_the_gates_learn(device):
    leaves = inputs(device, 2, 4, 2, 19, 10, 24, 24, torch.float32)
    leaves["gate"].data.zero_()
    y = peftops.add_gated_prompt(**leaves)
    grads = dict(zip(NAMES, torch.autograd.grad(y, leaves.values(), normal(y.shape, y.dtype, 9, device)), strict=True))
    assert (grads["gate"] != 0).all()
    assert all((grads[name] == 0).all() for name in ("query", "prompt_key", "prompt_value"))


def test_nan_and_infinity_stay_where_they_belong(device):
    leaves = inputs(device, 2, 4, 2, 19, 10, 24, 24, torch.float32)
    with torch.no_grad():
        clean = peftops.add_gated_prompt(**leaves)
        leaves["query"][0, 1, 3, 5] = torch.nan
        leaves["query"][1, 2, 18, 0] = torch.inf
        leaves["out"][1, 0, 0, 0] = -torch.inf
        y = peftops.add_gated_prompt(**leaves)
        hit = torch.zeros_like(y, dtype=torch.bool)
        hit[0, 1, 3], hit[1, 2, 18], hit[1, 0, 0, 0] = True, True, True
        assert torch.equal(y[~hit], clean[~hit]) and not y[hit].isfinite().any()
        leaves["prompt_value"][1, 2, 3] = torch.nan  # of the third and fourth query head
        y = peftops.add_gated_prompt(**leaves)
        assert y[:, 2:, :, 3].isnan().all() and torch.equal(y[:, :2][~hit[:, :2]], clean[:, :2][~hit[:, :2]])


def causal_mask(rows, keys):
    return torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("option", ["plain", "causal", "bool mask", "float mask", "scale"])
def test_is_an_attention_and_a_prompt(device, kv_heads, option):
    """Bit for bit torch's attention with add_gated_prompt, forward and backward, with a graph and without."""
    query = laid_out(normal((2, 4, 7, 20), torch.float32, 0, device), "rows first").requires_grad_()
    key, value = (normal((2, kv_heads, 9, 20), torch.float32, i, device).requires_grad_() for i in (1, 2))
    prompt = [normal((kv_heads, 10, 20), torch.float32, i, device).requires_grad_() for i in (3, 4)]
    gate = normal((4,), torch.float32, 5, device).requires_grad_()
    mask = causal_mask(7, 9).to(device)
    low = torch.zeros(7, 9, device=device).masked_fill(~mask, -1e9)
    options = {
        "causal": {"is_causal": True},
        "bool mask": {"attn_mask": mask},
        "float mask": {"attn_mask": low},
        "scale": {"scale": 0.4},
        "plain": {},
    }[option]
    leaves = (query, key, value, *prompt, gate)
    y = peftops.gated_prompt_attention(*leaves, **options)
    out = F.scaled_dot_product_attention(query, key, value, enable_gqa=kv_heads < 4, **options)
    want = peftops.add_gated_prompt(out, query, *prompt, gate, scale=options.get("scale"))
    assert torch.equal(y, want)
    g = normal(y.shape, torch.float32, 6, device)
    assert all(map(torch.equal, torch.autograd.grad(y, leaves, g), torch.autograd.grad(want, leaves, g)))
    with torch.no_grad():
        assert torch.equal(peftops.gated_prompt_attention(*leaves, **options), want)


def rounding(*parts):
    """What fp32 may differ by in sums of these magnitudes, generously: formulas below are fp32 on both sides."""
    return sum(part.abs().max().item() for part in parts) * 200 * FP32


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_computes_what_llama_adapter_trains(device, kv_heads):
    """Probabilities of prompt and words side by side, those of the prompt times tanh(gate), over [Va; V]."""
    b, h, s, d, k = 2, 4, 13, 16, 10
    query, key, value = (normal((b, n, s, d), torch.float32, i, device) for i, n in enumerate((h, kv_heads, kv_heads)))
    prompt_key, prompt_value = (normal((1, kv_heads, k, d), torch.float32, 3 + i, device) for i in range(2))
    gate = normal((1, h, 1, 1), torch.float32, 5, device)
    wide = lambda t: t.expand(b, -1, -1, -1).repeat_interleave(h // kv_heads, 1)
    mask = torch.full((s, s), -torch.inf, device=device).triu(1)
    p_prompt = torch.softmax(query @ wide(prompt_key).mT / d**0.5, -1) * gate.tanh()
    p_words = torch.softmax(query @ wide(key).mT / d**0.5 + mask, -1)
    want = torch.cat([p_prompt, p_words], -1) @ torch.cat([wide(prompt_value), wide(value)], 2)
    got = peftops.gated_prompt_attention(query, key, value, prompt_key, prompt_value, gate, is_causal=True)
    assert (got - want).abs().max() <= rounding(value, prompt_value)


def test_computes_what_peft_does(device):
    """One gate for the layer, not squashed; the prompt's part is projected by itself, then added."""
    b, h, s, d, k = 2, 4, 13, 16, 10
    query, key, value = (normal((b, h, s, d), torch.float32, i, device) for i in range(3))
    prompt_key, prompt_value = (normal((h, k, d), torch.float32, 3 + i, device) for i in range(2))
    gate, o_proj = torch.tensor([1.7], device=device), normal((h * d, h * d), torch.float32, 6, device) / 8
    joined = lambda t: t.transpose(1, 2).reshape(b, s, h * d)
    scores = gate * torch.softmax(query @ prompt_key.mT / d**0.5, -1)
    base = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    want = F.linear(joined(base), o_proj) + F.linear(joined(scores @ prompt_value), o_proj)
    got = peftops.gated_prompt_attention(
        query, key, value, prompt_key, prompt_value, gate, gate_activation="none", is_causal=True
    )
    assert (F.linear(joined(got), o_proj) - want).abs().max() <= rounding(base @ torch.ones(d, device=device)) * 4
