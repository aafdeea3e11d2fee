"""64 rows with 64 different adapters over an NF4 base, against the base alone and a loop over the adapters."""

import harness
import torch

import peftops

N = K = 4096
M, R = 64, 16


def cases():
    for dtype in (torch.float32, torch.bfloat16):
        W, x = peftops.nf4_quantize((0.02 * torch.randn(N, K)).to(dtype)), torch.randn(M, K).to(dtype)
        pool = peftops.AdapterPool({"layer": (K, N)}, pages=M * 9, dtype=dtype)
        factors = [(torch.randn(R, K).to(dtype), torch.randn(N, R).to(dtype)) for _ in range(M)]
        for i, f in enumerate(factors):
            pool.add(str(i), {"layer": f})
        index = torch.tensor([pool.pin(str(i)) for i in range(M)])

        @torch.no_grad()
        def loop(W=W, x=x, factors=factors):
            rows = x.split(1)
            return torch.cat([peftops.nf4_linear(r, W, lora_A=A, lora_B=B) for r, (A, B) in zip(rows, factors, strict=True)])

        @torch.no_grad()
        def ours(W=W, x=x, layer=pool.layer("layer"), index=index):
            return peftops.multi_lora_linear(x, W, layer, index)

        yield harness.Case(
            f"{N}x{K} {str(dtype)[6:]} M={M}, {M} adapters r={R}",
            {
                "peftops": ours,
                "base": torch.no_grad()(lambda W=W, x=x: peftops.nf4_linear(x, W)),
                "loop": loop,
            },
            want={"base": 1 / 1.3, "loop": 5},
        )


if __name__ == "__main__":
    harness.run("multi_lora_linear", cases())
