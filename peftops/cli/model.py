"""Models, tokenizers and answers for the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..integrations.hf import gguf_file, load_model
from .data import prompt_ids

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    file = gguf_file(path)
    if file is None:
        return AutoTokenizer.from_pretrained(path)
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def device_and_dtype(dtype: str) -> tuple[torch.device, torch.dtype]:
    """Where to run, and in what: bfloat16 on a GPU; float32 on a CPU, where the rest of the model is fastest so."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if dtype == "auto":
        return device, torch.bfloat16 if device.type == "cuda" else torch.float32
    return device, DTYPES[dtype]


def load_base(path: Path, dtype: str, *, quantize: bool, **options: Any) -> nn.Module:
    device, wanted = device_and_dtype(dtype)
    return load_model(path, dtype=wanted, quantize=quantize, **options).to(device)


@torch.no_grad()
def answer(model: nn.Module, tokenizer: Any, messages: list[dict[str, str]], max_tokens: int) -> str:
    """The model's greedy answer."""
    was_training = model.training
    model.eval()
    ids = torch.tensor([prompt_ids(tokenizer, messages)], device=model.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False,
        pad_token_id=pad, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model.train(was_training)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
