"""transformers' ``save_pretrained`` and its Trainer's checkpoints, of a model that has adapters of ours.

Both contain only the adapter's files. The base is still where it was read from, and no loader would find its layers
under the names that adapted layers have. For some methods the adapter's file does not hold the trained numbers
themselves. These are then in ``peftops_training.safetensors``, beside the optimizer's file.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..attaching import attachment, hosts, state_of
from ..nn import unwrapped
from .files import write_atomically
from .peft_files import CONFIG, adapters_of, check_same, read_tensors, refill, write_adapter

TRAINING = "peftops_training.safetensors"
_ELSEWHERE = {"variant": None, "save_peft_format": True, "distributed_checkpoint": False}  # options that say where


def is_attached(model: Any) -> bool:
    return isinstance(model, nn.Module) and state_of(model) is not None


def saving_adapters(save_pretrained: Callable[..., None]) -> Callable[..., None]:
    """transformers' method, which writes the active adapter of a model that has one as :func:`peftops.save` does."""

    @functools.wraps(save_pretrained)
    def save(
        self: nn.Module,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        *args: Any,
        **options: Any,
    ) -> None:
        if not is_attached(self):
            return save_pretrained(self, save_directory, is_main_process, state_dict, push_to_hub, *args, **options)
        if args:
            raise TypeError("an adapter is attached: give save_pretrained the options after push_to_hub by their names")
        if any(host.is_merged for _, host in hosts(self)):
            raise ValueError(
                "an adapter is merged into the model: peftops.detach(model, merged=True) leaves a plain "
                "model, which can be saved; after peftops.unmerge(model) the adapter is"
            )
        for option, default in _ELSEWHERE.items():
            if options.pop(option, default) != default:
                raise ValueError(
                    f"{option} is not for adapters, which have one file; peftops.save(model, directory) writes it"
                )
        write_adapter(self, save_directory, given=state_dict, here=is_main_process)
        if push_to_hub and is_main_process:
            known = ("commit_message", "private", "token", "create_pr", "revision", "commit_description", "tags")
            how = {key: value for key, value in options.items() if key in known}
            self.push_to_hub(options.get("repo_id", Path(save_directory).name), **how)

    return save


def _trained(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The trained numbers, by their names, if the adapter's file has other numbers in their place."""
    parts = adapters_of(model, name)
    written = {id(tensor) for part in parts.values() for tensor in part.stored().values()}
    own = {f"{path}.{leaf}": p for path, part in parts.items() for leaf, p in part.named_parameters()}
    return {} if all(id(p) in written or not p.requires_grad for p in own.values()) else own


def save_training(model: nn.Module, folder: Path) -> None:
    """Write the numbers that an adapter's files lack for resuming with the same bits, if they lack any."""
    model = unwrapped(model)
    tensors = {key: p.detach().cpu().clone() for key, p in _trained(model, attachment(model).switch.active).items()}
    if tensors:
        write_atomically(folder / TRAINING, lambda path: save_file(tensors, path, metadata={"format": "pt"}))


@torch.no_grad()
def load_training(model: nn.Module, folder: Path) -> None:
    """Copy a checkpoint's trained numbers into the active adapter; the reverse of both.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged, or of another method, other options or another
            model; nothing has changed then.
    """
    if not (folder / TRAINING).exists():
        return refill(model, folder)
    state = attachment(model)
    name = state.switch.active
    check_same(state.configs[name].as_built(adapters_of(unwrapped(model), name)), folder)
    tensors, own = read_tensors(folder / TRAINING), _trained(unwrapped(model), name)
    shapes = lambda found: {key: list(tensor.shape) for key, tensor in found.items()}
    for key in sorted(own.keys() | tensors.keys()):
        was, here = shapes(tensors).get(key), shapes(own).get(key)
        if was != here:
            raise ValueError(f"{folder / TRAINING} does not fit: its {key} is {was}, the model's {here}")
    for key, parameter in own.items():
        parameter.copy_(tensors[key])


def checkpointing(trainer: type) -> None:
    """Let transformers' Trainer write and read checkpoints of adapters. Trainer calls ``save_pretrained`` itself. On
    resuming it would look for the files of a whole model, or of HF PEFT's own models."""
    save_model, load, load_best = trainer.save_model, trainer._load_from_checkpoint, trainer._load_best_model

    def ours(self: Any, folder: str | None) -> bool:
        gathered = self.is_fsdp_enabled or self.is_deepspeed_enabled  # these have files of their own
        return is_attached(self.model) and not gathered and bool(folder) and (Path(folder) / CONFIG).is_file()

    @functools.wraps(save_model)
    def _save_model(self: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
        save_model(self, output_dir, _internal_call=_internal_call)
        if _internal_call and self.args.should_save and ours(self, output_dir):
            save_training(self.model, Path(output_dir))

    @functools.wraps(load)
    def _load(self: Any, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not ours(self, resume_from_checkpoint):
            return load(self, resume_from_checkpoint, model)
        load_training(self.model if model is None else model, Path(resume_from_checkpoint))

    @functools.wraps(load_best)
    def _load_best(self: Any) -> None:
        if not ours(self, self.state.best_model_checkpoint):
            return load_best(self)
        load_training(self.model, Path(self.state.best_model_checkpoint))

    trainer.save_model, trainer._load_from_checkpoint, trainer._load_best_model = _save_model, _load, _load_best
