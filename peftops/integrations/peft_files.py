"""Adapters in HF PEFT's own format: ``adapter_config.json`` and ``adapter_model.safetensors``.

``peftops.json`` beside them has the facts for which PEFT has no field (the method, and how its base was quantised).
PEFT does not read it.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..attaching import METHODS, attach, attachment, detach, hosts
from ..attaching.targets import exact_target, is_within
from ..attaching.targets import layers as modules_of
from ..nn import PREFIX, Select, Stored, opened, unwrapped, unwrapped_name
from ..nn.undo import all_or_nothing
from . import peft_experts
from .files import writable_directory
from .peft_tensors import adapted_layers_of, adapters_own, check_ranks, of_biases, plain_names, some
from .peft_whole import with_whole
from .together import write_together

CONFIG, WEIGHTS, OWN = "adapter_config.json", "adapter_model.safetensors", "peftops.json"
# The end of a model's class: PEFT's name of its task, and names of heads; PEFT expects one of these heads in the file.
_TASKS = {
    "ForSequenceClassification": ("SEQ_CLS", {"classifier", "score"}),
    "ForTokenClassification": ("TOKEN_CLS", {"classifier", "score"}),
    "ForQuestionAnswering": ("QUESTION_ANS", {"qa_outputs"}),
}
VERSION = 1  # of peftops.json, and of its statements about the tensors


def save(model: nn.Module, directory: str | os.PathLike, *, name: str | None = None) -> None:
    """Write an attached adapter so that HF PEFT, and :func:`load`, can read it.

    If FSDP2 has sharded it, all ranks must call this: the shards are gathered, and rank 0 writes.

    Args:
        directory: made if it does not exist. Files of another adapter in it are replaced in one step: if the process is
            killed, the directory has either the old adapter or the new one.
        name: which adapter; by default the active one.

    Raises:
        ValueError: there is no such adapter, or it is not finite.
        OSError: the directory cannot be written to, or has no room.

    Examples:
        >>> peftops.save(peftops.attach(llama(), peftops.LoRAConfig(r=2)), "adapter")
        >>> import os
        >>> sorted(os.listdir("adapter"))
        ['adapter_config.json', 'adapter_model.safetensors', 'peftops.json']
    """
    write_adapter(model, directory, name=name)


def write_adapter(
    model: nn.Module,
    directory: str | os.PathLike,
    *,
    name: str | None = None,
    given: dict[str, Tensor] | None = None,
    here: bool = True,
) -> None:
    """:func:`save`, from tensors that the caller has gathered, or in a process that does not write.

    Args:
        given: a state dict of the model that has the adapter, perhaps with the names of torch's wrappers.
        here: whether this process writes.

    Raises:
        ValueError: ``given`` lacks a tensor of the adapter.
    """
    model = unwrapped(model)
    state = attachment(model)
    name = state.switch.active if name is None else name
    if name not in state.configs:
        raise ValueError(f"the model has no adapter named {name!r}; it has {', '.join(state.configs)}")
    adapters = adapters_of(model, name) if given is None else _adapters_in(given, model, name)
    config = state.configs[name].as_built(adapters)
    tensors, rank = {}, 0
    for path, adapter in adapters.items():
        for key, tensor in adapter.stored().items():
            if hasattr(tensor, "full_tensor"):  # a DTensor
                rank, tensor = tensor.device_mesh.get_rank(), tensor.full_tensor()
            tensors[_key(config, adapter, key, path)] = tensor.detach().cpu().contiguous()
    if rank != 0 or not here:
        return
    _check_finite(tensors, f"the adapter {name!r}")
    chosen = lambda path: type(adapters[path]) is not Select and not is_within(path, config.modules_to_save)
    adapted = [path for path in adapters if chosen(path)]
    own_fields = config.to_peft()
    peft_knows = own_fields["peft_type"] == "LORA"
    if peft_knows:
        tensors = peft_experts.to_peft(tensors, model)
    split = peft_experts.split_target if peft_knows else lambda *found: {"target_modules": exact_target(*found)}
    targets = split(model, adapted) if _target_field(config) else {}
    fields = {
        **own_fields,
        **targets,
        **({"modules_to_save": list(config.modules_to_save)} if config.modules_to_save else {}),
        "task_type": _task(model, config),
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
        "auto_mapping": None,
        "revision": None,
    }
    folder = writable_directory(directory, sum(t.nbytes for t in tensors.values()) + 2**20)
    text = lambda value: json.dumps(value, indent=2, sort_keys=True, default=sorted) + "\n"  # (a set as a list)
    write_together(
        folder,
        {
            WEIGHTS: lambda path: save_file(tensors, path, metadata={"format": "pt"}),
            OWN: lambda path: path.write_text(text(_said(config))),
            CONFIG: lambda path: path.write_text(text(fields)),
        },
    )


def adapters_of(model: nn.Module, name: str) -> dict[str, Stored]:
    """The parts of an adapter, by the names of their layers and bodies."""
    return {path: host.adapters[name] for path, host in hosts(model) if name in host.adapters}


def _adapters_in(given: dict[str, Tensor], model: nn.Module, name: str) -> dict[str, Stored]:
    """Copies of the parts of an adapter, with the tensors of a state dict of the model."""
    known = {unwrapped_name(key): tensor for key, tensor in given.items()}
    known |= {key.removeprefix("module."): tensor for key, tensor in known.items()}  # of DistributedDataParallel
    own = {id(p): unwrapped_name(key) for key, p in model.named_parameters()}
    result = {}
    for path, host in hosts(model):
        if name in host.adapters:
            names = [own[id(p)] for p in host.adapters[name].parameters()]
            lacking = [key for key in names if key not in known]
            if lacking:
                raise ValueError(f"state_dict has no {lacking[0]}, which is of the adapter {name!r}")
            # Objects in the memo are not copied but taken from there: a part may refer to its layer.
            memo = {id(p): nn.Parameter(known[own[id(p)]], False) for p in host.adapters[name].parameters()}
            memo |= {id(layer): layer for layer in (host, getattr(host, "base", None))}
            result[path] = copy.deepcopy(host.adapters[name], memo)
    return result


def load(
    model: nn.Module, directory: str | os.PathLike, *, name: str = "default", quantize: bool | None = None
) -> nn.Module:
    """Attach an adapter that :func:`save` or HF PEFT wrote; the reverse of both.

    Args:
        model: the base that the adapter was trained on; changed and returned.
        directory: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        name: what to call the adapter here.
        quantize: whether to quantise a dense base to NF4 as for training. By default that is done if peftops' QLoRA
            made the adapter.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or not finite, the method or an option is not supported, or the tensors are not
            exactly those of the config and the model; nothing has changed then.

    Examples:
        >>> peftops.save(peftops.attach(llama(), peftops.LoRAConfig(r=2)), "adapter")
        >>> peftops.summary(peftops.load(llama(), "adapter", name="again")).active
        'again'
    """
    folder = Path(directory)
    config, tensors = read_adapter(folder, quantize)
    with opened(model):
        _load(model, folder, name, config, tensors)
    return model


def _load(model: nn.Module, folder: Path, name: str, config: Any, tensors: dict[str, Tensor]) -> None:
    tensors = _of_model(tensors, model, config, folder / WEIGHTS)
    # PEFT lists every name that a head may have: a name that is neither in the file nor in the model has no meaning.
    owners = [_owner(key) for key in tensors] + [path for path, _ in modules_of(model)]
    whole = tuple(name for name in config.modules_to_save if any(is_within(owner, [name]) for owner in owners))
    if _target_field(config) == "target":
        tensors, whole = with_whole(tensors, _read_json(folder / CONFIG), model, whole, folder / WEIGHTS)
    config = dataclasses.replace(config, modules_to_save=whole)
    field = _target_field(config)
    if field:
        # The tensors tell the adapted layers: PEFT has several more options to choose them.
        biases = of_biases(tensors, model) if getattr(config, "bias", None) == "all" else set()
        rest = {key: tensor for key, tensor in tensors.items() if key not in biases}
        adapted = adapted_layers_of(METHODS[type(config)], rest, model, whole, folder / WEIGHTS)
        if not adapted:
            raise ValueError(f"{folder / WEIGHTS} has no tensor of an adapted layer")
        config = dataclasses.replace(config, **{field: exact_target(model, adapted)})
    with all_or_nothing(model):
        attach(model, config, name=name)
        try:
            _fill(model, config, name, tensors, folder / WEIGHTS)
        except BaseException:
            detach(model, name)
            raise


def _of_model(tensors: dict[str, Tensor], model: nn.Module, config: Any, file: Path) -> dict[str, Tensor]:
    """The tensors of a file by their names in this model, without tensors that do not belong to the adapter."""
    tensors = plain_names(tensors, model, file)
    if hasattr(config, "target"):
        tensors = peft_experts.from_peft(tensors, model, config, file)
    _check_sizes(config, tensors, file)
    return adapters_own(tensors, model, file)


def refill(model: nn.Module, directory: str | os.PathLike) -> None:
    """Copy an adapter that :func:`save` wrote into the active adapter, which has the same method and options; nothing
    else changes.

    Raises:
        FileNotFoundError, ValueError: as :func:`load`; or the files are of another method or have other options.
    """
    folder, state = Path(directory), attachment(model)
    name = state.switch.active
    config, tensors = read_adapter(folder)
    built = state.configs[name].as_built(adapters_of(model, name))
    check_same(built, folder)
    with opened(model):
        _fill(model, config, name, _of_model(tensors, model, config, folder / WEIGHTS), folder / WEIGHTS)


def check_same(config: Any, folder: Path) -> None:
    """Raise a ValueError unless the files in ``folder`` are of the method, and were made with the options."""
    own = _read_json(folder / OWN)
    here = json.loads(json.dumps(_said(config), default=sorted))
    if own.get("method") != here["method"]:
        raise ValueError(f"{folder} is of {own.get('method')}, and the model's adapter of {here['method']}")
    was, now = own.get("options") or {}, here["options"]
    differing = [key for key in {**now, **was} if was.get(key) != now.get(key)]
    other = [f"{key}={was.get(key)!r} (here {now.get(key)!r})" for key in differing]
    if other:
        raise ValueError(f"{folder} was made with other options: {', '.join(other)}")


def _said(config: Any) -> dict[str, Any]:
    """The content of peftops.json."""
    return {"version": VERSION, "method": type(config).__name__, "options": dataclasses.asdict(config)}


def read_adapter(directory: str | os.PathLike, quantize: bool | None = None) -> tuple[Any, dict[str, Tensor]]:
    """The options and tensors of an adapter's files, by their keys; raises the errors of :func:`load` about files."""
    folder = Path(directory)
    fields, own = _read_json(folder / CONFIG), {}
    if (folder / OWN).exists():
        own = _read_json(folder / OWN)
    try:
        config, tensors = _config(fields, own, quantize), read_tensors(folder / WEIGHTS)
        check_ranks(fields, tensors, folder / WEIGHTS)
        return config, config.tensors_from_peft(fields, tensors)
    except (AttributeError, LookupError, ArithmeticError, TypeError) as error:  # fields of another kind than theirs
        raise ValueError(f"{folder / CONFIG} or {OWN} is damaged: {error}") from error


