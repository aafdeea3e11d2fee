"""Weights in MXFP4 out of a checkpoint of transformers, such as gpt-oss: the file's own codes, nothing dequantised."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from ..ops import MXFP4Tensor
from .hf import safetensors_of

MXFP4_PARTS = BLOCKS, SCALES = "_blocks", "_scales"  # after a parameter's name


def to_mxfp4(weight: MXFP4Tensor) -> dict[str, torch.Tensor]:
    """The tensors of a stack of experts as transformers writes them, by what follows the parameter's name. They are the
    weight's own memory."""
    return {BLOCKS: weight.blocks.unflatten(-1, (-1, 16)), SCALES: weight.scales}


def mxfp4_weights(
    folder: str | os.PathLike, wanted: Callable[[str], bool] = lambda name: True, *,
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[tuple[str, MXFP4Tensor]]:  # fmt: skip
    """The weights of a checkpoint that are in MXFP4, one at a time.

    The experts of gpt-oss are stacks ``[experts, out, in]``. (transformers keeps the dense ones transposed, as
    ``[experts, in, out]``.)

    Args:
        folder: with safetensors, in which ``NAME_blocks`` and ``NAME_scales`` are a weight.
        wanted: tells by the parameter's name, without these endings, whether to read it.
        dtype: the dtype of the weights that they stand for.

    Yields:
        Names and weights, whose bits are the file's.

    Raises:
        FileNotFoundError: there are no safetensors.
        ValueError: one of the two tensors is missing, or they do not fit together.
    """
    files = {}
    for file in safetensors_of(Path(folder)):
        with safe_open(file, "pt") as tensors:
            files |= dict.fromkeys(tensors.keys(), file)
    for name in sorted({key.removesuffix(end) for end in (BLOCKS, SCALES) for key in files if key.endswith(end)}):
        if not wanted(name):
            continue
        parts = []
        for key in (f"{name}{BLOCKS}", f"{name}{SCALES}"):
            if key not in files:
                raise ValueError(f"{folder}: {key} is missing")
            with safe_open(files[key], "pt") as tensors:
                parts.append(tensors.get_tensor(key).clone())  # or all of the file would stay in memory
        try:
            yield name, MXFP4Tensor.from_blocks(*parts, dtype=dtype)
        except ValueError as error:
            raise ValueError(f"{folder}: {name}: {error}") from None
