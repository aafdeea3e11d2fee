"""nf4_quantize with double quantisation, against bitsandbytes."""

import bitsandbytes.functional as bnb
import torch

import harness
import peftops


def cases():
    for n, k in ((4096, 4096), (11008, 4096), (1536, 576)):
        for dtype in (torch.float32, torch.bfloat16):
            weight = torch.randn(n, k).to(dtype)
            yield harness.Case(
                f"quantize {n}x{k} {str(dtype)[6:]}",
                {
                    "peftops": lambda w=weight: peftops.nf4_quantize(w),
                    "bitsandbytes": lambda w=weight: bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True),
                },
                bytes=weight.numel() * (weight.element_size() + 4.127 / 8),
                want={"bitsandbytes": 40},
            )


if __name__ == "__main__":
    harness.run("nf4_quantize", cases())
