"""Adapters of experts in HF PEFT's files (``target_parameters``), which have other names and another layout.

PEFT wraps the module that has the parameters, once for each parameter. So the last parameter's factors are
``experts.lora_A.weight``, and those of the one before ``experts.base_layer.lora_A.weight``. All experts' A are one
matrix ``[E r, in]``; of B, ``[out, r E]``, the expert is the fastest index. If a module does not declare that its
weights are transposed (Llama 4's does not), PEFT does not transpose them, and its A and B change places.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor, nn

from ..attaching.config import Config
from ..attaching.patterns import matches_whole
from ..attaching.targets import ALL_LINEAR, exact_target, layers
from ..nn import EXPERTS, PREFIX, base_of, kind_of, module_at, stacks_of

A, B = "lora_A.weight", "lora_B.weight"


def is_of_experts(model: nn.Module, path: str) -> bool:
    return kind_of(base_of(module_at(model, path))) == EXPERTS


def split_target(model: nn.Module, adapted: list[str]) -> dict[str, list[str] | str]:
    """PEFT's ``target_modules`` for these layers, and ``target_parameters`` if there are experts among them."""
    experts = [path for path in adapted if is_of_experts(model, path)]
    modules = [path for path in adapted if path not in experts]
    target = {"target_modules": exact_target(model, modules) if modules else []}
    if experts:
        names = exact_target(model, experts)
        target["target_parameters"] = sorted(experts) if isinstance(names, str) else names
    return target


def to_peft(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors of an adapter's file by the names that PEFT has for them, and in its layout."""
    result = dict(tensors)
    for module, names in _experts(model):
        own = [name for name in names if f"{PREFIX}{module}.{name}.{A}" in result]
        for key, name in zip(_wrappers(module, len(own)), own, strict=True):
            down, up = (result.pop(f"{PREFIX}{module}.{name}.{factor}") for factor in (A, B))
            if _swapped(model, module):
                down, up = up.mT, down.mT
            result[f"{key}.{A}"] = down.flatten(0, 1).contiguous()
            result[f"{key}.{B}"] = up.permute(1, 2, 0).flatten(1).contiguous()
    return result


def from_peft(tensors: dict[str, Tensor], model: nn.Module, config: Config, file: object) -> dict[str, Tensor]:
    """The reverse; ``config.target`` tells which parameters they are of.

    Raises:
        ValueError: a module has adapters of more or fewer parameters.
    """
    result = dict(tensors)
    for module, names in _experts(model):
        given = sum(
            key.startswith(f"{PREFIX}{module}.")
            and re.fullmatch(r"(base_layer\.)*" + re.escape(A), key.removeprefix(f"{PREFIX}{module}.")) is not None
            for key in tensors
        )
        if not given:
            continue
        own = names if given == len(names) else [n for n in names if _means(config.target, f"{module}.{n}")]
        if len(own) != given:
            raise ValueError(
                f"{file} does not fit: it has adapters of {given} parameters of {module}, and its "
                f"configuration means {', '.join(own) or 'none'} of {', '.join(names)}"
            )
        for key, name in zip(_wrappers(module, given), own, strict=True):
            experts = base_of(module_at(model, f"{module}.{name}")).weight.shape[0]
            if f"{key}.{B}" not in result:
                raise ValueError(f"{file} does not fit: {key}.{B} is missing")
            down, up = result.pop(f"{key}.{A}"), result.pop(f"{key}.{B}")
            if down.dim() != 2 or up.dim() != 2 or down.shape[0] % experts or up.shape[1] % experts:
                raise ValueError(
                    f"{file} does not fit: {key}.lora_A and lora_B have shapes {list(down.shape)} and "
                    f"{list(up.shape)}, which do not fit {experts} experts"
                )
            down, up = down.unflatten(0, (experts, -1)), up.unflatten(1, (-1, experts)).permute(2, 0, 1)
            if _swapped(model, module):
                down, up = up.mT, down.mT
            result[f"{PREFIX}{module}.{name}.{A}"], result[f"{PREFIX}{module}.{name}.{B}"] = down, up
    return result


def _experts(model: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """Each module of experts, and the names of its weights in the order in which PEFT finds them."""
    for path, module in layers(model):
        names = stacks_of(base_of(module))
        if names:
            yield path, list(names)


def _wrappers(module: str, count: int) -> list[str]:
    """PEFT's names of its wrappers around a module; the wrapper of the first parameter comes first."""
    return [f"{PREFIX}{module}{'.base_layer' * depth}" for depth in reversed(range(count))]


def _swapped(model: nn.Module, module: str) -> bool:
    experts = base_of(module_at(model, module))
    layer = base_of(getattr(experts, stacks_of(experts)[-1]))
    return layer.transposed and not getattr(experts, "is_transposed", False)


def _means(target: list[str] | str, name: str) -> bool:
    if isinstance(target, str):
        return target == ALL_LINEAR or matches_whole(target, name)
    return any(name == t or name.endswith(f".{t}") for t in target)
