"""The operators: what a kernel computes, as differentiable functions of tensors."""

from .lora_linear import lora_linear
from .multi_lora_linear import multi_lora_linear
from .nf4_dequantize import nf4_dequantize
from .nf4_linear import nf4_linear
from .nf4_quantize import nf4_quantize
from .nf4_tensor import NF4Tensor

__all__ = ["NF4Tensor", "lora_linear", "multi_lora_linear", "nf4_dequantize", "nf4_linear", "nf4_quantize"]