def _task(model: nn.Module, config: Any) -> str | None:
    """PEFT's name of the task of a model of transformers; PEFT needs it for prompts."""
    if not getattr(model, "can_generate", lambda: False)():
        matching = (named for kind, named in _TASKS.items() if type(model).__name__.endswith(kind))
        return next((task for task, heads in matching if heads & set(config.modules_to_save)), None)
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def _target_field(config: Any) -> str | None:
    """The option that chooses the adapted layers; None if the method has no such option."""
    return config.target_field if hasattr(config, config.target_field or "") else None


def _key(config: Any, adapter: Stored, name: str, path: str) -> str:
    """The name of an adapter's tensor in a file."""
    key = adapter.file_key(name, path)
    return config.peft_prefix + key.removeprefix(PREFIX) if key.startswith(PREFIX) else key


def _owner(key: str) -> str:
    """The name of the module of a file's tensor, perhaps after a part of PEFT's prefix."""
    return key.removeprefix(PREFIX).rpartition(".")[0]


_SIZES = ("n", "tokens", "width", "image_features")  # options that are a dimension of some tensor


def _check_sizes(config: Any, tensors: dict[str, Tensor], file: Path) -> None:
    """Raise if an option is larger than every dimension in the file, before memory for it is allocated."""
    most = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    asked = {name: getattr(config, name, None) or 0 for name in _SIZES}
    if hasattr(config, "rank_and_scaling"):
        asked |= {f"the rank of {layer}": config.rank_and_scaling(layer)[0] for layer in {_layer(k) for k in tensors}}
    else:
        asked["r"] = getattr(config, "r", 0)
    for name, value in asked.items():
        if value > most:
            raise ValueError(f"{file} does not fit: {name} is {value}, no tensor in it has a dimension above {most}")


