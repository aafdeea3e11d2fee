"""Low-level kernels for parameter-efficient fine-tuning."""

import torch  # noqa: F401  (loads the libraries that _C is linked with)

from . import _C
from .ops import NF4Tensor, lora_linear, nf4_dequantize, nf4_linear, nf4_quantize

__version__ = "0.1.0"
__all__ = ["NF4Tensor", "lora_linear", "nf4_dequantize", "nf4_linear", "nf4_quantize"]
