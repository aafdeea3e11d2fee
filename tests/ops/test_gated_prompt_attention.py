import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import peftops
import reference
from numerics import FP32, assert_sums
from strategies import dtypes, normal, seeds

NAMES = ("out", "query", "prompt_key", "prompt_value", "gate")
layouts = st.sampled_from(["heads first", "rows first", "slice of qkv", "broken rows", "unaligned"])
head_dims = st.sampled_from([1, 3, 8, 15, 16, 17, 20, 32, 33, 64, 100])
token_counts = st.sampled_from([1, 2, 9, 10, 15, 16, 17, 31, 32, 33, 70])
row_counts = st.sampled_from([0, 1, 2, 5, 15, 16, 17, 33])


def laid_out(t, how):
    """The same [B, H, S, d] values as an attention may have them."""
    if how == "rows first":  # transformers: a view of [B, S, H, d]
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "slice of qkv":
        return torch.stack([t.transpose(1, 2)] * 3, 2)[:, :, 1].transpose(1, 2)
    if how == "broken rows":
        return t.mT.contiguous().mT
    if how == "unaligned":
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)
    return t


def inputs(
    device,
    b,
    heads,
    kv_heads,
    s,
    k,
    d,
    dv,
    dtype=torch.float32,
    *,
    prompt_dtype=None,
    each=False,
    scalar=False,
    how="heads first",
    seed=0,
):
    leaf = lambda shape, dtype, i: normal(shape, dtype, seed + i, device)
    lead = (b,) if each else ()
    values = (
        laid_out(leaf((b, heads, s, dv), dtype, 0), how),
        laid_out(leaf((b, heads, s, d), dtype, 1), how),
        leaf((*lead, kv_heads, k, d), prompt_dtype or dtype, 2),
        leaf((*lead, kv_heads, k, dv), prompt_dtype or dtype, 3),
        leaf((1,) if scalar else (heads,), torch.float32, 4),
    )
    return {name: t.requires_grad_() for name, t in zip(NAMES, values, strict=True)}


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


def test_keeps_nothing_but_inputs(device):
    leaves = inputs(device, 2, 4, 2, 64, 10, 32, 32, torch.bfloat16, prompt_dtype=torch.float32, how="rows first")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        peftops.add_gated_prompt(**leaves)
    own = {leaves[name].data_ptr(): name for name in NAMES}
    assert sorted(own[t.data_ptr()] for t in kept) == ["gate", "prompt_key", "prompt_value", "query"]


def peak_memory(call):
    """Bytes that call() holds at most beyond what is there before; CPU only."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize("s", [512, 2048])
def test_needs_memory_of_the_size_of_its_outputs(device, s):
    """With 256 tokens of 16 dims, one matrix [rows, tokens] would be 16 outputs."""
    leaves = inputs(device, 1, 2, 2, s, 256, 16, 16, torch.float32)
    y = peftops.add_gated_prompt(**leaves)
    g = normal(y.shape, y.dtype, 9, device)
    assert y.nbytes <= peak_memory(lambda: peftops.add_gated_prompt(**leaves)) <= 1.1 * y.nbytes
    prompts = leaves["prompt_key"].nbytes + leaves["prompt_value"].nbytes
    backward = peak_memory(lambda: torch.autograd.grad(y, list(leaves.values())[1:], g, retain_graph=True))
    assert y.nbytes <= backward <= 1.3 * y.nbytes + 2 * prompts  # their gradients, and partial sums at least once


def test_a_step_keeps_one_gradient_of_the_query():
    """The attention's, to which the prompt's is added: beside a plain attention's, partial sums and y alone."""
    query, key, value = (normal((1, 4, 512, 64), torch.float32, i, "cpu").requires_grad_() for i in range(3))
    prompt = [normal((4, 10, 64), torch.float32, i, "cpu") for i in (3, 4)]
    gate = normal((4,), torch.float32, 5, "cpu")
    g = torch.ones_like(query)

    def held(attention):
        y = attention()
        return peak_memory(lambda: torch.autograd.grad(y, (query, key, value), g, retain_graph=True))

    plain = held(lambda: F.scaled_dot_product_attention(query, key, value))
    ours = held(lambda: peftops.gated_prompt_attention(query, key, value, *prompt, gate))
    assert ours <= plain + query.nbytes / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d", [20, 64])
