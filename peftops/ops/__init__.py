"""The operators: what a kernel computes, as differentiable functions of tensors."""

from .experts_linear import experts_linear
from .gated_prompt_attention import add_gated_prompt, gated_prompt_attention, with_gated_prompt
from .gptq_quantize import gptq_quantize
from .group_dequantize import group_dequantize
from .group_linear import group_linear
from .group_quantize import group_quantize
from .group_tensor import GroupQuantTensor
from .lora_linear import lora_linear
from .multi_lora_linear import multi_lora_linear
from .mxfp4_dequantize import mxfp4_dequantize
from .mxfp4_linear import mxfp4_linear
from .mxfp4_quantize import mxfp4_quantize
from .mxfp4_tensor import MXFP4Tensor
from .nf4_dequantize import nf4_dequantize
from .nf4_linear import nf4_linear
from .nf4_quantize import nf4_quantize
from .nf4_tensor import NF4Tensor
from .paged_attention import paged_attention
from .qalora_linear import qalora_linear
from .qalora_merge import qalora_merge

__all__ = [
    "GroupQuantTensor",
    "MXFP4Tensor",
    "NF4Tensor",
    "add_gated_prompt",
    "experts_linear",
    "gated_prompt_attention",
    "gptq_quantize",
    "group_dequantize",
    "group_linear",
    "group_quantize",
    "lora_linear",
    "multi_lora_linear",
    "mxfp4_dequantize",
    "mxfp4_linear",
    "mxfp4_quantize",
    "nf4_dequantize",
    "nf4_linear",
    "nf4_quantize",
    "paged_attention",
    "qalora_linear",
    "qalora_merge",
    "with_gated_prompt",
]
