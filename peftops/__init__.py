"""Low-level kernels for parameter-efficient fine-tuning, and the methods on top of them."""

from importlib.util import find_spec

import torch

from . import _C
from .integrations import load, load_model, save, summary
from .methods import activate, attach, detach, disabled, merge, unmerge
from .methods.lora import LoRAConfig
from .methods.qlora import QLoRAConfig
from .ops import NF4Tensor, lora_linear, nf4_dequantize, nf4_linear, nf4_quantize

if torch.version.cuda and find_spec("peftops._C_cuda"):
    from . import _C_cuda  # noqa: F401  (linked with libtorch_cuda, so it loads only where torch has CUDA)

__version__ = "0.1.0"
__all__ = [
    "LoRAConfig", "NF4Tensor", "QLoRAConfig", "activate", "attach", "detach", "disabled", "load", "load_model",
    "lora_linear", "merge", "nf4_dequantize", "nf4_linear", "nf4_quantize", "save", "summary", "unmerge",
]  # fmt: skip
