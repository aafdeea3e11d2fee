"""Second moments of a layer's inputs: calibration needs nothing else of the inputs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_RIDGE, _DEPENDENT = 1e-4, 5e-4  # shares of a column's own moment


class Moments:
    """The sum of x x^T over rows x, in float32, separately for each half of the rows: codes from one half can be tested
    on the other.

    Args:
        width: of a row.
        op: the name that errors begin with.
    """

    def __init__(self, width: int, device: torch.device, op: str = "gptq_quantize"):
        self.width, self.op, self.counts = width, op, [0, 0]
        self.sums = [torch.zeros((width, width), device=device) for _ in range(2)]

    @classmethod
    def of(cls, batches: Tensor | Iterable[Tensor], width: int, device: torch.device) -> Moments:
        self = cls(width, device)
        for x in [batches] if isinstance(batches, Tensor) else batches:
            self.add(x)
        return self

    def add(self, x: Tensor) -> None:
        """Rows ``[..., width]`` of any float dtype: the first half of them, then the rest."""
        if x.dim() == 0 or x.shape[-1] != self.width:
            raise ValueError(f"{self.op}: the last dim of inputs must be {self.width}, but a shape is {list(x.shape)}")
        rows = x.detach().reshape(-1, self.width).to(self.sums[0].device, torch.float32)
        first = (len(rows) + (self.counts[0] <= self.counts[1])) // 2
        for i, part in enumerate((rows[:first], rows[first:])):
            self.sums[i].addmm_(part.t(), part)
            self.counts[i] += len(part)

    @property
    def count(self) -> int:
        return sum(self.counts)

    def mean(self) -> Tensor:
        """The mean of x x^T over all rows, float32 ``[width, width]``.

        Raises:
            ValueError: there are no rows, or a value is not finite.
        """
        if self.count == 0:
            raise ValueError(f"{self.op}: inputs hold no row")
        total = (self.sums[0] + self.sums[1]) / self.count
        if not total.isfinite().all():
            raise ValueError(f"{self.op}: inputs hold a NaN or an infinity, or are too large to square")
        return total

    def halves(self) -> list[Tensor]:
        """The means of both halves."""
        return [total / max(1, count) for total, count in zip(self.sums, self.counts, strict=True)]


def damped(moments: Tensor, damping: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """The upper triangular V with V V^T = the moments, with ``damping`` times the mean of their diagonal added to the
    diagonal, or more if the factorisation needs more.

    Raises:
        ValueError: a moment is negative or not finite, which no damping can mend.
    """
    diagonal = moments.diagonal().to(dtype, copy=True)
    diagonal[diagonal == 0] = 1.0  # an input that is always 0: its column is rounded alone
    while True:
        added = moments.flip(0, 1).to(dtype)  # (a flip is a copy)
        added.diagonal().copy_((diagonal + damping * diagonal.mean()).flip(0))
        factor, failed = torch.linalg.cholesky_ex(added)
        del added  # the matrices of a wide layer take the most memory
        if not failed:
            return factor.flip(0, 1)
        if not damping < 1e6:
            raise ValueError("moments must be finite, symmetric and positive, as sums of x x^T over rows x are")
        damping *= 10


def rank(moments: Tensor) -> tuple[int, int]:
    """The approximate number of directions that the inputs span, and the number of columns that are not always 0."""
    live = moments.diagonal() > 0
    size = torch.where(live, moments.diagonal(), 1).rsqrt()
    own = damped(size[:, None] * moments * size, _RIDGE, torch.float32).diagonal().square()
    return int((own > _DEPENDENT)[live].sum()), int(live.sum())


def output_errors(weight: Tensor, approximations: list[Tensor], moments: Tensor) -> list[float]:
    """The relative error of the outputs of each, against those of ``weight``, in the Frobenius norm over the inputs of
    the moments."""
    sums = [0.0] * (len(approximations) + 1)
    for begin in range(0, len(weight), 1024):
        rows = slice(begin, begin + 1024)
        want = weight[rows].float()
        for i, part in enumerate((want, *(other[rows].float() - want for other in approximations))):
            sums[i] += torch.einsum("ij,ij->", part @ moments, part).double().item()
    return [(max(0.0, part) / max(sums[0], 1e-30)) ** 0.5 for part in sums[1:]]
