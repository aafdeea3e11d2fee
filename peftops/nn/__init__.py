"""The blocks that methods are made of."""

from .adapter import AdaptedLayer, Adapter, MergeError, Switch
from .group_linear import GroupConv2d, GroupLinear
from .nf4_linear import NF4Linear, dense_weight, quantize_linears

__all__ = [
    "AdaptedLayer", "Adapter", "GroupConv2d", "GroupLinear", "MergeError", "NF4Linear", "Switch", "dense_weight",
    "quantize_linears",
]  # fmt: skip
