"""Every PEFT method: one file here is one method, and nothing else needs to know its name.

A file holds the paper, the equation, a frozen dataclass with the method's options, and a class of one of three
bases: an :class:`~peftops.nn.Adapter` changes what a layer computes, a :class:`~peftops.nn.Select` trains
parameters that a layer has, a :class:`~peftops.nn.Prompt` puts vectors before what the model reads.
``@register(Config)`` is all that makes ``attach(model, Config(...))`` use it.

Three hooks, and no more, are for methods that one layer at a time does not fit: ``build`` makes the adapters of
all layers together, ``prepare`` changes the model before they are put in, ``begin`` the layer that one stands on.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import pkgutil
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import nn

from ..nn import (
    AdaptedLayer,
    Adapter,
    MergeError,
    Prompt,
    Prompted,
    Stored,
    Switch,
    base_of,
    close_experts,
    is_quantized,
    keep_names,
    module_at,
    opened,
    sizes,
    unwrapped,
)
from ..nn.ties import forget_broken_ties
from ..nn.undo import about, all_or_nothing
from ..nn.unreached import watch
from .left_dense import tell_left_dense
from .selection import whole
from .targets import body_of, find_targets, head_of, is_within, layers

_IGNORED = "_ddp_params_and_buffers_to_ignore"  # where DistributedDataParallel looks
METHODS: dict[type, type[Stored]] = {}  # config class -> class of its adapters


def register(config_class: type) -> Callable[[type[Stored]], type[Stored]]:
    """Makes ``attach(model, Config(...))`` use the decorated class.

    An adapter of a layer is made by ``Class(base, config, name of the layer)``, for all layers of
    ``config.target``. The class may have static hooks:

    * ``build(model, config) -> {name: adapter}`` makes all adapters instead; it changes nothing of the model and
      raises whatever is wrong. (The name of a prompt is that of the body that it stands before.)
    * ``prepare(model, config)`` runs next.
    """

    def add(adapter_class: type[Stored]) -> type[Stored]:
        METHODS[config_class] = adapter_class
        return adapter_class

    return add


def each_target(adapter_class: type[Adapter], model: nn.Module, config: object) -> dict[str, nn.Module]:
    """The layers that ``config.target`` means, by name, but for those that train whole."""
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
    """The adapters of a method for a model, not yet in it; and copies of what trains whole, in place of theirs."""
    copied = whole(model, config.modules_to_save)
    if hasattr(adapter_class, "build"):
        return adapter_class.build(model, config) | copied
    return each_adapter(adapter_class, model, config) | copied


@dataclass
class Attachment:
    """The adapters of a model; kept as the model's attribute ``_peftops``."""

    switch: Switch = field(default_factory=Switch)
    configs: dict[str, object] = field(default_factory=dict)
    trainable_before: list[str] = field(default_factory=list)  # parameters that trained before
    ignored_before: list[str] = field(default_factory=list)  # by DistributedDataParallel
    resting: dict[str, set[str]] = field(default_factory=dict)  # parameters that train while their adapter is active


def attachment(model: nn.Module) -> Attachment:
    model = unwrapped(model)
    found = getattr(model, "_peftops", None)
    if found is None:
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


def attach(model: nn.Module, config: object, *, name: str = "default") -> nn.Module:
    """Add an adapter to ``model``, in place, freeze everything else, and make the adapter active.

    Args:
        model: any module; changed and returned. :func:`detach` undoes it.
        config: options of a method, for instance ``LoRAConfig(r=16)`` or ``QLoRAConfig()``.
        name: several adapters can be attached side by side; :func:`activate` switches between them.

    Raises:
        TypeError: no method has this config; a target is not supported.
        ValueError: the name is taken or not a plain one; nothing matches ``config.target``; the model is in
            DistributedDataParallel already.
        RuntimeError: an operator cannot do with a weight what the method needs; the message names the layer.

    Whatever is raised, an interrupt too, the model is then as it was. (So a method that quantises needs memory for the
    dense model and its codes: :func:`peftops.load_model` quantises one tensor after the other.)

    Examples:
        >>> model = peftops.attach(llama(), peftops.LoRAConfig(r=2))
        >>> peftops.summary(model).layers
        14
    """
    adapter_class = METHODS.get(type(config))
    if adapter_class is None:
        known = ", ".join(sorted(c.__name__ for c in METHODS))
        raise TypeError(f"config must be one of {known}, not a {type(config).__name__}")
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"an adapter needs a plain name without dots, which no attribute of torch's modules has, not {name!r}"
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("DistributedDataParallel sums the gradients of what it found as it was made: attach first")
    given, model = model, unwrapped(model)
    state = getattr(model, "_peftops", None) or Attachment()
    if name in state.configs:
        raise ValueError(f"the model already has an adapter named {name!r}; give this one another name")
    if any(host.is_merged for _, host in hosts(model)):
        raise ValueError("an adapter is merged into the model; unmerge it first: peftops.unmerge(model)")
    with opened(model):
        # Whatever can be wrong with the config shows here, before anything has changed.
        adapters = build(adapter_class, model, config)
        _tell_large_ranks(model, adapters)
        _tell_frozen_head(model, adapters)

        configs, active, resting = dict(state.configs), state.switch.active, dict(state.resting)
        try:
            with all_or_nothing(model):
                _put(model, state, name, config, adapters)
        except BaseException:
            state.configs, state.switch.active, state.resting = configs, active, resting
            raise
    tell_left_dense(model, config)
    return given


