"""Influence functions: which training examples made an adapted model say what it says."""

from .ekfac import Influence

__all__ = ["Influence"]
