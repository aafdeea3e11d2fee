"""The plug-in that lets transformers' ``from_pretrained`` read models into our formats, one tensor after the other.

transformers makes the model without memory; :class:`CodesQuantizer` puts our layers where linear ones are, and gets
each tensor of the files once transformers has renamed and converted it as it does for this kind of model.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..attaching.config import check_choice
from ..attaching.targets import ALL_LINEAR, find_targets, is_linear, layers
from ..methods.qlora import BLOCK_SIZES
from ..nn import (
    EXPERTS,
    LINEAR,
    ExpertsLinear,
    PackedLinear,
    as_matrix,
    close_experts,
    dense_matrix,
    is_conv1d,
    is_quantized,
    open_experts,
    opened,
    shell_of,
    stack_layer,
    stacks_of,
    with_matrix,
)
from ..ops import group_quantize, nf4_quantize
from .bitsandbytes_files import to_bitsandbytes
from .code_files import OWN_PARTS, Layout
from .expert_codes import with_codes
from .gptq_files import FORMAT, to_gptq


class _CodesConfig(QuantizationConfigMixin):
    """Both configurations share this: which layers stay dense, and how files are laid out."""

    quant_method: str
    layouts: ClassVar[tuple[str, ...]]

    def _set(self, skip: Any, layout: str, quant_method: str | None, **own: Any) -> None:
        if isinstance(skip, str) or not all(isinstance(name, str) for name in skip or ()):
            raise ValueError(f"skip must be a list of layers' names or of their ends, not {skip!r}")
        check_choice("layout", layout, self.layouts)
        if quant_method not in (None, self.quant_method):
            raise ValueError(f"a {type(self).__name__} is of quant_method {self.quant_method!r}, not {quant_method!r}")
        vars(self).update(own, skip=sorted(skip or ()), layout=layout)

    def to_dict(self) -> dict[str, Any]:
        """The entry of ``config.json`` for it; in another library's layout, as that library says it."""
        own = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return self._as_of_layout() if self.layout != "peftops" else {"quant_method": self.quant_method, **own}

    def _as_of_layout(self) -> dict[str, Any]:
        raise NotImplementedError

    def file_layout(self) -> Layout:
        """How the files of a model that is in codes already are read."""
        return Layout(self.layout)

    def quantize(self, dense: Tensor) -> Tensor:
        raise NotImplementedError

    def stored(self, weight: Tensor) -> dict[str, Tensor]:
        """The tensors of a weight by what follows the layer's name, in another library's layout."""
        raise NotImplementedError


@register_quantization_config("peftops_nf4")
class NF4Config(_CodesConfig):
    """For ``from_pretrained(..., quantization_config=NF4Config())``: linear layers become 4-bit while they are read.

    Args:
        block_size: elements of a weight that share one absmax, a power of two from 32 to 4096.
        double_quant: quantise the absmax values, too: 4.127 instead of 4.5 bits per weight.
        skip: names, or ends of names, of layers that stay dense. The output layer, and layers that are not called, do
            anyway.
        layout: how ``save_pretrained`` writes the model: "peftops", or "bitsandbytes" in that library's own files,
            which whoever has it can read without us.

    Raises:
        ValueError: an option is not one of those.
    """

    quant_method = "peftops_nf4"
    layouts = ("peftops", "bitsandbytes")

    def __init__(self, block_size: int = 64, double_quant: bool = True, skip: Any = None, layout: str = "peftops",
                 quant_method: str | None = None):  # fmt: skip
        check_choice("block_size", block_size, BLOCK_SIZES)
        check_choice("double_quant", double_quant, (True, False))
        self._set(skip, layout, quant_method, block_size=block_size, double_quant=double_quant)

    def quantize(self, dense: Tensor) -> Tensor:
        return nf4_quantize(dense, block_size=self.block_size, double_quant=self.double_quant)

    def _as_of_layout(self) -> dict[str, Any]:
        return {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": self.double_quant, "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_compute_dtype": vars(self).get("_dtype", "float32"),
            "llm_int8_skip_modules": vars(self).get("_dense", self.skip),
        }  # fmt: skip

    def stored(self, weight: Tensor) -> dict[str, Tensor]:
        return to_bitsandbytes(weight)


