"""Models of transformers, read straight into 4 bits."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.qlora import BLOCK_SIZES
from ..methods.targets import ALL_LINEAR, find_targets
from ..nn import GroupLinear, NF4Linear, as_matrix, is_conv1d, shell_of
from ..nn.ties import forget_broken_ties, parameter_at, tie, tied_names
from ..nn.undo import about
from ..ops import GroupQuantTensor, NF4Tensor, nf4_quantize
from .bitsandbytes_files import PARTS, from_bitsandbytes
from .gguf_files import gguf_tensors, open_gguf
from .gptq_files import FORMAT, GPTQ_PARTS, from_gptq
from .own_files import LAYOUT, OWN_PARTS, from_own

_DERIVED = re.compile(r".*rotary_emb\.inv_freq")  # in old checkpoints; computed from the configuration, and compared


def gguf_file(path: str | os.PathLike) -> Path | None:
    """``path`` if it is a GGUF file, or the only one in the directory that it is."""
    path = Path(path)
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    files = sorted(path.glob("*.gguf"))
    return files[0] if len(files) == 1 and not (path / "config.json").exists() else None


def model_config(path: str | os.PathLike, *, trust_remote_code: bool = False) -> Any:
    """The configuration of the causal language model that is in a directory or a GGUF file.

    Raises:
        FileNotFoundError: there is no model at ``path``.
        ValueError: the file is damaged, wants to run code of its own, or the model is none of that kind.
    """
    from transformers import AutoConfig

    file, folder = gguf_file(path), Path(path)
    if not file and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no model at {path}: neither a GGUF file nor a directory with config.json")
    where, how = (file.parent, {"gguf_file": file.name}) if file else (folder, {})
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code, **how)
    except Exception as error:  # whatever a reader stumbles over in a damaged file
        name = file or folder / "config.json"
        check_own_code(path, error)
        raise ValueError(f"{name} is damaged or not supported: {_first_line(error)}") from error
    _check_causal(path, config)
    return config


def check_own_code(path: str | os.PathLike, error: Exception) -> None:
    """Say what transformers means where it wants to run code out of a model's directory."""
    if "trust_remote_code" in str(error):
        raise ValueError(f"{path} comes with Python code of its own, which is not run unless you ask for it: read it, "
                         "then allow it with --trust-remote-code, or trust_remote_code=True") from error  # fmt: skip


