"""The comparison table of PEFT techniques: what is known about a method before it is tried.

Seven rows (prompts, prefixes, adapters, LoRA, QLoRA, QA-LoRA, ReLoRA) are copied from a published table. The other rows
are marked ``ours``: they follow from the formulas and from HF PEFT's published runs of Llama-3.2-3B.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Traits:
    """A row: words, not numbers."""

    overhead: str  # of computing
    memory: str  # efficiency
    versatility: str  # across tasks
    quality: str  # effect on it
    ours: bool = False
    high_rate: bool = False  # whether it needs a learning rate 10 to 50 times LoRA's


def _ours(*words: str, high_rate: bool = False) -> Traits:
    return Traits(*words, ours=True, high_rate=high_rate)


TABLE: dict[str, Traits] = {
    "prompttuning": Traits("low", "moderate", "high", "depends on the prompt's start and length", high_rate=True),
    "prefixtuning": Traits("low", "moderate", "moderate", "varies; usually positive when tuned well", high_rate=True),
    "bottleneck": Traits("moderate", "good", "high", "typically positive when tuned well"),
    "lora": Traits("low to moderate", "good", "moderate", "generally positive"),
    "qlora": Traits("low", "excellent", "high", "comparable to full fine-tuning"),
    "qalora": Traits("low", "excellent", "moderate", "positive where 4 bits are deployed"),
    "relora": Traits("moderate", "good", "moderate", "that of a high-rank update"),
    "dora": _ours("moderate", "good", "moderate", "LoRA's, or a little better, a quarter slower"),
    "pissa": _ours("low to moderate", "good", "moderate", "LoRA's, learns faster at first"),
    "olora": _ours("low to moderate", "good", "moderate", "LoRA's, learns faster at first"),
    "loftq": _ours("low", "excellent", "high", "QLoRA's, from a better start"),
    "lqlora": _ours("low", "excellent", "high", "QLoRA's at fewer bits"),
    "lorafa": _ours("low", "excellent", "moderate", "below LoRA's of the same rank"),
    "multilora": _ours("moderate", "good", "high", "above LoRA's on mixtures of tasks"),
    "longlora": _ours("low", "good", "low", "for longer contexts than the base knows"),
    "glora": _ours("moderate", "good", "moderate", "close to LoRA's"),
    "vera": _ours("low", "good", "high", "below LoRA's, with a fraction of its parameters", high_rate=True),
    "tiedlora": _ours("low", "good", "high", "close to LoRA's on easy tasks"),
    "ia3": _ours("low", "good", "high", "good with few examples", high_rate=True),
    "llamaadapter": _ours("low", "good", "moderate", "positive for following instructions", high_rate=True),
    "bitfit": _ours("low", "good", "high", "fair on small models and small data"),
    "normtuning": _ours("low", "good", "high", "fair; nothing new is learnt"),
    "toplayers": _ours("low", "good", "low", "good where the task is close to the base's"),
    "headonly": _ours("low", "excellent", "low", "good where the base's features fit already"),
    "surgical": _ours("low", "good", "low", "best for the shift that its block is for"),
}

UNKNOWN = _ours("unknown", "unknown", "unknown", "unknown")


def traits_of(method: str) -> Traits:
    """The row of a method, by its name."""
    return TABLE.get(method, UNKNOWN)
