"""Zero-init gated attention, causal, forward and a whole step: against attention without a prompt; against the
same attention with the prompt's part composed of torch's operators; and against two softmaxes written out, as
LLaMA-Adapter's own code has them. Then the prompt's part alone, and a step of decoding."""

import torch
from torch.nn import functional as F

import harness
import peftops

B, H, D, TOKENS = 2, 32, 64, 10
SHAPES = [(rows, dtype) for rows in (512, 2048) for dtype in (torch.float32, torch.bfloat16)]


def prompt_part(query, prompt_key, prompt_value, gate):
    p = torch.softmax(query @ prompt_key.mT * D**-0.5, -1, dtype=torch.float32)
    return (gate.tanh()[:, None, None] * p).to(query.dtype) @ prompt_value


def plain(query, key, value, *prompt):
    return F.scaled_dot_product_attention(query, key, value, is_causal=query.shape[2] > 1)


def composed(query, key, value, *prompt):
    return plain(query, key, value) + prompt_part(query, *prompt)


def eager(query, key, value, *prompt):
    scores = query @ key.mT * D**-0.5
    rows, keys = scores.shape[-2:]
    mask = torch.full((rows, keys), -torch.inf, dtype=query.dtype, device=query.device).triu(1 + keys - rows)
    p = torch.softmax(scores + mask, -1, dtype=torch.float32).to(query.dtype)
    return p @ value + prompt_part(query, *prompt)


def ours(query, key, value, *prompt):
    return peftops.gated_prompt_attention(query, key, value, *prompt, is_causal=query.shape[2] > 1)


def inputs(rows, keys, dtype):
    """As transformers hands them over: query, key and value are [B, H, S, d] views of [B, S, H, d]."""
    words = [torch.randn(B, n, H, D, dtype=dtype).transpose(1, 2) for n in (rows, keys, keys)]
    prompt = [torch.randn(TOKENS, H, D, dtype=dtype).transpose(0, 1) for _ in range(2)]
    return [t.requires_grad_() for t in (*words, *prompt, torch.randn(H))]


def no_grad(calls, leaves):
    return {name: torch.no_grad()(lambda f=f: f(*leaves)) for name, f in calls.items()}


def steps(calls, leaves, g):
    def step(call):
        wanted = leaves[:3] if call is plain else leaves
        return lambda: torch.autograd.grad(call(*leaves), wanted, g)

    return {name: step(call) for name, call in calls.items()}


def cases():
    calls = {"peftops": ours, "plain": plain, "composed": composed, "eager": eager}
    want = {"plain": 1 / 1.1, "composed": 1, "eager": 1.5}
    for rows, dtype in SHAPES:
        leaves = inputs(rows, rows, dtype)
        g = torch.randn(B, rows, H, D).to(dtype).transpose(1, 2)
        label = f"S={rows} K={TOKENS} {str(dtype)[6:]}"
        yield harness.Case(f"forward {label}", no_grad(calls, leaves), want=want)
        yield harness.Case(f"step {label}", steps(calls, leaves, g), want=want)
    parts = {"peftops": peftops.add_gated_prompt, "composed": lambda out, *rest: out + prompt_part(*rest)}
    for rows, dtype in SHAPES:
        query, _, _, *prompt = inputs(rows, 1, dtype)
        out = query.detach().clone()
        leaves = [out, query, *prompt]
        label = f"prompt's part S={rows} K={TOKENS} {str(dtype)[6:]}"
        yield harness.Case(label, no_grad(parts, leaves), bytes=3 * out.nbytes, want={"composed": 1})
    for keys in (128, 2048):
        leaves = inputs(1, keys, torch.float32)
        yield harness.Case(f"decode keys={keys} float32", no_grad(calls, leaves), want={"composed": 1, "eager": 1})


if __name__ == "__main__":
    harness.run("gated_prompt_attention", cases())
