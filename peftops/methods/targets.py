"""Which layers of a model a method adapts."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence

from torch import nn

from ..nn import AdaptedLayer

ALL_LINEAR = "all-linear"
Target = str | Sequence[str]


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module by its dotted name; an adapted layer counts as the layer that it was."""
    stack = [("", model)]
    while stack:
        name, module = stack.pop()
        yield name, module
        if not isinstance(module, AdaptedLayer):
            children = list(module.named_children())
            stack += [(f"{name}.{leaf}" if name else leaf, child) for leaf, child in reversed(children)]


def is_linear(module: nn.Module) -> bool:
    return isinstance(module.base if isinstance(module, AdaptedLayer) else module, nn.Linear)


def is_output_layer(model: nn.Module, module: nn.Module) -> bool:
    """Whether this is the model's head, which "all-linear" leaves out: it is large and often tied."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return module is head


def find_targets(model: nn.Module, target: Target) -> list[str]:
    """The names of the layers that ``target`` means, as HF PEFT reads it.

    Args:
        target: "all-linear" for every linear layer but the output layer; any other string is a regular
            expression for whole names; a list holds names or their last parts (``"q_proj"`` matches
            ``"model.layers.0.self_attn.q_proj"``).

    Raises:
        ValueError: nothing matches; the sentence lists near names.
        TypeError: a match is not a linear layer.
    """
    named = [(name, module) for name, module in layers(model) if name]
    if target == ALL_LINEAR:
        found = [name for name, module in named if is_linear(module) and not is_output_layer(model, module)]
        if not found:
            raise ValueError(f"target {ALL_LINEAR!r}: the model has no linear layers but its output layer")
        return found
    if isinstance(target, str):
        try:
            pattern = re.compile(target)
        except re.error as error:
            raise ValueError(f"target {target!r} is not a regular expression: {error}") from None
        matches = lambda name: pattern.fullmatch(name) is not None
    else:
        matches = lambda name: any(name == t or name.endswith(f".{t}") for t in target)
    found = [(name, module) for name, module in named if matches(name)]
    if not found:
        raise ValueError(f"target {target!r} matches no layer of {type(model).__name__}{_near(named, target)}")
    for name, module in found:
        if not is_linear(module):
            raise TypeError(
                f"target {target!r} matches {name}, a {type(module).__name__}; only linear layers are supported"
            )
    return [name for name, _ in found]


def _near(named: list[tuple[str, nn.Module]], target: Target) -> str:
    leaves = sorted({name.rpartition(".")[2] for name, module in named if is_linear(module)})
    asked = [target] if isinstance(target, str) else list(target)
    near = {match for t in asked for match in difflib.get_close_matches(t.rpartition(".")[2], leaves, 3, 0.5)}
    names = sorted(near) or leaves[:10]
    return f"; {'did you mean' if near else 'its linear layers are'}: {', '.join(names)}" if names else ""


def suffixes_or_names(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The shortest list of targets that means exactly these layers: last parts of names if they do."""
    leaves = sorted({name.rpartition(".")[2] for name in names})
    try:
        same = set(find_targets(model, leaves)) == set(names)
    except TypeError:
        same = False
    return leaves if same else sorted(names)
