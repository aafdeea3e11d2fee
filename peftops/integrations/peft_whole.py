"""Embeddings and heads that HF PEFT's files hold whole, or some rows of them, beside the adapter's own tensors.

PEFT saves them for ``save_embedding_layers``, automatically if the vocabulary was resized, and saves tied ones together
for ``ensure_weight_tying``. For ``trainable_token_indices`` it saves only the new rows. All of these are loaded as
``modules_to_save``, modules that are whole in the file: the model computes the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..attaching.targets import is_within, layers
from ..nn import PREFIX, base_of, is_quantized, module_at

_ROWS = ".token_adapter.trainable_tokens_delta"


def with_whole(
    tensors: dict[str, Tensor], fields: dict[str, Any], model: nn.Module, saved: tuple[str, ...], file: object
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors, with embeddings and heads whole, and ``saved``, the list of modules that are whole, with these
    added.

    Args:
        fields: of ``adapter_config.json``.

    Raises:
        ValueError: an embedding or its rows do not fit the model, or the embedding has another adapter as well.
    """
    tensors, found = dict(tensors), []
    for path, rows, ids in list(_rows(tensors, fields, model, saved, file)):
        del tensors[f"{PREFIX}{path}{_ROWS}"]
        weight = base_of(module_at(model, path)).weight
        for other in _tied(model, weight):
            own = weight.detach().to(torch.float32, copy=True)
            tensors[f"{PREFIX}{other}.weight"] = own.index_copy(0, ids.to(own.device), rows.to(own))
            found.append(other)
    for path in _embeddings(model):
        given, weight = tensors.get(f"{PREFIX}{path}.weight"), base_of(module_at(model, path)).weight
        if given is None or path in found or is_within(path, saved):
            continue
        if given.shape != weight.shape:
            raise ValueError(
                f"{file} holds {path} itself (save_embedding_layers), {list(given.shape)}, and the "
                f"model's is {list(weight.shape)}: call model.resize_token_embeddings({len(given)}) "
                "before you load it"
            )
        if is_quantized(weight) or not torch.equal(given.to(weight.device, weight.dtype), weight):
            found.append(path)
        else:  # as the model has it
            for leaf, _ in base_of(module_at(model, path)).named_parameters(recurse=False):
                tensors.pop(f"{PREFIX}{path}.{leaf}", None)
    for path in found:
        for leaf, own in base_of(module_at(model, path)).named_parameters(recurse=False):
            tensors.setdefault(f"{PREFIX}{path}.{leaf}", own.detach())
    return tensors, (*saved, *found)


def _embeddings(model: nn.Module) -> list[str]:
    """The names of the model's embedding and output layer, from transformers."""
    gets = (getattr(model, f"get_{which}_embeddings", lambda: None) for which in ("input", "output"))
    own = [base_of(layer) for layer in (get() for get in gets) if hasattr(layer, "weight")]  # (of an image, none has)
    return [path for path, module in layers(model) if any(base_of(module) is layer for layer in own)]


def _tied(model: nn.Module, weight: Tensor) -> list[str]:
    """The names of all layers that have this weight."""
    return [path for path, module in layers(model) if getattr(base_of(module), "weight", None) is weight]


def _rows(
    tensors: dict[str, Tensor], fields: dict[str, Any], model: nn.Module, saved: tuple[str, ...], file: object
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The layers of which a file has rows, these rows, and their indices."""
    asked = fields.get("trainable_token_indices")
    if not isinstance(asked, dict):
        asked = dict.fromkeys(_embeddings(model)[:1], asked)
    paths = [key.removeprefix(PREFIX).removesuffix(_ROWS) for key in tensors if key.endswith(_ROWS)]
    for path in paths:
        what, rows = f"{file}: trainable_token_indices of {path}", tensors[f"{PREFIX}{path}{_ROWS}"]
        ids = next((v for name, v in asked.items() if f".{path}".endswith(f".{name}")), None)
        known = next((base_of(module) for name, module in layers(model) if name == path), None)
        weight = getattr(known, "weight", None)
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise ValueError(f"{what} must be a list of numbers, not {ids!r}")
        if weight is None or is_quantized(weight) or weight.dim() != 2:
            raise ValueError(f"{what}: the model has no dense matrix of that name")
        if list(rows.shape) != [len(ids), weight.shape[1]] or not all(0 <= i < len(weight) for i in ids):
            raise ValueError(
                f"{what} are {ids}, its rows {list(rows.shape)}, and the model's matrix is {list(weight.shape)}"
            )
        beside = [key for key in tensors if key.startswith(f"{PREFIX}{path}.") and not key.endswith(_ROWS)]
        if beside or is_within(path, saved):
            raise ValueError(f"{what}: it has another adapter, too, which peftops does not support")
        yield path, rows, torch.tensor(ids, dtype=torch.int64)
