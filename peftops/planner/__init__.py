"""What training by each method takes, and which one to choose, before any weight is loaded."""

from .choose import WANTS, Choice, choose
from .estimate import Estimate, estimate, estimate_all, skeleton
from .table import TABLE, Traits, traits_of

__all__ = ["TABLE", "WANTS", "Choice", "Estimate", "Traits", "choose", "estimate", "estimate_all", "skeleton",
           "traits_of"]  # fmt: skip
