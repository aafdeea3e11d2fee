"""Models in GGUF, llama.cpp's format, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# For these, llama.cpp permutes the rows of q and k, because it rotates in another way; transformers needs the original
# order.
PERMUTED = {"llama"}
# For these, llama.cpp adds the 1 to the weights of norms that transformers adds when it computes.
RAISED = {"gemma3"}
FREQUENCIES = "rope_freqs.weight"
SUPPORTED = {*PERMUTED, *RAISED, "qwen2", "qwen3"}


def open_gguf(path: Path, config: Any) -> Any:
    """A reader of a GGUF file. Its rotary frequencies go into the configuration that transformers made from the other
    fields.

    Raises:
        ValueError: the file is damaged, or its architecture or its rotary scaling is not supported.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        architecture = reader.fields["general.architecture"].contents()
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from None
    if architecture not in SUPPORTED:
        raise ValueError(
            f"{path} is a GGUF of architecture {architecture!r}; supported are {', '.join(sorted(SUPPORTED))}. "
            "Others load from safetensors, which transformers converts them to."
        )
    scaling = reader.fields.get(f"{architecture}.rope.scaling.type")
    if scaling is not None and scaling.contents() != "none":
        raise ValueError(f"{path} scales rotary positions ({scaling.contents()}), which is not read from a GGUF")
    factors = next((tensor for tensor in reader.tensors if tensor.name == FREQUENCIES), None)
    if factors is not None:
        _stretch(config, torch.tensor(factors.data, dtype=torch.float32), path)
    return reader


def _stretch(config: Any, factors: Tensor, path: Path) -> None:
    """Put the rule for rotary frequencies into a configuration. The file has only the result of the rule, ``factors``,
    by which each frequency is divided; the rules of Llama 3.1 and 3.2 are known."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if factors.eq(1).all():
        return
    plain = config.rope_parameters
    theta, width = plain["rope_theta"], 2 * len(factors)
    config.rope_parameters = {
        **plain,
        "rope_type": "llama3",
        "factor": factors.max().item(),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    made, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    wanted = 1 / theta ** (torch.arange(0, width, 2).float() / width) / factors
    if made.shape != wanted.shape or not torch.allclose(made, wanted, rtol=1e-3, atol=0):
        config.rope_parameters = plain
        raise ValueError(f"{path} has {FREQUENCIES}, which are not those of Llama 3.1 or 3.2; no others are read")


@dataclass
class Lazy:
    """A tensor that is made on access, as ``tensor[...]``, and not kept."""

    make: Callable[[], Tensor]

    def __getitem__(self, whole: Any) -> Tensor:
        return self.make()


def gguf_tensors(path: Path, reader: Any, names: Iterable[str], config: Any) -> dict[str, Lazy]:
    """The tensors of a GGUF file, dequantised to float32, by their names in a transformers model; one at a time.

    Args:
        reader: of :func:`open_gguf`.
        names: the model's parameters.
        config: its configuration; the counts of heads and layers are read.

    Raises:
        ValueError: the file has a tensor that the model lacks.
    """
    import gguf
    import numpy as np

    architecture = reader.fields["general.architecture"].contents()
    kind = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    to_gguf = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    wanted = {}
    for name in names:
        stem, _, suffix = name.rpartition(".")
        found = to_gguf.get_name(stem)
        if found:
            wanted[f"{found}.{suffix}"] = name
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}

    def dense(tensor: Any) -> Tensor:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if architecture in PERMUTED and (count := heads.get(tensor.name.split(".")[-2])):
            shape = values.shape
            values = values.reshape(count, shape[0] // count // 2, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
        if architecture in RAISED and tensor.name.endswith("norm.weight"):
            values = values - 1
        return torch.from_numpy(np.array(values, dtype=np.float32))

    known = {tensor.name for tensor in reader.tensors} - {FREQUENCIES}  # (the configuration has those already)
    if known - wanted.keys():
        raise ValueError(f"{path} has a tensor {min(known - wanted.keys())} that the model has no place for")
    return {wanted[tensor.name]: Lazy(partial(dense, tensor)) for tensor in reader.tensors if tensor.name in wanted}
