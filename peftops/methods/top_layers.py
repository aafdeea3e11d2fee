"""Layer freezing: the last n blocks of a model train, and its head if wanted; the rest is frozen.

    h_l = block_l(h_(l-1)),  l = 1 .. L    the parameters of the blocks l > L - n and of the last norm train

Their values do not change at the start, so the model starts as it was. No parameter below them trains, so autograd
keeps no activations there: their memory shrinks with n / L. A head whose weight is tied to the embedding gets a weight
of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..attaching import register
from ..attaching.config import Config, check_range
from ..attaching.selection import copies
from ..attaching.targets import blocks, body_of, head_of
from ..nn import Select
from .norm_tuning import is_norm


@dataclass(frozen=True)
class TopLayersConfig(Config):
    """Options of layer freezing.

    Args:
        layers: n; 0 for the head alone.
        head: whether the layers above the body train, too.
        norm: whether the norms of the body outside of the blocks train.

    Examples:
        >>> model = peftops.attach(llama(), peftops.TopLayersConfig(layers=1))
        >>> any(p.requires_grad for p in model.model.layers[0].parameters())
        False
    """

    peft_type: ClassVar[str] = "TOP_LAYERS"

    layers: int = 2
    head: bool = False
    norm: bool = True

    def __post_init__(self) -> None:
        check_range("layers", self.layers, 0, whole=True)
        super().__post_init__()


def top(model: nn.Module, count: int, head: bool, norm: bool) -> set[str]:
    """The names of the blocks, norms and layers of the head that train."""
    stack = blocks(model)
    if count > len(stack):
        raise ValueError(f"layers={count}, but {type(model).__name__} has {len(stack)} blocks")
    body, above = body_of(model), head_of(model)
    inside = lambda path: path.startswith(f"{body}.") if body else path not in above
    norms = [
        path
        for path, layer in model.named_modules()
        if is_norm(layer) and inside(path) and not any(path.startswith(f"{block}.") for block in stack)
    ]
    last = norms[-1:] if norm and count else []  # those before the blocks are of the embedding
    return {*stack[len(stack) - count :], *(above if head else []), *last}


@register(TopLayersConfig)
class TopLayers(Select):
    @staticmethod
    def build(model: nn.Module, config: TopLayersConfig) -> dict[str, TopLayers]:
        trained = top(model, config.layers, config.head, config.norm)
        inside = lambda path, layer, leaf: path in trained or any(path.startswith(f"{name}.") for name in trained)
        return copies(TopLayers, model, inside, "layers chosen")
