"""accelerate's FSDP2, and DeepSpeed, on a model with a frozen base in codes: how it is prepared, and its checkpoints.

A checkpoint has what trains, and nothing of the base. Both write so for models of HF PEFT. Of others they would write
the whole model, codes too, which they cannot read again. transformers' Trainer uses the same functions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from ..nn import is_quantized, own_rows, unwrapped_name
from .checkpoints import is_attached


def _has_codes(model: nn.Module) -> bool:
    return any(is_quantized(own_rows(parameter)) for parameter in model.parameters())


def _has_frozen_base(model: nn.Module) -> bool:
    return is_attached(model) or _has_codes(model)


def _without_frozen(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The part of a state dict that trains. torch and DeepSpeed keep the second name of a tied weight, and codes."""
    every = model.named_parameters(remove_duplicate=False)
    frozen = {unwrapped_name(name): is_quantized(parameter) for name, parameter in every if not parameter.requires_grad}
    parts = tuple(f"{name}." for name, in_codes in frozen.items() if in_codes)
    return {name: t for name, t in state_dict.items() if name not in frozen and not name.startswith(parts)}


def _check_whole(state_dict: dict[str, Any], model: nn.Module) -> None:
    """Raise a ValueError if a checkpoint lacks something that trains; it may lack all else."""
    trained = {unwrapped_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    if lacking := trained - state_dict.keys():
        raise ValueError(f"the checkpoint does not fit: it has no {min(lacking)}, which the model trains")


def loaded_everywhere(prepare: Callable[[Any, nn.Module], nn.Module]) -> Callable[[Any, nn.Module], nn.Module]:
    """accelerate's preparation for FSDP2, which can have rank 0 send its weights to the others. It cannot send codes.
    transformers has loaded them on every rank by then, so that nothing needs to be sent."""

    @functools.wraps(prepare)
    def _prepare(accelerator: Any, model: nn.Module) -> nn.Module:
        plugin = accelerator.state.fsdp_plugin
        asked = plugin.cpu_ram_efficient_loading
        plugin.cpu_ram_efficient_loading = asked and not _has_codes(model)
        try:
            return prepare(accelerator, model)
        finally:
            plugin.cpu_ram_efficient_loading = asked

    return _prepare


def without_base(utilities: ModuleType) -> None:
    """Let ``accelerate.utils.fsdp_utils`` leave out the frozen parameters of models with adapters or codes."""
    read, write, of_peft = utilities._get_model_state_dict, utilities._set_model_state_dict, utilities.is_peft_model

    def ours(model: nn.Module, how: dict[str, Any]) -> Any:
        """The options of torch's functions; or None if accelerate is to have its way, as with FSDP1."""
        known = how.get("adapter_only") and of_peft(model)
        return how.get("sd_options") if _has_frozen_base(model) and not known else None

    @functools.wraps(read)
    def _read(model: nn.Module, **how: Any) -> dict[str, Any]:
        options = ours(model, how)
        if options is None:
            return read(model, **how)
        state = get_model_state_dict(model, options=dataclasses.replace(options, ignore_frozen_params=True))
        return _without_frozen(state, model)

    @functools.wraps(write)
    def _write(model: nn.Module, state_dict: dict[str, Tensor], **how: Any) -> Any:
        options = ours(model, how)
        if options is None:
            return write(model, state_dict, **how)
        # Of a checkpoint in one file, ranks other than the first are given nothing: they are sent their shards.
        if state_dict:
            _check_whole(state_dict, model)
        return set_model_state_dict(model, state_dict, options=dataclasses.replace(options, strict=False))

    utilities._get_model_state_dict, utilities._set_model_state_dict = _read, _write


def deepspeed_without_base(engine: type) -> None:
    """Let ``deepspeed.DeepSpeedEngine`` leave out the same parameters, and not send codes to other ranks."""
    send, save = engine._broadcast_model, engine.save_checkpoint
    state_dict, fill = engine.module_state_dict, engine.load_module_state_dict
    mark = "ds_optim_param"  # parameters with this attribute are not sent

    @functools.wraps(send)
    def _send(self: Any) -> None:
        codes = [parameter for parameter in self.module.parameters() if is_quantized(parameter)]
        if codes and self.zero_optimization_partition_weights():
            raise ValueError(
                "DeepSpeed's ZeRO stage 3 cuts each parameter into shares of its numbers, and codes have none; "
                "use stage 1 or 2, or FSDP2, which cuts codes by rows"
            )
        for parameter in codes:
            setattr(parameter, mark, True)
        try:
            send(self)
        finally:
            for parameter in codes:
                delattr(parameter, mark)

    @functools.wraps(save)
    def _save(self: Any, *args: Any, **options: Any) -> Any:
        if _has_frozen_base(self.module):
            options["exclude_frozen_parameters"] = True
        return save(self, *args, **options)

    @functools.wraps(state_dict)
    def _state_dict(self: Any, *args: Any, exclude_frozen_parameters: bool = False, **options: Any) -> dict[str, Any]:
        found = state_dict(self, *args, exclude_frozen_parameters=exclude_frozen_parameters, **options)
        return _without_frozen(found, self.module) if exclude_frozen_parameters else found

    @functools.wraps(fill)
    def _fill(self: Any, checkpoint: dict[str, Any], strict: bool = True, *args: Any, **options: Any) -> Any:
        if _has_frozen_base(self.module):
            _check_whole(checkpoint["module"], self.module)
            strict = False
        return fill(self, checkpoint, strict, *args, **options)

    engine._broadcast_model, engine.save_checkpoint = _send, _save
    engine.module_state_dict, engine.load_module_state_dict = _state_dict, _fill
