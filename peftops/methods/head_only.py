"""Head only, also called linear probing: the layers above the model's body train.

    y = W f(x) + b    W and b train, f is frozen

Their values do not change at the start, so the model starts as it was. A head whose weight is tied to the embedding
gets a weight of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..attaching import register
from ..attaching.config import Config
from ..attaching.selection import copies
from ..attaching.targets import head_of
from ..nn import Select


@dataclass(frozen=True)
class HeadOnlyConfig(Config):
    """Head only has no options.

    Examples:
        >>> model = peftops.attach(llama(), peftops.HeadOnlyConfig())
        >>> peftops.summary(model).trainable == 64 * 32
        True
    """

    peft_type: ClassVar[str] = "HEAD_ONLY"


@register(HeadOnlyConfig)
class HeadOnly(Select):
    @staticmethod
    def build(model: nn.Module, config: HeadOnlyConfig) -> dict[str, HeadOnly]:
        head = head_of(model)
        return copies(HeadOnly, model, lambda path, layer, leaf: path in head, "head")
