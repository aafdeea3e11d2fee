"""Hooks into other libraries, which may be imported later: after ``import peftops`` they know our classes."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

from torch import nn

from ..nn import experts_forward, is_quantized


def when_imported(name: str, call: Callable[[], None]) -> None:
    """Call the function right after the first import of the module ``name``, or now if it is imported already."""
    if name in sys.modules:
        call()
    else:
        sys.meta_path.insert(0, _Watch(name, call))


class _Watch(MetaPathFinder):
    """Lets the other finders find one module, and calls the function after the module has run."""

    def __init__(self, name: str, call: Callable[[], None]):
        self.name, self.call = name, call

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: object) -> None:
                execute(module)
                self.call()

            spec.loader.exec_module = exec_module
        return spec


def _register_quantizers() -> None:
    from . import quantizer  # noqa: F401  (it registers itself)


def _register_layers() -> None:
    from . import peft_layers  # noqa: F401  (it registers itself)


def _register_experts() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS["peftops"] = experts_forward


def _register_saving() -> None:
    from transformers import modeling_utils

    from .checkpoints import saving_adapters

    modeling_utils.PreTrainedModel.save_pretrained = saving_adapters(modeling_utils.PreTrainedModel.save_pretrained)


def _register_checkpoints() -> None:
    from transformers.trainer import Trainer

    from .checkpoints import checkpointing

    checkpointing(Trainer)


def _register_shards() -> None:
    from accelerate.utils import fsdp_utils

    from .sharded import loaded_everywhere, without_base

    prepare = getattr(fsdp_utils, "fsdp2_prepare_model", None)
    if prepare is None:
        return  # an accelerate that has FSDP1 alone
    without_base(fsdp_utils)
    for module in ("accelerate.utils.fsdp_utils", "accelerate.utils", "accelerate.accelerator"):  # it is copied there
        if getattr(sys.modules.get(module), "fsdp2_prepare_model", None) is prepare:
            sys.modules[module].fsdp2_prepare_model = loaded_everywhere(prepare)


def _register_processes() -> None:
    """DistributedDataParallel sends all parameters as one flat tensor, which does not work for codes.
    :func:`peftops.attach` tells it to ignore the codes of its models; this does the same for models that other
    libraries adapt."""
    from torch.nn.parallel.distributed import DistributedDataParallel

    init, ignored = DistributedDataParallel.__init__, "_ddp_params_and_buffers_to_ignore"

    @functools.wraps(init)
    def leaving_codes(self: DistributedDataParallel, module: nn.Module, *args: Any, **options: Any) -> None:
        codes = [name for name, parameter in module.named_parameters() if is_quantized(parameter)]
        if codes:
            setattr(module, ignored, list(dict.fromkeys([*getattr(module, ignored, ()), *codes])))
        init(self, module, *args, **options)

    DistributedDataParallel.__init__ = leaving_codes


def _register_deepspeed() -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    from .sharded import deepspeed_without_base

    deepspeed_without_base(DeepSpeedEngine)


when_imported("torch.nn.parallel.distributed", _register_processes)
when_imported("deepspeed.runtime.engine", _register_deepspeed)
when_imported("peft.tuners.lora.model", _register_layers)
when_imported("transformers.quantizers.auto", _register_quantizers)
when_imported("transformers.integrations.moe", _register_experts)
when_imported("transformers.modeling_utils", _register_saving)
when_imported("transformers.trainer", _register_checkpoints)
when_imported("accelerate.utils.fsdp_utils", _register_shards)
