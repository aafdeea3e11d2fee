"""Methods that train parameters which a model has already."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .adapter import PREFIX, Adapter, MergeError
from .layers import with_parameters
from .quantized import is_quantized


class Select(Adapter):
    """Parameters of a layer, trained: the layer computes with copies in their place.

    The copies start with the values of the originals, in float32, and the base keeps the originals. So the base can be
    used at any time, switching costs nothing, and removing the copies is exact. A copy of a tied weight is no longer
    tied.
    """

    def __init__(self, base: nn.Module, leaves: list[str], layer: str):
        super().__init__()
        for leaf in leaves:
            value = getattr(base, leaf)
            if is_quantized(value):
                raise TypeError(f"{layer}.{leaf} is quantised, and codes cannot be trained; use a dense model")
            self.register_parameter(leaf, nn.Parameter(value.detach().to(torch.float32, copy=True)))
        self.leaves = leaves

    def stored(self) -> dict[str, Tensor]:
        return {leaf: getattr(self, leaf) for leaf in self.leaves}

    def file_key(self, name: str, layer: str) -> str:
        return f"{PREFIX}{layer}.{self.peft_keys.get(name, name)}"

    def _in_place_of(self, base: nn.Module) -> dict[str, Tensor]:
        return {leaf: parameter.to(getattr(base, leaf).dtype) for leaf, parameter in self.named_parameters()}

    def adapt(self, base: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        # (a tied weight has one copy of its own here, hence tie_weights=False)
        return functional_call(base, self._in_place_of(base), args, kwargs, tie_weights=False)

    def merge_into(self, base: nn.Module, *, dense: bool) -> tuple[nn.Module, MergeError]:
        flat = lambda tensors: torch.cat([t.detach().float().flatten() for t in tensors])
        rounded = self._in_place_of(base)
        before = flat(getattr(base, leaf) for leaf in rounded)
        error = MergeError.between(before, flat(self.parameters()), flat(rounded.values()))
        return with_parameters(base, rounded), error
