"""Low-level kernels for parameter-efficient fine-tuning, and the methods on top of them."""

import torch  # noqa: F401  (loads the libraries that _C is linked with)

from . import _C
from .integrations import load, load_model, save, summary
from .methods import activate, attach, detach, disabled, merge, unmerge
from .methods.lora import LoRAConfig
from .methods.qlora import QLoRAConfig
from .ops import (
    GroupQuantTensor,
    NF4Tensor,
    gptq_quantize,
    group_dequantize,
    group_linear,
    group_quantize,
    lora_linear,
    nf4_dequantize,
    nf4_linear,
    nf4_quantize,
    qalora_linear,
    qalora_merge,
)

__version__ = "0.1.0"
__all__ = [
    "GroupQuantTensor", "LoRAConfig", "NF4Tensor", "QLoRAConfig", "activate", "attach", "detach", "disabled",
    "gptq_quantize", "group_dequantize", "group_linear", "group_quantize", "load", "load_model", "lora_linear", "merge",
    "nf4_dequantize", "nf4_linear", "nf4_quantize", "qalora_linear", "qalora_merge", "save", "summary", "unmerge",
]  # fmt: skip
