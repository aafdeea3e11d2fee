"""Tokens for prompts to start from."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

POPULATION = 5000  # of Lester et al.: ids are sorted by frequency, so the first ones are the most common tokens


def frequent(model: nn.Module, count: int) -> list[int]:
    """``count`` of the first 5,000 ids. An id repeats only if there are fewer ids than ``count``."""
    population = min(POPULATION, model.get_input_embeddings().num_embeddings)
    if count <= population:
        return torch.randperm(population)[:count].tolist()
    return torch.randint(population, (count,)).tolist()


def encoded(model: nn.Module, tokenizer: str | None, text: str) -> list[int]:
    """The ids of ``text`` without special tokens.

    Raises:
        ValueError: there is no tokenizer, or there are no tokens in the text.
    """
    from transformers import AutoTokenizer

    path: Any = tokenizer or getattr(model, "name_or_path", None)
    if not path:
        raise ValueError("a prompt's text needs a tokenizer, and this model does not come from a path; give one")
    ids = AutoTokenizer.from_pretrained(path)(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"{text!r} has no tokens to start a prompt from")
    return ids
