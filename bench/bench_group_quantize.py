"""group_quantize, against the same in eager PyTorch, which leaves the codes unpacked."""

import torch

import harness
import peftops


def eager(weight, bits, group):
    w = weight.float().unflatten(1, (-1, group))
    low, high = w.aminmax(dim=-1)
    scales = (high - low) / (2**bits - 1)
    zeros = -low / scales
    codes = (w / scales[..., None] + zeros[..., None]).round_().clamp_(0, 2**bits - 1)
    return codes.to(torch.uint8), scales, zeros


def cases():
    for n, k in ((4096, 4096), (1536, 576)):
        for bits, dtype in ((4, torch.float32), (4, torch.bfloat16), (3, torch.float32), (8, torch.float32)):
            weight = torch.randn(n, k).to(dtype)
            yield harness.Case(
                f"quantize {n}x{k} {str(dtype)[6:]} bits={bits}",
                {
                    "peftops": lambda w=weight, b=bits: peftops.group_quantize(w, bits=b),
                    "eager": lambda w=weight, b=bits: eager(w, b, 32),
                },
                bytes=weight.numel() * (weight.element_size() + bits / 8 + 2 / 8),
                want={"eager": 4},
            )


if __name__ == "__main__":
    harness.run("group_quantize", cases())
