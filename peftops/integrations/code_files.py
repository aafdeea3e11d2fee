"""Weights in codes from the tensors of a checkpoint in any layout: our own, bitsandbytes', GPTQ's or AWQ's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.packed_tensor import PackedTensor
from .awq_files import AWQ_PARTS, from_awq
from .bitsandbytes_files import PARTS as BITSANDBYTES
from .bitsandbytes_files import from_bitsandbytes
from .gptq_files import GPTQ_PARTS, from_gptq
from .mxfp4_files import from_mxfp4

# The ends of keys, behind the layer's name. (A state dict of ours has the attributes of a packed tensor.)
OWN_PARTS = tuple(dict.fromkeys(f"weight.{part}" for kind in PackedTensor.FORMATS.values() for part in kind.PARTS))
BITSANDBYTES_PARTS = tuple(f"weight.{part}" for part in BITSANDBYTES)
# In layout "mxfp4", only stacks of experts are in codes, and they have names of their own.
LAYOUTS = {
    "peftops": OWN_PARTS,
    "bitsandbytes": BITSANDBYTES_PARTS,
    "gptq": GPTQ_PARTS,
    "awq": AWQ_PARTS,
    "mxfp4": (),
}


@dataclass(frozen=True)
class Layout:
    """How a checkpoint stores its codes. The fields beside the name are settings of GPTQ that the tensors do not
    tell."""

    name: str = "peftops"
    bits: int = 4
    checkpoint_format: str | None = None

    @property
    def names(self) -> list[str]:
        """The ends of the names, after the layer's name, of all tensors that a weight may have, packed or dense."""
        return ["weight", *LAYOUTS[self.name]]

    def read(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> PackedTensor:
        """The weight that these tensors hold; it stands for a weight of ``dtype``.

        Raises:
            ValueError: the tensors do not make such a weight.
        """
        if self.name == "gptq":
            try:
                weight = from_gptq(dict(parts), bits=self.bits, checkpoint_format=self.checkpoint_format)
            except (KeyError, TypeError) as error:
                raise ValueError(str(error.args[0])) from None
        elif self.name == "awq":
            weight = from_awq(parts, dtype)
        elif self.name == "mxfp4":
            weight = from_mxfp4(parts, dtype)
        elif self.name == "bitsandbytes":
            weight = from_bitsandbytes(parts)
        else:
            weight = _own(parts, shape, dtype)
        if weight.shape != shape:
            raise ValueError(f"codes have shape {list(weight.shape)}, the model expects {list(shape)}")
        return weight.to(dtype)


def _own(parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> PackedTensor:
    return PackedTensor.from_parts({name.removeprefix("weight."): part for name, part in parts.items()}, shape, dtype)
