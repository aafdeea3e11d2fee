"""Which layers of a model a method adapts."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from ..nn import EXPERTS, LINEAR, Prompted, base_of, kind_of, module_at, unwrapped
from ..nn.uncalled import uncalled
from .patterns import matches_whole

ALL_LINEAR = "all-linear"
Target = str | Sequence[str]


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module by the dotted name that it has in the model without adapters. An adapted layer counts as its base,
    with the modules in it; the modules of prompts do not count. Names leave out torch's wrappers."""
    stack = [("", model)]
    while stack:
        name, module = stack.pop()
        module = unwrapped(module)
        yield name, module
        if not isinstance(module, Prompted):
            children = list(base_of(module).named_children())
            stack += [(f"{name}.{leaf}" if name else leaf, child) for leaf, child in reversed(children)]


def is_linear(module: nn.Module) -> bool:
    return kind_of(base_of(module)) == LINEAR


def output_layers(model: nn.Module) -> list[str]:
    """The model's head. "all-linear" leaves it out, because it is either large and often tied, or small and specific to
    a task."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        return [name for name, module in model.named_modules() if module is head]
    return head_of(model) if body_of(model) else []


def find_targets(model: nn.Module, target: Target, kinds: Sequence[str] = (LINEAR,)) -> list[str]:
    """The names of the layers that ``target`` means, as HF PEFT reads it.

    Args:
        target: "all-linear" for every linear layer but the output layer; any other string is a regular
            expression for whole names; a list holds names or their last parts (``"q_proj"`` matches
            ``"model.layers.0.self_attn.q_proj"``). Layers whose weights are read without a call of the layer are left
            out.
        kinds: the supported kinds of layers. "all-linear" always means linear ones, and experts' if these are
            supported.

    Raises:
        ValueError: nothing matches; the sentence lists near names.
        TypeError: a matching layer is of another kind, or is never called.
    """
    if target == ALL_LINEAR:
        left_out = {*output_layers(model), *read_without_calls(model)}
        meant = {LINEAR, *kinds} & {LINEAR, EXPERTS}
        linear = [name for name, m in layers(model) if kind_of(base_of(m)) in meant and name not in left_out]
        if not linear:
            subclasses = {type(m).__name__ for _, m in layers(model) if isinstance(m, nn.Linear) and not is_linear(m)}
            others = f" ({', '.join(sorted(subclasses))} compute otherwise than nn.Linear)" if subclasses else ""
            others += _way(subclasses)
            raise ValueError(
                f"target {ALL_LINEAR!r}: the model has no linear layers except its output layer "
                f"and layers that are never called{others}"
            )
        return linear
    found = matches(model, target, "target")
    check_called(model, [name for name, _ in found], f"target {target!r}")
    for name, module in found:
        if kind_of(base_of(module)) not in kinds:
            supported = " and ".join([", ".join(kinds[:-1]), kinds[-1]] if len(kinds) > 1 else kinds)
            raise TypeError(
                f"target {target!r} matches {name}, a {type(module).__name__}; only {supported} layers are supported"
                f"{_way({type(module).__name__})}"
            )
    return [name for name, _ in found]


def _way(kinds: set[str]) -> str:
    """For an error about layers of other kinds: how they become ours."""
    return "; peftops.from_bitsandbytes(model) makes ours of its layers" if "Linear4bit" in kinds else ""


def read_without_calls(model: nn.Module) -> set[str]:
    """The names of the layers whose weights another module reads without a call: an adapter in place of such a layer
    would do nothing."""
    return uncalled((name, base_of(module)) for name, module in layers(model))


def check_called(model: nn.Module, names: Collection[str], what: str) -> None:
    """Raise a TypeError if one of these layers cannot be adapted because it is not called."""
    for name in sorted(read_without_calls(model) & set(names)):
        owner = type(base_of(module_at(model, name.rpartition(".")[0]))).__name__
        raise TypeError(
            f"{what} matches {name}, whose weights {owner} reads without a call, at least sometimes: an adapter would "
            "have no effect then"
        )


def matches(model: nn.Module, target: Target, option: str) -> list[tuple[str, nn.Module]]:
    """The modules that a regular expression or a list means; an error with near names is raised if there are none."""
    named = [(name, module) for name, module in layers(model) if name]
    if isinstance(target, str):
        meant = lambda name: matches_whole(target, name)
    else:
        meant = lambda name: any(name == t or name.endswith(f".{t}") for t in target)
    try:
        found = [(name, module) for name, module in named if meant(name)]
    except ValueError as error:  # of the pattern
        raise ValueError(f"{option} {error}") from None
    if not found:
        raise ValueError(f"{option} {target!r} matches no layer of {type(model).__name__}{_near(named, target)}")
    return found


def is_within(path: str, names: Sequence[str]) -> bool:
    """Whether a layer is in a module whose name ends in one of these, or is that module. As in HF PEFT, "norm" also
    matches the end of "input_norm"."""
    return any(f"{name}." in f"{path}." for name in names)


def _near(named: list[tuple[str, nn.Module]], target: Target) -> str:
    leaves = sorted({name.rpartition(".")[2] for name, module in named if is_linear(module)})
    asked = [target] if isinstance(target, str) else list(target)
    near = {match for t in asked for match in difflib.get_close_matches(t.rpartition(".")[2], leaves, 3, 0.5)}
    names = sorted(near) or leaves[:10]
    return f"; {'did you mean' if near else 'its linear layers are'}: {', '.join(names)}" if names else ""


def exact_target(model: nn.Module, names: Collection[str]) -> Target:
    """The shortest target that matches exactly these layers: last parts of names, or whole names, or an expression if a
    name is the end of another name."""
    for target in ({name.rpartition(".")[2] for name in names}, set(names)):
        if {name for name, _ in layers(model) if any(f".{name}".endswith(f".{t}") for t in target)} == set(names):
            return sorted(target)
    return "|".join(re.escape(name) for name in sorted(names))


def joined_target(modules: list[str] | str | None, parameters: list[str] | None) -> list[str] | str:
    """One target for HF PEFT's ``target_modules`` and ``target_parameters``, which it reads by the same rules."""
    if not parameters or modules == ALL_LINEAR:  # all-linear has the experts' as well
        return modules or []
    if isinstance(modules, str):
        return "|".join([f"({modules})", *(rf"(.*\.)?{re.escape(name)}" for name in parameters)])
    return [*(modules or []), *parameters]


