"""One training step of LLaMA-shaped models, 512 tokens, all linears adapted with r=16: QLoRA of peftops against
PEFT's LoRA on the dense model, and PEFT on bitsandbytes' 4-bit layers. Also what each keeps in memory."""

import copy

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import harness
import peftops

TOKENS, R = 512, 16
LAYERS = 2  # the rest are the same again
# hidden, feed-forward, heads, key-value heads: SmolLM2-135M's, and TinyLlama-1.1B's
SHAPES = ((576, 1536, 9, 3), (2048, 5632, 32, 4))


def llama(hidden: int, feed_forward: int, heads: int, groups: int, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    # A small vocabulary: the head is not adapted, and takes everybody the same time.
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=groups,
    )
    return LlamaForCausalLM(config).to(dtype)


def with_peftops(model: nn.Module) -> nn.Module:
    peftops.attach(model, peftops.QLoRAConfig(r=R))
    return model


def with_peft(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=R, lora_alpha=2 * R, target_modules="all-linear", task_type="CAUSAL_LM"))


def with_bitsandbytes(model: nn.Module) -> nn.Module:
    for name, dense in list(model.model.named_modules()):
        if isinstance(dense, nn.Linear):
            kind = dict(quant_type="nf4", compress_statistics=True)
            size, dtype = (dense.in_features, dense.out_features), dense.weight.dtype
            layer = bnb.nn.Linear4bit(*size, bias=False, compute_dtype=dtype, **kind)
            layer.weight = bnb.nn.Params4bit(dense.weight.data, requires_grad=False, **kind)
            model.model.set_submodule(name, layer.to(torch.get_default_device()))  # moving it is what quantises
    model.is_loaded_in_4bit = True  # what PEFT asks
    return with_peft(model)


def step_of(model: nn.Module):
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 1024, (1, TOKENS), generator=draw, device="cpu").to(torch.get_default_device())

    def step():
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def memory(model: nn.Module, step) -> str:
    """MiB of the parameters, and of what one step saves for its backward pass; storages, each counted once."""
    storage = lambda t: {s.data_ptr(): s.nbytes() for s in (t.untyped_storage(),)} if type(t) is torch.Tensor else {}
    saved: dict[int, int] = {}
    own: dict[int, int] = {}
    for p in model.parameters():
        parts = p.__tensor_flatten__()[0] if isinstance(p, peftops.NF4Tensor) else ["data"]
        for part in parts:
            own |= storage(getattr(p, part))

    def pack(t):
        saved.update(storage(t.detach()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step()
    kept = sum(size for pointer, size in saved.items() if pointer not in own)
    return f"{sum(own.values()) / 2**20:.0f} MiB of parameters, {kept / 2**20:.0f} MiB saved"


def cases():
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            dense = llama(*shape, dtype)
            makers = {"peftops": with_peftops, "dense": with_peft, "bitsandbytes": with_bitsandbytes}
            models = {name: make(copy.deepcopy(dense)) for name, make in makers.items()}
            del dense
            steps = {name: step_of(model) for name, model in models.items()}
            label = f"step {shape[0]} {str(dtype)[6:]} {LAYERS} layers"
            for name, step in steps.items():
                step()
                print(f"    {label}, {name}: {memory(models[name], step)}")
            adapted = sum(p.numel() for name, p in models["dense"].named_parameters() if "base_layer" in name)
            # Forward and the gradient of x; the frozen weights need none.
            want = {"dense": 1 / 0.95, "bitsandbytes": 1 / 0.75}
            yield harness.Case(label, steps, flops=4.0 * TOKENS * adapted, want=want, dtype=dtype)


if __name__ == "__main__":
    harness.run("qlora_step", cases())
