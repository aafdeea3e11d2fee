"""qalora_merge, against the same in eager PyTorch."""

import torch

import harness
import peftops

R = 16


def cases():
    for n, k in ((4096, 4096), (11008, 4096), (1536, 576)):
        weight = peftops.group_quantize(torch.randn(n, k))
        A, B = torch.randn(R, k // 32), torch.randn(n, R)
        yield harness.Case(
            f"merge {n}x{k} r={R}",
            {
                "peftops": lambda w=weight, A=A, B=B: torch.ops.peftops.qalora_merge(w.scales, w.zeros, A, B, 2.0),
                "eager": lambda w=weight, A=A, B=B: w.zeros - 2.0 * (B @ A) / w.scales,
                "checked": lambda w=weight, A=A, B=B: peftops.qalora_merge(w, A, B, scaling=2.0),
            },
            flops=2.0 * weight.zeros.numel() * R,
            bytes=3 * weight.zeros.nbytes,
            want={"eager": 1},
        )


if __name__ == "__main__":
    harness.run("qalora_merge", cases())
