"""What the module layer costs over the ops: attaching, switching, and the step of a layer.

The model has SmolLM2-135M's shapes: 30 layers, 210 linear ones. An adapted layer's forward and backward are compared
with the same op called directly, at 512 rows.
"""

import time

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import harness
import peftops


def model():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1024,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
        )
    )


def seconds(call):
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def attaching():
    for config in (
        peftops.LoRAConfig(),
        peftops.QLoRAConfig(),
        peftops.DoRAConfig(),
        peftops.IA3Config(),
        peftops.PiSSAConfig(iterations=4),
        peftops.PrefixTuningConfig(),
    ):
        base = model()
        took = seconds(lambda base=base, config=config: peftops.attach(base, config))
        short = " (want 1 s)" if type(config) is peftops.LoRAConfig and took > 1 else ""
        print(f"attach {type(config).__name__:22} 30 layers {took:10.3f} s{short}", flush=True)


def switching():
    base = peftops.attach(model(), peftops.LoRAConfig())
    peftops.attach(base, peftops.LoRAConfig(r=8), name="other")
    took = max(seconds(lambda name=name: peftops.activate(base, name)) for name in ["default", "other"] * 10)
    short = " (want 10 ms)" if took > 0.01 else ""
    print(f"switch between two adapters   30 layers {took * 1e3:10.3f} ms{short}", flush=True)


def layers():
    for k, n in ((576, 576), (576, 1536), (2048, 2048)):
        for config, name in ((peftops.LoRAConfig(), "lora"), (peftops.QLoRAConfig(), "qlora")):
            layer = peftops.attach(nn.Sequential(nn.Linear(k, n, bias=False)), config)[0]
            base, adapter = layer.base, layer.adapters["default"]
            op = peftops.lora_linear if name == "lora" else peftops.nf4_linear
            x = torch.randn(512, k, requires_grad=True)

            def bare(op=op, x=x, weight=base.weight, adapter=adapter):
                op(x, weight, lora_A=adapter.lora_A, lora_B=adapter.lora_B, scaling=adapter.scaling).sum().backward()

            yield harness.Case(
                f"forward and backward {name} {n}x{k} M=512",
                {"layer": lambda layer=layer, x=x: layer(x).sum().backward(), "op": bare},
                want={"op": 1 / 1.05},
            )


if __name__ == "__main__":
    attaching()
    switching()
    harness.run("methods", layers())
