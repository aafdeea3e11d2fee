"""Shared by the methods that train a model's own parameters: the chosen parameters become trained copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from ..nn import Select, base_of
from .targets import check_called, is_within, layers, matches, read_without_calls


def copies(
    select_class: type[Select], model: nn.Module, chosen: Callable[[str, nn.Module, str], bool], what: str | None
) -> dict[str, Select]:
    """A ``select_class`` for each layer that has chosen parameters, and is called.

    Args:
        chosen: a function of a layer's name, the layer and the name of a parameter in it; tells whether the parameter
            trains.
        what: words for the chosen parameters, for the error; None if it is no error to choose nothing.

    Raises:
        ValueError: nothing is chosen.
        TypeError: a chosen parameter belongs to a module that contains others, not to a layer.
    """
    found: dict[str, Select] = {}
    not_called = read_without_calls(model)
    for path, module in layers(model):
        if path in not_called:
            continue
        base = base_of(module)
        leaves = [leaf for leaf, _ in base.named_parameters(recurse=False) if chosen(path, base, leaf)]
        if not leaves:
            continue
        if not path or any(True for _ in base.children()):
            name = f"{path}.{leaves[0]}".lstrip(".")
            kind = type(base).__name__
            raise TypeError(f"{name} is not in a layer but in a {kind} of several; it cannot be selected")
        found[path] = select_class(base, leaves, path)
    if not found and what:
        raise ValueError(f"{type(model).__name__} has no {what} to train")
    return found


def whole(model: nn.Module, names: Sequence[str]) -> dict[str, Select]:
    """Copies of all parameters in the modules whose names end in one of these: HF PEFT's ``modules_to_save``."""
    if isinstance(names, str) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"modules_to_save must be a list of names, not {names!r}")
    paths = [path for path, _ in layers(model)]
    for name in names:
        if not any(is_within(path, [name]) for path in paths):
            matches(model, [name], "modules_to_save")  # raises, and tells near names
    check_called(model, [path for path in paths if is_within(path, names)], f"modules_to_save {list(names)}")
    chosen = lambda path, layer, leaf: is_within(path, names)
    return copies(Select, model, chosen, f"parameters in {', '.join(names)}" if names else None)
