"""64 rows with 64 different adapters over an NF4 base, against the base alone, a loop over the adapters, and PEFT's
mixed-batch forward over bitsandbytes' layer and over the dense one; and the same of a small model's layer."""

import bitsandbytes as bnb
import peft
import torch
from torch import nn

import harness
import peftops

M, R = 64, 16
SHAPES = ((4096, 4096), (1536, 576))
FULL, HALF = torch.float32, torch.bfloat16


def mixed_batch(base, factors, x):
    """PEFT's layer with an adapter per row, called as PEFT's model calls it."""
    config = peft.LoraConfig(r=R, lora_alpha=R, target_modules=["layer"])
    model = nn.Sequential()
    model.add_module("layer", base)
    model.is_loaded_in_4bit = isinstance(base, bnb.nn.Linear4bit)  # what PEFT asks
    model = peft.get_peft_model(model, config, "adapter0", autocast_adapter_dtype=False)
    for i in range(1, M):
        model.add_adapter(f"adapter{i}", config, autocast_adapter_dtype=False)
    layer = model.eval().base_model.model.layer
    for i, (A, B) in enumerate(factors):
        layer.lora_A[f"adapter{i}"].weight.data, layer.lora_B[f"adapter{i}"].weight.data = A, B
    names = [f"adapter{i}" for i in range(M)]
    return torch.no_grad()(lambda: layer(x, adapter_names=names))


def dense(weight):
    layer = nn.Linear(*weight.T.shape, bias=False, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def in_4bit(weight):
    layer = bnb.nn.Linear4bit(*weight.T.shape, bias=False, compute_dtype=weight.dtype, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    return layer.to(torch.get_default_device())  # moving it is what quantises


def case(n, k, dtype, stored):
    weight, x = (0.02 * torch.randn(n, k)).to(dtype), torch.randn(M, k).to(dtype)
    W = peftops.nf4_quantize(weight)
    pool = peftops.AdapterPool({"layer": (k, n)}, pages=M * 9, dtype=stored)
    factors = [(torch.randn(R, k).to(dtype), torch.randn(n, R).to(dtype)) for _ in range(M)]
    for i, f in enumerate(factors):
        pool.add(str(i), {"layer": f})
    index, layer = torch.tensor([pool.pin(str(i)) for i in range(M)], device="cpu"), pool.layer("layer")

    def loop():
        rows = zip(x.split(1), factors, strict=True)
        return torch.cat([peftops.nf4_linear(row, W, lora_A=A, lora_B=B) for row, (A, B) in rows])

    no_grad = torch.no_grad()
    return harness.Case(
        f"{n}x{k} {str(dtype)[6:]}, {M} adapters r={R} {str(stored)[6:]}",
        {
            "peftops": no_grad(lambda: peftops.multi_lora_linear(x, W, layer, index)),
            "base": no_grad(lambda: peftops.nf4_linear(x, W)),
            "loop": no_grad(loop),
            "PEFT+bnb": mixed_batch(in_4bit(weight), factors, x),
            "PEFT dense": mixed_batch(dense(weight), factors, x),
        },
        want={"base": 1 / 1.3, "loop": 5, "PEFT+bnb": 5},
    )


def cases():
    for n, k in SHAPES:
        for dtype, stored in ((FULL, FULL), (FULL, HALF), (HALF, HALF)):
            yield case(n, k, dtype, stored)


if __name__ == "__main__":
    harness.run("multi_lora_linear", cases())