def _check_causal(path: str | os.PathLike, config: Any) -> None:
    """Raise for an encoder, say: transformers would build a language model of it whose head is new."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    made = getattr(config, "architectures", None)
    if made and not getattr(config, "auto_map", None):
        if not set(made) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
            raise ValueError(f"{path} is not a causal language model: it holds a {', '.join(map(str, made))} and no "
                             f"causal language model of a {config.model_type}")  # fmt: skip


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
    """Read a causal language model, each linear layer but the output layer straight into NF4.

    One tensor is read, quantised and freed before the next, so memory never holds more than the 4-bit model
    and one dense tensor. (Pages of the file itself come and go as the system likes.)

    Args:
        path: a directory with ``config.json`` and safetensors, dense, or in NF4 in bitsandbytes' layout or our own, or
            in GPTQ's, whose codes stay as they are; or a GGUF file (of a llama, qwen2 or qwen3), or a directory with
            one.
        dtype: of what is not quantised, and what the 4-bit weights stand for.
        quantize: False for a dense model.
        block_size, double_quant: see :func:`peftops.nf4_quantize`.
        trust_remote_code: run the Python code that the directory comes with; nothing ever asks for that.

    Returns:
        The model, in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: there is no model at ``path``.
        ValueError: the files are damaged, or do not hold exactly the tensors that the model has.
    """
    files = ModelFiles(path, dtype=dtype, trust_remote_code=trust_remote_code)
    linears = set(find_targets(files.model, ALL_LINEAR)) if quantize else set()
    files.fill(linears.__contains__, block_size=block_size, double_quant=double_quant)
    return files.finish()


class ModelFiles:
    """A causal language model without its tensors, and the files that these are read from, some or all at a time.

    Attributes:
        model: on the meta device, but for what :meth:`fill` has read.
        prequantised: whether the files hold codes already.
    """

    def __init__(self, path: str | os.PathLike, *, dtype: torch.dtype, trust_remote_code: bool = False):
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

        self.path, self.folder, self.dtype, self._file = path, Path(path), dtype, gguf_file(path)
        self.config = config = model_config(path, trust_remote_code=trust_remote_code)
        self.prequantised, self._bits, self._own_block = hasattr(config, "quantization_config"), None, None
        if self.prequantised:
            self._bits, self._own_block = _check_prequantised(self.folder, config.quantization_config)
            del config.quantization_config
        self._reader = open_gguf(self._file, config) if self._file else None
        try:
            with init_empty_weights(include_buffers=False):
                self.model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        except Exception as error:  # whatever the numbers of a damaged configuration lead to
            raise ValueError(f"{path}: transformers cannot build this model: {_first_line(error)}") from error
        self._names = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        self._buffers, self._held = dict(self.model.named_buffers()), set()

    def _tensors(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
        if self._file:
            return gguf_tensors(self._file, self._reader, self._names, self.config, wanted)
        tensors = _safetensors(self.folder, wanted, self._bits)
        return self._own_weights(tensors) if self._own_block else tensors

    def _own_weights(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The parts of a weight in our own layout as one. They follow each other: the names of a file are sorted."""
        layer, parts = "", {}

        def whole() -> tuple[str, Tensor]:
            own = self.model.get_submodule(layer) if f"{layer}.weight" in self._names else None
            if own is None:
                raise ValueError(f"{self.path} has a layer {layer} that {type(self.model).__name__} has no place for")
            with about(f"{self.path}: {layer}"):
                return f"{layer}.weight", from_own(parts, self._own_block, as_matrix(own, own.weight).shape, self.dtype)

        for name, tensor in tensors:
            of, _, part = name.rpartition(".weight.")
            if parts and (of != layer or part not in OWN_PARTS):
                yield whole()
                parts = {}
            if part in OWN_PARTS and of:
                layer, parts = of, {**parts, part: tensor}
            else:
                yield name, tensor
        if parts:
            yield whole()

    def fill(
        self, quantized: Callable[[str], bool] = lambda layer: False, *,
        wanted: Callable[[str], bool] = lambda name: True, block_size: int = 64, double_quant: bool = True,
    ) -> None:  # fmt: skip
        """Read the tensors whose names are ``wanted``, and quantise the layers that ``quantized`` names."""
        path, model = self.path, self.model
        # A tensor of safetensors is a part of its file, all of which stays in memory for as long as one is used.
        own = lambda tensor: tensor.to(self.dtype, copy=not self._file)
        for name, tensor in self._tensors(wanted):
            layer, _, leaf = name.rpartition(".")
            parent = model.get_submodule(layer) if name in self._names else None
            if _DERIVED.fullmatch(name):
                _check_frequencies(path, name, tensor, self._buffers)
            elif parent is None and name in self._buffers:
                _check_shape(path, name, tensor, self._buffers[name].shape)
                self._buffers[name].copy_(tensor)
            elif parent is None:
                raise ValueError(f"{path} has a tensor {name} that {type(model).__name__} has no place for")
            else:
                want = getattr(parent, leaf)
                own_layout = self._own_block and isinstance(tensor, NF4Tensor)
                _check_shape(path, name, tensor, (as_matrix(parent, want) if own_layout else want).shape)
                if isinstance(tensor, GroupQuantTensor):
                    replace(model, layer, GroupLinear(tensor.to(self.dtype), None, shell_of(parent)))
                elif leaf == "weight" and (quantized(layer) or isinstance(tensor, NF4Tensor)):
                    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                        tensor = tensor.float()
                    if not self.prequantised:
                        tensor = as_matrix(parent, tensor).contiguous()
                        with about(f"{path}: {layer}"):
                            tensor = nf4_quantize(tensor, block_size=block_size, double_quant=double_quant)
                    elif is_conv1d(parent) and not own_layout:
                        raise ValueError(f"{path} holds {layer}, a Conv1D, in NF4; read the dense model instead")
                    replace(model, layer, NF4Linear(own(tensor), None, shell_of(parent)))
                else:
                    parent._parameters[leaf] = nn.Parameter(own(tensor), requires_grad=False)
            self._held.add(name)
            del tensor

    def finish(self) -> nn.Module:
        """The model, once all of it is there."""
        model = self.model
        _tie(model, self._held)
        missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        if missing:
            raise ValueError(f"{self.path} lacks {len(missing)} tensors, among them {', '.join(missing[:4])}")
        model.requires_grad_(False)
        model.config._name_or_path = str(self.path)
        _read_generation_config(model, self.folder)
        return model.eval()


