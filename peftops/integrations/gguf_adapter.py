"""Adapters as llama.cpp reads them: a GGUF file with A and B of each layer, under its own names of the layers."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from ..attaching import attachment, hosts
from ..methods.lora import LoRA
from ..nn import LINEAR, kind_of, unwrapped
from .files import writable_directory, write_atomically
from .gguf_files import PERMUTED
from .gguf_model import ARCHITECTURES


def save_gguf(model: nn.Module, file: str | os.PathLike, *, name: str | None = None) -> None:
    """Write an attached adapter of LoRA's family as a GGUF file, for llama.cpp's ``--lora`` and Ollama's ``ADAPTER``.

    llama.cpp adds ``alpha / r * B A`` to the weights of a GGUF of the same base model; A and B are in float32. All
    layers share one alpha. If a layer has another scaling, its B includes the quotient.

    Args:
        file: is replaced in one step, when the new one is complete.
        name: which adapter; by default the active one.

    Raises:
        ImportError: the package gguf is not installed.
        TypeError: such a file cannot hold the method, a layer or the kind of model; the sentence says which.
        ValueError: there is no such adapter, or it is not finite.
        OSError: the file cannot be written.

    Examples:
        >>> model = peftops.attach(llama(), peftops.LoRAConfig(r=2))
        >>> peftops.save_gguf(model, "adapter.gguf")
    """
    import gguf

    model, file = unwrapped(model), Path(file)
    state = attachment(model)
    name = state.switch.active if name is None else name
    if name not in state.configs:
        raise ValueError(f"the model has no adapter named {name!r}; it has {', '.join(state.configs)}")
    config = getattr(model, "config", None)
    architecture = ARCHITECTURES.get(getattr(config, "model_type", None))
    if architecture is None:
        kind = getattr(config, "model_type", type(model).__name__)
        raise TypeError(f"a GGUF of {kind} is not known here; {', '.join(sorted(ARCHITECTURES))} are")
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    alpha, tensors = None, {}
    for path, host in hosts(model):
        if name not in host.adapters:
            continue
        A, B, scaling = _factors(path, host.base if hasattr(host, "base") else None, host.adapters[name])
        target = names.get_name(path)
        if target is None:
            raise TypeError(f"llama.cpp has no name for {path} in a model of {architecture}")
        count = heads.get(target.rpartition(".")[2]) if architecture in PERMUTED else None
        if count:  # the order of rows that llama.cpp turns
            B = B.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
        alpha = (scaling * len(A) or 1.0) if alpha is None else alpha  # (0 means no scaling there)
        tensors |= {f"{target}.weight.lora_a": A, f"{target}.weight.lora_b": B * (scaling * len(A) / alpha)}
    broken = next((key for key, tensor in tensors.items() if not tensor.isfinite().all()), None)
    if broken:
        raise ValueError(f"the adapter {name!r} is not finite: {broken} holds NaN or infinity")
    writable_directory(file.parent, sum(t.nbytes for t in tensors.values()) + 2**20)
    write_atomically(file, lambda temporary: _write(temporary, architecture, alpha or 1.0, tensors))


@torch.no_grad()
def _factors(path: str, base: nn.Module | None, adapter: nn.Module) -> tuple[Tensor, Tensor, float]:
    """A, B and the scaling. Raises an error if the adapter has anything else."""
    biased = isinstance(adapter, LoRA) and adapter.biased
    if not isinstance(adapter, LoRA) or type(adapter).adapt is not LoRA.adapt or biased:
        kind = f"{type(adapter).__name__}{' with biases' if biased else ''}"
        raise TypeError(
            f"a GGUF adapter holds A and B, as LoRA has them, and {path} has a {kind}; merge it into the model"
        )
    if base is None or kind_of(base) != LINEAR:
        raise TypeError(f"a GGUF adapter is of linear layers, and {path} is a {type(base).__name__}")
    A, B = (factor.detach().float().cpu() for factor in adapter.factors())
    return A, B, adapter.scaling


def _write(file: Path, architecture: str, alpha: float, tensors: dict[str, Tensor]) -> None:
    import gguf

    writer = gguf.GGUFWriter(file, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for key, tensor in tensors.items():
        writer.add_tensor(key, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
