"""The memory that training by each method takes, and which method to choose, before any weight is loaded."""

from .choose import WANTS, Choice, choose
from .estimate import MOMENTS, Estimate, estimate, estimate_all, skeleton
from .table import TABLE, Traits, traits_of

__all__ = [
    "MOMENTS",
    "TABLE",
    "WANTS",
    "Choice",
    "Estimate",
    "Traits",
    "choose",
    "estimate",
    "estimate_all",
    "skeleton",
    "traits_of",
]