@register_quantization_config("peftops_group")
class GroupConfig(_CodesConfig):
    """The same for groups of codes with a scale and a zero each, see :func:`peftops.group_quantize`.

    Args:
        bits, group_size, symmetric, clip: as there.
        skip: as of :class:`NF4Config`.
        layout: "peftops", or "gptq": GPTQ's tensors with scales and zeros in float32, so that nothing is lost, which
            ``load_model`` reads.
        checkpoint_format: of files that are read in layout "gptq": "gptq", or "gptq_v2".

    Raises:
        ValueError: an option is not one of those.
    """

    quant_method = "peftops_group"
    layouts = ("peftops", "gptq")

    def __init__(self, bits: int = 4, group_size: int = 32, symmetric: bool = False, clip: str = "none",
                 skip: Any = None, layout: str = "peftops", checkpoint_format: str = FORMAT,
                 quant_method: str | None = None):  # fmt: skip
        check_choice("bits", bits, (2, 3, 4, 8))
        check_choice("group_size", group_size, tuple(2**i for i in range(3, 13)))
        check_choice("symmetric", symmetric, (True, False))
        check_choice("clip", clip, ("none", "mse"))
        self._set(skip, layout, quant_method, bits=bits, group_size=group_size, symmetric=symmetric, clip=clip,
                  checkpoint_format=checkpoint_format)  # fmt: skip

    def file_layout(self) -> Layout:
        return Layout(self.layout, self.bits, self.checkpoint_format)

    def quantize(self, dense: Tensor) -> Tensor:
        how = {name: getattr(self, name) for name in ("bits", "group_size", "symmetric", "clip")}
        return group_quantize(dense, **how)

    def _as_of_layout(self) -> dict[str, Any]:
        return {"quant_method": "gptq", "checkpoint_format": FORMAT, "bits": self.bits, "group_size": self.group_size,
                "desc_act": False, "sym": self.symmetric, "zeros": "float32"}  # fmt: skip

    def stored(self, weight: Tensor) -> dict[str, Tensor]:
        return to_gptq(weight)


class _Read(ConversionOps):
    """The way of the tensors of one parameter, once they are in the model's own order.

    An error would be logged by transformers and end in one that says nothing, so it waits in ``hf_quantizer.faults``.
    """

    def __init__(self, quantizer: CodesQuantizer, prefix: str = ""):
        self.hf_quantizer = quantizer  # (by this name transformers knows that it must not cast what codes are made of)
        self.prefix = prefix  # of the names that the tensors come under

    def __deepcopy__(self, memo: dict) -> _Read:
        return self  # transformers copies it for each parameter; there is one quantizer

    def convert(
        self, input_dict: dict[str, Any], model: nn.Module, full_layer_name: str, **kwargs: Any
    ) -> dict[str, Any]:
        tensors = {
            name.removeprefix(self.prefix): value[0] if isinstance(value, list) else value
            for name, value in input_dict.items()
        }
        if self.hf_quantizer.pre_quantized:
            stored = lambda layer, leaf: self._stored(_part(layer, leaf), tensors, full_layer_name, model)
            return {full_layer_name: self._kept(full_layer_name, model, stored)}
        return {
            name: self._kept(name, model, lambda layer, leaf, dense=dense: self._quantized(layer, leaf, dense))
            for name, dense in tensors.items()
        }

    def _kept(self, name: str, model: nn.Module, make: Callable[[nn.Module, str], Tensor]) -> Tensor:
        path, _, leaf = name.rpartition(".")
        layer = model.get_submodule(path)
        try:
            return make(layer, leaf)
        except (ValueError, RuntimeError, TypeError) as error:
            self.hf_quantizer.faults[name] = error
            return getattr(layer, leaf)

    def _quantized(self, layer: nn.Module, leaf: str, dense: Tensor) -> Tensor:
        own, layer = getattr(layer, leaf), _part(layer, leaf)
        dense = _fitting(layer, dense)
        if dense.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            dense = dense.float()
        codes = self.hf_quantizer.quantization_config.quantize(_as_matrix(layer, dense).contiguous())
        return nn.Parameter(codes.to(own.dtype), requires_grad=False)

    def _stored(self, layer: nn.Module, tensors: dict[str, Tensor], name: str, model: nn.Module) -> Tensor:
        if tensors.keys() == {"weight"}:  # dense; of whatever layer
            dense = tensors["weight"]
            if dense.is_floating_point() and not (dense.dtype == torch.float32 and _is_in(name, _wide(model))):
                dense = dense.to(layer.weight.dtype)
            return _fitting(layer, dense) if isinstance(layer, PackedLinear) else dense
        if not isinstance(layer, PackedLinear | ExpertsLinear):
            raise ValueError(f"a {type(layer).__name__} cannot be in codes")
        shape = layer.matrices.shape if isinstance(layer, ExpertsLinear) else layer.weight.shape
        codes = self.hf_quantizer.layout.read(tensors, shape, layer.weight.dtype)
        return nn.Parameter(codes._like(_own_memory), requires_grad=False)

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("codes are written as they are")


