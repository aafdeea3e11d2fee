"""A model as files that need no other files: dense, or in codes in GPTQ's layout."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ..integrations.files import whole_directory
from ..integrations.gguf_model import write_gguf
from ..integrations.gptq_files import FORMAT, to_gptq
from ..nn import ExpertsLinear, GroupLinear


def write_dense(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Write a model without adapters as a directory of transformers, completely or not at all.

    Args:
        folder: is not there yet, or empty.

    Raises:
        TypeError: the model has biases, and its configuration has no option for them.
        OSError: the disk is full, or ``folder`` holds something.
    """
    stand_alone(model)
    with whole_directory(folder, sum(p.nbytes for p in model.parameters())) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def write_whole_gguf(model: nn.Module, tokenizer: Any, folder: Path, pre: str | None) -> None:
    """Write a model without adapters as one GGUF file in a directory; raises what :func:`write_dense` and
    :func:`~peftops.integrations.gguf_model.write_gguf` do."""
    stand_alone(model)
    with whole_directory(folder, sum(p.nbytes for p in model.parameters())) as temporary:
        write_gguf(model, tokenizer, temporary / "model.gguf", pre)


def stand_alone(model: nn.Module) -> None:
    """Change a model without adapters to a dense one that its own configuration describes; raises the errors of
    :func:`write_dense`."""
    _forget_codes(model)
    _untie(model)
    _give_biases_a_place(model)
    _check_finite(model)


def write_packed(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Write a model whose layers are group-quantised, without a loss: codes, scales and zeros in GPTQ's layout, the
    last two in float32. Raises the errors of :func:`write_dense`."""
    experts = next((path for path, layer in model.named_modules() if isinstance(layer, ExpertsLinear)), None)
    if experts:
        raise TypeError(f"{experts} is of experts, of which GPTQ's layout has no codes; merge without --packed")
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, GroupLinear)}
    coded = {f"{path}.weight" for path in layers}
    tensors = {name: p.detach().contiguous() for name, p in model.named_parameters() if name not in coded}
    for path, layer in layers.items():
        tensors |= {f"{path}.{part}": tensor for part, tensor in to_gptq(layer.weight).items()}
    (how,) = {(layer.weight.bits, layer.weight.group_size) for layer in layers.values()}
    _untie(model)
    with whole_directory(folder, sum(t.nbytes for t in tensors.values())) as temporary:
        save_file(tensors, temporary / "model.safetensors", {"format": "pt"})
        model.config.architectures = [type(model).__name__]
        codes = {
            "quant_method": "gptq",
            "checkpoint_format": FORMAT,
            "bits": how[0],
            "group_size": how[1],
            "desc_act": False,
            "sym": False,
            "zeros": "float32",
        }
        config = model.config.to_dict() | {"quantization_config": codes}
        (temporary / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        model.generation_config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def _forget_codes(model: nn.Module) -> None:
    """Layers in codes become dense ones, and the configuration no longer mentions codes."""
    from ..integrations.quantizer import dequantize

    dequantize(model)
    if getattr(model, "hf_quantizer", None) is not None:
        model.dequantize()


def _untie(model: nn.Module) -> None:
    """If head and embedding are two tensors now, the configuration tells readers of the files not to tie them."""
    head = model.get_output_embeddings()
    if head is None or head.weight is model.get_input_embeddings().weight:
        return
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False


def _give_biases_a_place(model: nn.Module) -> None:
    """If merging made biases in layers that have none by the configuration, set the configuration's option for them."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if not (names - _names(model, model.config)):
        return
    wider = copy.deepcopy(model.config)
    for key, value in model.config.to_dict().items():
        if key.endswith("bias") and value is False:
            setattr(wider, key, True)
    expected = _names(model, wider)
    homeless = sorted(names - expected)
    if homeless:
        raise TypeError(
            f"a {type(model).__name__} has no place for {homeless[0]}, which merging made; train with "
            "--set new_bias=False, or use the adapter as it is"
        )
    for name in sorted(expected - names):
        layer = model.get_submodule(name.rpartition(".")[0])
        layer.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight)), requires_grad=False)
    model.config = wider


def _names(model: nn.Module, config: Any) -> set[str]:
    """The names of the parameters that a model of this configuration has."""
    with torch.device("meta"):
        made = type(model)(copy.deepcopy(config))
    return {name for name, _ in made.named_parameters(remove_duplicate=False)}


def _check_finite(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"{name} is not finite in {parameter.dtype}; nothing was written")
