"""Low-level kernels for parameter-efficient fine-tuning, and the methods on top of them."""

import torch  # noqa: F401  (loads the libraries that _C is linked with)

from . import _C
from .integrations import load, load_model, save, summary
from .methods import activate, attach, detach, disabled, merge, unmerge
from .methods.lora import LoRAConfig
from .methods.qlora import QLoRAConfig
from .ops import (
    NF4Tensor, add_gated_prompt, gated_prompt_attention, lora_linear, nf4_dequantize, nf4_linear, nf4_quantize,
)  # fmt: skip

__version__ = "0.1.0"
__all__ = [
    "LoRAConfig", "NF4Tensor", "QLoRAConfig", "activate", "add_gated_prompt", "attach", "detach", "disabled",
    "gated_prompt_attention", "load", "load_model", "lora_linear", "merge", "nf4_dequantize", "nf4_linear", "nf4_quantize", "save", "summary", "unmerge",
]  # fmt: skip
