"""The methods by their configs, and how a method makes the adapters of a model."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..nn import Adapter, Stored, base_of, module_at
from ..nn.undo import about
from .selection import whole
from .targets import find_targets, is_within

METHODS: dict[type, type[Stored]] = {}  # config class -> class of its adapters


def register(config_class: type) -> Callable[[type[Stored]], type[Stored]]:
    """Makes ``attach(model, Config(...))`` use the decorated class.

    An adapter of a layer is made by ``Class(base, config, name of the layer)``, for all layers of
    ``config.target``. The class may have static hooks:

    * ``build(model, config) -> {name: adapter}`` makes all adapters instead. It does not change the model, and it
      raises an error if anything is wrong. (The name of a prompt is the name of the body in front of which it stands.)
    * ``prepare(model, config)`` runs next.
    """

    def add(adapter_class: type[Stored]) -> type[Stored]:
        METHODS[config_class] = adapter_class
        return adapter_class

    return add


def each_target(adapter_class: type[Adapter], model: nn.Module, config: object) -> dict[str, nn.Module]:
    """The layers that ``config.target`` means, by name, without the layers that train whole."""
    paths = find_targets(model, config.target, adapter_class.layers)
    left = [path for path in paths if not is_within(path, config.modules_to_save)]
    if not left:
        raise ValueError(f"modules_to_save {list(config.modules_to_save)} has all that target {config.target!r} means")
    return {path: base_of(module_at(model, path)) for path in left}


def each_adapter(adapter_class: type[Adapter], model: nn.Module, config: object) -> dict[str, Adapter]:
    """An adapter for each of those layers."""
    adapters = {}
    for path, base in each_target(adapter_class, model, config).items():
        with about(path):
            adapters[path] = adapter_class(base, config, path)
    return adapters


def build(adapter_class: type[Stored], model: nn.Module, config: object) -> dict[str, Stored]:
    """The adapters of a method for a model, not yet put into it. A module that trains whole has a copy in place of an
    adapter."""
    copied = whole(model, config.modules_to_save)
    if hasattr(adapter_class, "build"):
        return adapter_class.build(model, config) | copied
    return each_adapter(adapter_class, model, config) | copied
