"""Models of transformers, read straight into 4 bits."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..nn.ties import forget_broken_ties
from .gguf_files import gguf_tensors, open_gguf
from .gptq_files import FORMAT, FORMATS

_DERIVED = re.compile(r".*rotary_emb\.inv_freq")  # in old checkpoints; computed from the configuration and compared


def gguf_file(path: str | os.PathLike) -> Path | None:
    """``path`` if it is a GGUF file, or the only GGUF file in the directory ``path``."""
    path = Path(path)
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    files = sorted(path.glob("*.gguf"))
    return files[0] if len(files) == 1 and not (path / "config.json").exists() else None


def model_config(path: str | os.PathLike, *, trust_remote_code: bool = False) -> Any:
    """The configuration of the causal language model that is in a directory or a GGUF file.

    Raises:
        FileNotFoundError: there is no model at ``path``.
        ValueError: the file is damaged, needs code of its own, or is not a causal language model.
    """
    config = _config(path, trust_remote_code)
    _check_causal(path, config)
    return config


def _config(path: str | os.PathLike, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    file, folder = gguf_file(path), Path(path)
    if not file and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no model at {path}: neither a GGUF file nor a directory with config.json")
    where, how = (file.parent, {"gguf_file": file.name}) if file else (folder, {})
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code, **how)
    except Exception as error:  # any error that a reader raises for a damaged file
        name = file or folder / "config.json"
        check_own_code(path, error)
        raise ValueError(f"{name} is damaged or not supported: {_first_line(error)}") from error
    return config


def check_own_code(path: str | os.PathLike, error: Exception) -> None:
    """Raise a clear error if transformers would ask to run code from a model's directory."""
    if "trust_remote_code" in str(error):
        raise ValueError(
            f"{path} comes with Python code of its own, which is not run unless you ask for it: read it, "
            "then allow it with --trust-remote-code, or trust_remote_code=True"
        ) from error


def _check_causal(path: str | os.PathLike, config: Any) -> None:
    """Raise for other models, such as an encoder: transformers would build a language model with a new head from it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    made = getattr(config, "architectures", None)
    if made and not getattr(config, "auto_map", None):
        if not set(made) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
            raise ValueError(
                f"{path} is not a causal language model: it holds a {', '.join(map(str, made))} and no "
                f"causal language model of a {config.model_type}"
            )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def load_model(
    path: str | os.PathLike,
    *,
    dtype: torch.dtype = torch.float32,
    quantize: bool = True,
    block_size: int = 64,
    double_quant: bool = True,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Read a model of transformers, each linear layer except the output layer directly into NF4.

    This is ``from_pretrained(path, quantization_config=NF4Config(...))`` of the class that the files name, with one
    difference: files that do not fit the model exactly are an error, and no parameter is new or random. One tensor is
    read, quantised and freed before the next, so memory holds at most the 4-bit model and one dense tensor. (The system
    may keep pages of the file itself.)

    Args:
        path: a directory with ``config.json`` and safetensors: dense, in our codes as ``save_pretrained`` writes them,
            in NF4 of bitsandbytes, or in GPTQ's layout (codes are not changed); or a GGUF file (of a llama, qwen2,
            qwen3 or gemma3), or a directory with one.
        dtype: of the parameters that are not quantised, and of the weights that the codes stand for.
        quantize: False leaves the model in the format of its files.
        block_size, double_quant: see :func:`peftops.nf4_quantize`.
        trust_remote_code: run the Python code in the directory; without it such a model is an error, and no prompt
            asks.

    Returns:
        The model, in evaluation mode, on the CPU, and frozen.

    Raises:
        FileNotFoundError: there is no model at ``path``.
        ValueError: the files are damaged, or do not hold exactly the tensors that the model has.

    Examples:
        >>> llama().save_pretrained("model")
        >>> model = peftops.load_model("model", quantize=True)
        >>> type(model.model.layers[0].mlp.up_proj.weight).__name__
        'NF4Tensor'
    """
    from .quantizer import NF4Config, release_files

    file, folder = gguf_file(path), Path(path)
    config = _config(path, trust_remote_code)
    files = [] if file else safetensors_of(folder)
    given = getattr(config, "quantization_config", None)
    if given is not None:
        config.quantization_config = _codes_config(folder, given)
    options: dict[str, Any] = {"config": config, "dtype": dtype, "output_loading_info": True}
    packed = _keys(files, r".*\.weight\.packed")
    if given is None and (quantize or packed):
        options["quantization_config"] = NF4Config(block_size=block_size, double_quant=double_quant)
    kind = _class_of(path, config, trust_remote_code)
    if file:
        reader = open_gguf(file, config)
        options["state_dict"] = gguf_tensors(file, reader, _names(path, kind, config), config)
        where = None
    else:
        where = folder
        options |= {"use_safetensors": True, "local_files_only": True, "trust_remote_code": trust_remote_code}
    with _quiet():
        try:
            model, info = _checked(path, kind).from_pretrained(where, **options)
            _check(path, model, info["missing_keys"], info["mismatched_keys"], info["unexpected_keys"])
            _check_dtypes(path, model, files if given is None and not packed else [])
        except _Unfit as error:
            raise ValueError(str(error)) from None
        except Exception as error:  # any error that damaged files cause
            check_own_code(path, error)
            raise ValueError(f"{path}: {error if isinstance(error, ValueError) else _first_line(error)}") from error
    if hasattr(kind, _FINALIZE):
        model.__class__ = kind
    _check_frequencies(path, files, model)
    release_files(model)
    forget_broken_ties(model)
    model.requires_grad_(False)
    model.config._name_or_path = str(path)
    return model


