"""NF4 weights as our own state dicts hold them: what an :class:`~peftops.NF4Tensor` is made of, a tensor each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops import NF4Tensor

LAYOUT = "peftops"  # in a configuration's quantization_config, as its quant_method
OWN_PARTS = NF4Tensor._PARTS


def own_config(block_size: int, double_quant: bool) -> dict[str, Any]:
    """What a configuration says of such files."""
    return {"quant_method": LAYOUT, "format": "nf4", "block_size": block_size, "double_quant": double_quant}


def to_own(weight: NF4Tensor) -> dict[str, Tensor]:
    """By what follows the layer's name in a state dict."""
    return {f"weight.{part}": tensor for part, tensor in weight._parts().items()}


def from_own(tensors: Mapping[str, Tensor], block_size: int, shape: torch.Size, dtype: torch.dtype) -> NF4Tensor:
    """The reverse of :func:`to_own`.

    Raises:
        ValueError: a tensor is missing, or has not the size that such a weight's has.
    """
    count = shape.numel()
    blocks = -(-count // block_size)
    sizes = {"packed": -(-count // 2), "_absmax": blocks}
    kinds = {"packed": torch.uint8, "_absmax": torch.float32}
    if "_absmax_scale" in tensors or "_absmax_offset" in tensors:
        sizes |= {"_absmax_scale": -(-blocks // 256), "_absmax_offset": 1}
        kinds |= {"_absmax": torch.uint8, "_absmax_scale": torch.float32, "_absmax_offset": torch.float32}
    for name, size in sizes.items():
        part = tensors.get(name)
        if part is None or part.numel() != size or part.dtype != kinds[name]:
            have = "is missing" if part is None else f"has {part.numel()} {part.dtype}"
            raise ValueError(f"weight.{name} {have}; a weight {list(shape)} in NF4 has {size} {kinds[name]}")
    parts = [tensors.get(name) for name in OWN_PARTS]
    return NF4Tensor(*parts, block_size, shape, dtype)
