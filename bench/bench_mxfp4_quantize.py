"""mxfp4_quantize, against the same in eager PyTorch, which leaves the codes unpacked."""

import torch

import harness
import peftops

MIDDLES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])


def eager(weight):
    w = weight.float().unflatten(1, (-1, 32))
    exponent = w.abs().amax(-1).frexp().exponent - 3
    scaled = w.ldexp(-exponent[..., None])
    return torch.bucketize(scaled.abs(), MIDDLES) + 8 * scaled.signbit(), exponent + 127


def cases():
    for n, k in ((4096, 4096), (1536, 576)):
        for dtype in (torch.float32, torch.bfloat16):
            weight = torch.randn(n, k).to(dtype)
            yield harness.Case(
                f"quantize {n}x{k} {str(dtype)[6:]}",
                {"peftops": lambda w=weight: peftops.mxfp4_quantize(w), "eager": lambda w=weight: eager(w)},
                bytes=weight.numel() * (weight.element_size() + 4.25 / 8),
                want={"eager": 4},
            )


if __name__ == "__main__":
    harness.run("mxfp4_quantize", cases())
