"""LQ-LoRA's mixed precision: the format of each weight, so that the sum of errors is least within a budget of bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..nn import dense_matrix
from ..nn.undo import about
from ..ops import NF4Tensor, group_quantize, nf4_quantize
from ..ops.packed_tensor import PackedTensor
from .lq import first_errors


@dataclass(frozen=True)
class Precision:
    """A format of codes: NF4, or whole numbers of 2, 3, 4 or 8 bits with a scale and a zero per group."""

    kind: str  # "nf4" or "int"
    bits: int
    block: int  # elements that share a scale
    double_quant: bool = False

    def __str__(self) -> str:
        kind = "nf4" if self.kind == "nf4" else f"int{self.bits}"
        return f"{kind}-{self.block}{'-double' if self.double_quant else ''}"

    @classmethod
    def of(cls, weight: PackedTensor) -> Precision:
        """That of codes."""
        if isinstance(weight, NF4Tensor):
            return cls("nf4", 4, weight.block_size, weight.double_quant)
        return cls("int", weight.bits, weight.group_size)

    @classmethod
    def parse(cls, text: str) -> Precision:
        """The reverse of ``str()``."""
        kind, _, rest = str(text).partition("-")
        block, *double = rest.split("-")
        kinds = {"nf4": ("nf4", 4), **{f"int{bits}": ("int", bits) for bits in (2, 3, 4, 8)}}
        if kind not in kinds or not block.isdecimal() or double not in ([], ["double"]) or (double and kind != "nf4"):
            raise ValueError(f"a precision must be like 'nf4-64', 'nf4-64-double' or 'int3-64', not {text!r}")
        return cls(*kinds[kind], int(block), bool(double))

    def fits(self, weight: Tensor) -> bool:
        return self.kind == "nf4" or weight.shape[1] % self.block == 0

    def quantize(self, weight: Tensor) -> PackedTensor:
        if self.kind == "nf4":
            return nf4_quantize(weight, block_size=self.block, double_quant=self.double_quant)
        return group_quantize(weight, bits=self.bits, group_size=self.block, clip="mse")

    def size(self, count: int) -> float:
        """Bits that ``count`` weights take: their codes, scales and zeros."""
        scales = -(-count // self.block)
        if self.kind == "int":
            return self.bits * count + 64 * scales
        return 4 * count + (8 * scales + 32 * -(-scales // 256) + 32 if self.double_quant else 32 * scales)


PRECISIONS = (
    *(Precision("nf4", 4, block, double) for block in (32, 64, 128, 256) for double in (True, False)),
    *(Precision("int", bits, block) for bits in (2, 3, 4, 8) for block in (32, 64, 128, 256)),
)


def allocate(costs: list[list[float]], sizes: list[list[float]], budget: float) -> list[int]:
    """The choice for each weight: the sum of costs is least, and the sum of sizes is within the budget.

    Args:
        costs, sizes: a list per weight, a number per choice.

    Raises:
        ImportError: scipy is missing.
        ValueError: even the smallest choices exceed the budget.
    """
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_matrix
    except ImportError:
        raise ImportError("a budget of bits is kept by scipy's integer programming: pip install scipy") from None
    least = sum(min(of) for of in sizes)
    if least > budget:
        raise ValueError(f"the smallest formats take {least:.0f} bits, which is more than the budget of {budget:.0f}")
    # A choice is left out if another one has a smaller cost and size: fewer choices are faster. Solvers need numbers
    # around 1.
    best = lambda i, j: (
        not any(
            (costs[i][k], sizes[i][k], k) < (costs[i][j], sizes[i][j], j) and sizes[i][k] <= sizes[i][j]
            for k in range(len(costs[i]))
        )
    )
    kept = [(i, j) for i in range(len(costs)) for j in range(len(costs[i])) if best(i, j)]
    cost = np.array([costs[i][j] for i, j in kept])
    one = csr_matrix((np.ones(len(kept)), ([i for i, _ in kept], range(len(kept)))), (len(costs), len(kept)))
    size = np.array([[sizes[i][j] / budget for i, j in kept]])
    limit = 1.0
    while True:
        found = milp(
            cost * 1000 / (np.abs(cost).max() or 1),
            integrality=np.ones(len(kept)),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one, 1, 1), LinearConstraint(size, ub=limit)],
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:
            raise ValueError(f"scipy's integer programming found no allocation: {found.message}")
        chosen = [j for (_, j), x in zip(kept, found.x, strict=True) if x > 0.5]
        excess = sum(of[j] for of, j in zip(sizes, chosen, strict=True)) / budget - 1
        if excess <= 0:
            return chosen
        limit -= excess  # the solver tolerates an excess of this size


def choose(
    layers: dict[str, nn.Module], ranks: dict[str, int], bits: float, fisher: dict[str, Tensor] | None
) -> dict[str, Precision]:
    """The precision of each dense layer: the sum of errors is least with ``bits`` a weight on average.

    Args:
        ranks: r of each.
        fisher: the importance of each weight; None if all are equal.
    """
    choices, costs, sizes = [], [], []
    for path, layer in layers.items():
        weight = dense_matrix(layer, layer.weight.dtype)
        importance = None if fisher is None else fisher[path].to(weight.device, torch.float32)
        choices.append([precision for precision in PRECISIONS if precision.fits(weight)])
        sizes.append([p.size(weight.numel()) for p in choices[-1]])
        if weight.is_meta:  # a plan has a model without numbers: assume that a bit more halves the error
            costs.append([4.0 ** -(size / weight.numel()) * weight.numel() for size in sizes[-1]])
        else:
            with about(path):
                costs.append(first_errors(weight, ranks[path], [p.quantize for p in choices[-1]], importance))
    if not layers:
        return {}
    found = allocate(costs, sizes, bits * sum(layer.weight.numel() for layer in layers.values()))
    return {path: of[j] for path, of, j in zip(layers, choices, found, strict=True)}
