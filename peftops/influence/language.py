"""Causal language models for influence functions: the loss of a batch, and its loss with labels drawn from the model.

A batch is a dict of tensors with ``input_ids``, ``labels`` (-100: no target) and, if padded, ``attention_mask``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn import IGNORED

Batch = Mapping[str, Tensor]


def _logits_and_labels(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    missing = {"input_ids", "labels"} - set(batch)
    if missing:
        raise ValueError(f"a batch needs input_ids and labels; this one has {', '.join(map(str, batch)) or 'nothing'}")
    labels = batch["labels"]
    targets = (labels != IGNORED).any(0)
    targets[0] = False  # nothing predicts the first token
    if not targets.any():
        raise ValueError("a batch has no targets: all of its labels are -100")
    # With a large vocabulary, logits would take most of the memory, so there are none before the first target.
    keep = labels.shape[1] - int(targets.nonzero()[0]) + 1
    given = {name: tensor for name, tensor in batch.items() if name != "labels"}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        given["logits_to_keep"] = keep
    logits, labels = model(**given, use_cache=False).logits[:, -keep:-1], labels[:, 1 - keep :]
    chosen = labels != IGNORED
    return logits[chosen].float(), labels[chosen]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Sum over the targets of ``-log p``."""
    logits, labels = _logits_and_labels(model, batch)
    return F.cross_entropy(logits, labels, reduction="sum")


def sampled_loss(model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
    """The same with targets drawn from what the model predicts: the gradient's covariance is the Fisher matrix, which
    for this loss is the Gauss-Newton matrix."""
    logits, _ = _logits_and_labels(model, batch)
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).flatten()
    return F.cross_entropy(logits, drawn, reduction="sum")


def token_mask(batch: Batch) -> Tensor | None:
    """``[n, t]``: which positions are tokens and not padding; None if all are."""
    return batch.get("attention_mask")
