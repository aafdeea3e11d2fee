"""Weights split into codes and factors of low rank, for methods that start from such a split."""

from .calibrated import calibrated_factors, gptq_like, moments_of
from .lq import fisher, lq_decompose
from .lq_budget import Precision, choose
from .singular import leading, shared, size

__all__ = [
    "Precision",
    "calibrated_factors",
    "choose",
    "fisher",
    "gptq_like",
    "leading",
    "lq_decompose",
    "moments_of",
    "shared",
    "size",
]
