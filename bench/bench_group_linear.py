"""group_linear, forward and the gradient of x, against the dense layer."""

import torch
from torch.nn import functional as F

import harness
import peftops

SHAPES = ((4096, 4096), (11008, 4096), (1536, 576))
BITS = (4, 8, 2, 3)

# How many times faster than the dense layer, by rows and dtype.
FORWARD = {1: (2.5, 2), 4: (1.5, 1.5), 16: (1.5, 1.5), 64: (0.95, 0.95), 256: (0.95, 0.95), 1024: (0.95, 0.95)}


def cases():
    for n, k in SHAPES:
        for bits in BITS:
            for which, dtype in enumerate((torch.float32, torch.bfloat16)):
                dense = (0.02 * torch.randn(n, k)).to(dtype)
                weight = peftops.group_quantize(dense, bits=bits)
                for m, want in FORWARD.items():
                    x = torch.randn(m, k).to(dtype)
                    yield harness.Case(
                        f"forward {n}x{k} {str(dtype)[6:]} bits={bits} M={m}",
                        {
                            "peftops": torch.no_grad()(lambda x=x, w=weight: peftops.group_linear(x, w)),
                            "dense": torch.no_grad()(lambda x=x, w=dense: F.linear(x, w)),
                        },
                        flops=2.0 * m * n * k,
                        dtype=dtype,
                        bytes=weight.nbytes if m <= 4 else 0,
                        want={"dense": want[which]},
                    )
                    yield harness.Case(
                        f"int8 {n}x{k} {str(dtype)[6:]} bits={bits} M={m}",
                        {
                            "peftops": torch.no_grad()(
                                lambda x=x, w=weight: peftops.group_linear(x, w, compute="int8")
                            ),
                            "dense": torch.no_grad()(lambda x=x, w=dense: F.linear(x, w)),
                            "float": torch.no_grad()(lambda x=x, w=weight: peftops.group_linear(x, w)),
                        },
                        flops=2.0 * m * n * k,
                        dtype=dtype,
                        want={"dense": 2} if dtype == torch.float32 and m >= 64 else {},
                    )
                x, g = torch.randn(256, k).to(dtype).requires_grad_(), torch.randn(256, n).to(dtype)
                outputs = {"peftops": peftops.group_linear(x, weight), "dense": F.linear(x, dense)}
                yield harness.Case(
                    f"backward {n}x{k} {str(dtype)[6:]} bits={bits} M=256",
                    {
                        name: lambda y=y, x=x, g=g: torch.autograd.grad(y, x, g, retain_graph=True)
                        for name, y in outputs.items()
                    },
                    flops=2.0 * 256 * n * k,
                    dtype=dtype,
                    want={"dense": 0.95},
                )


if __name__ == "__main__":
    harness.run("group_linear", cases())
