"""lora_linear over a dense base, a whole step forward and back, against the composition that PEFT uses."""

import torch
from torch.nn import functional as F

import harness
import peftops

SHAPES = ((4096, 4096), (1536, 576), (192, 576))
R = 16


def cases():
    for n, k in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for m in (64, 512):
                weight = (0.02 * torch.randn(n, k)).to(dtype)
                x = torch.randn(m, k).to(dtype).requires_grad_()
                g = torch.randn(m, n).to(dtype)
                A, B = torch.randn(R, k, requires_grad=True), torch.randn(n, R, requires_grad=True)

                def ours(x=x, weight=weight, A=A, B=B, g=g):
                    y = peftops.lora_linear(x, weight, lora_A=A, lora_B=B, scaling=2.0)
                    return torch.autograd.grad(y, (x, A, B), g)

                def composed(x=x, weight=weight, A=A, B=B, g=g):
                    y = F.linear(x, weight)
                    y = y + (F.linear(F.linear(x.to(A.dtype), A), B) * 2.0).to(y.dtype)
                    return torch.autograd.grad(y, (x, A, B), g)

                yield harness.Case(
                    f"step {n}x{k} {str(dtype)[6:]} M={m} r={R}",
                    {"peftops": ours, "composed": composed},
                    flops=4.0 * m * n * k,
                    dtype=dtype,
                    want={"composed": 1},
                )


if __name__ == "__main__":
    harness.run("lora_linear", cases())
