"""Hooks into libraries that nobody may have imported yet: ``import peftops`` alone makes them know our classes."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec

from ..nn import experts_forward


def when_imported(name: str, call: Callable[[], None]) -> None:
    """Call right after the module ``name`` is imported for the first time; now, if it has been."""
    if name in sys.modules:
        call()
    else:
        sys.meta_path.insert(0, _Watch(name, call))


class _Watch(MetaPathFinder):
    """Lets the other finders find one module, and what it is called for happen after that has run."""

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


when_imported("peft.tuners.lora.model", _register_layers)
when_imported("transformers.quantizers.auto", _register_quantizers)
when_imported("transformers.integrations.moe", _register_experts)
when_imported("transformers.modeling_utils", _register_saving)
when_imported("transformers.trainer", _register_checkpoints)
