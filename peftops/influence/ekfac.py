"""Influence functions with EK-FAC, Grosse et al. 2023 (arXiv:2308.03296), on the matrices of an adapter.

    score(q, m) = sum over matrices of < (G + lambda)^-1 grad L_q, grad L_m >

L is the sum of an example's losses, G the Gauss-Newton matrix of each matrix by itself. A positive score says that more
weight on example m lowers the loss of query q. The score is the damped, proximal response to m. It does not predict the
result of a new training without m. With the eigenvectors Q_A of the inputs' covariance and Q_S of the
(pseudo-)gradients',

    (G + lambda)^-1 V = Q_S [(Q_S^T V Q_A) / (Lambda + lambda)] Q_A^T,  Lambda = mean over examples of (Q_S^T g Q_A)^2

(George et al. 2018, arXiv:1806.03884), where g is an example's gradient with labels drawn from the model. The default
lambda is 0.1 mean(Lambda), by matrix. Scores depend on the split of B A into B and A. A matrix whose gradients are all
0, as A's are while B is 0, adds 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import language
from .matrices import Matrix, matrices, watched

Gradients = dict[str, Tensor]  # by matrix: [n, out, in]


@dataclass
class Factors:
    """The curvature of one matrix: eigenvectors of inputs and gradients, and the corrected eigenvalues."""

    inputs: Tensor  # Q_A, [in, in]; one tensor for all matrices that have the same input
    gradients: Tensor  # Q_S, [out, out]
    values: Tensor  # Lambda, [out, in]

    def rotate(self, g: Tensor) -> Tensor:
        return self.gradients.t() @ g @ self.inputs

    def solve(self, g: Tensor, damping: float | None) -> Tensor:
        """``(G + lambda)^-1 g``; 0 where both Lambda and lambda are."""
        damped = self.values + (0.1 * self.values.mean() if damping is None else damping)
        return self.gradients @ (self.rotate(g) * torch.where(damped > 0, 1 / damped, 0)) @ self.inputs.t()


class Influence:
    """Scores of training examples for queries, over the matrices that train in a model's active adapter.

    Fit it on training data, compute the :meth:`queries`, then score any number of examples for them:
    ``influence = Influence(model); influence.fit(batches); influence.scores(influence.queries(asked), batches)``.

    Args:
        model: with a trained adapter of LoRA's family (the gradient of A is 0 while B is 0).
        loss: (model, batch) -> the sum of the losses of the batch's examples. By default all three functions are those
            of a causal language model of transformers, with batches that are dicts of input_ids, attention_mask and
            labels.
        sampled_loss: (model, batch, generator) -> the same for labels drawn from the model's own prediction.
        mask: batch -> ``[n, t]``, which tokens count in covariances, or None for all.
        damping: lambda of every matrix; None for a tenth of its mean eigenvalue.

    Raises:
        TypeError: the adapter has parameters other than A and B of linear layers.
        ValueError: no adapter is attached, nothing trains, damping is negative.

    Examples:
        >>> model = peftops.attach(llama(), peftops.LoRAConfig(r=2))
        >>> for parameter in model.parameters():
        ...     if parameter.requires_grad:
        ...         _ = nn.init.normal_(parameter, std=0.1)  # as if trained
        >>> batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        >>> influence = peftops.Influence(model)
        >>> _ = influence.fit([batch])
        >>> influence.scores(influence.queries([batch]), [batch]).shape  # two queries, two examples
        torch.Size([2, 2])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Callable[[nn.Module, Any], Tensor] = language.loss,
        sampled_loss: Callable[[nn.Module, Any, torch.Generator], Tensor] = language.sampled_loss,
        mask: Callable[[Any], Tensor | None] = language.token_mask,
        damping: float | None = None,
    ):
        if damping is not None and not damping >= 0:
            raise ValueError(f"damping must be at least 0, or None for a tenth of the mean eigenvalue, not {damping!r}")
        self.model, self.loss, self.sampled_loss, self.mask, self.damping = model, loss, sampled_loss, mask, damping
        self.matrices = matrices(model)
        self.factors: dict[str, Factors] = {}

    def fit(self, batches: Iterable[Any], *, seed: int = 0) -> Influence:
        """Estimate the curvature from training data, in two passes. A few thousand examples are enough.

        Raises:
            ValueError: there are no batches, or all gradients are 0.
        """
        batches, generator = list(batches), torch.Generator().manual_seed(seed)
        if not batches:
            raise ValueError("influence needs at least one batch to fit")
        sampled = lambda model, batch: self.sampled_loss(model, batch, generator)
        bases = self._eigenvectors(batches, sampled)
        sums, count = dict.fromkeys(bases, 0), 0
        for batch in batches:
            gradients = self._gradients(batch, sampled)
            count += _size(batch)
            for name, g in gradients.items():
                sums[name] = sums[name] + Factors(*bases[name], g).rotate(g).square().sum(0)
        self.factors = {name: Factors(*bases[name], total / count) for name, total in sums.items()}
        if not any(f.values.any() for f in self.factors.values()):
            self.factors = {}
            raise ValueError("all gradients of the data are 0; has it targets, and is the adapter active?")
        return self

    def _eigenvectors(self, batches: list[Any], sampled: Callable) -> dict[str, tuple[Tensor, Tensor]]:
        """Q_A and Q_S of each matrix, from covariances over all tokens that count."""
        inputs: dict[str, Tensor] = {}
        gradients: dict[str, Tensor] = {}
        shared: dict[str, str] = {}
        for batch in batches:
            mask = self.mask(batch)

            def take(matrix: Matrix, source: str, a: Tensor, ds: Tensor, mask: Tensor | None = mask) -> None:
                shared[matrix.name] = source
                keep = slice(None) if mask is None else mask.bool().flatten()
                a, ds = a.flatten(0, 1)[keep], ds.flatten(0, 1)[keep]
                if source == matrix.name:
                    inputs[source] = inputs.get(source, 0) + a.t() @ a
                gradients[matrix.name] = gradients.get(matrix.name, 0) + ds.t() @ ds

            self._pass(batch, sampled, take)
        vectors = {name: _eigenvectors(total) for name, total in inputs.items()}
        order = [matrix.name for matrix in self.matrices if matrix.name in gradients]
        return {name: (vectors[shared[name]], _eigenvectors(gradients[name])) for name in order}

    def queries(self, batches: Iterable[Any]) -> Gradients:
        """``(G + lambda)^-1`` times the gradients of all examples of the batches, one query each."""
        self._check_fitted()
        parts = [self._gradients(batch, self.loss) for batch in batches]
        if not parts:
            raise ValueError("influence needs at least one query")
        return {name: f.solve(torch.cat([p[name] for p in parts]), self.damping) for name, f in self.factors.items()}

    def scores(self, queries: Gradients, batches: Iterable[Any]) -> Tensor:
        """``[queries, examples]``. The gradients of a batch are computed, used and freed. Gradients of low-rank
        matrices are small, so contracting activations and output gradients with the queries would save nothing."""
        self._check_fitted()
        columns = [
            sum(queries[name].flatten(1) @ g.flatten(1).t() for name, g in self._gradients(batch, self.loss).items())
            for batch in batches
        ]
        return torch.cat(columns, 1) if columns else torch.zeros(len(next(iter(queries.values()))), 0)

    def self_influence(self, batches: Iterable[Any]) -> Tensor:
        """``[examples]``: the score of each example for itself, which is never negative. A score divided by the roots
        of the self-influences of query and example lies in [-1, 1]. Then no example gets a high score only because its
        gradient is large."""
        self._check_fitted()
        rows = []
        for batch in batches:
            solved = lambda name, g: self.factors[name].solve(g, self.damping)
            rows.append(sum((solved(name, g) * g).sum((1, 2)) for name, g in self._gradients(batch, self.loss).items()))
        return torch.cat(rows) if rows else torch.zeros(0)

    def _gradients(self, batch: Any, loss: Callable[[nn.Module, Any], Tensor]) -> Gradients:
        """The gradient of each example of a batch, summed over its tokens."""
        found: Gradients = {}

        def take(matrix: Matrix, source: str, a: Tensor, ds: Tensor) -> None:
            g = ds.transpose(1, 2) @ a
            found[matrix.name] = found[matrix.name] + g if matrix.name in found else g

        self._pass(batch, loss, take)
        return found

    def _pass(self, batch: Any, loss: Callable[[nn.Module, Any], Tensor], take: Callable) -> None:
        with watched(self.matrices, _size(batch), take), _evaluating(self.model):
            total = loss(self.model, batch)
            torch.autograd.grad(total, [p for p in self.model.parameters() if p.requires_grad], allow_unused=True)

    def _check_fitted(self) -> None:
        if not self.factors:
            raise ValueError("fit(batches) comes first")


def _size(batch: Any) -> int:
    return len(next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0])


def _eigenvectors(covariance: Tensor) -> Tensor:
    covariance = covariance.double()
    return torch.linalg.eigh((covariance + covariance.t()) / 2)[1].float()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Turns dropout off, which would add noise to every gradient."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
