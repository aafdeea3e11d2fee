"""nf4_dequantize of double-quantised weights, against bitsandbytes."""

import bitsandbytes.functional as bnb
import torch

import harness
import peftops


def cases():
    for n, k in ((4096, 4096), (11008, 4096), (1536, 576)):
        for dtype in (torch.float32, torch.bfloat16):
            weight = torch.randn(n, k).to(dtype)
            ours = peftops.nf4_quantize(weight)
            theirs = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            yield harness.Case(
                f"dequantize {n}x{k} {str(dtype)[6:]}",
                {
                    "peftops": lambda w=ours: peftops.nf4_dequantize(w),
                    "bitsandbytes": lambda w=theirs: bnb.dequantize_4bit(*w),
                },
                bytes=weight.numel() * (weight.element_size() + 4.127 / 8),
                want={"bitsandbytes": 5 if dtype is torch.float32 else 1},
            )


if __name__ == "__main__":
    harness.run("nf4_dequantize", cases())