def _part(module: nn.Module, leaf: str) -> nn.Module:
    """The layer that a parameter belongs to: experts' are parameters as they are read, and layers afterwards."""
    return stack_layer(module, leaf) if leaf in stacks_of(module) else module


def _as_matrix(layer: nn.Module, dense: Tensor) -> Tensor:
    return as_matrix(getattr(layer, "dense_shell", layer), dense)


def _fitting(layer: nn.Module, dense: Tensor) -> Tensor:
    transposed = is_conv1d(getattr(layer, "dense_shell", layer))
    expected = layer.weight.shape[::-1] if transposed else layer.weight.shape
    if dense.shape != expected:
        raise ValueError(f"has shape {list(dense.shape)}, the model expects {list(expected)}")
    return dense


def _own_memory(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy if its memory is that of a file: all of it would stay for as long as this does."""
    return tensor if tensor.untyped_storage().resizable() else tensor.clone()


def release_files(model: nn.Module) -> None:
    """Let no parameter be a part of the file that it was read from."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not is_quantized(tensor) and tensor.device.type == "cpu":
            tensor.data = _own_memory(tensor.data)


@register_quantizer("peftops_nf4")
@register_quantizer("peftops_group")
class CodesQuantizer(HfQuantizer):
    """transformers calls this while it reads a model whose configuration is one of those above."""

    is_trainable = True
    is_qat_trainable = True  # adapters that are not PEFT's, which transformers does not see, and what stays dense

    def __init__(self, quantization_config: _CodesConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.faults: dict[str, Exception] = {}
        self.layout = quantization_config.file_layout()
        self.renamed: list[WeightRenaming] = []
        self.stacks: dict[str, torch.Size] = {}  # the parameters of experts that may become codes as they are read

    def is_serializable(self) -> bool:
        return True

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        path, _, leaf = param_name.rpartition(".")
        return param_name in self.stacks or (leaf == "weight" and isinstance(model.get_submodule(path), PackedLinear))

    def get_quantize_ops(self) -> ConversionOps:
        return _Read(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        return [WeightConverter(self.layout.names, "weight", [_Read(self)])] if self.pre_quantized else []

    def update_weight_conversions(self, weight_conversions: list, model: nn.Module) -> list:
        """Those of experts come first: their codes have the names of layers, which they are not until all is read."""
        ends = {f".{path.rpartition('.')[2]}.{leaf}" for path, module in layers(model) for leaf in stacks_of(module)}
        own = []
        for end in sorted(ends) if self.pre_quantized and self.layout.name == "peftops" else ():
            exact = re.escape(end)
            own.append(WeightRenaming(f"{exact}.bias", f"{end}_bias"))
            own.append(WeightConverter([f"{exact}.{part}" for part in OWN_PARTS], end, [_Read(self, f"{exact}.")]))
        self.renamed = [way for way in own if isinstance(way, WeightRenaming)]
        if self.pre_quantized and self.layout.name == "bitsandbytes":
            weight_conversions = [with_codes(way, self) for way in weight_conversions]
        return own + super().update_weight_conversions(weight_conversions, model)

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized and _has_codes(checkpoint_files or ()):
            # A model that was quantised where no configuration says so, as by peftops.attach.
            self.pre_quantized, self.layout = True, Layout()
        if self.pre_quantized:  # the files tell which are dense
            names = {name for name, _ in _linears(model)}
        else:
            names = self._chosen(model)
        self.stacks = {
            name: getattr(module, leaf).shape
            for path, module in layers(model) for leaf in stacks_of(module)
            if (name := f"{path}.{leaf}") in names or self.pre_quantized
        }  # fmt: skip
        for name, layer in list(_linears(model)):
            if name in names:
                _replace(model, layer, PackedLinear(as_matrix(layer, layer.weight), layer.bias, shell_of(layer)))

    def _chosen(self, model: nn.Module) -> set[str]:
        tied = {name.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for name in pair}
        skip = {*self.quantization_config.skip, *_wide(model)}
        with opened(model):
            found = find_targets(model, ALL_LINEAR, (LINEAR, EXPERTS))
        return {name for name in found if name not in tied and not _is_in(name, skip)}

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.faults:
            name, error = next(iter(self.faults.items()))
            more = f" ({len(self.faults) - 1} more tensors are not right)" if len(self.faults) > 1 else ""
            raise ValueError(f"tensor {name}: {error}{more}") from error
        for _, layer in list(layers(model)):
            if type(layer) is PackedLinear:  # of no format yet
                _replace(model, layer, _of_kind(layer))
        for name, shape in self.stacks.items():
            tensor = model.get_parameter(name)
            if not is_quantized(tensor) and tensor.shape != shape:
                raise ValueError(f"tensor {name} has shape {list(tensor.shape)}, the model expects {list(shape)}")
        open_experts(model)  # those that are in codes now stay so
        close_experts(model)
        release_files(model)
        self.remember(model)
        model.is_loaded_in_4bit = not isinstance(self.quantization_config, GroupConfig)
        if model.is_loaded_in_4bit and not find_spec("bitsandbytes"):  # whose classes transformers looks for then
            model.num_parameters = MethodType(_num_parameters, model)
        return model

    def remember(self, model: nn.Module) -> None:
        """The entry of files of this model, and how transformers may change names in them: not those of
        tensors that are joined or cut, which codes cannot be."""
        coded = [name for name, layer in layers(model) if is_quantized(getattr(layer, "weight", None))]
        vars(self.quantization_config).update(
            _dense=sorted(name for name, layer in _linears(model)),
            _dtype=str(model.dtype).removeprefix("torch."),
        )
        names = [f"{name}.weight" for name in coded]
        cut = lambda way: any(hasattr(op, "hf_quantizer") for op in way.operations) or any(
            target in name for target in way.target_patterns for name in names
        )
        ways = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [
            way for way in ways if way not in self.renamed and not (isinstance(way, WeightConverter) and cut(way))
        ]

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor] | None, dict]:
        config = self.quantization_config
        if config.layout == "peftops":
            return None, {}
        tensors: dict[str, Tensor] = {}
        for name, value in model.state_dict(keep_vars=True).items():
            if is_quantized(value):
                if value.dim() != 2:
                    raise ValueError(f"{name} is of experts, of which layout={config.layout!r} has no codes; save the "
                                     "model with layout='peftops'")  # fmt: skip
                parts = config.stored(value)
                tensors |= {f"{name.removesuffix('weight')}{part}": t.contiguous() for part, t in parts.items()}
            else:
                tensors[name] = value.detach() if isinstance(value, Tensor) else value
        return tensors, {}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        model.is_loaded_in_4bit = False
        vars(model).pop("num_parameters", None)
        return dequantize(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)  # (out of a configuration)


@torch.no_grad()
def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Layers in codes become dense ones with the weights that the codes stand for, those that an adapter saw; ``dtype``
    is by default that which each stands for."""
    for module in list(model.modules()):
        for leaf, layer in list(module.named_children()):
            kept = isinstance(layer, ExpertsLinear) or hasattr(layer, "dense_shell")
            if kept and is_quantized(getattr(layer, "weight", None)):
                bias = layer.bias if layer.bias is None or dtype is None else layer.bias.to(dtype)
                dense = with_matrix(layer, dense_matrix(layer, dtype or layer.weight.dtype), bias)
                setattr(module, leaf, dense.train(layer.training))
    close_experts(model)
    return model


def _wide(model: nn.Module) -> set[str]:
    """The modules that transformers keeps in float32 in this kind of model."""
    return set(getattr(model, "_keep_in_fp32_modules", None) or ())


def _is_in(name: str, parts: set[str]) -> bool:
    return any(f".{part}." in f".{name}." for part in parts)


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, layer in layers(model):
        if name and is_linear(layer) and not is_quantized(layer.weight):
            yield name, layer


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Wherever the model has the layer."""
    new.train(old.training)
    for module in list(model.modules()):
        for leaf, child in list(module._modules.items()):
            if child is old:
                setattr(module, leaf, new)


def _of_kind(layer: PackedLinear) -> nn.Module:
    """The layer for what the file had, which may be dense."""
    if is_quantized(layer.weight):
        return PackedLinear.over(layer.weight, layer.bias, layer.dense_shell)
    dense = copy.copy(layer.dense_shell)
    dense._parameters = {"weight": layer.weight, "bias": layer.bias}
    return dense


def _has_codes(files: Any) -> bool:
    return any(key.endswith(f".{part}") for key in _keys(files) for part in OWN_PARTS)


def _keys(files: Any) -> Iterator[str]:
    from safetensors import safe_open

    for file in files:
        if str(file).endswith(".safetensors"):
            with safe_open(file, "pt") as tensors:
                yield from tensors.keys()


def _num_parameters(model: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    left_out = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} if exclude_embeddings else set()
    mine = (p for p in model.parameters() if id(p) not in left_out)
    return sum(p.numel() for p in mine if p.requires_grad or not only_trainable)
