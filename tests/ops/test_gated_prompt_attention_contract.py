"""The rest of the contract: memory, one gradient of the query, threads, compiling, errors."""

import pytest
import torch
from torch.nn import functional as F

import peftops
from gated_prompt import NAMES, inputs, laid_out
from strategies import normal


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
