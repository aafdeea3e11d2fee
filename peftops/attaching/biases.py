"""The biases that train beside a low-rank product, by HF PEFT's options ``bias`` and ``lora_bias``.

y = W x + b + s (B A x + c)    b of the layer, if it has one, trains from what it is; c from 0
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..nn import EMBEDDING, EXPERTS, Adapter, Select, kind_of, over_channels, sizes
from .selection import copies
from .targets import is_within

BIASES = ("none", "lora_only", "all")


def other_biases(model: nn.Module, adapted: Collection[str], config: Any) -> dict[str, Select]:
    """Copies of the biases of all layers that are not adapted. As in PEFT, a bias is any parameter with "bias" in its
    name."""
    left = lambda path: path in adapted or is_within(path, config.modules_to_save)
    return copies(Select, model, lambda path, layer, leaf: "bias" in f"{path}.{leaf}" and not left(path), None)


class Biased(Adapter):
    """An adapter with a ``scaling`` that may have biases. A method that overrides the product, the file or the choice
    of layers has no biases."""

    peft_keys: ClassVar = {"own_bias": "base_layer.bias", "lora_B_bias": "lora_B.bias"}

    def add_biases(self, base: nn.Module, config: Any) -> None:
        self.own_bias = self.lora_B_bias = None
        if config.bias == "none" and not config.lora_bias:
            return
        option = f"bias={config.bias!r}" if config.bias != "none" else "lora_bias=True"
        kinds = type(self).__mro__
        above = kinds[: next(i for i, kind in enumerate(kinds) if Biased in kind.__bases__)]
        if any(own in vars(kind) for kind in above for own in ("adapt", "stored", "build")):
            raise ValueError(f"{option}: {type(self).__name__} has no biases of its own; LoRA has")
        if kind_of(base) == EXPERTS or (config.lora_bias and kind_of(base) == EMBEDDING):
            raise ValueError(f"{option} is not for {kind_of(base)}; target other layers alone")
        if config.bias != "none" and getattr(base, "bias", None) is not None:
            self.own_bias = nn.Parameter(base.bias.detach().to(torch.float32, copy=True))
        if config.lora_bias:
            self.lora_B_bias = nn.Parameter(torch.zeros(sizes(base)[1], device=base.weight.device))

    @property
    def biased(self) -> bool:
        return self.own_bias is not None or self.lora_B_bias is not None

    def with_biases(self, bias: Tensor | None) -> Tensor | None:
        """A layer's bias, with what has been learnt."""
        bias = bias if self.own_bias is None else self.own_bias
        if self.lora_B_bias is None:
            return bias
        return self.scaling * self.lora_B_bias + (0 if bias is None else bias)

    def moved(self, base: nn.Module, y: Tensor) -> Tensor:
        """The layer's output, which has the bias that it had, with the one that it has now."""
        by = self.with_biases(base.bias) - (0 if base.bias is None else base.bias)
        return y + over_channels(base, by).to(y.dtype)
