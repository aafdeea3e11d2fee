"""Rotary positions for longer contexts, Chen et al. 2023 (arXiv:2306.15595): divided by a whole number."""

from __future__ import annotations

import torch
from torch import nn


def _rotaries(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "inv_freq") and hasattr(module, "config")]


def stretches(model: nn.Module, length: int) -> bool:
    """Whether :func:`stretch` would change the model. Raises an error if a change is needed and not possible."""
    config = model.config
    if length <= getattr(config, "max_position_embeddings", 0):
        return False
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if kind != "default" or not _rotaries(model):
        raise TypeError(
            f"length={length} needs a model with plain rotary positions, not a {type(model).__name__} whose rope_type "
            f"is {kind!r}"
        )
    return True


@torch.no_grad()
def stretch(model: nn.Module, length: int) -> None:
    """Let ``model`` read ``length`` tokens with the angles that it was trained with, and write that into its config.

    Does nothing if the model reads so many already.
    """
    config = model.config
    if length <= config.max_position_embeddings:
        return
    factor = float(-(-length // config.max_position_embeddings))
    config.rope_parameters = {**config.rope_parameters, "rope_type": "linear", "factor": factor}
    config.max_position_embeddings = length
    for rotary in _rotaries(model):
        rotary.rope_type = "linear"
        rotary.inv_freq = rotary.inv_freq / factor
        if hasattr(rotary, "original_inv_freq"):
            rotary.original_inv_freq = rotary.original_inv_freq / factor
