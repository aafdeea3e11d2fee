"""Quantised weights in layers and methods, for all formats: a PackedTensor knows its own operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.packed_tensor import PackedTensor


class StoredInParts(nn.Module):
    """A layer whose state dict has the parts of its packed ``weight`` as plain tensors: ``weight.packed``,
    ``weight.scales``, ... So every writer of state dicts can write it (safetensors, and with it transformers'
    ``save_pretrained`` and Trainer). A state dict with the weight itself, as FSDP's, is read as well."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """(torch would put a new weight in the old one's place. It cannot if something, such as DeepSpeed, refers
        weakly to the old one. So the weight stays, and becomes the new one.)"""
        codes = {name: weight for name, weight in self._parameters.items() if is_quantized(weight)}
        with torch.no_grad():
            done = {name: weight for name, weight in codes.items() if weight.become(fn(weight))}
        self._parameters.update(dict.fromkeys(done))
        try:
            return super()._apply(fn, recurse)
        finally:
            self._parameters.update(done)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        name = f"{prefix}weight"
        if not keep_vars and is_quantized(destination.get(name)):
            parts = destination.pop(name).parts()
            destination.update({f"{name}.{part}": tensor for part, tensor in parts.items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        weight, name = self.weight, f"{prefix}weight"
        own = {f"{name}.{part}": tensor for part, tensor in weight.parts().items()} if is_quantized(weight) else {}
        if own and own.keys() <= state_dict.keys():
            errors = rest[-1]
            given = {key: state_dict[key] for key in own}
            state_dict = {key: value for key, value in state_dict.items() if key not in own}
            state_dict[name] = weight.detach()
            wrong = [key for key, t in given.items() if (t.shape, t.dtype) != (own[key].shape, own[key].dtype)]
            for key in wrong:
                is_, want = given[key], own[key]
                errors.append(
                    f"{key} is {is_.dtype} {list(is_.shape)}, not {want.dtype} {list(want.shape)}: codes of "
                    "another format, or another layer"
                )
            if not wrong:
                parts = {key.removeprefix(f"{name}."): tensor for key, tensor in given.items()}
                state_dict[name] = weight.detach().with_parts(parts, weight.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def is_quantized(weight: object) -> bool:
    return isinstance(weight, PackedTensor)


def own_rows(weight: Tensor) -> Tensor:
    """The rows that this process has of a weight that FSDP2 has cut; any other weight as it is."""
    return getattr(weight, "_local_tensor", weight)


def dequantized(weight: PackedTensor, dtype: torch.dtype) -> Tensor:
    return weight.dequantize(dtype=dtype)


def quantized_like(dense: Tensor, weight: PackedTensor) -> PackedTensor:
    return weight.quantize_like(dense)
