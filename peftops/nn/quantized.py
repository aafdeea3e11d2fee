"""The differences between the kinds of quantised weights, for layers and methods; all other code treats them alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import (
    GroupQuantTensor,
    NF4Tensor,
    group_dequantize,
    group_linear,
    group_quantize,
    nf4_dequantize,
    nf4_linear,
    nf4_quantize,
)


@dataclass(frozen=True)
class Kind:
    linear: Callable[..., Tensor]  # (x, weight, bias, lora_A=, lora_B=, scaling=, dropout_p=, training=)
    dequantize: Callable[..., Tensor]  # (weight, dtype=)
    quantize_like: Callable[[Tensor, Tensor], Tensor]  # (dense, weight): dense, quantised as weight is


KINDS: dict[type[Tensor], Kind] = {
    NF4Tensor: Kind(
        nf4_linear,
        nf4_dequantize,
        lambda dense, like: nf4_quantize(dense, block_size=like.block_size, double_quant=like.double_quant),
    ),
    GroupQuantTensor: Kind(
        group_linear,
        group_dequantize,
        lambda dense, like: group_quantize(dense, bits=like.bits, group_size=like.group_size),
    ),
}


class StoredInParts(nn.Module):
    """A layer whose packed ``weight`` is plain tensors in a state dict: what it is made of, under ``weight.packed``,
    ``weight.scales``, ... So whatever writes state dicts (safetensors, and with it transformers' ``save_pretrained``
    and Trainer) can write it. A state dict that has the weight itself, as FSDP's does, is read as well."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        name = f"{prefix}weight"
        if not keep_vars and is_quantized(destination.get(name)):
            parts = destination.pop(name)._parts()
            destination.update({f"{name}.{part}": tensor for part, tensor in parts.items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        weight, name = self.weight, f"{prefix}weight"
        own = {f"{name}.{part}": tensor for part, tensor in weight._parts().items()} if is_quantized(weight) else {}
        if own and own.keys() <= state_dict.keys():
            errors = rest[-1]
            given = {key: state_dict[key] for key in own}
            state_dict = {key: value for key, value in state_dict.items() if key not in own}
            state_dict[name] = weight.detach()
            wrong = [key for key, t in given.items() if (t.shape, t.dtype) != (own[key].shape, own[key].dtype)]
            for key in wrong:
                is_, want = given[key], own[key]
                errors.append(f"{key} is {is_.dtype} {list(is_.shape)}, not {want.dtype} {list(want.shape)}: codes of "
                              "another format, or another layer")  # fmt: skip
            if not wrong:
                parts = {key.removeprefix(f"{name}."): tensor for key, tensor in given.items()}
                state_dict[name] = weight.detach()._with(parts, weight.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def is_quantized(weight: object) -> bool:
    return type(weight) in KINDS


def dequantized(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return KINDS[type(weight)].dequantize(weight, dtype=dtype)


def quantized_like(dense: Tensor, weight: Tensor) -> Tensor:
    return KINDS[type(weight)].quantize_like(dense, weight)
