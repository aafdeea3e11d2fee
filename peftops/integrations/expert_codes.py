"""Checkpoints of bitsandbytes in which each matrix of each expert has codes of its own: this makes one stack of codes
of them.

The codes of all matrices, one after another, are the codes of the stack if no block straddles two matrices. So nothing
is decoded. Quantised scales cannot be joined in this way, because each matrix has its own offset and a stack has one.
They become the float32 numbers that they stand for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from ..ops import NF4Tensor
from .bitsandbytes_files import PARTS, from_bitsandbytes

_PLAIN = [["MergeModulelist"], ["MergeModulelist", "Concatenate"]]  # the ways to a stack that codes can go


def with_codes(way: WeightConverter, quantizer: Any) -> WeightConverter:
    """A conversion of transformers from experts' matrices to a stack, extended to codes; any other conversion
    unchanged."""
    sources = way._original_source_patterns
    plain = [type(op).__name__ for op in getattr(way, "operations", [])] in _PLAIN
    if not plain or not all("experts.*." in source and source.endswith(".weight") for source in sources):
        return way
    all_sources = [f"{source}{part}" for source in sources for part in ("", *(f".{part}" for part in PARTS))]
    operation = _Stacked(quantizer, list(sources), way.operations)
    return way.copy(all_sources, way._original_target_patterns, operations=[operation])


class _Stacked(ConversionOps):
    def __init__(self, quantizer: Any, sources: list[str], dense: list[ConversionOps]):
        self.hf_quantizer, self.sources, self.dense = quantizer, sources, dense

    def __deepcopy__(self, memo: dict) -> _Stacked:
        return self

    def convert(self, input_dict: dict[str, list[Tensor]], **kwargs: Any) -> dict[str, Any]:
        if input_dict.keys() <= set(self.sources):
            for op in self.dense:
                input_dict = op.convert(input_dict, **kwargs | {"source_patterns": self.sources})
            return input_dict
        name, model = kwargs["full_layer_name"], kwargs["model"]
        path, _, leaf = name.rpartition(".")
        own = getattr(model.get_submodule(path), leaf)
        try:
            codes = stacked([_matrices(input_dict, source) for source in self.sources])
            if codes.shape != own.shape:
                raise ValueError(f"codes have shape {list(codes.shape)}, the model expects {list(own.shape)}")
            return {name: nn.Parameter(codes.to(own.dtype), requires_grad=False)}
        except ValueError as error:
            self.hf_quantizer.faults[name] = error
            return {name: own}

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("codes are written as they are")


def _matrices(tensors: dict[str, list[Tensor]], source: str) -> list[NF4Tensor]:
    """The matrices of all experts that match one pattern of names."""
    parts = {key.removeprefix(source): found for key, found in tensors.items() if key.startswith(source)}
    counts = {len(found) for found in parts.values()}
    if len(counts) != 1:
        raise ValueError(f"some experts have tensors of {source} that others lack")
    return [from_bitsandbytes({f"weight{end}": found[e] for end, found in parts.items()}) for e in range(*counts)]


def stacked(groups: list[list[NF4Tensor]]) -> NF4Tensor:
    """``[E, out, in]`` of one matrix for each expert, or of several whose rows follow one another.

    Raises:
        ValueError: the matrices differ in width, blocks or dtype; a block would straddle two matrices.
    """
    matrices = [matrix for expert in zip(*groups, strict=True) for matrix in expert]
    kinds = {(m.shape[1], m.block_size, m.dtype) for m in matrices}
    if len(kinds) != 1:
        raise ValueError("the matrices of experts have codes of different widths, blocks or dtypes")
    ((width, block, dtype),) = kinds
    if any(m.numel() % block for m in matrices):
        raise ValueError(f"blocks of {block} elements would straddle matrices of experts, {matrices[0].numel()} each")
    packed = torch.cat([m.packed for m in matrices])
    absmax = torch.cat([m.absmax for m in matrices])
    shape = torch.Size([len(groups[0]), sum(group[0].shape[0] for group in groups), width])
    return NF4Tensor(packed, absmax, None, None, block, shape, dtype)
