"""Layers that bench/gpu.py measures beside those of gpu_steps.py: experts, MXFP4, and attention over pages. Each stands
beside the ways that a user has without it, dense weights among them."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch.nn import functional as F

import peftops
from gpu_steps import BF16, case, spread

# Name: quantise, product, experts, out, in, experts a token. Mixtral's are as large as it has them.
MODELS = {
    "mixtral": (peftops.nf4_quantize, 8, 14336, 4096, 2),
    "qwen3-30b-a3b": (peftops.nf4_quantize, 128, 768, 2048, 8),
    "gpt-oss mxfp4": (peftops.mxfp4_quantize, 32, 5760, 2880, 4),
}
HEADS, KV_HEADS, D, PAGE = 32, 8, 128, 16


def layers() -> dict:
    torch.manual_seed(0)
    records = []
    for name in MODELS:
        records += experts(name)
        torch.cuda.empty_cache()
    for m in (1, 16, 64, 256, 1024):
        records += mxfp4(m)
    for label, lengths, rows in (
        ("decode, 64 sequences of 37 to 2048", [37 + 2011 * i // 63 for i in range(64)], 1),
        ("decode, 1 sequence of 8192", [8192], 1),
        ("a piece of 512 of a prompt of 4096", [4096], 512),
    ):
        records += attention(label, lengths, rows)
    return {"records": records}


def experts(name: str) -> list[dict]:
    quantize, count, n, k, top = MODELS[name]
    copies = 2 if count * n * k > 1 << 28 else spread(count * n * k // 2)
    dense = [torch.empty(count, n, k, dtype=BF16, device="cuda").normal_(std=0.02) for _ in range(copies)]
    stacks, layers = [quantize(d) for d in dense], [[quantize(matrix) for matrix in d] for d in dense]
    decode = {peftops.nf4_quantize: peftops.nf4_dequantize, peftops.mxfp4_quantize: peftops.mxfp4_dequantize}[quantize]
    records = []
    for tokens in (1, 16, 256, 2048):
        chosen = torch.rand(tokens, count).topk(top).indices.flatten().sort().values
        offsets = chosen.bincount(minlength=count).cumsum(0)
        ends, x = [0, *offsets.tolist()], torch.randn(tokens * top, k, device="cuda", dtype=BF16)
        offsets, int32 = offsets.cuda(), offsets.int().cuda()

        def looped(of, x=x, ends=ends):  # those that have rows alone
            return [x[a:b] @ decode(of[e]).T for e, (a, b) in enumerate(pairwise(ends)) if b > a]

        providers = {
            "peftops": [lambda s=s, x=x, o=offsets: peftops.experts_linear(x, s, o) for s in stacks],
            "decoded, a product each": [lambda of=of, looped=looped: looped(of) for of in layers],
            "dense, grouped": [
                lambda d=d, x=x, o=int32: torch._grouped_mm(x, d.transpose(1, 2), offs=o) for d in dense
            ],
        }
        records += case(f"experts_linear {name} tokens={tokens}", **providers)
        g = torch.randn(tokens * top, n, device="cuda", dtype=BF16)
        stream = torch.cuda.Stream()  # backward runs where forward did
        with torch.cuda.stream(stream):
            x = x.detach().requires_grad_()
            outputs = {
                "peftops": [peftops.experts_linear(x, s, offsets) for s in stacks],
                "dense, grouped": [torch._grouped_mm(x, d.transpose(1, 2), offs=int32) for d in dense],
            }
        calls = {
            name: [lambda y=y, x=x, g=g: torch.autograd.grad(y, x, g, retain_graph=True) for y in of]
            for name, of in outputs.items()
        }
        records += case(f"experts_linear backward {name} tokens={tokens}", stream=stream, **calls)
    return records


def mxfp4(m: int, n: int = 4096, k: int = 4096) -> list[dict]:
    dense = [(0.02 * torch.randn(n, k, device="cuda")).to(BF16) for _ in range(spread(2 * n * k))]
    packed, x = [peftops.mxfp4_quantize(w) for w in dense], torch.randn(m, k, device="cuda", dtype=BF16)
    return case(
        f"mxfp4_linear M={m}",
        peftops=[lambda w=w: peftops.mxfp4_linear(x, w) for w in packed] * 2,
        dequantised=[lambda w=w: F.linear(x, peftops.mxfp4_dequantize(w)) for w in packed] * 2,
        dense=[lambda w=w: F.linear(x, w) for w in dense] * 2,
    )


def attention(label: str, lengths: list[int], rows: int) -> list[dict]:
    """Against gathering the pages for torch's attention, and torch's attention of rows that lie side by side already,
    as long as the longest."""
    each = [-(-length // PAGE) for length in lengths]
    order = torch.randperm(sum(each)).tolist()
    table = torch.zeros(len(lengths), max(each), dtype=torch.int32)
    for s, count in enumerate(each):
        table[s, :count] = torch.tensor([order.pop() for _ in range(count)])
    table, ends = table.cuda(), torch.tensor(lengths, dtype=torch.int32, device="cuda")
    keys, values = (torch.randn(sum(each), KV_HEADS, PAGE, D, device="cuda", dtype=BF16) for _ in range(2))
    query = torch.randn(len(lengths), HEADS, rows, D, device="cuda", dtype=BF16)
    at = ends[:, None] - rows + torch.arange(rows, device="cuda")
    mask = (torch.arange(max(each) * PAGE, device="cuda") <= at[:, None, :, None]).contiguous()

    def gather():
        return [t[table].transpose(1, 2).flatten(2, 3) for t in (keys, values)]

    def attend(k, v):
        return F.scaled_dot_product_attention(query, k, v, attn_mask=mask, enable_gqa=True)

    together = gather()
    return case(
        f"paged_attention, {label}",
        peftops=[lambda: peftops.paged_attention(query, keys, values, table, ends)] * 8,
        **{"gather + SDPA": [lambda: attend(*gather())] * 8, "SDPA of rows": [lambda: attend(*together)] * 8},
    )