def _tie(model: nn.Module, held: set[str]) -> None:
    """Let the weights be one that the configuration ties, but for those that the file holds two different ones of: it
    is of a model whose head, or embedding, went its own way."""
    for name, source in tied_names(model).items():
        if name in held and source in held:
            one = torch.equal(parameter_at(model, name), parameter_at(model, source))
        else:
            one = True
        if one and name in held and source not in held:
            tie(model, source, name)
        elif one:
            tie(model, name, source)
    forget_broken_ties(model)


def replace(model: nn.Module, name: str, new: NF4Linear | GroupLinear) -> None:
    parent, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent)
    new.bias = getattr(parent, leaf).bias
    setattr(parent, leaf, new)


def _safetensors(folder: Path, wanted: Callable[[str], bool], bits: int | None) -> Iterator[tuple[str, Tensor]]:
    """The wanted tensors of a directory; the parts of a weight that bitsandbytes quantised, or in GPTQ's layout of
    ``bits``, as one."""
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no safetensors in {folder}; pytorch_model.bin is not read, save the model again")
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                keys = sorted(tensors.keys())
                parts = {key for key in keys if any(key.endswith(f".weight.{part}") for part in PARTS)}
                packed = {key.removesuffix(".qweight") for key in keys if bits and key.endswith(".qweight")}
                for layer in sorted(packed):
                    parts |= {f"{layer}.{key}" for key in GPTQ_PARTS}
                    if not wanted(f"{layer}.weight"):
                        continue
                    own = {key: tensors.get_tensor(f"{layer}.{key}") for key in GPTQ_PARTS if f"{layer}.{key}" in keys}
                    yield f"{layer}.weight", from_gptq(own, bits=bits, checkpoint_format=FORMAT)
                for key in keys:
                    if key in parts or not wanted(key):
                        continue
                    own = {
                        p[len(key) - len("weight") :]: tensors.get_tensor(p) for p in parts if p.startswith(f"{key}.")
                    }
                    tensor = tensors.get_tensor(key)
                    yield key, from_bitsandbytes({"weight": tensor, **own}) if own else tensor
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged or cut short: {error}") from None


def _check_prequantised(folder: Path, config: object) -> tuple[int | None, int | None]:
    """Raise unless the quantisation is one that is read; the bits of GPTQ's, and the block size of our own layout's."""
    get = config.get if isinstance(config, dict) else lambda key, default=None: getattr(config, key, default)
    if get("quant_method") == "gptq" and get("checkpoint_format") == FORMAT:
        return get("bits"), None
    if get("quant_method") == LAYOUT and get("format") == "nf4":
        if get("block_size") not in BLOCK_SIZES:
            raise ValueError(f"{folder}: block_size must be one of {BLOCK_SIZES}, not {get('block_size')}")
        return None, get("block_size")
    if get("quant_method") != "bitsandbytes" or get("bnb_4bit_quant_type") != "nf4":
        raise ValueError(f"{folder} is quantised already, by {get('quant_method')}; only NF4 of bitsandbytes is read, "
                         f"and GPTQ with checkpoint_format {FORMAT!r}")  # fmt: skip
    return None, None


def _check_frequencies(path: object, name: str, tensor: Tensor, buffers: dict[str, Tensor]) -> None:
    own = [value for key, value in buffers.items() if _DERIVED.fullmatch(key) and value.shape == tensor.shape]
    # (in as many digits as the file has)
    if not any(torch.allclose(tensor.float(), value.to(tensor.dtype).float(), rtol=1e-2, atol=1e-7) for value in own):
        raise ValueError(f"{path}: {name} has other rotary frequencies than those that its configuration gives")


def _check_shape(path: object, name: str, tensor: Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{path}: tensor {name} has shape {list(tensor.shape)}, the model expects {list(shape)}")


def _read_generation_config(model: nn.Module, folder: Path) -> None:
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