_FINALIZE = "_finalize_model_loading"  # there transformers fills in parameters that files lack


class _Unfit(Exception):
    """Raised if the files do not fit the model."""


def _class_of(path: object, config: Any, trust_remote_code: bool) -> Any:
    """The class of a model by its configuration, or the automatic class that finds it in the model's own code."""
    import transformers

    if trust_remote_code and getattr(config, "auto_map", None):
        return transformers.AutoModelForCausalLM
    made = (getattr(config, "architectures", None) or [None])[0]
    causal = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    found = getattr(transformers, str(made), None) if made or type(config) not in causal else causal[type(config)]
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ValueError(
            f"{path} holds a {made or config.model_type}, which is not a model of transformers "
            f"{transformers.__version__}"
        )
    return found


def _checked(path: object, kind: Any) -> Any:
    """The class, changed to raise before it makes parameters that its files lack: these could be larger than the
    files."""
    if not hasattr(kind, _FINALIZE):
        return kind

    def finalize(model: nn.Module, load_config: Any, info: Any) -> Any:
        _check(path, model, info.missing_keys, info.mismatched_keys, ())
        return getattr(kind, _FINALIZE)(model, load_config, info)

    return type(kind.__name__, (kind,), {"__module__": kind.__module__, _FINALIZE: staticmethod(finalize)})


def _check(path: object, model: nn.Module, missing: Any, mismatched: Any, unexpected: Any) -> None:
    for name, shape, expected in sorted(mismatched):
        raise _Unfit(f"{path}: tensor {name} has shape {list(shape)}, the model expects {list(expected)}")
    groups: dict[str, set[str]] = {}
    for name, source in model.all_tied_weights_keys.items():
        groups.setdefault(source, {source}).add(name)
    tied = {name: group for group in groups.values() for name in group}
    ignored = [*(model._keys_to_ignore_on_load_missing or ())]
    lacks = sorted(
        name
        for name in missing
        if tied.get(name, {name}) <= set(missing) and not any(re.search(pattern, name) for pattern in ignored)
    )
    if lacks:
        raise _Unfit(f"{path} lacks {len(lacks)} tensors, among them {', '.join(lacks[:4])}")
    if unexpected:
        raise _Unfit(f"{path} has a tensor {min(unexpected)} that {type(model).__name__} has no place for")


