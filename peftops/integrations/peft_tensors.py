"""The tensors of an adapter's file: each one gets its place in the model, or is refused."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from ..attaching.config import by_pattern
from ..attaching.targets import is_within, layers
from ..nn import PREFIX, Stored, base_of, is_quantized, module_at, unwrapped_name

_BASE = ".base_layer.weight"
_TWICE = ".modules_to_save", ".original_module"  # within PEFT's wrapper


_RANK_AT = {"lora_A.weight": 0, "lora_B.weight": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}  # the dimension


def check_ranks(fields: dict[str, Any], tensors: dict[str, Tensor], file: object) -> None:
    """Raise unless A and B of every layer have the rank of ``adapter_config.json``. The scaling is alpha divided by
    that rank, so with a wrong rank a reader would compute something else, and no shape would show it.

    Two kinds are left out. In PEFT's files the factors of all experts are one matrix, which can be split only with the
    model. And a module that is saved whole has no rank.

    Raises:
        ValueError: a layer has another rank.
    """
    if "r" not in fields:
        return
    stacks = {parameter.rpartition(".")[0].rpartition(".")[2] for parameter in fields.get("target_parameters") or ()}
    for key, tensor in tensors.items():
        name = unwrapped_name(key.removeprefix(PREFIX))
        layer, leaf = next(((name.removesuffix(f".{e}"), e) for e in _RANK_AT if name.endswith(f".{e}")), (name, None))
        of_experts = stacks & {layer.partition(".base_layer")[0].rpartition(".")[2], ""}
        if leaf is None or of_experts or is_within(name.rpartition(".")[0], fields.get("modules_to_save") or ()):
            continue
        r = by_pattern(fields.get("rank_pattern") or {}, layer, fields["r"])
        stacked = tensor.dim() == 3 and ".experts." in f".{layer}."  # in our own files; else a Conv1d
        at = _RANK_AT[leaf] + stacked
        size = tensor.shape[at] if at < tensor.dim() else 0
        in_groups = leaf == "lora_B.weight" and tensor.dim() > 2 and not stacked  # of a convolution, each has its part
        if size != r and not (in_groups and size and r % size == 0):
            raise ValueError(
                f"{file} does not fit: {layer}.{leaf.removesuffix('.weight')} has shape {list(tensor.shape)}, and "
                f"adapter_config.json says that its rank, dimension {at} of that, is {r}"
            )


def plain_names(tensors: dict[str, Tensor], model: nn.Module, file: object) -> dict[str, Tensor]:
    """The tensors by the model's names, without the names of torch's wrappers that it had when it was saved."""
    ddp = "" if any(path == "module" for path, _ in layers(model)) else "module."
    result: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = unwrapped_name(key).removeprefix(ddp)
        if name.startswith(PREFIX):
            name = PREFIX + name.removeprefix(PREFIX).removeprefix(ddp)
        if name in result:
            raise ValueError(f"{file} holds {name} twice, once under the name of a wrapper")
        result[name] = tensor
    return result


def adapters_own(tensors: dict[str, Tensor], model: nn.Module, file: object) -> dict[str, Tensor]:
    """The tensors without those that HF PEFT adds and that are not the adapter's: the weight of an adapted layer, zeros
    for the parts that GLoRA does not use, second copies by ``bias="all"`` of a module that is saved whole, and the
    projections with which VeLoRA compresses its inputs for the backward pass.

    Raises:
        ValueError: such a weight differs from the model's, or such zeros are not 0.
    """
    result = {}
    for key, tensor in tensors.items():
        if key.endswith(_BASE):
            _check_base(key.removeprefix(PREFIX).removesuffix(_BASE), tensor, model, file)
        elif (key.endswith(".zeros") and not tensor.any()) or key.endswith(".lora_velora_embed"):
            pass
        elif any(part in key and key.replace(part, "") in tensors for part in _TWICE):
            pass
        else:
            result[key] = tensor
    return result


def _check_base(path: str, tensor: Tensor, model: nn.Module, file: object) -> None:
    if path not in (name for name, _ in layers(model)):
        raise ValueError(f"{file} is for another model: this one has no {path}")
    weight = getattr(base_of(module_at(model, path)), "weight", None)
    if weight is None or is_quantized(weight) or weight.shape != tensor.shape:
        own = "no dense weight" if weight is None or is_quantized(weight) else list(weight.shape)
        raise ValueError(f"{file} holds the weight of {path} itself, {list(tensor.shape)}; the model's is {own}")
    if not torch.equal(weight, tensor.to(weight.device, weight.dtype)):
        raise ValueError(
            f"{file} holds the weight of {path} itself, and the model has another one (PEFT saves it if the "
            f"vocabulary was resized, and by save_embedding_layers). The adapter needs that weight: "
            f"copy the file's tensor {PREFIX}{path}{_BASE} into model.get_submodule({path!r}).weight before you load it"
        )


def of_biases(tensors: dict[str, Tensor], model: nn.Module) -> set[str]:
    """The tensors that are biases of the model's own layers: as in PEFT, those with "bias" in their names."""
    parameters = lambda module: base_of(module).named_parameters(recurse=False)
    own = {f"{PREFIX}{path}.{leaf}" for path, module in layers(model) for leaf, _ in parameters(module)}
    return {key for key in own & tensors.keys() if "bias" in key}


def adapted_layers_of(
    adapter_class: type[Stored], tensors: dict[str, Tensor], model: nn.Module, whole: Sequence[str], file: object
) -> set[str]:
    """The names of the layers that the tensors adapt, without those that train whole.

    Raises:
        ValueError: a tensor does not belong to such a layer, or the model has no layer of that name.
    """
    suffixes = [f".{key}" for key in adapter_class.peft_keys.values()]
    known = {path for path, _ in layers(model)}
    found, strangers = set(), set()
    for key in tensors:
        name = key.removeprefix(PREFIX)
        owner = name.rpartition(".")[0]
        path = next((name.removesuffix(s) for s in suffixes if name.endswith(s)), None) if name != key else None
        if (path is None or owner in known) and is_within(owner, whole):
            continue
        if path is not None:
            (found if path in known else strangers).add(path)
        elif not any(fnmatch(key, shared) for shared in adapter_class.peft_shared.values()):
            raise ValueError(f"{file} has an unexpected tensor {key}")
    if strangers:
        raise ValueError(f"{file} is for another model: this one has no {some(sorted(strangers))}")
    return found


def some(things: list[str], most: int = 4) -> str:
    rest = len(things) - most
    return ", ".join(things[:most]) + (f" and {rest} more" if rest > 0 else "")
