"""BitFit, Ben Zaken et al. 2021 (arXiv:2106.10199): only the biases train.

    y = W x + b    b trains

Their values do not change at the start, so the model starts as it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..attaching import register
from ..attaching.config import Config
from ..attaching.selection import copies
from ..nn import Select


@dataclass(frozen=True)
class BitFitConfig(Config):
    """BitFit has no options. It cannot train a model without biases (LLaMA, Mistral, Gemma).

    Examples:
        >>> model = peftops.attach(nn.Sequential(nn.Linear(8, 4)), peftops.BitFitConfig())
        >>> peftops.summary(model).trainable
        4
    """

    peft_type: ClassVar[str] = "BITFIT"


@register(BitFitConfig)
class BitFit(Select):
    @staticmethod
    def build(model: nn.Module, config: BitFitConfig) -> dict[str, BitFit]:
        return copies(BitFit, model, lambda path, layer, leaf: leaf == "bias", "biases")
