"""Experts in MXFP4 as transformers writes them, in checkpoints such as gpt-oss: the file's own codes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..ops import MXFP4Tensor

MXFP4_PARTS = BLOCKS, SCALES = "_blocks", "_scales"  # after a parameter's name


def to_mxfp4(weight: MXFP4Tensor) -> dict[str, Tensor]:
    """The tensors of a stack ``[experts, out, in]``, by the part of their names after the parameter's. They share the
    weight's memory. (transformers keeps the dense stacks transposed, as ``[experts, in, out]``.)"""
    return {BLOCKS: weight.blocks.unflatten(-1, (-1, 16)), SCALES: weight.scales}


def from_mxfp4(parts: Mapping[str, Tensor], dtype: torch.dtype) -> MXFP4Tensor:
    """The reverse of :func:`to_mxfp4`; the weight stands for one of ``dtype``.

    Raises:
        ValueError: one of the two tensors is missing, or they do not fit together.
    """
    if missing := [part for part in MXFP4_PARTS if part not in parts]:
        raise ValueError(f"the tensor of the same name with {missing[0]} is missing")
    return MXFP4Tensor.from_blocks(parts[BLOCKS], parts[SCALES], dtype=dtype)
