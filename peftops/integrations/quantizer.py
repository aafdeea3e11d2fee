"""The plug-in that lets transformers' ``from_pretrained`` read models into our formats, one tensor after the other.

transformers makes the model without memory. :class:`CodesQuantizer` replaces linear layers by ours, and gets each
tensor of the files after transformers has renamed and converted it for this kind of model.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from ..attaching.targets import ALL_LINEAR, find_targets, is_linear, layers
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
from .code_configs import CodesConfig, GroupConfig, MXFP4Config, NF4Config  # noqa: F401 (they come with their plug-in)
from .code_files import OWN_PARTS, Layout
from .expert_codes import with_codes
from .mxfp4_files import MXFP4_PARTS


class _Read(ConversionOps):
    """The last conversion of the tensors of one parameter, after transformers' own conversions.

    transformers would log an error here and then raise another one without the reason, so the error is kept in
    ``hf_quantizer.faults``.
    """

    def __init__(self, quantizer: CodesQuantizer, prefix: str = ""):
        self.hf_quantizer = quantizer  # (transformers does not cast the tensors for an operation with this attribute)
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
        if tensors.keys() == {"weight"}:  # dense, of any layer
            dense = tensors["weight"]
            if dense.is_floating_point() and not (dense.dtype == torch.float32 and _is_in(name, _wide(model))):
                dense = dense.to(layer.weight.dtype)
            return _fitting(layer, dense) if isinstance(layer, PackedLinear) else dense
        if not isinstance(layer, PackedLinear | ExpertsLinear):
            raise ValueError(f"a {type(layer).__name__} cannot be in codes")
        shape = layer.matrices.shape if isinstance(layer, ExpertsLinear) else layer.weight.shape
        codes = self.hf_quantizer.layout.read(tensors, shape, layer.weight.dtype)
        return nn.Parameter(codes.like(_own_memory), requires_grad=False)

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("codes are written as they are")


def _part(module: nn.Module, leaf: str) -> nn.Module:
    """The layer of a parameter. Experts are parameters while they are read, and layers afterwards."""
    return stack_layer(module, leaf) if leaf in stacks_of(module) else module


def _as_matrix(layer: nn.Module, dense: Tensor) -> Tensor:
    return as_matrix(getattr(layer, "dense_shell", layer), dense)


def _fitting(layer: nn.Module, dense: Tensor) -> Tensor:
    transposed = is_conv1d(getattr(layer, "dense_shell", layer))
    expected = layer.weight.shape[::-1] if transposed else layer.weight.shape
    if dense.shape != expected:
        raise ValueError(f"has shape {list(dense.shape)}, the model expects {list(expected)}")
    if not dense.is_floating_point():
        raise ValueError(f"has dtype {dense.dtype}, the model expects floating-point numbers")
    return dense


def _own_memory(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy if its memory is a part of a file: otherwise the whole file would stay in memory
    with it."""
    return tensor if tensor.untyped_storage().resizable() else tensor.clone()


def release_files(model: nn.Module) -> None:
    """Copy the parameters that still share memory with the file from which they were read."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not is_quantized(tensor) and tensor.device.type == "cpu":
            tensor.data = _own_memory(tensor.data)


@register_quantizer("peftops_nf4")
@register_quantizer("peftops_group")
@register_quantizer("peftops_mxfp4")
class CodesQuantizer(HfQuantizer):
    """transformers calls this class while it reads a model with one of the configurations in ``code_configs``."""

    is_trainable = True
    is_qat_trainable = True  # our adapters, which transformers does not see, and dense layers

    def __init__(self, quantization_config: CodesConfig, **kwargs: Any):
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
        """The conversions of experts come first: their codes have the names of layers, and experts become layers only
        after reading."""
        ends = {f".{path.rpartition('.')[2]}.{leaf}" for path, module in layers(model) for leaf in stacks_of(module)}
        own = []
        join, parts = {"peftops": (".", OWN_PARTS), "mxfp4": ("", MXFP4_PARTS)}.get(self.layout.name, ("", ()))
        for end in sorted(ends) if self.pre_quantized and parts else ():
            start = re.escape(end) + join
            if join:
                own.append(WeightRenaming(f"{start}bias", f"{end}_bias"))
            own.append(WeightConverter([f"{start}{part}" for part in parts], end, [_Read(self, start)]))
        self.renamed = [way for way in own if isinstance(way, WeightRenaming)]
        if self.pre_quantized and self.layout.name == "bitsandbytes":
            weight_conversions = [with_codes(way, self) for way in weight_conversions]
        return own + super().update_weight_conversions(weight_conversions, model)

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized and _has_codes(checkpoint_files or ()):
            # A model that was quantised without a configuration, as by peftops.attach.
            self.pre_quantized, self.layout = True, Layout()
        if self.pre_quantized:  # the files tell which are dense
            names = {name for name, _ in _linears(model)}
        else:
            names = self._chosen(model)
        self.stacks = {
            name: getattr(module, leaf).shape
            for path, module in layers(model)
            for leaf in stacks_of(module)
            if (name := f"{path}.{leaf}") in names or self.pre_quantized
        }
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
        """Store the configuration for files of this model, and the renamings that transformers may apply to them.
        Conversions that join or cut tensors are left out, because they do not work for codes."""
        coded = [name for name, layer in layers(model) if is_quantized(getattr(layer, "weight", None))]
        vars(self.quantization_config).update(
            _dense=sorted(name for name, layer in _linears(model)),
            _dtype=str(model.dtype).removeprefix("torch."),
        )
        names = [f"{name}.weight" for name in coded]
        cut = lambda way: (
            any(hasattr(op, "hf_quantizer") for op in way.operations)
            or any(target in name for target in way.target_patterns for name in names)
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
        state = model.state_dict(keep_vars=True)
        stacks = {name.removesuffix(".weight") for name, p in state.items() if is_quantized(p) and p.dim() == 3}
        for name, value in state.items():
            layer, _, leaf = name.rpartition(".")
            if is_quantized(value):
                if value.dim() != config.stored_dims:
                    kind = "of experts" if layer in stacks else "of a layer other than experts"
                    raise ValueError(
                        f"{name} is {kind}, of which layout={config.layout!r} has no codes; save the "
                        "model with layout='peftops'"
                    )
                tensors |= {f"{layer}{part}": t.contiguous() for part, t in config.stored(value).items()}
            elif layer in stacks and leaf == "bias":
                tensors[f"{layer}_bias"] = value.detach()
            else:
                tensors[name] = value.detach() if isinstance(value, Tensor) else value
        return tensors, {}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        model.is_loaded_in_4bit = False
        vars(model).pop("num_parameters", None)
        return dequantize(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)  # (out of a configuration)


@torch.no_grad()
def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Layers in codes become dense ones, with the numbers that the codes stand for. The default of ``dtype`` is the
    dtype that each weight stands for."""
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
    """Replace the layer in all places where the model has it."""
    new.train(old.training)
    for module in list(model.modules()):
        for leaf, child in list(module._modules.items()):
            if child is old:
                setattr(module, leaf, new)


def _of_kind(layer: PackedLinear) -> nn.Module:
    """The layer for the weight of the file, which may be dense."""
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
