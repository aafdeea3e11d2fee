"""Low-level kernels for parameter-efficient fine-tuning, and the methods on top of them."""

from importlib.util import find_spec

import torch  # loads the libraries that _C is linked with

from . import _C as _C
from . import ops as ops
from .attaching import activate, attach, detach, disabled, merge, unmerge
from .factors import fisher
from .influence import Influence
from .integrations import (
    CalibrationConfig,
    combine,
    from_bitsandbytes,
    input_moments,
    load,
    load_model,
    quantize_model,
    save,
    save_gguf,
    summary,
)
from .methods.bitfit import BitFitConfig
from .methods.bottleneck import BottleneckConfig
from .methods.dora import DoRAConfig
from .methods.glora import GLoRAConfig
from .methods.head_only import HeadOnlyConfig
from .methods.ia3 import IA3Config
from .methods.llama_adapter import LLaMAAdapterConfig
from .methods.loftq import LoftQConfig
from .methods.longlora import LongLoRAConfig
from .methods.lora import LoRAConfig
from .methods.lorafa import LoRAFAConfig
from .methods.lqlora import LQLoRAConfig
from .methods.multilora import MultiLoRAConfig
from .methods.norm_tuning import NormTuningConfig
from .methods.olora import OLoRAConfig
from .methods.pissa import PiSSAConfig
from .methods.prefix_tuning import PrefixTuningConfig
from .methods.prompt_tuning import PromptTuningConfig
from .methods.qalora import QALoRAConfig
from .methods.qlora import QLoRAConfig
from .methods.relora import ReLoRAConfig, relora_step
from .methods.surgical import SurgicalConfig, auto_rgn, auto_snr, weighted_groups
from .methods.tiedlora import TiedLoRAConfig
from .methods.top_layers import TopLayersConfig
from .methods.vera import VeRAConfig
from .nn import head_loss, language_model_loss
from .ops import *  # noqa: F403  (its __all__ is a part of this one's)
from .optim import AdamW8bit, loraplus_groups, prune_state, relora_schedule
from .prompts import HardPrompt, Verbalizer, choice_scores, demonstrations, image_prompts, prompt_per_row
from .serving import AdapterPool, Sampling, Server

if torch.version.cuda and find_spec("peftops._C_cuda"):
    from . import _C_cuda  # noqa: F401  (linked with libtorch_cuda, so it loads only where torch has CUDA)

__version__ = "0.1.0"
__all__ = [
    *ops.__all__,
    "AdamW8bit",
    "AdapterPool",
    "BitFitConfig",
    "BottleneckConfig",
    "CalibrationConfig",
    "DoRAConfig",
    "GLoRAConfig",
    "HardPrompt",
    "HeadOnlyConfig",
    "IA3Config",
    "Influence",
    "LLaMAAdapterConfig",
    "LQLoRAConfig",
    "LoRAConfig",
    "LoRAFAConfig",
    "LoftQConfig",
    "LongLoRAConfig",
    "MultiLoRAConfig",
    "NormTuningConfig",
    "OLoRAConfig",
    "PiSSAConfig",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "QALoRAConfig",
    "QLoRAConfig",
    "ReLoRAConfig",
    "Sampling",
    "Server",
    "SurgicalConfig",
    "TiedLoRAConfig",
    "TopLayersConfig",
    "VeRAConfig",
    "Verbalizer",
    "activate",
    "attach",
    "auto_rgn",
    "auto_snr",
    "choice_scores",
    "combine",
    "demonstrations",
    "detach",
    "disabled",
    "fisher",
    "from_bitsandbytes",
    "head_loss",
    "image_prompts",
    "input_moments",
    "language_model_loss",
    "load",
    "load_model",
    "loraplus_groups",
    "merge",
    "prompt_per_row",
    "prune_state",
    "quantize_model",
    "relora_schedule",
    "relora_step",
    "save",
    "save_gguf",
    "summary",
    "unmerge",
    "weighted_groups",
]


def __getattr__(name: str) -> object:
    if name in ("GroupConfig", "MXFP4Config", "NF4Config"):  # not in __all__: they import transformers
        from . import integrations

        return getattr(integrations, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
