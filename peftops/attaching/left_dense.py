"""How much of a model a method leaves as it was: the parameters that are neither in codes nor adapted, by name and
size."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator

from torch import Tensor, nn

from ..nn import AdaptedLayer, base_of, is_quantized, unwrapped
from .targets import ALL_LINEAR, layers

TELLING = 0.05  # the share of a model from which a warning is due: a table of positions may be 3-D as well


def left_dense(model: nn.Module) -> dict[str, int]:
    """The dense tensors with two or more dims and their numbers of parameters, largest first. In a name, "*" stands for
    the number of a layer."""
    found: dict[str, int] = {}
    for name, parameter, _ in _dense(model):
        found[name] = found.get(name, 0) + parameter.numel()
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def tell_left_dense(model: nn.Module, config: object) -> None:
    """Warn if a method for all linear layers has left a large part of the model dense, in 3-D tensors as experts of
    most models are: otherwise the user would notice only when memory runs out."""
    if getattr(config, "target", None) != ALL_LINEAR and not config.quantizes:
        return
    stacks: dict[str, int] = {}
    for name, parameter, adapted in _dense(model):
        if not adapted and parameter.dim() == 3:
            stacks[name] = stacks.get(name, 0) + parameter.numel()
    total, left = sum(p.numel() for p in model.parameters()), sum(stacks.values())
    if left > TELLING * total:
        does = "neither quantises nor adapts" if config.quantizes else "does not adapt"
        warnings.warn(
            f"{left:,} of the model's {total:,} parameters ({left / total:.0%}) are in 3-D tensors that "
            f"{type(config).__name__.removesuffix('Config')} {does}: "
            f"{', '.join(stacks)} stay as they are",
            stacklevel=3,
        )


def _dense(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Each dense tensor with two dims or more, and whether its layer is adapted. Convolutions have kernels, not
    stacks of matrices."""
    seen: set[int] = set()
    for path, module in layers(model):
        base, adapted = base_of(module), isinstance(unwrapped(module), AdaptedLayer)
        if isinstance(base, nn.modules.conv._ConvNd):
            continue
        for leaf, parameter in base.named_parameters(recurse=False):
            if parameter.dim() > 1 and min(parameter.shape) > 1 and not is_quantized(parameter):
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield re.sub(r"\.\d+(?=\.)", ".*", f"{path}.{leaf}".lstrip(".")), parameter, adapted
