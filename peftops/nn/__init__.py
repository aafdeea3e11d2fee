"""The blocks that methods are made of."""

from .adapter import (
    PREFIX,
    WRAPPERS,
    AdaptedLayer,
    Adapter,
    MergeError,
    Stored,
    Switch,
    base_of,
    module_at,
    owner_of,
    unwrapped,
)
from .adapter_pool import AdapterPool, PoolFull, peak_tokens
from .experts import close_experts, experts_forward, keep_names, open_experts, opened, stack_layer, stacks_of
from .experts_linear import ExpertsLinear
from .gated_prompt import GatedPrompt
from .group_conv2d import GroupConv2d
from .language_loss import head_loss, language_model_loss, splits
from .layers import (
    CONVOLUTION,
    EMBEDDING,
    EXPERTS,
    LINEAR,
    as_matrix,
    dense_matrix,
    is_conv1d,
    kind_of,
    matrix,
    sizes,
    with_matrix,
)
from .low_rank import factor_shapes, low_rank, low_rank_change, product
from .packed_linear import (
    GroupLinear,
    MXFP4Linear,
    NF4Linear,
    PackedLinear,
    packed_layer,
    quantize_linears,
    shell_of,
)
from .prompt import Prompt, Prompted
from .quantized import dequantized, is_quantized, quantized_like
from .select import Select
from .tensor_parallel import Parts, column_parallel_lora, of_first_rank, row_parallel_lora, shard_lora, unshard_lora

__all__ = [
    "CONVOLUTION",
    "EMBEDDING",
    "EXPERTS",
    "LINEAR",
    "PREFIX",
    "WRAPPERS",
    "AdaptedLayer",
    "Adapter",
    "AdapterPool",
    "ExpertsLinear",
    "GatedPrompt",
    "GroupConv2d",
    "GroupLinear",
    "MXFP4Linear",
    "MergeError",
    "NF4Linear",
    "PackedLinear",
    "Parts",
    "PoolFull",
    "Prompt",
    "Prompted",
    "Select",
    "Stored",
    "Switch",
    "as_matrix",
    "base_of",
    "close_experts",
    "column_parallel_lora",
    "dense_matrix",
    "dequantized",
    "experts_forward",
    "factor_shapes",
    "head_loss",
    "is_conv1d",
    "is_quantized",
    "keep_names",
    "kind_of",
    "language_model_loss",
    "low_rank",
    "low_rank_change",
    "matrix",
    "module_at",
    "of_first_rank",
    "open_experts",
    "opened",
    "owner_of",
    "packed_layer",
    "peak_tokens",
    "product",
    "quantize_linears",
    "quantized_like",
    "row_parallel_lora",
    "shard_lora",
    "shell_of",
    "sizes",
    "splits",
    "stack_layer",
    "stacks_of",
    "unshard_lora",
    "unwrapped",
    "with_matrix",
]
