"""Adapters put on a model, taken off, and switched."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator

from torch import nn

from ..nn import (
    AdaptedLayer,
    Prompt,
    Prompted,
    Stored,
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
from ..ops.group_tensor import all_finite
from .left_dense import tell_left_dense
from .merging import unmerge
from .registry import METHODS, build
from .state import Attachment, attachment, hosts, is_cut, state_of
from .targets import body_of, head_of, is_within

_IGNORED = "_ddp_params_and_buffers_to_ignore"  # where DistributedDataParallel looks


def attach(model: nn.Module, config: object, *, name: str = "default") -> nn.Module:
    """Add an adapter to ``model``, in place, freeze everything else, and make the adapter active.

    Args:
        model: any module; changed and returned. :func:`detach` undoes it.
        config: options of a method, for instance ``LoRAConfig(r=16)`` or ``QLoRAConfig()``.
        name: several adapters can be attached side by side; :func:`activate` switches between them.

    Raises:
        TypeError: no method has this config; a target is not supported.
        ValueError: the name is taken or not a plain one; nothing matches ``config.target``; the model is in
            DistributedDataParallel already, or FSDP2 has cut it; a weight that the adapter starts from, or copies, is
            not finite.
        RuntimeError: an operator that the method needs does not support a weight; the message names the layer.

    After any error or interrupt the model is as it was before. (So a method that quantises needs memory for the dense
    model and its codes. :func:`peftops.load_model` needs less: it quantises one tensor after the other.)

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
            f"an adapter's name must be plain, without dots, and no attribute of torch's modules may have it, "
            f"not {name!r}"
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "DistributedDataParallel knows only the parameters that existed when it was made: attach first"
        )
    if is_cut(model):
        raise ValueError("fully_shard knows only the parameters that existed when it was called: attach first")
    given, model = model, unwrapped(model)
    state = state_of(model) or Attachment()
    if name in state.configs:
        raise ValueError(f"the model already has an adapter named {name!r}; give this one another name")
    if any(host.is_merged for _, host in hosts(model)):
        raise ValueError("an adapter is merged into the model; unmerge it first: peftops.unmerge(model)")
    with opened(model):
        # All mistakes of the config show here, before anything has changed.
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
            _check_start(adapter)
    state.configs[name] = config
    _switch(model, state, name)
    model._peftops = state
    _ignore_codes(model, state)
    _keep_vocabulary(model)
    keep_names(model)
    watch({f"{path}.{n}": p for path, adapter in adapters.items() for n, p in adapter.named_parameters()})


def _check_start(adapter: Stored) -> None:
    """Numbers that an adapter makes of a weight may be too large for it; then nothing could train."""
    for leaf, parameter in adapter.named_parameters():
        if not is_quantized(parameter) and not all_finite(parameter.detach()):
            raise ValueError(
                f"{leaf} of {type(adapter).__name__} is made of numbers of the model that are not finite, or too large"
            )


def _switch(model: nn.Module, state: Attachment, name: str | None) -> None:
    """Make an adapter the active one, and the only one that trains: DistributedDataParallel waits for a gradient of
    every parameter that trains, and the parameters of an inactive adapter never get one."""
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
    """DistributedDataParallel sends every parameter as one flat tensor to make all ranks equal, and codes are not such
    tensors. Each rank computes the same codes from the same file, so DistributedDataParallel may ignore them."""
    setattr(model, _IGNORED, state.ignored_before + [n for n, p in model.named_parameters() if is_quantized(p)])


def _tell_large_ranks(model: nn.Module, adapters: dict[str, Stored]) -> None:
    """They are allowed, as in HF PEFT: a model may have a gate of one row among its layers."""
    ranks = {path: adapter.rank for path, adapter in adapters.items() if getattr(adapter, "rank", 0)}
    smaller = [path for path, r in ranks.items() if r > min(sizes(base_of(module_at(model, path))))]
    if smaller:
        path, rest = smaller[0], f" and {len(smaller) - 1} other layers" if len(smaller) > 1 else ""
        in_, out = sizes(base_of(module_at(model, path)))
        warnings.warn(f"r={ranks[path]} is more than {path} can use{rest}: its weight is {out} x {in_}", stacklevel=3)


def _tell_frozen_head(model: nn.Module, adapters: dict[str, Stored]) -> None:
    """Warn if a head will not train: a model for a task, made of a model that was trained on text, has a head of random
    numbers."""
    if not re.search("For.*(Classification|Answering|Choice)$", type(model).__name__) or not body_of(model):
        return
    head = head_of(model)
    if head and not any(is_within(path, [name]) for path in adapters for name in head):
        warnings.warn(
            f"{', '.join(head)} of {type(model).__name__} will not train; if it is new and has random weights, attach "
            f"with modules_to_save={sorted({name.partition('.')[0] for name in head})}",
            stacklevel=3,
        )


def _keep_vocabulary(model: nn.Module) -> None:
    """Make transformers' ``resize_token_embeddings`` raise an error if embeddings or the head are adapted: the adapter
    has the old size, and otherwise one of the two layers would be resized before the error."""
    vars(model).pop("resize_token_embeddings", None)
    for get in ("get_input_embeddings", "get_output_embeddings"):
        with contextlib.suppress(AttributeError, NotImplementedError):
            if isinstance(getattr(model, get)(), AdaptedLayer):
                model.resize_token_embeddings = _refuse_to_resize


def _refuse_to_resize(*args: object, **kwargs: object) -> None:
    raise ValueError("an adapter is on the embeddings or the head; call resize_token_embeddings before you attach it")


def detach(model: nn.Module, name: str | None = None, *, merged: bool = False) -> nn.Module:
    """Take an adapter off, or all of them. Without the last one, the model is as it was before :func:`attach`.

    (A base that QLoRA quantised stays quantised: its dense weights are gone.)

    Args:
        name: which adapter; None for all.
        merged: keep the weights that :func:`merge` made, in plain layers; this cannot be undone.

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
        _ignore_codes(model, state)  # layers that are no longer adapted have other names
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


def _check_name(state: Attachment, name: str) -> None:
    if not isinstance(name, str):
        raise TypeError(
            f"activate takes the name of one adapter, not {name!r}; peftops.combine(model, names, "
            "weights) makes one adapter of several"
        )
    if name not in state.configs:
        raise ValueError(f"the model has no adapter named {name!r}; it has {', '.join(state.configs)}")
