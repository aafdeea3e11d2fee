"""mxfp4_linear, forward and the gradient of x, against the dense layer, and nf4_linear of the same shape."""

import torch
from torch.nn import functional as F

import harness
import peftops

SHAPES = ((4096, 4096), (5760, 2880), (1536, 576))  # the second is gpt-oss's

# How many times faster than the dense layer, by rows and dtype.
FORWARD = {1: (2.5, 2), 4: (1.5, 1.5), 16: (1.5, 1.5), 64: (0.95, 0.95), 256: (0.95, 0.95)}


def cases():
    for n, k in SHAPES:
        for which, dtype in enumerate((torch.float32, torch.bfloat16)):
            dense = (0.02 * torch.randn(n, k)).to(dtype)
            weight, nf4 = peftops.mxfp4_quantize(dense), peftops.nf4_quantize(dense)
            for m, want in FORWARD.items():
                x = torch.randn(m, k).to(dtype)
                yield harness.Case(
                    f"forward {n}x{k} {str(dtype)[6:]} M={m}",
                    {
                        "peftops": torch.no_grad()(lambda x=x, w=weight: peftops.mxfp4_linear(x, w)),
                        "dense": torch.no_grad()(lambda x=x, w=dense: F.linear(x, w)),
                        "nf4": torch.no_grad()(lambda x=x, w=nf4: peftops.nf4_linear(x, w)),
                    },
                    flops=2.0 * m * n * k,
                    dtype=dtype,
                    bytes=weight.nbytes if m <= 4 else 0,
                    want={"dense": want[which]},
                )
            x, g = torch.randn(256, k).to(dtype).requires_grad_(), torch.randn(256, n).to(dtype)
            outputs = {"peftops": peftops.mxfp4_linear(x, weight), "dense": F.linear(x, dense)}
            yield harness.Case(
                f"backward {n}x{k} {str(dtype)[6:]} M=256",
                {
                    name: lambda y=y, x=x, g=g: torch.autograd.grad(y, x, g, retain_graph=True)
                    for name, y in outputs.items()
                },
                flops=2.0 * 256 * n * k,
                dtype=dtype,
                want={"dense": 0.95},
            )


if __name__ == "__main__":
    harness.run("mxfp4_linear", cases())
