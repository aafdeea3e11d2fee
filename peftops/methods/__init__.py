"""Every PEFT method: one file here is one method, and nothing else needs to know its name.

A file holds the paper, the equation, a frozen dataclass with the method's options, and a class that is an
:class:`~peftops.nn.Adapter`. ``@register(Config)`` is all that makes ``attach(model, Config(...))`` use it.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import nn

from ..nn import AdaptedLayer, Adapter, MergeError, Switch
from ..ops import NF4Tensor
from .targets import find_targets

METHODS: dict[type, type[Adapter]] = {}  # config class -> adapter class


def register(config_class: type) -> Callable[[type[Adapter]], type[Adapter]]:
    """Makes ``attach(model, Config(...))`` use the decorated class: ``Adapter(base, config, name of the layer)``.

    The class may have a hook ``prepare(model, config)``, which runs before the layers are looked up.
    """

    def add(adapter_class: type[Adapter]) -> type[Adapter]:
        METHODS[config_class] = adapter_class
        return adapter_class

    return add


@dataclass
class Attachment:
    """What is attached to a model; kept as the model's attribute ``_peftops``."""

    switch: Switch = field(default_factory=Switch)
    configs: dict[str, object] = field(default_factory=dict)
    trainable_before: list[str] = field(default_factory=list)  # parameters that trained before


def attachment(model: nn.Module) -> Attachment:
    found = getattr(model, "_peftops", None)
    if found is None:
        raise ValueError(f"{type(model).__name__} has no adapters; attach one first: peftops.attach(model, config)")
    return found


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """The adapted layers by the names of the layers that they were."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, AdaptedLayer))


def attach(model: nn.Module, config: object, *, name: str = "default") -> nn.Module:
    """Add an adapter to ``model``, in place, freeze everything else, and make the adapter active.

    Args:
        model: any module; changed and returned. :func:`detach` undoes it.
        config: options of a method, for instance ``LoRAConfig(r=16)`` or ``QLoRAConfig()``.
        name: several adapters can be attached side by side; :func:`activate` switches between them.

    Raises:
        TypeError: no method has this config; a target is not supported.
        ValueError: the name is taken or not a plain one; nothing matches ``config.target``.
    """
    adapter_class = METHODS.get(type(config))
    if adapter_class is None:
        known = ", ".join(sorted(c.__name__ for c in METHODS))
        raise TypeError(f"config must be one of {known}, not a {type(config).__name__}")
    if not name or "." in name or hasattr(nn.ModuleDict, name):
        raise ValueError(f"an adapter needs a plain name without dots, not {name!r}")
    state = getattr(model, "_peftops", None) or Attachment()
    if name in state.configs:
        raise ValueError(f"the model already has an adapter named {name!r}; give this one another name")
    if any(layer.is_merged for _, layer in adapted_layers(model)):
        raise ValueError("an adapter is merged into the model; unmerge it first: peftops.unmerge(model)")
    # Whatever can be wrong with the config shows here, before anything has changed.
    adapters = {}
    for path in find_targets(model, config.target):
        layer = model.get_submodule(path)
        base = layer.base if isinstance(layer, AdaptedLayer) else layer
        adapters[path] = adapter_class(base, config, path).train(layer.training)

    if not state.configs:
        state.trainable_before = [n for n, p in model.named_parameters() if p.requires_grad]
    prepare = getattr(adapter_class, "prepare", None)
    if prepare:
        prepare(model, config)
    if not state.configs:
        model.requires_grad_(False)
    for path, adapter in adapters.items():
        parent, leaf = _parent(model, path)
        layer = getattr(parent, leaf)
        if not isinstance(layer, AdaptedLayer):
            layer = AdaptedLayer(layer, state.switch).train(layer.training)
            setattr(parent, leaf, layer)
        layer.adapters[name] = adapter
    state.configs[name] = config
    state.switch.active = name
    model._peftops = state
    return model


def detach(model: nn.Module, name: str | None = None, *, merged: bool = False) -> nn.Module:
    """Take an adapter off, or all of them: with the last one, the model is as it was before :func:`attach`.

    (A base that QLoRA quantised stays quantised: its dense weights are gone.)

    Args:
        name: which adapter; None for all.
        merged: leave behind the weights that :func:`merge` made, in plain layers, for good.
    """
    state = attachment(model)
    if name is not None:
        _check_name(state, name)
    if merged:
        if not all(layer.is_merged for _, layer in adapted_layers(model)):
            raise ValueError("detach(merged=True) needs a merged adapter: peftops.merge(model)")
        name = None
    else:
        unmerge(model)
    for adapter in list(state.configs) if name is None else [name]:
        del state.configs[adapter]
        for _, layer in adapted_layers(model):
            if adapter in layer.adapters:
                del layer.adapters[adapter]
    for path, layer in list(adapted_layers(model)):
        if not layer.adapters:
            parent, leaf = _parent(model, path)
            setattr(parent, leaf, layer.base)
    if state.switch.active not in state.configs:
        state.switch.active = next(iter(state.configs), None)
    if not state.configs:
        trainable = set(state.trainable_before)
        for path, parameter in model.named_parameters():
            parameter.requires_grad_(path in trainable and not isinstance(parameter, NF4Tensor))
        del model._peftops
    return model


def activate(model: nn.Module, name: str) -> None:
    """Make another of the attached adapters the active one."""
    state = attachment(model)
    _check_name(state, name)
    state.switch.active = name


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Inside ``with disabled(model):`` the model computes what it computed without adapters."""
    switch = attachment(model).switch
    merged = [layer for _, layer in adapted_layers(model) if layer.is_merged]
    if merged:
        raise ValueError("an adapter is merged into the model; unmerge it first: peftops.unmerge(model)")
    active, switch.active = switch.active, None
    try:
        yield model
    finally:
        switch.active = active