def _put(model: nn.Module, state: Attachment, name: str, config: object, adapters: dict[str, Stored]) -> None:
    if not state.configs:
        state.trainable_before = [n for n, p in model.named_parameters() if p.requires_grad]
        state.ignored_before = list(getattr(model, _IGNORED, []))
    prepare = getattr(METHODS[type(config)], "prepare", None)
    if prepare:
        prepare(model, config)
    if not state.configs:
        model.requires_grad_(False)
    for path, adapter in adapters.items():
        adapter.train(module_at(model, path).training)
        with about(path):
            (Prompted if isinstance(adapter, Prompt) else AdaptedLayer).put(model, path, name, adapter, state.switch)
    state.configs[name] = config
    _switch(model, state, name)
    model._peftops = state
    _ignore_codes(model, state)
    _keep_vocabulary(model)
    keep_names(model)
    watch({f"{path}.{n}": p for path, adapter in adapters.items() for n, p in adapter.named_parameters()})


def _switch(model: nn.Module, state: Attachment, name: str | None) -> None:
    """Make an adapter the active one, and the only one that trains: DistributedDataParallel waits for a gradient of
    every parameter that does, and one that is not used never gets any."""
    state.switch.active = name
    adapters = [(path, other, adapter) for path, host in hosts(model) for other, adapter in host.adapters.items()]
    for path, other, adapter in adapters:
        for leaf, parameter in adapter.named_parameters():
            if other == name and f"{path}.{leaf}" in state.resting.get(name, ()):
                parameter.requires_grad_(True)
            elif other != name and parameter.requires_grad:
                state.resting.setdefault(other, set()).add(f"{path}.{leaf}")
                parameter.requires_grad_(False)
    state.resting = {other: names for other, names in state.resting.items() if other in state.configs and other != name}


def _ignore_codes(model: nn.Module, state: Attachment) -> None:
    """DistributedDataParallel makes all ranks alike by sending every parameter as one flat tensor, which codes are not.
    They come from the same file by the same arithmetic on every rank: tell it to leave them alone."""
    setattr(model, _IGNORED, state.ignored_before + [n for n, p in model.named_parameters() if is_quantized(p)])


def _tell_large_ranks(model: nn.Module, adapters: dict[str, Stored]) -> None:
    """They are allowed, as in HF PEFT: a model may have a gate of one row among its layers."""
    ranks = {path: adapter.rank for path, adapter in adapters.items() if getattr(adapter, "rank", 0)}
    smaller = [path for path, r in ranks.items() if r > min(sizes(base_of(module_at(model, path))))]
    if smaller:
        path, rest = smaller[0], f" and {len(smaller) - 1} other layers" if len(smaller) > 1 else ""
        in_, out = sizes(base_of(module_at(model, path)))
        warnings.warn(
            f"r={ranks[path]} is more than {path} can use{rest}: its weight is {out} x {in_}", stacklevel=3
        )


def _tell_frozen_head(model: nn.Module, adapters: dict[str, Stored]) -> None:
    """A model for a task, made of one that was trained on text, has a head of random numbers."""
    if not re.search("For.*(Classification|Answering|Choice)$", type(model).__name__) or not body_of(model):
        return
    head = head_of(model)
    if head and not any(is_within(path, [name]) for path in adapters for name in head):
        warnings.warn(
            f"{', '.join(head)} of {type(model).__name__} will not train; if that is new, and so random, attach with "
            f"modules_to_save={sorted({name.partition('.')[0] for name in head})}",
            stacklevel=3,
        )


def _keep_vocabulary(model: nn.Module) -> None:
    """Let transformers' ``resize_token_embeddings`` say that it cannot where embeddings or the head are adapted: the
    adapter is of the old size, and one of two layers would be resized before that shows."""
    vars(model).pop("resize_token_embeddings", None)
    for get in ("get_input_embeddings", "get_output_embeddings"):
        with contextlib.suppress(AttributeError, NotImplementedError):
            if isinstance(getattr(model, get)(), AdaptedLayer):
                model.resize_token_embeddings = _refuse_to_resize


