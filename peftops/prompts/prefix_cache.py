"""A prefix as transformers sees it: a cache that is not empty."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..attaching import state_of
from ..nn.prompt import cache_name


class PrefixCache:
    """A cache that holds a prefix and does not keep new keys and values, for calls that are not continued.

    It has the methods that the code of attention and masks calls. It keeps no new tokens, so a block that gradient
    checkpointing runs a second time sees the same cache as the first time.
    """

    is_compileable = False

    def __init__(self, pairs: Tensor):
        self.pairs = pairs  # [2 L, batch, heads, P, width]: key, value of layer 0, and so on
        self.is_sliding = [False] * (len(pairs) // 2)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The keys and values with the prefix in front."""
        prefix = self.pairs[2 * layer_idx], self.pairs[2 * layer_idx + 1]
        return torch.cat([prefix[0], keys], -2), torch.cat([prefix[1], values], -2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.pairs.shape[-2]

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


def keeping_the_cache(body: nn.Module, keep: bool) -> None:
    """Whether checkpointed blocks may see a cache. transformers removes the cache from them, because they would update
    it twice, unless they declare that they do not write to it. No layer writes into a :class:`PrefixCache`."""
    for module in body.modules():
        if getattr(module, "gradient_checkpointing", False) and hasattr(module, "_can_checkpoint_with_cache"):
            if keep:
                module._can_checkpoint_with_cache = True
            else:
                module.__dict__.pop("_can_checkpoint_with_cache", None)


def prefilled(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """The keys and values, ``[heads, P, width]`` each, that the base model has for ``ids`` of shape [1, P]."""
    state = state_of(model)
    active = None if state is None else state.switch.active
    training = model.training
    model.eval()
    try:
        if state is not None:
            state.switch.active = None
        cache = getattr(model.base_model(ids, use_cache=True), cache_name(model.base_model))
    finally:
        model.train(training)
        if state is not None:
            state.switch.active = active
    return [t[0].float() for layer in cache.layers for t in (layer.keys, layer.values)]
