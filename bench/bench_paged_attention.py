"""Attention over pages: against gathering each sequence's pages and torch's attention of the padded rows, which is what
there is without it; and against the same attention of rows that lie side by side already, padding included.

torch attends in the fastest way that it has: the query heads of a head of keys as rows of one product. Its
``enable_gqa``, and copies of the keys as transformers makes them where there is a mask, are slower."""

import torch
from torch.nn import functional as F

import harness
import peftops

HEADS, KV_HEADS, D, PAGE = 32, 8, 64, 16


def inputs(lengths, rows, dtype):
    each = [-(-n // PAGE) for n in lengths]
    order = torch.randperm(sum(each)).tolist()
    table = torch.zeros(len(lengths), max(each), dtype=torch.int32)
    for s, count in enumerate(each):
        table[s, :count] = torch.tensor([order.pop() for _ in range(count)])
    pages = [torch.randn(sum(each), KV_HEADS, PAGE, D).to(dtype) for _ in range(2)]
    return torch.randn(len(lengths), HEADS, rows, D).to(dtype), *pages, table, torch.tensor(lengths).int()


def gathered(query, keys, values, table, lengths):
    return [t[table.long()].transpose(1, 2).flatten(2, 3) for t in (keys, values)]


def attend(query, keys, values, lengths):
    batch, heads, rows, d = query.shape
    group = heads // keys.shape[1]
    at = lengths[:, None] - rows + torch.arange(rows)
    mask = (torch.arange(keys.shape[2]) <= at[:, None, :, None]).repeat(1, 1, group, 1)
    together = query.view(batch, keys.shape[1], group * rows, d)
    return F.scaled_dot_product_attention(together, keys, values, attn_mask=mask).view(batch, heads, rows, d)


def cases():
    mixed = [37, 1024, 80, 200, 512, 64, 300, 120]
    for label, lengths, rows in (
        ("decode, mixed lengths", mixed, 1),
        ("decode, one length", [512] * 8, 1),
        ("a piece of 64 of a prompt of 1024", [1024], 64),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            given = inputs(lengths, rows, dtype)
            rows_of = gathered(*given)
            providers = {
                "peftops": lambda g=given: peftops.paged_attention(*g),
                "gather + SDPA": lambda g=given: attend(g[0], *gathered(*g), g[4]),
                "SDPA of rows": lambda g=given, r=rows_of: attend(g[0], *r, g[4]),
            }
            yield harness.Case(f"{label} {str(dtype)[6:]}", providers, want={"gather + SDPA": 1})


if __name__ == "__main__":
    harness.run("paged_attention", cases())