@dataclass
class MergeReport:
    """The error that merging added, by layer."""

    layers: dict[str, MergeError]
    quantized: bool

    @property
    def rounding(self) -> float:
        """Relative error of the merged weights, over all layers (root mean square)."""
        return (sum(e.rounding**2 for e in self.layers.values()) / len(self.layers)) ** 0.5

    @property
    def change(self) -> float:
        """Size of the adapter's change relative to the weights, over all layers (root mean square)."""
        return (sum(e.change**2 for e in self.layers.values()) / len(self.layers)) ** 0.5

    def __str__(self) -> str:
        what = "quantising the merged weights again" if self.quantized else "rounding the merged weights"
        return (
            f"{len(self.layers)} layers merged: the adapter changes the weights by {self.change:.3%}, "
            f"{what} errs by {self.rounding:.3%}"
        )


def merge(model: nn.Module, *, dense: bool = False) -> MergeReport:
    """Fold the active adapter into the weights, so that it costs nothing; :func:`unmerge` takes it out exactly.

    Into an NF4 base, the sum has to be quantised again, which usually errs by more than what the adapter
    changed; the report says by how much, and so does a warning. ``dense=True`` merges into dense weights
    of the base's dtype instead.

    Raises:
        TypeError: the method cannot be merged.
        ValueError: there is no adapter, or it is merged already.
    """
    state = attachment(model)
    name = state.switch.active
    targets = [(path, layer) for path, layer in adapted_layers(model) if name in layer.adapters]
    if any(layer.is_merged for _, layer in targets):
        raise ValueError("an adapter is merged into the model already; unmerge it first: peftops.unmerge(model)")
    quantized = not dense and any(isinstance(layer.base.weight, NF4Tensor) for _, layer in targets)
    report = MergeReport({}, quantized)
    try:
        for path, layer in targets:
            report.layers[path] = layer.merge(name, dense=dense)
    except BaseException:
        unmerge(model)  # all or nothing
        raise
    if quantized:
        warnings.warn(f"{report}. merge(model, dense=True) merges into dense weights instead.", stacklevel=2)
    return report


def unmerge(model: nn.Module) -> None:
    """Put the layers back that :func:`merge` replaced: the same bits."""
    for _, layer in adapted_layers(model):
        layer.unmerge()


def _check_name(state: Attachment, name: str) -> None:
    if name not in state.configs:
        raise ValueError(f"the model has no adapter named {name!r}; it has {', '.join(state.configs)}")


def _parent(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, leaf = path.rpartition(".")
    return model.get_submodule(parent), leaf


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
