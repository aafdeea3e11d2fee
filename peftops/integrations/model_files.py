"""A dense language model's files, read in parts, for code that works on a model block by block."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ..nn import NF4Linear, as_matrix, shell_of
from ..nn.ties import forget_broken_ties, parameter_at, tie, tied_names
from ..nn.undo import about
from ..ops import nf4_quantize
from .gguf_files import gguf_tensors, open_gguf
from .hf import gguf_file, model_config, safetensors_of


class ModelFiles:
    """A causal language model without its tensors, and the files from which they are read, some or all at a time.

    Attributes:
        model: on the meta device, except the tensors that :meth:`fill` has read.
        prequantised: whether the files hold codes already.

    Raises:
        FileNotFoundError: there is no model at ``path``.
        ValueError: the configuration is damaged.
    """

    def __init__(self, path: str | os.PathLike, *, dtype: torch.dtype, trust_remote_code: bool = False):
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

        self.path, self.folder, self.dtype, self._file = path, Path(path), dtype, gguf_file(path)
        self.config = config = model_config(path, trust_remote_code=trust_remote_code)
        self.prequantized = getattr(config, "quantization_config", None) is not None
        if self.prequantized:
            del config.quantization_config
        self._reader = open_gguf(self._file, config) if self._file else None
        self._shards = [] if self._file else safetensors_of(self.folder)
        try:
            with init_empty_weights(include_buffers=False):
                self.model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        except Exception as error:  # any error that a damaged configuration causes
            line = str(error).strip().partition("\n")[0]
            raise ValueError(f"{path}: transformers cannot build this model: {type(error).__name__}: {line}") from error
        self._names = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        self._buffers, self._held = dict(self.model.named_buffers()), set()

    def _tensors(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
        from safetensors import safe_open

        if self._file:
            known = gguf_tensors(self._file, self._reader, self._names, self.config)
            yield from ((name, lazy[...]) for name, lazy in known.items() if wanted(name))
        for shard in self._shards:
            with safe_open(shard, "pt") as tensors:
                yield from ((name, tensors.get_tensor(name)) for name in sorted(tensors.keys()) if wanted(name))

    def fill(
        self,
        quantized: Callable[[str], bool] = lambda layer: False,
        *,
        wanted: Callable[[str], bool] = lambda name: True,
        block_size: int = 64,
        double_quant: bool = True,
    ) -> None:
        """Read the tensors whose names are ``wanted``, and quantise the layers that ``quantized`` names."""
        path, model = self.path, self.model
        # A tensor of safetensors is a part of its file, and the whole file stays in memory while one of them is used.
        own = lambda tensor: tensor.to(self.dtype, copy=not self._file)
        for name, tensor in self._tensors(wanted):
            layer, _, leaf = name.rpartition(".")
            parent = model.get_submodule(layer) if name in self._names else None
            if parent is None and leaf == "inv_freq":  # of old checkpoints: the configuration gives them
                continue
            if parent is None and name in self._buffers:
                _check_fit(path, name, tensor, self._buffers[name])
                self._buffers[name].copy_(tensor)
            elif parent is None:
                raise ValueError(f"{path} has a tensor {name} that {type(model).__name__} has no place for")
            else:
                _check_fit(path, name, tensor, getattr(parent, leaf))
                if leaf == "weight" and quantized(layer):
                    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                        tensor = tensor.float()
                    with about(f"{path}: {layer}"):
                        tensor = nf4_quantize(
                            as_matrix(parent, tensor).contiguous(), block_size=block_size, double_quant=double_quant
                        )
                    replace(model, layer, NF4Linear(own(tensor), None, shell_of(parent)))
                else:
                    parent._parameters[leaf] = nn.Parameter(own(tensor), requires_grad=False)
            self._held.add(name)
            del tensor

    def finish(self) -> nn.Module:
        """The complete model; raises if tensors are missing."""
        from transformers import GenerationConfig

        model = self.model
        _tie(model, self._held)
        missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        if missing:
            raise ValueError(f"{self.path} lacks {len(missing)} tensors, among them {', '.join(missing[:4])}")
        if (self.folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(self.folder)
        model.requires_grad_(False)
        model.config._name_or_path = str(self.path)
        return model.eval()


def _check_fit(path: object, name: str, tensor: Tensor, own: Tensor) -> None:
    if tensor.shape != own.shape:
        raise ValueError(f"{path}: tensor {name} has shape {list(tensor.shape)}, the model expects {list(own.shape)}")
    if own.is_floating_point() and not tensor.is_floating_point():
        raise ValueError(f"{path}: tensor {name} has dtype {tensor.dtype}, the model expects floating-point numbers")


def _tie(model: nn.Module, held: set[str]) -> None:
    """Tie the weights that the configuration ties, unless the file has two different tensors for them: that file is of
    a model whose head or embedding was trained separately."""
    for name, source in tied_names(model).items():
        both = name in held and source in held
        one = not both or torch.equal(parameter_at(model, name), parameter_at(model, source))
        if one and name in held and source not in held:
            tie(model, source, name)
        elif one:
            tie(model, name, source)
    forget_broken_ties(model)


def replace(model: nn.Module, name: str, new: NF4Linear) -> None:
    """Replace the layer ``name`` by this layer, which gets the old one's bias."""
    parent, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent)
    new.bias = getattr(parent, leaf).bias
    setattr(parent, leaf, new)
