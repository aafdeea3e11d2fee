"""The blocks that methods are made of."""

from .adapter import PREFIX, AdaptedLayer, Adapter, MergeError, Stored, Switch
from .adapter_pool import AdapterPool
from .gated_prompt import GatedPrompt
from .group_linear import GroupConv2d, GroupLinear
from .layers import (
    CONVOLUTION,
    EMBEDDING,
    LINEAR,
    as_matrix,
    dense_matrix,
    is_conv1d,
    kind_of,
    matrix,
    sizes,
    with_matrix,
)
from .low_rank import factor_shapes, low_rank, product
from .nf4_linear import NF4Linear, quantize_linears, shell_of
from .prompt import Prompt, Prompted
from .quantized import dequantized, is_quantized, quantized_like
from .select import Select

__all__ = [
    "CONVOLUTION", "EMBEDDING", "LINEAR", "PREFIX", "AdaptedLayer", "Adapter", "AdapterPool", "GatedPrompt",
    "GroupConv2d", "GroupLinear", "MergeError", "NF4Linear", "Prompt", "Prompted", "Select", "Stored", "Switch",
    "as_matrix", "dense_matrix", "dequantized", "factor_shapes", "is_conv1d", "is_quantized", "kind_of", "low_rank",
    "matrix", "product", "quantize_linears", "quantized_like", "shell_of", "sizes", "with_matrix",
]  # fmt: skip
