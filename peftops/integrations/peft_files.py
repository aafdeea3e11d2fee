"""Adapters in HF PEFT's own format: ``adapter_config.json`` and ``adapter_model.safetensors``.

What PEFT has no field for (which method it was, how its base was quantised) is in ``peftops.json`` beside
them, which PEFT does not read.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..methods import METHODS, adapted_layers, attach, attachment, detach
from ..methods.lora import LoRAConfig
from ..methods.targets import suffixes_or_names
from .files import write_atomically, writable_directory

CONFIG, WEIGHTS, OWN = "adapter_config.json", "adapter_model.safetensors", "peftops.json"
_PREFIX = "base_model.model."  # PEFT's wrappers around the model


def save(model: nn.Module, directory: str | os.PathLike, *, name: str | None = None) -> None:
    """Write an attached adapter so that HF PEFT, and :func:`load`, can read it.

    Args:
        directory: made if it is not there; files of another adapter in it are replaced, each at once.
        name: which adapter; by default the active one.

    Raises:
        ValueError: there is no such adapter.
        OSError: the directory cannot be written to, or has no room.
    """
    state = attachment(model)
    name = state.switch.active if name is None else name
    if name not in state.configs:
        raise ValueError(f"the model has no adapter named {name!r}; it has {', '.join(state.configs)}")
    config = state.configs[name]
    tensors, layers = {}, []
    for path, layer in adapted_layers(model):
        if name in layer.adapters:
            layers.append(path)
            adapter = layer.adapters[name]
            for parameter, key in adapter.peft_keys.items():
                tensors[f"{_PREFIX}{path}.{key}"] = getattr(adapter, parameter).detach().cpu().contiguous()

    fields = {
        **config.to_peft(),
        "target_modules": suffixes_or_names(model, layers),
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
        "auto_mapping": None,
        "revision": None,
    }
    own = {"method": type(config).__name__, "options": dataclasses.asdict(config)}
    folder = writable_directory(directory, sum(t.nbytes for t in tensors.values()) + 2**20)
    text = lambda value: json.dumps(value, indent=2, sort_keys=True) + "\n"
    write_atomically(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    write_atomically(folder / OWN, lambda path: path.write_text(text(own)))
    write_atomically(folder / CONFIG, lambda path: path.write_text(text(fields)))


def load(
    model: nn.Module, directory: str | os.PathLike, *, name: str = "default", quantize: bool | None = None
) -> nn.Module:
    """Attach an adapter that :func:`save` or HF PEFT wrote; the reverse of both.

    Args:
        model: the base that the adapter was trained on; changed and returned.
        directory: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        name: what to call the adapter here.
        quantize: whether to quantise a dense base to NF4 as for training. By default it is if the adapter
            was made by QLoRA here.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, the method or an option is not supported, or the tensors are not
            exactly those of the config and the model; nothing has changed then.
    """
    folder = Path(directory)
    fields, own = _read_json(folder / CONFIG), {}
    if (folder / OWN).exists():
        own = _read_json(folder / OWN)
    tensors = _read_tensors(folder / WEIGHTS)
    config = _config(fields, own, quantize)

    layers: dict[str, dict[str, Tensor]] = {}
    keys = {f".{key}": parameter for parameter, key in METHODS[type(config)].peft_keys.items()}
    for key, tensor in tensors.items():
        suffix = next((s for s in keys if key.endswith(s)), None)
        if not key.startswith(_PREFIX) or suffix is None:
            raise ValueError(f"{folder / WEIGHTS} has an unexpected tensor {key}")
        layers.setdefault(key[len(_PREFIX) : -len(suffix)], {})[keys[suffix]] = tensor
    known = {path for path, _ in model.named_modules()}
    strangers = sorted(path for path in layers if path not in known)
    if strangers:
        raise ValueError(f"{folder / WEIGHTS} is for another model: this one has no {_some(strangers)}")

    # The tensors tell best which layers are adapted: PEFT has several more ways to choose them.
    attach(model, dataclasses.replace(config, target=sorted(layers)), name=name)
    try:
        _fill(model, name, layers, folder / WEIGHTS)
    except BaseException:
        detach(model, name)
        raise
    return model


@torch.no_grad()
def _fill(model: nn.Module, name: str, layers: dict[str, dict[str, Tensor]], file: Path) -> None:
    """Copy the tensors into the adapters, all of which must be there and fit, before the first is copied."""
    copies, wrong = [], []
    for path, layer in adapted_layers(model):
        if name not in layer.adapters:
            continue
        for parameter in layer.adapters[name].peft_keys:
            target, source = getattr(layer.adapters[name], parameter), layers[path].get(parameter)
            if source is None:
                wrong.append(f"{path}.{parameter} is missing")
            elif source.shape != target.shape:
                wrong.append(f"{path}.{parameter} has shape {list(source.shape)}, expected {list(target.shape)}")
            else:
                copies.append((target, source))
    if wrong:
        raise ValueError(f"{file} does not fit: {_some(wrong)}")
    for target, source in copies:
        target.copy_(source)


def _config(fields: dict, own: dict, quantize: bool | None) -> object:
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"peft_type {kind!r} is not supported; LORA is")
    missing = [key for key in ("r", "lora_alpha", "target_modules") if key not in fields]
    if missing:
        raise ValueError(f"{CONFIG} lacks {', '.join(missing)}")
    from ..methods.qlora import QLoRAConfig

    if quantize is None:
        quantize = own.get("method") == QLoRAConfig.__name__
    if not quantize:
        return LoRAConfig.from_peft(fields)
    options = own.get("options", {})
    chosen = {key: options[key] for key in ("block_size", "double_quant") if key in options}
    return QLoRAConfig.from_peft(fields, **chosen)


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no {path.name} in {path.parent}; is it the directory of an adapter?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(value).__name__}, not an object")
    return value


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise FileNotFoundError(f"no {path.name} in {path.parent}; is it the directory of an adapter?")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from None


def _some(things: list[str], most: int = 4) -> str:
    rest = len(things) - most
    return ", ".join(things[:most]) + (f" and {rest} more" if rest > 0 else "")