def _layer(key: str) -> str:
    """The name of the layer of a tensor of LoRA's family."""
    return key.removeprefix(PREFIX).partition(".lora_")[0]


@torch.no_grad()
def _fill(model: nn.Module, config: Any, name: str, tensors: dict[str, Tensor], file: Path) -> None:
    """Copy the tensors into the adapters. All tensors are checked before the first is copied: they must be complete and
    fit."""
    wrong, used, filled = [], set(), []
    for path, host in hosts(model):
        if name not in host.adapters:
            continue
        adapter = host.adapters[name]
        stored = adapter.stored()
        keys = {parameter: _key(config, adapter, parameter, path) for parameter in stored}
        used.update(keys.values())
        missing = [parameter for parameter, key in keys.items() if key not in tensors]
        wrong += [f"{path}.{parameter} is missing" for parameter in missing]
        if missing:
            continue
        given = {parameter: tensors[key].to(stored[parameter].device) for parameter, key in keys.items()}
        own = adapter.complete(given)
        wrong += [
            f"{path}.{parameter} has shape {list(own[parameter].shape)}, expected {list(tensor.shape)}"
            for parameter, tensor in stored.items()
            if own[parameter].shape != tensor.shape
        ]
        filled.append((adapter, own))
    wrong += [f"{key} is unexpected" for key in sorted(tensors.keys() - used)]
    if wrong:
        raise ValueError(f"{file} does not fit: {some(wrong)}")
    for adapter, own in filled:
        adapter.restore(own)


