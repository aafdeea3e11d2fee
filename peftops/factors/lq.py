"""LQ-LoRA's decomposition of one weight, and the Fisher information that tells which of its elements matter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..attaching.targets import ALL_LINEAR, Target, find_targets
from ..nn import module_at
from ..nn.layers import as_matrix, dequantized
from ..ops.packed_tensor import PackedTensor
from .singular import leading, shared, size


def fisher(
    model: nn.Module, loss: Callable[[Any], Tensor], samples: Iterable[Any], *, target: Target = ALL_LINEAR
) -> dict[str, Tensor]:
    """How much the loss depends on each element of a model's weights: the sum of its squared gradients.

    Args:
        model: dense and without adapters.
        loss: of one sample (in a batch, gradients of samples would cancel before they are squared).
        samples: the paper takes 10,000.
        target: the layers, as for :class:`LoRAConfig`.

    Returns:
        Float32 ``[out, in]`` by name of the layer.

    Raises:
        TypeError: a weight is quantised.
        ValueError: there are no samples, or a gradient is not finite.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> found = peftops.fisher(model, lambda x: model(x).square().sum(), torch.randn(5, 8))
        >>> found["0"].shape
        torch.Size([4, 8])
    """
    layers = {path: module_at(model, path) for path in find_targets(model, target)}
    for path, layer in layers.items():
        if isinstance(layer.weight, PackedTensor):
            raise TypeError(f"fisher: {path} is quantised, and codes have no gradient; use a dense model")
    weights = [layer.weight for layer in layers.values()]
    flags, count = [weight.requires_grad for weight in weights], 0
    sums = [torch.zeros_like(weight, dtype=torch.float32, requires_grad=False) for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for sample in samples:
            count += 1
            for total, gradient in zip(sums, torch.autograd.grad(loss(sample), weights), strict=True):
                total += gradient.float().square()
    finally:
        for weight, flag in zip(weights, flags, strict=True):
            weight.requires_grad_(flag)
    if not count:
        raise ValueError("fisher needs at least one sample")
    result = {path: as_matrix(layer, t).contiguous() for (path, layer), t in zip(layers.items(), sums, strict=True)}
    for path, total in result.items():
        if not total.isfinite().all():
            raise ValueError(f"fisher: the gradient of {path} is not finite")
    return result


class Weighing:
    """The weight of each element of an error. A sum of squared errors uses the importance of each element. A search for
    singular vectors uses the product of the row's and the column's mean importance, because it can only use such
    products.

    Args:
        importance: ``[out, in]``, see :func:`fisher`; None for the same of all.
    """

    def __init__(self, importance: Tensor | None):
        self.root = self.rows = self.columns = None
        if importance is not None and importance.any():
            self.root = importance.sqrt()
            # The roots of the means are divisors later, so none may be less than a thousandth of the largest.
            means = (importance.mean(dim, keepdim=True).sqrt() for dim in (1, 0))
            self.rows, self.columns = (mean.clamp(min=1e-3 * mean.max().item()) for mean in means)

    def size(self, error: Tensor) -> float:
        """``||sqrt(F) o error||``."""
        return size(error if self.root is None else self.root * error).item()

    def factors(self, weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
        """``L1 [out, r]`` and ``L2 [r, in]`` whose product is closest to ``weight``."""
        if self.rows is None:
            right, left = shared(*leading(weight, r), 1.0)
            return left, right
        right, left = shared(*leading(self.rows * weight * self.columns, r), 1.0)
        return left / self.rows, right / self.columns


def first_errors(
    weight: Tensor, r: int, quantizers: list[Callable[[Tensor], PackedTensor]], importance: Tensor | None = None
) -> list[float]:
    """The squared errors of one step of :func:`lq_decompose`, or of plain codes where these err less.

    The first singular vectors are the same for all ``quantizers``, so this is cheap; more steps can only reduce the
    error.
    """
    weigh, want = Weighing(importance), weight.float()
    left, right = weigh.factors(want, r)
    errors = []
    for quantize in quantizers:
        lost = [rest - _dense(quantize(rest.to(weight.dtype))) for rest in (want, want - left @ right)]
        errors.append(min(map(weigh.size, lost)) ** 2)
    return errors


def lq_decompose(
    weight: Tensor,
    r: int,
    quantize: Callable[[Tensor], PackedTensor],
    *,
    iterations: int = 10,
    importance: Tensor | None = None,
) -> tuple[PackedTensor, Tensor | None, Tensor | None, list[float]]:
    """Q, L1 and L2 with ``Q + L1 L2`` close to ``weight``: singular vectors first, then codes of the remainder, in
    turn.

    Args:
        weight: ``[out, in]``, any float dtype, which Q has, too.
        quantize: the function that makes Q of a dense weight.
        iterations: at most this many; the loop stops when the error grows. 0 for plain codes.
        importance: of each element, see :class:`Weighing`.

    Returns:
        The best iterate (L1 and L2 are None if that is plain codes), and the errors, relative to the weight: of plain
        codes, then of each iterate.
    """
    weigh, want = Weighing(importance), weight.float()
    scale = weigh.size(want) or 1.0
    codes = quantize(weight)
    best: tuple = (codes, None, None)
    errors, rest = [weigh.size(want - _dense(codes)) / scale], want
    for _ in range(iterations):
        left, right = weigh.factors(rest, min(r, *rest.shape))
        low = left @ right
        codes = quantize((want - low).to(weight.dtype))
        rest = want - _dense(codes)
        errors.append(weigh.size(rest - low) / scale)
        if errors[-1] < min(errors[:-1]):
            best = codes, left, right
        if len(errors) > 2 and errors[-1] >= errors[-2]:
            break
    return *best, errors


def _dense(codes: PackedTensor) -> Tensor:
    return dequantized(codes, torch.float32)