def has_parameters(module: nn.Module, *, recurse: bool = True) -> bool:
    return next(module.parameters(recurse), None) is not None


def blocks(model: nn.Module) -> list[str]:
    """The names of the blocks that a model is a stack of, bottom first.

    They are the members of the outermost lists of modules (``nn.ModuleList``) that have parameters; for a model
    without such lists, its children that do.
    """
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{block}.") for block in found):
            found += [f"{name}.{leaf}".lstrip(".") for leaf, child in module.named_children() if has_parameters(child)]
    return found or [name for name, child in model.named_children() if has_parameters(child)]


def body_of(model: nn.Module) -> str:
    """The name of the part under the head, which transformers' models declare; "" if it is the model itself."""
    body = getattr(model, "base_model", model)
    return next(name for name, module in model.named_modules() if module is body)


def head_of(model: nn.Module) -> list[str]:
    """The names of the layers above the body; for a model without a body, the name of the last layer with
    parameters."""
    body = body_of(model)
    leaves = [name for name, module in layers(model) if name and has_parameters(base_of(module), recurse=False)]
    output = getattr(model, "get_output_embeddings", lambda: None)()
    above = [name for name in leaves if body and not name.startswith(f"{body}.")]
    return above or [name for name in leaves if module_at(model, name) is output] or leaves[-1:]


@dataclass
class Sublayers:
    """Where a transformer block adds to its stream: names of linear layers."""

    attention: list[str]  # the last one of each attention
    feed_forward: tuple[str, str]  # the first and the last one of the rest


def sublayers(model: nn.Module) -> list[Sublayers]:
    """Those of each block. An attention is a module whose class has "Attention" in its name, as all of
    transformers' have; the other linear layers of a block are its feed-forward part.

    Raises:
        TypeError: a block is not of that shape.
    """
    result, not_called = [], read_without_calls(model)
    for block in blocks(model):
        named = [(f"{block}.{name}" if name else block, m) for name, m in layers(model.get_submodule(block))]
        outer: list[str] = []
        for name, module in named:
            if "Attention" in type(base_of(module)).__name__ and not any(name.startswith(f"{o}.") for o in outer):
                outer.append(name)
        linear = [name for name, module in named if is_linear(module) and name not in not_called]
        attention = [[n for n in linear if n.startswith(f"{o}.")] for o in outer]
        rest = [n for n in linear if not any(n.startswith(f"{o}.") for o in outer)]
        if not rest or not outer or not all(attention):
            kind = type(model.get_submodule(block)).__name__
            raise TypeError(
                f"{block}, a {kind}, is not a transformer block with linear layers: it needs a submodule whose class "
                "is named ...Attention... and a feed-forward part"
            )
        result.append(Sublayers([names[-1] for names in attention], (rest[0], rest[-1])))
    return result
