"""Which adapters a model has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from ..nn import AdaptedLayer, Prompted, Switch, unwrapped
from .targets import layers


@dataclass
class Attachment:
    """The adapters of a model; kept as the model's attribute ``_peftops``."""

    switch: Switch = field(default_factory=Switch)
    configs: dict[str, object] = field(default_factory=dict)
    trainable_before: list[str] = field(default_factory=list)  # parameters that trained before
    ignored_before: list[str] = field(default_factory=list)  # by DistributedDataParallel
    resting: dict[str, set[str]] = field(default_factory=dict)  # parameters that train while their adapter is active


def state_of(model: nn.Module) -> Attachment | None:
    """The adapters of a model; None if it has none."""
    return getattr(unwrapped(model), "_peftops", None)


def attachment(model: nn.Module) -> Attachment:
    """The adapters of a model, which must have one."""
    found = state_of(model)
    if found is None:
        model = unwrapped(model)
        raise ValueError(f"{type(model).__name__} has no adapters; attach one first: peftops.attach(model, config)")
    return found


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """The adapted layers by the names of the layers that they were."""
    return ((name, host) for name, host in hosts(model) if isinstance(host, AdaptedLayer))


def hosts(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer | Prompted]]:
    """All that adapters are in: the adapted layers, and the bodies with prompts, by their names."""
    seen: set[int] = set()  # (a module may have several names)
    for name, module in layers(model):
        if isinstance(module, AdaptedLayer | Prompted) and id(module) not in seen:
            seen.add(id(module))
            yield name.removesuffix(Prompted.NAME).rstrip(".") if isinstance(module, Prompted) else name, module


def is_cut(model: nn.Module) -> bool:
    """Whether FSDP2's ``fully_shard`` has given each rank a share of the model. (It changes the classes of modules.)"""
    return any(kind.__name__ == "FSDPModule" for module in model.modules() for kind in type(module).__mro__)