def test_the_prompts_gradient_is_added_before_it_is_rounded(device, dtype, d):
    leaves = inputs(device, 2, 4, 2, 35, 10, d, 24, dtype, prompt_dtype=torch.float32, how="rows first")
    query, *prompt, gate = (t.detach() for t in list(leaves.values())[1:])
    g, base = (normal((2, 4, 35, n), dtype, 9 + n, device) for n in (24, d))
    exact, *want = torch.ops.peftops.gated_prompt_backward(g.float(), query.float(), *prompt, gate, 0.3, True)
    for layout in ("heads first", "rows first"):
        got = laid_out(base, layout).clone(memory_format=torch.preserve_format)
        rest = torch.ops.peftops.gated_prompt_backward_(got, g, query, *prompt, gate, 0.3)
        assert torch.equal(got, (base.float() + exact).to(dtype))
        assert all(map(torch.equal, rest, want))


def test_any_attention_with_a_prompt(device):
    """Bit for bit add_gated_prompt, whoever learns, more than once, and where rows share their gradient in memory."""
    query, key, value = (normal((2, 4, 9, 20), torch.float32, i, device) for i in range(3))
    prompt = [normal((2, 10, 20), torch.float32, i, device) for i in (3, 4)]
    gate = normal((1,), torch.float32, 5, device)
    leaves = (query, key, value, *prompt, gate)

    def attend(query):
        return F.scaled_dot_product_attention(query.sum(2, keepdim=True), key, value).expand(2, 4, 9, 20)

    for learns in range(1, 1 << len(leaves)):
        for i, t in enumerate(leaves):
            t.requires_grad_(bool(learns >> i & 1))
        wanted = [t for t in leaves if t.requires_grad]
        got = peftops.with_gated_prompt(attend, query, *prompt, gate, gate_activation="none")
        want = peftops.add_gated_prompt(attend(query), query, *prompt, gate, gate_activation="none")
        assert torch.equal(got, want)
        g = normal(got.shape, torch.float32, 6, device)
        before = g.clone()
        for _ in range(2):
            grads = [torch.autograd.grad(y, wanted, g, retain_graph=True) for y in (got, want)]
            assert all(map(torch.equal, *grads)), learns
        assert torch.equal(g, before)


def test_writes_no_input(device):
    leaves = inputs(device, 2, 4, 2, 19, 10, 24, 24, torch.float32, how="rows first")
    g = normal((2, 4, 19, 24), torch.float32, 9, device)
    before = [t.detach().clone() for t in (*leaves.values(), g)]
    y = peftops.add_gated_prompt(**leaves)
    torch.autograd.grad(y, leaves.values(), g)
    with torch.no_grad():
        peftops.add_gated_prompt(**leaves)
        out, query, *rest = (t.detach() for t in leaves.values())
        peftops.gated_prompt_attention(query, query, out, *rest)
    assert all(map(torch.equal, (*leaves.values(), g), before))


def test_same_bits_for_any_number_of_threads(device, threads):
    leaves = inputs(device, 3, 20, 10, 150, 40, 24, 24, torch.float32, how="rows first")
    g = normal((3, 20, 150, 24), torch.float32, 9, device)
    runs = []
    for n in (1, 2, 3, 5):
        threads(n)
        y = peftops.add_gated_prompt(**leaves)
        runs.append((y, *torch.autograd.grad(y, leaves.values(), g)))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_gradients_that_nobody_wants(device):
    leaves = inputs(device, 2, 4, 2, 19, 10, 24, 24)
    g = normal((2, 4, 19, 24), torch.float32, 9, device)
    all_of = torch.autograd.grad(peftops.add_gated_prompt(**leaves), leaves.values(), g)
    for name, want in zip(NAMES, all_of, strict=True):
        alone = {n: t.detach().requires_grad_(n == name) for n, t in leaves.items()}
        (got,) = torch.autograd.grad(peftops.add_gated_prompt(**alone), alone[name], g)
        assert torch.equal(got, want), name


