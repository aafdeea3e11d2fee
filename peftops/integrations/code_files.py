"""Weights in codes out of the tensors of a checkpoint, whatever its layout: our own, bitsandbytes' or GPTQ's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import GroupQuantTensor, NF4Tensor
from ..ops.packed_tensor import PackedTensor
from .bitsandbytes_files import PARTS as BITSANDBYTES
from .bitsandbytes_files import from_bitsandbytes
from .gptq_files import GPTQ_PARTS, from_gptq

# By what follows the layer's name. (A state dict of ours has the attributes of a packed tensor.)
OWN_PARTS = tuple(dict.fromkeys(f"weight.{part}" for kind in (NF4Tensor, GroupQuantTensor) for part in kind._PARTS))
BITSANDBYTES_PARTS = tuple(f"weight.{part}" for part in BITSANDBYTES)
LAYOUTS = {"peftops": OWN_PARTS, "bitsandbytes": BITSANDBYTES_PARTS, "gptq": GPTQ_PARTS}


@dataclass(frozen=True)
class Layout:
    """How a checkpoint stores its codes; what its tensors do not tell themselves is of GPTQ's."""

    name: str = "peftops"
    bits: int = 4
    checkpoint_format: str | None = None

    @property
    def names(self) -> list[str]:
        """All tensors that a weight may have, by what follows the layer's name, and that of a dense one."""
        return ["weight", *LAYOUTS[self.name]]

    def read(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> PackedTensor:
        """The weight that these tensors hold, and that stands for one of ``dtype``.

        Raises:
            ValueError: they are not those of such a weight.
        """
        if self.name == "gptq":
            try:
                weight = from_gptq(dict(parts), bits=self.bits, checkpoint_format=self.checkpoint_format)
            except (KeyError, TypeError) as error:
                raise ValueError(str(error.args[0])) from None
        elif self.name == "bitsandbytes":
            weight = from_bitsandbytes(parts)
        else:
            weight = _own(parts, shape, dtype)
        if weight.shape != shape:
            raise ValueError(f"codes have shape {list(weight.shape)}, the model expects {list(shape)}")
        return weight.to(dtype)


def _own(parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> PackedTensor:
    given = {name.removeprefix("weight."): tensor for name, tensor in parts.items()}
    kind = GroupQuantTensor if "scales" in given else NF4Tensor
    optional = {"_absmax_scale", "_absmax_offset"} if "_absmax_scale" not in given else set()
    missing = [name for name in kind._PARTS if name not in given and name not in optional]
    if missing:
        raise ValueError(f"{', '.join(f'weight.{name}' for name in missing)} is missing")
    numbers = {name: part for name, part in given.items() if part.is_floating_point()}
    wrong = next((name for name, part in numbers.items() if not part.isfinite().all()), None)
    if wrong:
        raise ValueError(f"weight.{wrong} holds a NaN or an infinity")
    return _group(given, shape, dtype) if kind is GroupQuantTensor else _nf4(given, shape, dtype)


def _nf4(given: dict[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> NF4Tensor:
    packed, absmax, scale = given["packed"], given["_absmax"], given.get("_absmax_scale")
    count, blocks = shape.numel(), absmax.numel()
    sizes = [2**i for i in range(5, 13) if -(-count // 2**i) == blocks]
    wants = {"packed": (torch.uint8, (-(-count // 2),)), "_absmax": (torch.uint8 if "_absmax_scale" in given else
             torch.float32, (blocks,)), "_absmax_scale": (torch.float32, (-(-blocks // 256),)),
             "_absmax_offset": (torch.float32, ())}  # fmt: skip
    _check(given, wants, shape)
    if not sizes:
        raise ValueError(f"weight._absmax has {blocks} blocks, which are none of a weight of shape {list(shape)}")
    # Where several block sizes make as many blocks, that is one block, whose numbers are the same for all.
    block_size = 64 if 64 in sizes else sizes[0]
    return NF4Tensor(packed, absmax, scale, given.get("_absmax_offset"), block_size, shape, dtype)


def _group(given: dict[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> GroupQuantTensor:
    *rows, k = shape
    groups, width = (given[name].shape[-1] if given[name].dim() else 0 for name in ("scales", "packed"))
    size, bits = k // max(groups, 1), width * 8 // k
    wants = {"packed": (torch.uint8, (*rows, k // 8 * bits)), "scales": (torch.float32, (*rows, groups)),
             "zeros": (torch.float32, (*rows, groups))}  # fmt: skip
    _check(given, wants, shape)
    if bits not in (2, 3, 4, 8) or not 8 <= size <= 4096 or size & (size - 1) or size * groups != k:
        raise ValueError(f"codes of {bits} bits in groups of {size} are none of a weight of shape {list(shape)}")
    return GroupQuantTensor(given["packed"], given["scales"], given["zeros"], bits, size, shape, dtype)


def _check(given: dict[str, Tensor], wants: dict[str, tuple], shape: torch.Size) -> None:
    for name, part in given.items():
        if name not in wants:
            raise ValueError(f"weight.{name} does not belong to {', '.join(wants)}")
        dtype, size = wants[name]
        if part.dtype != dtype or tuple(part.shape) != tuple(size):
            raise ValueError(
                f"weight.{name} is {part.dtype} {list(part.shape)}, not {dtype} {list(size)} as in a weight of shape "
                f"{list(shape)}"
            )
