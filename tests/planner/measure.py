"""Trains three steps in a process of its own and prints the peak of its resident memory beyond what it began with.

python measure.py MODEL METHOD BATCH LENGTH DTYPE
"""

import gc
import os
import sys
from pathlib import Path

import gguf  # noqa: F401  (imported now, not while a model is read)
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import peftops
from peftops.attaching import METHODS
from peftops.cli.training import memory_now, memory_peak, reset_memory_peak
from peftops.integrations.hf import gguf_file, model_config


def main(path, method, batch, length, dtype):
    config = {adapter.__name__.lower(): kind for kind, adapter in METHODS.items()}[method]()
    whole = model_config(path)
    # What modules and libraries take once they are used is not the model's: a tiny one has used them all.
    sizes = dict(hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=4, vocab_size=64)
    tiny = AutoConfig.for_model(whole.model_type, num_hidden_layers=2, bos_token_id=0, eos_token_id=0, **sizes)
    train(AutoModelForCausalLM.from_config(tiny, dtype=dtype), config, 2, 8)
    gc.collect()
    before = memory_now()
    if gguf_file(path):
        model = peftops.load_model(path, dtype=dtype, quantize=False)
    else:
        model = AutoModelForCausalLM.from_config(whole, dtype=dtype)
    train(model, config, batch, length)
    print(memory_peak() - before)


def train(model, config, batch, length):
    peftops.attach(model, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = torch.randint(5, model.config.vocab_size, (batch, length))
    gc.collect()
    for step in range(3):
        if step == 1:
            reset_memory_peak()
        loss, targets = peftops.language_model_loss(model, ids, ids)
        (loss / targets).backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    path, method, batch, length, dtype = sys.argv[1:]
    main(Path(path), method, int(batch), int(length), getattr(torch, dtype))
    os._exit(0)  # no time for tidying up