def test_a_second_derivative_is_an_error(device):
    leaves = inputs(device, 1, 2, 2, 5, 3, 8, 8, torch.float32)
    y = peftops.add_gated_prompt(**leaves)
    (grad,) = torch.autograd.grad(y, leaves["query"], torch.ones_like(y).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("how", ["heads first", "rows first", "slice of qkv", "broken rows"])
@pytest.mark.parametrize("each", [False, True])
def test_registration(device, how, each):
    leaves = inputs(device, 2, 4, 2, 5, 3, 8, 12, torch.float32, each=each, how=how)
    out, query, key, value, gate = (t.detach() for t in leaves.values())
    op = torch.ops.peftops
    torch.library.opcheck(op.gated_prompt_add.default, (out, query, key, value, gate, 0.5))
    torch.library.opcheck(op.gated_prompt_add.default, (out, query, key, value, gate[:1].expand(4), 0.5))
    for need_query in (True, False):
        torch.library.opcheck(op.gated_prompt_backward.default, (out, query, key, value, gate, 0.5, need_query))
    if how != "broken rows":
        torch.library.opcheck(op.gated_prompt_add_.default, (out.clone(), query, key, value, gate, 0.5))
        torch.library.opcheck(op.gated_prompt_backward_.default, (query.clone(), out, query, key, value, gate, 0.5))


@pytest.mark.parametrize("how", ["heads first", "rows first"])
def test_compiles_without_a_graph_break(device, how):
    leaves = inputs(device, 2, 4, 2, 5, 3, 8, 8, torch.float32, how=how)
    out, query, *rest = leaves.values()
    call = lambda query: peftops.gated_prompt_attention(query, out, out, *rest, is_causal=True)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    y = compiled(query)
    assert torch.equal(y, call(query)) and y.stride() == call(query).stride()
    g = normal(y.shape, y.dtype, 9, device)
    got = torch.autograd.grad(y, leaves.values(), g)
    want = torch.autograd.grad(call(query), leaves.values(), g)
    assert all(map(torch.equal, got, want))
    with torch.no_grad():
        assert torch.equal(compiled(query), y)


def test_autocast(device):
    leaves = inputs(device, 2, 4, 2, 5, 3, 8, 8, torch.float32)
    out, query, *rest = leaves.values()
    with torch.autocast(device, torch.bfloat16):
        added = peftops.add_gated_prompt(**leaves)
        y = peftops.gated_prompt_attention(query, out, out, *rest)
    assert added.dtype == y.dtype == torch.bfloat16
    lower = {name: t.bfloat16() if name in ("out", "query") else t for name, t in leaves.items()}
    assert torch.equal(added, peftops.add_gated_prompt(**lower))
    assert torch.equal(y, peftops.gated_prompt_attention(lower["query"], lower["out"], lower["out"], *rest))


def test_bad_input(device):
    good = {n: t.detach() for n, t in inputs(device, 2, 4, 2, 5, 3, 8, 8, torch.float32).items()}
    key, value, gate = good["prompt_key"], good["prompt_value"], good["gate"]

    def refused(error, match, **bad):
        with pytest.raises(error, match="add_gated_prompt: " + match):
            peftops.add_gated_prompt(**{**good, **bad})

    refused(ValueError, "gate_activation must be 'tanh' or 'none', not 'sigmoid'", gate_activation="sigmoid")
    refused(ValueError, r"gate must have 1 element or 4, one a head, but its shape is \[3\]", gate=gate[:3])
    refused(ValueError, r"query must have shape \[batch, heads, rows, d\], not \[4, 5, 8\]", query=good["query"][0])
    refused(RuntimeError, r"out must have shape \[2, 4, 5, 8\], not \[2, 4, 4, 8\]", out=good["out"][:, :, 1:])
    three = {"prompt_key": key[[0, 1, 1]], "prompt_value": value[[0, 1, 1]]}
    refused(RuntimeError, "3 prompt heads do not divide 4 query heads", **three)
    three = {"prompt_key": key.expand(3, 2, 3, 8)}
    refused(RuntimeError, "there must be one prompt, or one for each of 2 samples, not 3", **three)
    refused(RuntimeError, r"a prompt must have shape \[kv_heads, tokens, d\] or .*, not \[3, 8\]", prompt_key=key[0])
    fit = r"do not fit together or query \[2, 4, 5, 8\]"
    refused(RuntimeError, rf"prompt_key \[2, 2, 8\] and prompt_value \[2, 3, 8\] {fit}", prompt_key=key[:, 1:])
    refused(RuntimeError, rf"prompt_key \[2, 3, 7\] and prompt_value \[2, 3, 8\] {fit}", prompt_key=key[..., 1:])
    each = {"prompt_value": value.expand(2, 2, 3, 8)}
    refused(RuntimeError, rf"prompt_key \[2, 3, 8\] and prompt_value \[2, 2, 3, 8\] {fit}", **each)
    refused(RuntimeError, "a prompt needs at least one token", prompt_key=key[:, :0], prompt_value=value[:, :0])
    refused(RuntimeError, "prompt_key and prompt_value must have one dtype", prompt_key=key.bfloat16())
    refused(RuntimeError, "query and out must have one dtype", query=good["query"].bfloat16())
    refused(RuntimeError, "query must be float32, bfloat16 or float16, not Double", query=good["query"].double())
    wide = {"query": torch.zeros(2, 4, 5, 1025, device=device), "prompt_key": torch.zeros(2, 3, 1025, device=device)}
    refused(RuntimeError, "a head must have 1 to 1024 dims, not 1025", **wide)
    with pytest.raises(ValueError, match="gated_prompt_attention: gate must have 1 element or 4"):
        peftops.gated_prompt_attention(good["query"], good["out"], good["out"], key, value, gate[:3])
    op, args = torch.ops.peftops, (good["query"], key, value, gate, 0.5)
    with pytest.raises(RuntimeError, match="the last dim of out must be contiguous"):
        op.gated_prompt_add_(laid_out(good["out"], "broken rows"), *args)
    dquery = good["query"].clone()
    with pytest.raises(RuntimeError, match="the last dim of dquery must be contiguous"):
        op.gated_prompt_backward_(laid_out(dquery, "broken rows"), good["out"], *args)
    with pytest.raises(RuntimeError, match=r"dquery must have shape \[2, 4, 5, 8\], not \[2, 4, 4, 8\]"):
        op.gated_prompt_backward_(dquery[:, :, 1:], good["out"], *args)
    with pytest.raises(RuntimeError, match="query and dquery must have one dtype"):
        op.gated_prompt_backward_(dquery.bfloat16(), good["out"], *args)
    with pytest.raises(RuntimeError, match=r"g must have shape \[2, 4, 5, 8\]"):
        op.gated_prompt_backward(good["out"][:, :2], *args, True)


def test_a_loss_on_what_the_attention_keeps():
    """Not on what is returned, or on both: the prompt has no part in what the attention keeps for itself."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, 5, 8, requires_grad=True) for _ in range(3))
    prompt = [torch.randn(4, 3, 8, requires_grad=True) for _ in range(2)]
    gate = torch.randn(4, requires_grad=True)
    kept = []

    def attend(q):
        kept[:] = [F.scaled_dot_product_attention(q, key, value)]
        return kept[0]

    leaves = [query, key, value, *prompt, gate]
    product = lambda f: f(attend, query, *prompt, gate)
    plain = lambda attend, query, *rest: peftops.add_gated_prompt(attend(query), query, *rest)
    for loss in (lambda y: kept[0].sum(), lambda y: y.sum() + kept[0].square().sum(), lambda y: y.square().sum()):
        got, want = (
            torch.autograd.grad(loss(product(f)), leaves, allow_unused=True) for f in (peftops.with_gated_prompt, plain)
        )
        for a, b in zip(got, want, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