def _check_dtypes(path: object, model: nn.Module, dense_files: list[Path]) -> None:
    """Raise if a weight consists of integers. transformers keeps them beside codes, and converts those of dense files
    to floating-point numbers, so that only the files can tell."""
    from safetensors import safe_open

    own = dict(model.named_parameters(remove_duplicate=False))
    found = {name: parameter.dtype for name, parameter in own.items() if not parameter.is_floating_point()}
    buffers = {_leaf(name) for name, _ in model.named_buffers()}  # of integers in some models
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    for file in dense_files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                whole = not tensors.get_slice(name).get_dtype().startswith(("F", "BF"))
                spared = _leaf(name) in buffers or any(re.search(pattern, name) for pattern in ignored)
                if whole and (name in own or not spared):
                    found[name] = tensors.get_tensor(name).dtype
    for name, dtype in found.items():
        raise _Unfit(f"{path}: tensor {name} has dtype {dtype}, the model expects floating-point numbers")


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _names(path: object, kind: Any, config: Any) -> set[str]:
    try:
        with torch.device("meta"):
            model = kind(config)
    except Exception as error:  # any error that a damaged configuration causes
        raise ValueError(f"{path}: transformers cannot build this model: {_first_line(error)}") from error
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Turns off transformers' warnings, because errors say the same here, and its progress bars, unless they are asked
    for."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def safetensors_of(folder: Path) -> list[Path]:
    """The safetensors files of a directory that transformers reads, without others such as consolidated.safetensors."""
    from safetensors import SafetensorError, safe_open

    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        files = [single]
    elif index.exists():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            files = sorted(folder / name for name in names)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{index} is damaged: {_first_line(error)}") from None
    else:
        raise FileNotFoundError(f"no safetensors in {folder}; pytorch_model.bin is not read, save the model again")
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except FileNotFoundError:
            raise FileNotFoundError(f"no {file.name} in {folder}, which {index.name} names") from None
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged or cut short: {error}") from None
    return files


def _keys(files: list[Path], pattern: str) -> list[tuple[Path, str]]:
    """The tensors whose whole names match."""
    from safetensors import safe_open

    found = []
    for file in files:
        with safe_open(file, "pt") as tensors:
            found += [(file, key) for key in tensors.keys() if re.fullmatch(pattern, key)]
    return found


def _codes_config(folder: Path, given: Any) -> dict[str, Any]:
    """The format of codes in a configuration, as one of our configurations; raises for a format that cannot be read."""
    from .code_configs import GROUP_SIZES

    get = given.get if isinstance(given, dict) else lambda key, default=None: getattr(given, key, default)
    method, form = get("quant_method"), get("checkpoint_format", FORMAT)
    if method in ("peftops_nf4", "peftops_group", "peftops_mxfp4") and isinstance(given, dict):
        return given
    # (The tensors tell the size of groups; this value is for files that are written again.)
    size = {"group_size": get("group_size")} if get("group_size") in GROUP_SIZES else {}
    group = {"quant_method": "peftops_group", **size}
    if method == "gptq" and get("bits") and form in FORMATS:
        return {**group, "layout": "gptq", "bits": get("bits"), "checkpoint_format": form}
    if (
        method == "awq"
        and (str(get("version", "gemm")).lower(), get("bits", 4)) == ("gemm", 4)
        and get("zero_point", 1)
    ):
        return {**group, "layout": "awq"}
    if method == "bitsandbytes" and get("bnb_4bit_quant_type") == "nf4":
        return {
            "quant_method": "peftops_nf4",
            "layout": "bitsandbytes",
            "double_quant": get("bnb_4bit_use_double_quant") is not False,
        }
    if method == "mxfp4":
        return {"quant_method": "peftops_mxfp4", "layout": "mxfp4"}
    raise ValueError(
        f"{folder} is quantised already, by {method}; only our own formats, NF4 of bitsandbytes, "
        f"MXFP4, AWQ and GPTQ are read, the last two with version gemm (and zero_point) and with checkpoint_format "
        f"{' or '.join(FORMATS)}"
    )


def _check_frequencies(path: object, files: list[Path], model: nn.Module) -> None:
    """Raise unless the rotary frequencies of an old checkpoint are those that the configuration gives."""
    from safetensors import safe_open

    for file, name in _keys(files, _DERIVED.pattern):
        with safe_open(file, "pt") as tensors:
            stored = tensors.get_tensor(name)
        own = [value for key, value in model.named_buffers() if _DERIVED.fullmatch(key) and value.shape == stored.shape]
        # (with the precision of the file)
        close = lambda value, stored=stored: torch.allclose(stored.float(), value.to(stored.dtype).float(), 1e-2, 1e-7)
        if not any(map(close, own)):
            raise ValueError(f"{path}: {name} has other rotary frequencies than those that its configuration gives")
