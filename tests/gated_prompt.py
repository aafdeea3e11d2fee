"""Inputs of zero-init gated attention, laid out in memory as attentions may have them."""

import torch

from strategies import normal

NAMES = ("out", "query", "prompt_key", "prompt_value", "gate")


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