def _refuse_to_resize(*args: object, **kwargs: object) -> None:
    raise ValueError("an adapter stands on the embeddings or the head; resize_token_embeddings before you attach it")


def detach(model: nn.Module, name: str | None = None, *, merged: bool = False) -> nn.Module:
    """Take an adapter off, or all of them: with the last one, the model is as it was before :func:`attach`.

    (A base that QLoRA quantised stays quantised: its dense weights are gone.)

    Args:
        name: which adapter; None for all.
        merged: leave behind the weights that :func:`merge` made, in plain layers, for good.

    Examples:
        >>> model = peftops.attach(llama(), peftops.LoRAConfig(r=2))
        >>> isinstance(peftops.detach(model).model.layers[0].self_attn.q_proj, nn.Linear)
        True
    """
    given, model = model, unwrapped(model)
    state = attachment(model)
    if name is not None:
        _check_name(state, name)
    if merged:
        if not all(host.is_merged for _, host in hosts(model)):
            raise ValueError("detach(merged=True) needs a merged adapter: peftops.merge(model)")
        name = None
    else:
        unmerge(model)
    for adapter in list(state.configs) if name is None else [name]:
        del state.configs[adapter]
        for _, host in hosts(model):
            if adapter in host.adapters:
                host.adapters.pop(adapter).left()
    for path, host in list(hosts(model)):
        if not host.adapters:
            host.leave(model, path)
    _keep_vocabulary(model)
    if state.switch.active not in state.configs:
        _switch(model, state, next(iter(state.configs), None))
    if not state.configs:
        trainable = set(state.trainable_before)
        for path, parameter in model.named_parameters():
            parameter.requires_grad_(path in trainable and not is_quantized(parameter))
        del model._peftops
        delattr(model, _IGNORED)
        if state.ignored_before:
            setattr(model, _IGNORED, state.ignored_before)
        if merged:
            forget_broken_ties(model)
    else:
        _ignore_codes(model, state)  # layers that are no adapted ones any more have other names
    close_experts(model)
    return given


def activate(model: nn.Module, name: str) -> None:
    """Make another of the attached adapters the active one, whose parameters train; those of the others rest.

    Examples:
        >>> model = peftops.attach(llama(), peftops.LoRAConfig(r=2), name="a")
        >>> _ = peftops.attach(model, peftops.LoRAConfig(r=4), name="b")
        >>> peftops.activate(model, "a")
        >>> peftops.summary(model).active
        'a'
    """
    state = attachment(model)
    _check_name(state, name)
    _switch(model, state, name)


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Inside ``with disabled(model):`` the model computes what it computed without adapters.

    Examples:
        >>> base = llama()(ids).logits
        >>> model = peftops.attach(llama(), peftops.PromptTuningConfig(tokens=2))
        >>> with peftops.disabled(model):
        ...     torch.equal(model(ids).logits, base)
        True
    """
    switch = attachment(model).switch
    if any(host.is_merged for _, host in hosts(model)):
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

    @property
    def quantized(self) -> bool:
        """Whether a merged weight was quantised again."""
        return any(error.quantized for error in self.layers.values())

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
        ValueError: there is no adapter, or it is merged already, or the sum is not finite; nothing has changed then.

    Examples:
        >>> model = peftops.attach(llama(), peftops.LoRAConfig(r=2))
        >>> peftops.merge(model).quantized
        False
    """
    state = attachment(model)
    name = state.switch.active
    targets = [(path, host) for path, host in hosts(model) if name in host.adapters]
    if any(host.is_merged for _, host in targets):
        raise ValueError("an adapter is merged into the model already; unmerge it first: peftops.unmerge(model)")
    report = MergeReport({})
    try:
        for path, host in targets:
            with about(path or type(model).__name__):
                error = report.layers[path] = host.merge(name, dense=dense)
                if not math.isfinite(error.change + error.rounding):
                    raise ValueError("merging would give weights that are not finite")
    except BaseException:
        unmerge(model)  # all or nothing
        raise
    if report.quantized:
        warnings.warn(f"{report}. merge(model, dense=True) merges into dense weights instead.", stacklevel=2)
    return report


def unmerge(model: nn.Module) -> None:
    """Put the layers back that :func:`merge` replaced: the same bits.

    Examples:
        >>> model = peftops.attach(llama(), peftops.LoRAConfig(r=2))
        >>> before = model(ids).logits
        >>> _ = peftops.merge(model)
        >>> peftops.unmerge(model)
        >>> torch.equal(model(ids).logits, before)
        True
    """
    for _, host in hosts(model):
        host.unmerge()


def _check_name(state: Attachment, name: str) -> None:
    if name not in state.configs:
        raise ValueError(f"the model has no adapter named {name!r}; it has {', '.join(state.configs)}")



for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
