"""Whole dense models as GGUF files, for llama.cpp and Ollama: the reverse of ``gguf_files``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .gguf_files import FREQUENCIES, PERMUTED
from .gguf_tokenizer import add_tokenizer

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # by transformers' names


def check_gguf(config: Any, tokenizer: Any, pre: str | None = None) -> None:
    """Raise the errors of :func:`write_gguf` that depend only on a model's configuration and tokenizer.

    Raises:
        ImportError: the package gguf is not installed.
        TypeError: a GGUF, or this writer, does not support the kind of model, an option of it or the tokenizer; the
            sentence says which.
        ValueError: ``pre`` is not a name that llama.cpp knows, or is missing and needed.
    """
    import gguf  # noqa: F401  (as early as that)

    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise TypeError(f"a GGUF of {kind} is not known here; {', '.join(sorted(ARCHITECTURES))} are")
    rope = config.rope_parameters["rope_type"]
    if rope not in ("default", "llama3"):
        raise TypeError(f"rope_type {rope!r} cannot be written into a GGUF; 'default' and 'llama3' can")
    window = getattr(config, "sliding_window", None)
    if window and window < config.max_position_embeddings and getattr(config, "use_sliding_window", True):
        raise TypeError(f"sliding_window={window}: llama.cpp would let {kind} see all tokens; set it to None for that")
    add_tokenizer(None, tokenizer, config.vocab_size, pre)


@torch.no_grad()
def write_gguf(model: nn.Module, tokenizer: Any, file: Path, pre: str | None = None) -> None:
    """Write a dense model, and its tokenizer, in the dtype of its weights; norms and biases are in float32.

    Args:
        file: a new one.
        pre: llama.cpp's name for the tokenizer's way to cut text before it looks for tokens; by default found from the
            tokenizer itself.

    Raises:
        ImportError, TypeError, ValueError: see :func:`check_gguf`; a weight has no name in a GGUF.
    """
    import gguf

    config = model.config
    check_gguf(config, tokenizer, pre)
    architecture = ARCHITECTURES[config.model_type]
    tensors = _tensors(model, architecture)  # before the file is there
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for add, value in (
        (writer.add_block_count, config.num_hidden_layers),
        (writer.add_context_length, config.max_position_embeddings),
        (writer.add_embedding_length, config.hidden_size),
        (writer.add_feed_forward_length, config.intermediate_size),
        (writer.add_head_count, config.num_attention_heads),
        (writer.add_head_count_kv, config.num_key_value_heads),
        (writer.add_key_length, width),
        (writer.add_value_length, width),
        (writer.add_layer_norm_rms_eps, config.rms_norm_eps),
        (writer.add_rope_dimension_count, width),
        (writer.add_rope_freq_base, config.rope_parameters["rope_theta"]),
        (writer.add_vocab_size, config.vocab_size),
    ):
        add(value)
    add_tokenizer(writer, tokenizer, config.vocab_size, pre)
    for name, tensor in tensors.items():
        _add(writer, name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: nn.Module, architecture: str) -> dict[str, Tensor]:
    """The weights by their names in a GGUF, in llama.cpp's order of rows, without a tied head."""
    import gguf

    config = model.config
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    result = {}
    if config.rope_parameters["rope_type"] == "llama3":
        result[FREQUENCIES] = _stretched(config)
    for path, tensor in model.named_parameters():  # (it names a tied weight once)
        stem, _, leaf = path.rpartition(".")
        target = names.get_name(stem)
        if target is None or (leaf == "bias" and architecture != "qwen2"):
            raise TypeError(f"a GGUF of {config.model_type} has no place for {path} that its readers know")
        count = heads.get(target.rpartition(".")[2]) if architecture in PERMUTED else None
        if count:
            tensor = tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
        result[f"{target}.{leaf}"] = tensor.detach().cpu()
    return result


def _stretched(config: Any) -> Tensor:
    """The divisors of the frequencies of Llama 3.1: a GGUF has no field for their rule."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    made, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, 2 * len(made), 2).float() / (2 * len(made)))
    return plain / made


def _add(writer: Any, name: str, tensor: Tensor) -> None:
    import gguf

    if tensor.dim() == 1 or tensor.dtype == torch.float32:
        writer.add_tensor(name, tensor.float().contiguous().numpy())
    elif tensor.dtype == torch.float16:
        writer.add_tensor(name, tensor.contiguous().numpy())
    else:
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().contiguous().numpy(), kind), raw_dtype=kind)
