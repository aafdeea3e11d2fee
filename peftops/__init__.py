"""Low-level kernels for parameter-efficient fine-tuning, and the methods on top of them."""

import torch  # noqa: F401  (loads the libraries that _C is linked with)

from . import _C
from .integrations import load, load_model, save, summary
from .methods import activate, attach, detach, disabled, merge, unmerge
from .methods.lora import LoRAConfig
from .methods.qlora import QLoRAConfig
from .nn import AdapterPool
from .ops import NF4Tensor, lora_linear, multi_lora_linear, nf4_dequantize, nf4_linear, nf4_quantize

__version__ = "0.1.0"
__all__ = [
    "AdapterPool", "LoRAConfig", "NF4Tensor", "QLoRAConfig", "activate", "attach", "detach", "disabled", "load",
    "load_model", "lora_linear", "merge", "multi_lora_linear", "nf4_dequantize", "nf4_linear", "nf4_quantize", "save",
    "summary", "unmerge",
]  # fmt: skip
