"""One training step of a LLaMA-7B, or of some of its layers, for bench/gpu.py: peftops against PEFT on bitsandbytes'
layers, and PEFT on the dense model."""

from __future__ import annotations

import gc
import statistics
import time

import torch
from torch import nn

import peftops

R, BF16 = 16, torch.bfloat16


def qlora_step(layers: int = 32, batch: int = 4, tokens: int = 512) -> dict:
    """One training step of a LLaMA-7B with random weights: tokens a second and peak memory, against PEFT on
    bitsandbytes' layers, and PEFT on the dense model."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
    )

    def llama() -> nn.Module:
        torch.manual_seed(0)
        with torch.device("meta"):
            model = LlamaForCausalLM(config).to(BF16)
        model = model.to_empty(device="cuda")
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(std=0.02) if p.dim() > 1 else p.fill_(1.0)
        for module in model.modules():  # buffers that to_empty left undefined
            if hasattr(module, "inv_freq"):
                fresh = type(module)(config).to("cuda")
                module.inv_freq, module.original_inv_freq = fresh.inv_freq, fresh.inv_freq
        return model

    def with_peftops() -> nn.Module:
        model = llama()
        peftops.attach(model, peftops.QLoRAConfig(r=R))
        return model

    def with_peft(model: nn.Module) -> nn.Module:
        lora = LoraConfig(r=R, lora_alpha=2 * R, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(model, lora)

    def with_bitsandbytes() -> nn.Module:
        import bitsandbytes as bnb

        model = llama()
        kind = dict(quant_type="nf4", compress_statistics=True)
        for name, dense in list(model.model.named_modules()):
            if isinstance(dense, nn.Linear):
                layer = bnb.nn.Linear4bit(dense.in_features, dense.out_features, bias=False, compute_dtype=BF16, **kind)
                layer.weight = bnb.nn.Params4bit(dense.weight.data, requires_grad=False, **kind)
                model.model.set_submodule(name, layer.cuda())
                dense.weight = None
        model.is_loaded_in_4bit = True  # what PEFT asks
        return with_peft(model)

    makers = {"peftops": with_peftops, "PEFT + bitsandbytes": with_bitsandbytes}
    makers["PEFT, dense"] = lambda: with_peft(llama())
    records = []
    for name, make in makers.items():
        for checkpointing in (True,) if layers > 8 else (False, True):
            try:
                model = make()
                model.train()
                if checkpointing:
                    model.enable_input_require_grads()
                    model.gradient_checkpointing_enable({"use_reentrant": False})
                gc.collect()
                torch.cuda.empty_cache()
                weights = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
                ids = torch.randint(0, 32000, (batch, tokens), device="cuda")
                times = []
                for _ in range(5):
                    torch.cuda.synchronize()
                    begin = time.perf_counter()
                    if name == "peftops":  # as `peftops finetune` does
                        loss, count = peftops.language_model_loss(model, ids, ids)
                        loss = loss / count
                    else:
                        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    torch.cuda.synchronize()
                    times.append(time.perf_counter() - begin)
                seconds = statistics.median(times[2:])
                records.append(
                    dict(
                        provider=name,
                        layers=layers,
                        batch=batch,
                        tokens=tokens,
                        checkpointing=checkpointing,
                        seconds=seconds,
                        tokens_per_second=batch * tokens / seconds,
                        loss=float(loss),
                        weights_bytes=weights,
                        peak_bytes=torch.cuda.max_memory_allocated(),
                    )
                )
                del loss
            except (RuntimeError, ImportError, AttributeError, TypeError) as error:  # another provider still counts
                records.append(dict(provider=name, layers=layers, error=f"{type(error).__name__}: {error}"[:300]))
            print(records[-1], flush=True)
            model = optimizer = None
            gc.collect()
            torch.cuda.empty_cache()
    return {"records": records}
