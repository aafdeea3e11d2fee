"""qalora_linear, a whole step forward and back, against dense LoRA and the same in eager PyTorch."""

import torch
from torch.nn import functional as F

import harness
import peftops

SHAPES = ((4096, 4096), (1536, 576))
R, GROUP = 16, 32


def cases():
    for n, k in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for m in (64, 512):
                dense = (0.02 * torch.randn(n, k)).to(dtype)
                weight = peftops.group_quantize(dense, group_size=GROUP)
                x, g = torch.randn(m, k).to(dtype).requires_grad_(), torch.randn(m, n).to(dtype)
                A, B = torch.randn(R, k // GROUP, requires_grad=True), torch.randn(n, R, requires_grad=True)
                wide = torch.randn(R, k, requires_grad=True)

                def ours(x=x, weight=weight, A=A, B=B, g=g):
                    y = peftops.qalora_linear(x, weight, lora_A=A, lora_B=B, scaling=2.0)
                    return torch.autograd.grad(y, (x, A, B), g)

                def dense_lora(x=x, weight=dense, A=wide, B=B, g=g):
                    y = F.linear(x, weight)
                    y = y + (F.linear(F.linear(x.to(A.dtype), A), B) * 2.0).to(y.dtype)
                    return torch.autograd.grad(y, (x, A, B), g)

                codes = weight.codes.view(n, -1, GROUP)

                def eager(x=x, weight=weight, codes=codes, A=A, B=B, g=g):
                    """From codes that are unpacked already; what is dequantised is kept for the way back."""
                    decoded = (codes - weight.zeros[..., None]) * weight.scales[..., None]
                    return pooled_lora(F.linear(x, decoded.flatten(1).to(x.dtype)), x, A, B, g)

                def dequantized(x=x, weight=weight, A=A, B=B, g=g):
                    """The same with our own kernel for the dequantisation: what the fused product saves."""
                    return pooled_lora(F.linear(x, peftops.group_dequantize(weight)), x, A, B, g)

                def pooled_lora(y, x, A, B, g):
                    pooled = F.avg_pool1d(x.to(A.dtype)[:, None], GROUP).squeeze(1) * GROUP
                    y = y + (F.linear(F.linear(pooled, A), B) * 2.0).to(y.dtype)
                    return torch.autograd.grad(y, (x, A, B), g)

                yield harness.Case(
                    f"step {n}x{k} {str(dtype)[6:]} M={m} r={R}",
                    {"peftops": ours, "dense LoRA": dense_lora, "eager": eager, "dequantised": dequantized},
                    flops=4.0 * m * n * k,
                    dtype=dtype,
                    want={"dense LoRA": 1, "eager": 1.3},
                )


if __name__ == "__main__":
    harness.run("qalora_linear", cases())
