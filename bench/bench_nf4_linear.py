"""nf4_linear, forward without and backward with an adapter, against the dense layer and bitsandbytes' Linear4bit, in
eval mode and in training; and forward with compute="int8" against that with "float". Errors of forward products are
against float64 with the quantised weight; the dense layer's is that of quantising."""

import bitsandbytes as bnb
import torch
from torch.nn import functional as F

import harness
import peftops

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (1536, 576))
DTYPES = (torch.float32, torch.bfloat16)
R = 16

# How many times faster than the dense layer and bitsandbytes, by rows and dtype; of the latter where it decodes the
# weight. Where the CPU has AVX512-BF16 it repacks it in eval mode and runs a fused kernel, in bf16 whatever the dtype.
FORWARD = {
    1: ((2.5, 20), (2, 20)),
    4: ((1.5, 8), (1.5, 8)),
    8: ((1.5, 8), (1.5, 8)),
    16: ((1.5, 8), (1.5, 8)),
    64: ((1, 3), (3, 3)),
    256: ((0.95, 1.15), (3, 3)),
    1024: ((0.95, 1.15), (3, 3)),
}
BACKWARD = ((0.95, 1.2), (3, 1.2))


def cases():
    for n, k in SHAPES:
        for which, dtype in enumerate(DTYPES):
            weight = (0.02 * torch.randn(n, k)).to(dtype)
            quantized = peftops.nf4_quantize(weight)
            decoded = peftops.nf4_dequantize(quantized, dtype=torch.float32).double()
            layer = linear4bit(weight).eval()
            for m, wants in FORWARD.items():
                x = torch.randn(m, k).to(dtype)
                yield harness.Case(
                    f"forward {n}x{k} {str(dtype)[6:]} M={m}",
                    no_grad(
                        peftops=lambda x=x, quantized=quantized: peftops.nf4_linear(x, quantized),
                        dense=lambda x=x, weight=weight: F.linear(x, weight),
                        Linear4bit=lambda x=x, layer=layer: layer(x),
                    ),
                    exact=lambda x=x, decoded=decoded: x.double() @ decoded.T,
                    flops=2.0 * m * n * k,
                    dtype=dtype,
                    bytes=quantized.nbytes if m <= 16 else 0,
                    want=dict(zip(("dense", "Linear4bit"), wants[which], strict=True)),
                )
                yield harness.Case(
                    f"int8 {n}x{k} {str(dtype)[6:]} M={m}",
                    no_grad(
                        peftops=lambda x=x, w=quantized: peftops.nf4_linear(x, w, compute="int8"),
                        dense=lambda x=x, weight=weight: F.linear(x, weight),
                        float=lambda x=x, w=quantized: peftops.nf4_linear(x, w),
                        Linear4bit=lambda x=x, layer=layer: layer(x),
                    ),
                    exact=lambda x=x, decoded=decoded: x.double() @ decoded.T,
                    flops=2.0 * m * n * k,
                    want={"float": 1.3, "Linear4bit": 1.15} | ({"dense": 2} if dtype == torch.float32 else {}),
                )
            yield backward(256, n, k, dtype, weight, quantized, linear4bit(weight), BACKWARD[which])


def linear4bit(weight: torch.Tensor) -> torch.nn.Module:
    """What people run of bitsandbytes, in training mode: there it decodes the weight."""
    kind = dict(quant_type="nf4", compress_statistics=True)
    layer = bnb.nn.Linear4bit(*weight.T.shape, bias=False, compute_dtype=weight.dtype, **kind)
    layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, **kind)
    return layer.to(torch.get_default_device())  # which is what quantises


def no_grad(**calls):
    return {name: torch.no_grad()(call) for name, call in calls.items()}


def backward(m, n, k, dtype, weight, quantized, theirs, wants):
    """Gradients of x, A and B through a LoRA layer with float32 adapters, as PEFT makes them."""
    x = torch.randn(m, k).to(dtype).requires_grad_()
    g = torch.randn(m, n).to(dtype)
    A, B = torch.randn(R, k, requires_grad=True), torch.randn(n, R, requires_grad=True)

    def composed(base):
        low_rank = F.linear(F.linear(x.to(A.dtype), A), B) * 2.0
        return base + low_rank.to(base.dtype)

    outputs = {
        "peftops": peftops.nf4_linear(x, quantized, lora_A=A, lora_B=B, scaling=2.0),
        "dense": composed(F.linear(x, weight)),
        "Linear4bit": composed(theirs(x)),
    }
    return harness.Case(
        f"backward {n}x{k} {str(dtype)[6:]} M={m} r={R}",
        {name: lambda y=y: torch.autograd.grad(y, (x, A, B), g, retain_graph=True) for name, y in outputs.items()},
        flops=2.0 * m * n * k + 8.0 * m * R * (n + k) / 2,
        dtype=dtype,
        want=dict(zip(("dense", "Linear4bit"), wants, strict=True)),
    )


if __name__ == "__main__":
    harness.run("nf4_linear", cases())