def _config(fields: dict, own: dict, quantize: bool | None) -> Any:
    """The options of the adapter in a file."""
    version = own.get("version", VERSION)
    if version > VERSION:
        raise ValueError(f"{OWN} is of version {version}, made by a newer peftops; this one reads up to {VERSION}")
    kind = fields.get("peft_type")
    family = [config for config in METHODS if getattr(config, "peft_type", None) == kind or config.claims(fields)]
    if kind is None or not family:
        known = sorted({config.peft_type for config in METHODS if hasattr(config, "peft_type")})
        raise ValueError(f"peft_type {kind!r} is not supported; {', '.join(known)} are")
    main = next((config for config in family if vars(config).get("peft_type") == kind), family[0])
    chosen = next((config for config in family if config.__name__ == own.get("method")), None)
    chosen = chosen or next((config for config in family if config.claims(fields)), main)
    if quantize is not None and quantize != chosen.quantizes:
        chosen = next((config for config in family if config.quantizes == quantize), chosen)
    new = {field.name for field in dataclasses.fields(chosen)} - {field.name for field in dataclasses.fields(main)}
    config = chosen.from_peft(fields, **{key: value for key, value in own.get("options", {}).items() if key in new})
    saved = fields.get("modules_to_save") or []
    if not isinstance(saved, list):
        raise ValueError(f"{CONFIG}: modules_to_save must be a list of names, not {saved!r}")
    return dataclasses.replace(config, modules_to_save=tuple(saved))


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no {path.name} in {path.parent}; is it the directory of an adapter?") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(value).__name__}, not an object")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise FileNotFoundError(f"no {path.name} in {path.parent}; is it the directory of an adapter?")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from None
    _check_finite(tensors, path)
    return tensors


def _check_finite(tensors: dict[str, Tensor], owner: object) -> None:
    """Raise if a tensor is not finite: such an adapter must not be deployed."""
    for key, tensor in tensors.items():
        wide = tensor.float() if tensor.element_size() == 1 else tensor  # bytes have no such test of their own
        if tensor.is_floating_point() and not wide.isfinite().all():
            raise ValueError(f"{owner} is not finite: {key} holds NaN or infinity")
