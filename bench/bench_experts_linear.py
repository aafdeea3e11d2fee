"""experts_linear over NF4 and MXFP4, forward and the gradient of x, against the ways of a user without it:
transformers' grouped and batched products on dense weights, decoding each expert before its product, and a loop over
nf4_linear or mxfp4_linear."""

import torch

import harness
import peftops

NF4 = (peftops.nf4_quantize, peftops.nf4_dequantize, peftops.nf4_linear)
MXFP4 = (peftops.mxfp4_quantize, peftops.mxfp4_dequantize, peftops.mxfp4_linear)

# Name: format, experts, out, in, experts a token. Mixtral is a quarter of its size in both directions.
MODELS = {
    "mixtral/4": (NF4, 8, 1024, 3584, 2),
    "olmoe": (NF4, 64, 2048, 1024, 8),
    "gpt-oss": (NF4, 32, 2880, 2880, 4),
    "gpt-oss mxfp4": (MXFP4, 32, 2880, 2880, 4),  # as its checkpoints have it
    "qwen3-30b-a3b": (NF4, 128, 2048, 768, 8),
}
TOKENS = (1, 16, 256, 2048)
GATHERED = 1 << 30  # bytes: beyond them nobody gathers a weight for every row


def wanted(tokens, rows_of_an_expert):
    """How many times faster than each peer."""
    want = {"grouped": 1, "batched": 1}
    if tokens <= 256:
        want["decoded"] = 3 if tokens <= 16 else 1.3
    return want | ({"loop": 1.2} if rows_of_an_expert <= 4 else {})


def each_expert(x, y, ends, product):
    """y by one product for each expert that has rows."""
    begin = 0
    for e, end in enumerate(ends):
        if end > begin:
            y[begin:end] = product(e, x[begin:end])
        begin = end
    return y


def batched(x, dense, experts):
    return torch.bmm(dense[experts], x[:, :, None])[:, :, 0]


def cases():
    for name, ((quantize, dequantize, linear), experts, n, k, top) in MODELS.items():
        for dtype in (torch.float32, torch.bfloat16):
            dense = torch.empty(experts, n, k, dtype=dtype).normal_(std=0.02)
            weight, layers = quantize(dense), [quantize(matrix) for matrix in dense]
            for tokens in TOKENS:
                chosen = torch.rand(tokens, experts).topk(top).indices.flatten().sort().values
                offsets = chosen.bincount(minlength=experts).cumsum(0)
                ends, x, int32 = offsets.tolist(), torch.randn(tokens * top, k).to(dtype), offsets.int()
                providers = {
                    "peftops": lambda x=x, w=weight, o=offsets: peftops.experts_linear(x, w, o),
                    "grouped": lambda x=x, d=dense, o=int32: torch._grouped_mm(x, d.transpose(1, 2), offs=o),
                    "decoded": lambda x=x, w=layers, ends=ends, n=n, dequantize=dequantize: each_expert(
                        x, x.new_empty(len(x), n), ends, lambda e, rows: rows @ dequantize(w[e]).T
                    ),
                    "loop": lambda x=x, w=layers, ends=ends, n=n, linear=linear: each_expert(
                        x, x.new_empty(len(x), n), ends, lambda e, rows: linear(rows, w[e])
                    ),
                }
                if len(x) * n * k * dense.element_size() <= GATHERED:
                    providers["batched"] = lambda x=x, d=dense, chosen=chosen: batched(x, d, chosen)
                want = wanted(tokens, len(x) / experts)
                yield harness.Case(
                    f"forward {name} {str(dtype)[6:]} tokens={tokens}",
                    {peer: torch.no_grad()(call) for peer, call in providers.items()},
                    flops=2.0 * len(x) * n * k,
                    dtype=dtype,
                    want={peer: times for peer, times in want.items() if peer in providers},
                )
            x, g = x.requires_grad_(), torch.randn(len(x), n).to(dtype)
            outputs = {
                "peftops": peftops.experts_linear(x, weight, offsets),
                "grouped": torch._grouped_mm(x, dense.transpose(1, 2), offs=offsets.int()),
            }
            yield harness.Case(
                f"backward {name} {str(dtype)[6:]} tokens={tokens}",
                {
                    peer: lambda y=y, x=x, g=g: torch.autograd.grad(y, x, g, retain_graph=True)
                    for peer, y in outputs.items()
                },
                flops=2.0 * len(x) * n * k,
                dtype=dtype,
                want={"grouped": 1},
            )


if __name__ == "__main__":
    harness.run("experts_linear", cases())
