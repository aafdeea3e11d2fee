"""Methods that put trainable vectors before a model's input."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import MergeError, Stored, Switch


class Prompt(Stored):
    """Trainable vectors for a whole model. A method writes :meth:`before` and, if it must, :meth:`after`.

    They run around the call of the model's body, the part under its head. So the head, its loss and ``generate`` see
    the positions of the caller, without those of the prompt.
    """

    def before(self, body: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments for the body, in place of ``arguments``. A cache has the name ``cache`` in both."""
        raise NotImplementedError

    def after(self, body: nn.Module, output: Any) -> Any:
        """The result of the call, in place of ``output``."""
        return output

    def forward(self) -> None:
        raise RuntimeError(f"{type(self).__name__} is not called; it changes the arguments of the model's body")


class Prompted(nn.Module):
    """All prompts of a model: a submodule of its body, with a hook before and one after the body's forward."""

    NAME = "peftops_prompts"

    def __init__(self, body: nn.Module, switch: Switch):
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.switch = switch
        self.is_merged = False  # whether the layers compute without it
        self.cache_name = cache_name(body)
        self._hooks = [
            body.register_forward_pre_hook(self._before, with_kwargs=True),
            body.register_forward_hook(self._after),
        ]

    @classmethod
    def put(cls, model: nn.Module, path: str, name: str, prompt: Prompt, switch: Switch) -> None:
        """Let the body at ``path`` have one more prompt."""
        body = model.get_submodule(path)
        if not hasattr(body, cls.NAME):
            body.add_module(cls.NAME, cls(body, switch).train(body.training))
        getattr(body, cls.NAME).adapters[name] = prompt

    def leave(self, model: nn.Module, path: str) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        delattr(model.get_submodule(path), self.NAME)

    def merge(self, name: str, *, dense: bool) -> MergeError:
        error = self.adapters[name].merge_into(self, dense=dense)[1]
        self.is_merged = True
        return error

    def unmerge(self) -> None:
        self.is_merged = False

    def _active(self) -> Prompt | None:
        name = self.switch.active
        return self.adapters[name] if not self.is_merged and name is not None and name in self.adapters else None

    def _before(self, body: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        prompt = self._active()
        if prompt is None:
            return None
        if args:  # transformers' bodies take the ids first, and all other arguments by name
            kwargs = {body.main_input_name if hasattr(body, "main_input_name") else "input_ids": args[0], **kwargs}
        if len(args) > 1:
            raise TypeError(f"{type(prompt).__name__} needs the arguments of {type(body).__name__} by their names")
        changed = prompt.before(body, {"cache" if name == self.cache_name else name: kwargs[name] for name in kwargs})
        return (), {self.cache_name if name == "cache" else name: changed[name] for name in changed}

    def _after(self, body: nn.Module, args: tuple, output: Any) -> Any:
        prompt = self._active()
        return None if prompt is None else prompt.after(body, output)


def cache_name(model: nn.Module) -> str:
    """The name of the cache that ``model`` takes and returns: "cache" since transformers 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def cached(arguments: dict[str, Any]) -> int:
    """How many positions the cache of a call holds already."""
    cache = arguments.get("cache")
    return 0 if cache is None else int(cache.get_seq_length())


def check_one_sequence(arguments: dict[str, Any], why: str = "a prompt stands before one") -> None:
    """Raise a ValueError for rows into which several sequences are packed: a prompt would stand before the first one
    only, and a prefix would connect them all. transformers takes a row as packed if its positions are not consecutive
    and there is no mask."""
    what = f"several sequences in a row, and {why}; give each sequence a row of its own"
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx"):
        if arguments.get(name) is not None:
            raise ValueError(f"{name} tells of {what}")
    positions = arguments.get("position_ids")
    if positions is None or positions.dim() > 2 or arguments.get("attention_mask") is not None or cached(arguments):
        return
    in_turn = (positions.diff(dim=-1) == 1).all()
    if torch.compiler.is_compiling():
        torch._assert_async(in_turn, f"position_ids tell of {what}")
    elif not in_turn:
        raise ValueError(f"position_ids tell of {what}")


def shifted(arguments: dict[str, Any], by: int, *, new: bool) -> dict[str, Any]:
    """The mask and the positions of a call whose tokens have ``by`` more in front of them.

    Args:
        new: whether these are in the sequence of this call, so that they need positions.

    Raises:
        ValueError: the mask has another shape than one number per token, so it cannot be made longer.
    """
    changed = dict(arguments)
    mask = arguments.get("attention_mask")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise ValueError("a prompt needs an attention_mask of shape [batch, tokens], or none")
        changed["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], by), mask], 1)
    positions = arguments.get("position_ids")
    if positions is not None:
        front = torch.arange(by, device=positions.device, dtype=positions.dtype).expand(*positions.shape[:-1], by)
        changed["position_ids"] = torch.cat([front, positions + by], -1) if new else positions + by
    return changed
