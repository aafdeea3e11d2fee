"""mxfp4_dequantize, against the way that transformers has it in eager PyTorch."""

import torch

import harness
import peftops

NUMBERS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def eager(weight, dtype):
    numbers = NUMBERS.to(dtype)
    blocks, out = weight.blocks.view(-1, 16), torch.empty(weight.numel() // 32, 32, dtype=dtype)
    out[:, 0::2], out[:, 1::2] = numbers[(blocks & 15).int()], numbers[(blocks >> 4).int()]
    return torch.ldexp(out, weight.scales.view(-1, 1).int() - 127).view(weight.shape)


def cases():
    for n, k in ((4096, 4096), (1536, 576)):
        for dtype in (torch.float32, torch.bfloat16):
            weight = peftops.mxfp4_quantize(torch.randn(n, k).to(dtype))
            yield harness.Case(
                f"dequantize {n}x{k} {str(dtype)[6:]}",
                {
                    "peftops": lambda w=weight: peftops.mxfp4_dequantize(w),
                    "eager": lambda w=weight, d=dtype: eager(w, d),
                },
                bytes=weight.nbytes + weight.numel() * dtype.itemsize,
                want={"eager": 3},
            )


if __name__ == "__main__":
    harness.run("mxfp4_dequantize", cases())
