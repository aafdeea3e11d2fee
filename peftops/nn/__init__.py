"""The blocks that methods are made of."""

from .adapter import AdaptedLayer, Adapter, MergeError, Switch
from .adapter_pool import AdapterPool
from .nf4_linear import NF4Linear, dense_weight, quantize_linears

__all__ = ["AdaptedLayer", "Adapter", "AdapterPool", "MergeError", "NF4Linear", "Switch", "dense_weight",
           "quantize_linears"]  # fmt: skip
