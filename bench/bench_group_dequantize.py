"""group_dequantize, against the same in eager PyTorch from codes that are unpacked already."""

import torch

import harness
import peftops


def cases():
    for n, k in ((4096, 4096), (1536, 576)):
        for bits, dtype in ((4, torch.float32), (4, torch.bfloat16), (3, torch.float32), (8, torch.float32)):
            weight = peftops.group_quantize(torch.randn(n, k).to(dtype), bits=bits)
            codes, zeros, scales = weight.codes.view(n, -1, 32), weight.zeros[..., None], weight.scales[..., None]
            yield harness.Case(
                f"dequantize {n}x{k} {str(dtype)[6:]} bits={bits}",
                {
                    "peftops": lambda w=weight: peftops.group_dequantize(w),
                    "eager": lambda c=codes, z=zeros, s=scales, d=dtype: ((c - z) * s).to(d),
                },
                bytes=weight.nbytes + weight.numel() * weight.element_size(),
                want={"eager": 3},
            )


if __name__ == "__main__":
    harness.run("group_dequantize", cases())
