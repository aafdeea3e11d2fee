"""Models in GGUF, llama.cpp's format, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

# llama.cpp permutes the rows of q and k of these, for its own way to rotate; transformers' way needs them back.
_PERMUTED = {"llama"}
_SUPPORTED = {*_PERMUTED, "qwen2", "qwen3"}


def gguf_tensors(path: Path, names: Iterable[str], config: object) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a GGUF file, dequantised to float32, by their names in a transformers model.

    Args:
        names: the model's parameters.
        config: its configuration; the counts of heads and layers are read.

    Raises:
        ValueError: the file is damaged, or of an architecture that is not supported.
    """
    import gguf
    import numpy as np

    try:
        reader = gguf.GGUFReader(path)
        architecture = reader.fields["general.architecture"].contents()
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from None
    if architecture not in _SUPPORTED:
        raise ValueError(
            f"{path} is a GGUF of architecture {architecture!r}; supported are {', '.join(sorted(_SUPPORTED))}. "
            "Others load from safetensors, which transformers converts them to."
        )
    kind = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    to_gguf = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    wanted = {}
    for name in names:
        stem, _, suffix = name.rpartition(".")
        found = to_gguf.get_name(stem)
        if found:
            wanted[f"{found}.{suffix}"] = name
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for tensor in reader.tensors:
        if tensor.name not in wanted:
            if tensor.name == "rope_freqs.weight":  # derived from the configuration
                continue
            raise ValueError(f"{path} has a tensor {tensor.name} that the model has no place for")
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if architecture in _PERMUTED and (count := heads.get(tensor.name.split(".")[-2])):
            shape = values.shape
            values = values.reshape(count, shape[0] // count // 2, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
        yield wanted[tensor.name], torch.from_numpy(np.array(values, dtype=np.float32))
