"""NF4 weights as bitsandbytes writes them into checkpoints: six tensors per weight."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..ops import NF4Tensor
from ..ops.nf4_dequantize import ABSMAX_MAP, NF4_CODE

_STATE = "quant_state.bitsandbytes__nf4"
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", _STATE)  # beside the packed weight


def to_bitsandbytes(weight: NF4Tensor) -> dict[str, Tensor]:
    """The tensors that bitsandbytes stores for this weight, by the part of their names after the layer's name in a
    state dict: ``weight``, ``weight.absmax``, ``weight.quant_map``, ``weight.quant_state.bitsandbytes__nf4`` and, if it
    is double-quantised, ``weight.nested_absmax`` and ``weight.nested_quant_map``."""
    state = {
        "quant_type": "nf4",
        "blocksize": weight.block_size,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    own = weight.parts()
    result = {"weight": own["packed"][:, None], "weight.absmax": own["_absmax"], "weight.quant_map": NF4_CODE.clone()}
    if weight.double_quant:
        state |= {
            "nested_blocksize": 256,
            "nested_dtype": "float32",
            "nested_offset": own["_absmax_offset"].item(),
        }
        result["weight.nested_absmax"] = own["_absmax_scale"]
        result["weight.nested_quant_map"] = ABSMAX_MAP.clone()
    text = json.dumps(state).encode()
    result[f"weight.{_STATE}"] = torch.tensor(list(text), dtype=torch.uint8, device="cpu")
    return result


def from_bitsandbytes(tensors: Mapping[str, Tensor]) -> NF4Tensor:
    """The reverse of :func:`to_bitsandbytes`.

    Raises:
        ValueError: a tensor is missing, or the weight is quantised in another way than NF4 with nested blocks of
            256, whose maps are bitsandbytes' own.
    """
    missing = [key for key in ("weight", "weight.absmax", f"weight.{_STATE}") if key not in tensors]
    if missing:
        raise ValueError(f"not an NF4 weight of bitsandbytes: {', '.join(missing)} is missing")
    try:
        state = json.loads(bytes(tensors[f"weight.{_STATE}"].tolist()))
        shape, block_size, dtype = torch.Size(state["shape"]), state["blocksize"], getattr(torch, state["dtype"])
        offset = torch.tensor(state.get("nested_offset", 0.0), dtype=torch.float32, device=tensors["weight"].device)
    except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"weight.{_STATE} is damaged: {error!r}") from None
    if not isinstance(dtype, torch.dtype) or offset.dim() or not offset.isfinite():
        raise ValueError(f"weight.{_STATE} is damaged: its dtype or nested_offset is not valid")
    if -(-math.prod(shape) // 2) != tensors["weight"].nbytes:
        raise ValueError(f"weight has {tensors['weight'].nbytes} bytes, which do not fit codes of shape {list(shape)}")
    for name, own in (("quant_map", NF4_CODE), ("nested_quant_map", ABSMAX_MAP)):
        given = tensors.get(f"weight.{name}")
        # bitsandbytes makes its map with torch.linspace, which rounds differently on some CPUs
        close = lambda a, b: a.shape == b.shape and torch.allclose(a.float().cpu(), b, rtol=2**-22, atol=0)
        if given is not None and not close(given, own):
            raise ValueError(f"weight.{name} is not the one that bitsandbytes uses for NF4")
    packed, absmax = tensors["weight"].flatten().view(torch.uint8), tensors["weight.absmax"]
    kinds = {"absmax": torch.float32}
    if "nested_offset" in state:
        kinds = {"absmax": torch.uint8, "nested_absmax": torch.float32}
    for name, kind in kinds.items():
        given = tensors.get(f"weight.{name}")
        if given is not None and given.dtype != kind:
            raise ValueError(f"weight.{name} must be {kind}, not {given.dtype}")
    if "nested_offset" not in state:
        return NF4Tensor(packed, absmax, None, None, block_size, shape, dtype)
    if state.get("nested_blocksize") != 256:
        raise ValueError(f"nested blocks must have 256 elements, not {state.get('nested_blocksize')}")
    if "weight.nested_absmax" not in tensors:
        raise ValueError("not an NF4 weight of bitsandbytes: weight.nested_absmax is missing")
    return NF4Tensor(packed, absmax, tensors["weight.nested_absmax"], offset, block_size, shape, dtype)
