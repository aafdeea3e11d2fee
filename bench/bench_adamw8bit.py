"""A step of AdamW8bit against torch's fused AdamW, of large weights and of the many small ones of adapters. (On a CPU
bitsandbytes' 8-bit AdamW takes minutes for one step of these.)"""

import torch
from torch import nn

import harness
import peftops

LISTS = {"10 of 4096x1024": [(4096, 1024)] * 10, "LoRA r=16 of 32 layers": [(16, 4096), (4096, 16)] * 2 * 32}


def step_of(make, weights: list[torch.Tensor]):
    parameters = [nn.Parameter(w.clone()) for w in weights]
    for i, p in enumerate(parameters):
        p.grad = torch.randn_like(p) * 10.0 ** -(i % 4)
    optimizer = make(parameters)
    optimizer.step()  # makes the state
    return optimizer.step


def cases():
    for label, shapes in LISTS.items():
        for dtype in (torch.float32, torch.bfloat16):
            weights = [torch.randn(shape).to(dtype) for shape in shapes]
            makers = {
                "peftops": peftops.AdamW8bit,
                "fused": lambda ps: torch.optim.AdamW(ps, fused=True),
            }
            n = sum(w.numel() for w in weights)
            yield harness.Case(
                f"{label} {str(dtype)[6:]}",
                {name: step_of(make, weights) for name, make in makers.items()},
                bytes=n * (3 * weights[0].element_size() + 4),
                want={"fused": 1 / 1.2},
            )


if __name__ == "__main__":
    harness.run("adamw8bit", cases())
