"""Models in memory whose layers are bitsandbytes'."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import NF4Linear
from ..nn.undo import about, all_or_nothing
from ..ops import NF4Tensor


def from_bitsandbytes(model: nn.Module) -> nn.Module:
    """Replace each ``Linear4bit`` of bitsandbytes by an :class:`~peftops.nn.NF4Linear` over the same codes, in place.

    Nothing is copied or rounded. HF PEFT's LoRA adapters on such layers stay, with the same parameters, and then
    compute with the fused operator. (If bitsandbytes has packed a layer for inference on a CPU, it has rounded the
    scales of its blocks to bfloat16. These scales stay rounded; only the order of the codes is restored.)

    Args:
        model: any module, with adapters of PEFT or without; changed and returned.

    Raises:
        ValueError: there is no such layer, one is in FP4, not quantised yet, or has blocks that NF4Tensor does not
            support; nothing has changed then.

    Examples:
        >>> import bitsandbytes as bnb
        >>> model = nn.Sequential(bnb.nn.Linear4bit(64, 64, quant_type="nf4"))
        >>> model = peftops.from_bitsandbytes(model.to("cpu"))
        >>> type(model[0].weight).__name__
        'NF4Tensor'
    """
    found = {name: layer for name, layer in model.named_modules() if _is_linear4bit(layer)}
    if not found:
        raise ValueError(f"a {type(model).__name__} has no Linear4bit of bitsandbytes")
    new = {}
    for name, layer in found.items():
        with about(name):
            new[id(layer)] = NF4Linear(_weight(layer), layer.bias).train(layer.training)
    with all_or_nothing(model):
        for module in list(model.modules()):
            for leaf, child in list(module._modules.items()):
                if id(child) in new:
                    setattr(module, leaf, new[id(child)])
                    _let_peft_know(module)
    for module in model.modules():
        if vars(module).get("hf_quantizer") is not None:
            _let_transformers_know(module)
    return new[id(model)] if id(model) in new else model


def _is_linear4bit(layer: nn.Module) -> bool:
    """(It compares names, so it does not import bitsandbytes.)"""
    kinds = (f"{kind.__module__}.{kind.__name__}" for kind in type(layer).__mro__)
    return "bitsandbytes.nn.modules.Linear4bit" in kinds


def _weight(layer: Any) -> NF4Tensor:
    state, data = getattr(layer.weight, "quant_state", None), layer.weight.data
    if state is None:
        raise ValueError("its weight is not quantised yet; move the model to its device first")
    if state.quant_type != "nf4":
        raise ValueError(f"its weight is in {state.quant_type.upper()}, and only NF4 is supported")
    packed, absmax, scale, offset = data.view(torch.uint8).flatten(), state.absmax, None, None
    if getattr(state, "packing_format_for_cpu", False):
        packed, absmax = _unpacked(data, state), state.absmax.T.flatten().float()
    elif state.nested:
        scale, offset = state.state2.absmax, state.offset
        if state.state2.blocksize != 256:
            raise ValueError(f"its nested blocks have {state.state2.blocksize} elements, and only 256 are supported")
    dtype = getattr(state, "original_dtype", None) or state.dtype
    return NF4Tensor(packed, absmax, scale, offset, state.blocksize, torch.Size(state.shape), dtype)


def _unpacked(data: Tensor, state: Any) -> Tensor:
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state = copy.copy(state)
    state.original_nested = False  # it would quantise the scales once more
    return _convert_weight_packed_for_cpu_inverse(data, state)[0].view(torch.uint8).flatten()


def _let_peft_know(wrapper: nn.Module) -> None:
    """A layer that PEFT made for bitsandbytes' layers becomes one that it makes for ours."""
    if type(wrapper).__module__ == "peft.tuners.lora.bnb":
        from .peft_layers import CodesLoraLinear

        wrapper.__class__ = CodesLoraLinear
        wrapper.fan_in_fan_out = wrapper.is_target_conv_1d_layer = False
    elif type(wrapper).__module__.startswith("peft.tuners.") and type(wrapper).__module__.endswith(".bnb"):
        kind = type(wrapper).__module__.split(".")[2]
        raise ValueError(f"PEFT's {kind} adapter on bitsandbytes' layers is not supported on ours; only its LoRA is")


def _let_transformers_know(model: Any) -> None:
    """save_pretrained still writes bitsandbytes' files."""
    from .quantizer import CodesQuantizer, NF4Config

    given = model.config.quantization_config
    config = NF4Config(layout="bitsandbytes", double_quant=bool(getattr(given, "bnb_4bit_use_double_quant", True)))
    model.hf_quantizer = CodesQuantizer(config, pre_quantized=True)
    model.config.quantization_config, model.quantization_method = config, config.quant_method
    model.hf_quantizer.remember(model)
