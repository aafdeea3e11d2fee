"""The loss of a language model, computed in pieces, so that all logits are never there at once.

A vocabulary of 128,000 words makes 512 KiB of logits in float32 for each token, and cross-entropy and its gradient make
as many again. They take most of the memory in a step of a small model, or of a large one in 4 bits. Here one piece of
the tokens passes the output layer, and its gradient is computed before the logits of the next piece. Backward keeps
only the gradient of the hidden states.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORED = -100  # the label of a token that the model is not to learn, as in torch and transformers
PIECE = 16 << 20  # logits at a time: 64 MiB of them in float32


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, labels, head, rows, *parameters):
        total = hidden.new_zeros((), dtype=torch.float32)
        d_hidden = torch.empty_like(hidden)
        sums: list[Tensor | None] = [None] * len(parameters)
        for begin in range(0, len(hidden), rows):
            piece = hidden[begin : begin + rows].detach().requires_grad_()
            with torch.enable_grad():
                loss = F.cross_entropy(head(piece).float(), labels[begin : begin + rows], reduction="sum")
            grads = torch.autograd.grad(loss, (piece, *parameters), allow_unused=True)
            d_hidden[begin : begin + rows] = grads[0]
            for i, grad in enumerate(grads[1:]):  # of several pieces, in float32
                if grad is not None:
                    sums[i] = grad if rows >= len(hidden) else grad.float() if sums[i] is None else sums[i].add_(grad)
            total += loss.detach()
        sums = [None if t is None else t.to(p.dtype) for t, p in zip(sums, parameters, strict=True)]
        results = (d_hidden if hidden.requires_grad else None, *sums)
        ctx.kept = [t is not None for t in results]
        ctx.save_for_backward(*(t for t in results if t is not None))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        kept = iter(ctx.saved_tensors)
        grads = [next(kept) * g if has else None for has in ctx.kept]
        return grads[0], None, None, None, *grads[1:]


def head_loss(head: nn.Module, hidden: Tensor, labels: Tensor, *, vocabulary: int | None = None) -> Tensor:
    """Sum of the negative log-likelihoods of ``labels`` under ``head(hidden)``.

    It equals ``F.cross_entropy(head(hidden).float(), labels, reduction="sum")``, with its gradients, apart from the
    order of sums. Some 16 million logits are made at a time.

    Args:
        head: the output layer, dense, quantised or adapted; a module from ``[tokens, width]`` to ``[tokens, words]``.
        hidden: ``[tokens, width]``, what goes into it.
        labels: int64 ``[tokens]``; tokens with -100 count as nothing.
        vocabulary: words, if ``head`` has no ``out_features``.

    Returns:
        A float32 number, differentiable once in ``hidden`` and the parameters of ``head``.

    Raises:
        ValueError: shapes do not fit together.

    Examples:
        >>> head = torch.nn.Linear(8, 100)
        >>> hidden, labels = torch.randn(5, 8, requires_grad=True), torch.randint(100, (5,))
        >>> peftops.head_loss(head, hidden, labels).backward()
        >>> hidden.grad.shape
        torch.Size([5, 8])
    """
    if hidden.dim() != 2 or labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"head_loss: hidden must be [tokens, width] and labels [tokens], not {list(hidden.shape)} and "
            f"{list(labels.shape)}"
        )
    words = vocabulary if vocabulary is not None else head.out_features
    rows = max(1, PIECE // max(1, words))
    if not torch.is_grad_enabled():
        pieces = zip(hidden.split(rows), labels.split(rows), strict=True)
        losses = [F.cross_entropy(head(x).float(), y, reduction="sum") for x, y in pieces]
        return sum(losses, hidden.new_zeros((), dtype=torch.float32))
    parameters = [p for p in head.parameters() if p.requires_grad]
    return _HeadLoss.apply(hidden, labels, head, rows, *parameters)


_splits: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def splits(model: nn.Module) -> bool:
    """Whether a causal language model of transformers is a body and then an output layer, without a change of the
    logits after that. A pass of two tokens tells it, once for a model."""
    if model not in _splits:
        _splits[model] = _looks_split(model)
    return _splits[model]


@torch.no_grad()
def _looks_split(model: nn.Module) -> bool:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    body = getattr(model, "base_model", model)
    if head is None or body is model or not hasattr(head, "out_features") or model._forward_hooks:
        return False
    seen: dict[str, Any] = {}

    def of_head(module: nn.Module, args: tuple, out: Tensor) -> None:
        seen.update(into=args[0], out=out)

    hooks = [
        head.register_forward_hook(of_head),
        body.register_forward_hook(lambda module, args, out: seen.update(body=out)),
    ]
    try:
        with torch.random.fork_rng(enabled=model.training):
            logits = model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device), use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    last = getattr(seen.get("body"), "last_hidden_state", None)
    if last is None or "into" not in seen:
        return False
    same = lambda a, b: a.untyped_storage()._cdata == b.untyped_storage()._cdata
    return seen["out"] is logits and same(seen["into"], last)


def language_model_loss(model: nn.Module, input_ids: Tensor, labels: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
    """Sum of the negative log-likelihoods of a causal language model's labels, and how many there are.

    Logits are made for the labelled tokens alone, and in pieces: see :func:`head_loss`. If a model changes its logits
    after the output layer (a cap, a factor), all of them are made at once.

    Args:
        model: one of transformers' causal language models, with adapters or without.
        input_ids: int64 ``[rows, tokens]``.
        labels: of the same shape. The label of a token is predicted from the tokens before it; -100 means no label.
        inputs: other arguments of ``model``, ``attention_mask`` for instance.

    Returns:
        The sum, float32, and the number of labels, int64; divide for the mean that ``model(labels=...)`` returns.

    Raises:
        ValueError: the shapes of input_ids and labels differ.

    Examples:
        >>> model = peftops.attach(llama(), peftops.LoRAConfig(r=2))
        >>> loss, count = peftops.language_model_loss(model, ids, ids)
        >>> (loss / count).backward()
        >>> count.item()  # the first token of each row has nothing before it
        14
    """
    if input_ids.shape != labels.shape:
        raise ValueError(
            f"language_model_loss: labels must have the shape of input_ids, {list(input_ids.shape)}, not "
            f"{list(labels.shape)}"
        )
    chosen = labels[:, 1:] != IGNORED
    wanted = labels[:, 1:][chosen]
    if splits(model):
        hidden = model.base_model(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state
        hidden = hidden[:, -labels.shape[1] : -1]  # a soft prompt's positions come first and have no labels
        loss = head_loss(model.get_output_embeddings(), hidden[chosen], wanted)
    else:
        labelled = chosen.any(0).nonzero()
        first = int(labelled[0]) if len(labelled) else 0  # no logits before the first label's, where the model can
        keep = labels.shape[1] - first
        some = {"logits_to_keep": keep} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        logits = model(input_ids=input_ids, use_cache=False, **some, **inputs).logits[:, -keep:-1]
        loss = F.cross_entropy(logits[chosen[:, first:]].float(), wanted, reduction="sum")
    return loss, chosen.sum()
