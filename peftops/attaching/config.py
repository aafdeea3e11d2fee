"""The options of a method, and their files: HF PEFT's ``adapter_config.json``, or the same with our own type."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import NoneType
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from ..nn import PREFIX, is_quantized
from .patterns import matches_whole
from .targets import Target

MOST_ITERATIONS = 1000  # the most that a file may ask for: without a limit, reading a file could take years
_LARGEST = {int: 2**63 - 1, float: sys.float_info.max}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of every method's options, which are a frozen dataclass.

    Args:
        modules_to_save: names, or ends of names, of modules that train whole beside what the method trains, as a new
            head does; they are in the adapter's file. (The name is HF PEFT's, and so is the meaning: "norm" is
            "input_norm", too.)

    By default the fields are written under their own names, with a ``peft_type`` that PEFT does not know and refuses. A
    method that PEFT also has translates them. Several methods may share a type of PEFT (all whose trained adapter is a
    LoRA); the method that sets ``peft_type`` itself reads the files that PEFT wrote.
    """

    peft_type: ClassVar[str]
    quantizes: ClassVar[bool] = False  # whether the method puts the base into 4 bits itself
    target_field: ClassVar[str | None] = "target"  # the option that the file's tensors tell; None if there is none
    peft_prefix: ClassVar[str] = PREFIX  # of PEFT's keys of parameters that the model had before

    modules_to_save: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Raise unless each option has its declared type; a method checks its own limits first."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not _is_a(value, _kinds(type(self))[field.name]):
                raise ValueError(f"{field.name} must be {_WORDS.get(field.type, field.type)}, not {value!r}")

    @classmethod
    def claims(cls, fields: dict[str, Any]) -> bool:
        """Whether fields that PEFT wrote are for this method, and not for the main method of their type."""
        return False

    def to_peft(self) -> dict[str, Any]:
        """The fields of ``adapter_config.json`` that are this method's."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != self.target_field}
        return {"peft_type": self.peft_type, **own}

    def as_built(self, adapters: dict[str, Any]) -> Config:
        """The options for a file, from which layers like those of ``adapters`` can be made again; usually these
        options."""
        return self

    @classmethod
    def from_peft(cls, fields: dict[str, Any], **own: Any) -> Config:
        """The reverse. ``own`` are options that the file's format does not know."""
        names = {f.name for f in dataclasses.fields(cls)}
        if "target" in names and cls.target_field == "target":
            needs(fields, "target_modules")
            own["target"] = fields["target_modules"]
        return cls(**{name: fields[name] for name in names if name in fields}, **own)

    @staticmethod
    def tensors_from_peft(fields: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a file of PEFT's, without those that its method never reads."""
        return tensors


_WORDS = {
    "bool": "True or False",
    "int": "a whole number",
    "float": "a finite number",
    "str": "text",
    "Sequence[str]": "a list of names",
}
_kinds = cache(get_type_hints)


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value, out of Python or of JSON, is of the kind that an annotation means."""
    whole, inner = get_origin(kind), get_args(kind)
    if kind is Any or kind is NoneType:
        return kind is Any or value is None
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool) and abs(value) <= _LARGEST[kind]
    if whole is dict:
        return isinstance(value, dict) and all(_is_a(k, inner[0]) and _is_a(x, inner[1]) for k, x in value.items())
    if whole in (list, tuple, Sequence):
        return isinstance(value, list | tuple | set) and all(_is_a(x, inner[0]) for x in value)
    return any(_is_a(value, k) for k in inner) if inner else isinstance(value, kind)


def needs(fields: dict[str, Any], *keys: str) -> None:
    """Raise unless a file says these. (Where it has null, HF PEFT asks a table of its own for the kind of model.)"""
    missing = [key for key in keys if fields.get(key) is None]
    if missing:
        raise ValueError(f"adapter_config.json lacks {', '.join(missing)}")


def refuse(fields: dict[str, Any], **neutral: Any) -> None:
    """Raise for a field that would change the result, unless it has its neutral value or an empty one."""
    for key, value in neutral.items():
        if fields.get(key) not in (None, value, [], {}):
            raise ValueError(f"this adapter needs {key}={fields[key]!r}, which peftops does not support")


def check_range(name: str, value: Any, low: float, high: float | None = None, *, whole: bool = False) -> None:
    """Raise unless ``value`` is a number in ``[low, high)`` that fits 64 bits."""
    right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if right and abs(value) <= _LARGEST[int if whole else float] and low <= value:
        if high is None or value < high:
            return
    kind = "a whole number" if whole else "a number"
    limits = f"from {low}" if high is None else f"in [{low}, {high})"
    raise ValueError(f"{name} must be {kind} {limits}, not {value!r}")


def check_scaling(alpha: Any, patterns: dict[str, Any] | None = None) -> None:
    """Raise unless ``alpha`` is None or a number that can be a numerator of the scaling, and each pattern maps a
    regular expression to such a number."""
    for value in (alpha, *(patterns or {}).values()):
        if value is not None:
            check_range("alpha", value, -1e9, 1e9)


def needs_scaling(method: str, scaling: float, layer: str) -> None:
    """Raise if the scaling is 0 or below: this method divides by it, or takes its root."""
    if not scaling > 0:
        raise ValueError(f"{method} needs a scaling above 0, and alpha makes that of {layer} {scaling:g}")


def needs_finite(method: str, weight: Tensor, layer: str) -> None:
    """Raise unless a method that decomposes a weight, or measures it, can: no number that it finds is above the norm.
    (Codes are finite by what reads them.)"""
    if is_quantized(weight) or weight.is_meta:
        return
    norm = torch.linalg.vector_norm(weight.detach(), dtype=torch.float64).item()
    if not norm <= torch.finfo(torch.float32).max:
        how = f"too large for float32: its norm is {norm:.3g}" if norm < math.inf else "not finite"
        raise ValueError(f"{method} starts from the weight of {layer}, which is {how}")


def check_pattern(name: str, pattern: Any) -> None:
    """Raise unless ``pattern`` is what :func:`by_pattern` reads."""
    if not isinstance(pattern, dict) or not all(isinstance(key, str) for key in pattern):
        raise ValueError(f"{name} must be a dict by regular expressions, not {pattern!r}")
    for key in pattern:
        try:
            re.compile(key)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{name}: {key!r} is not a regular expression: {error}") from None


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}")


def check_target(target: Target) -> None:
    names = target if isinstance(target, list | tuple | set) else [target]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"target must be 'all-linear', names or a regular expression, not {target!r}")


def by_pattern(pattern: dict[str, Any], layer: str, default: Any) -> Any:
    """The value of the first key that matches the end of a layer's name, as HF PEFT reads its patterns."""
    for key, value in pattern.items():
        if matches_whole(rf"(.*\.)?({key})", layer):
            return value
    return default
