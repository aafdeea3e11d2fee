"""Changes of a model that happen completely or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Inside, modules may be replaced, hooks added and parameters frozen. If an error or an interrupt ends the block,
    the model has its old modules, hooks and settings again.

    Replaced modules are kept until the end of the block, so a dense model and its codes exist side by side until then.
    Numbers that are written in place are not restored.
    """
    own = [(vars(module), dict(vars(module))) for module in model.modules()]
    within = [(part, part.copy()) for _, saved in own for part in saved.values() if isinstance(part, dict)]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for now, before in (*own, *within):  # in place: handles of hooks, and other objects, refer to these dicts
            now.clear()
            now.update(before)
        for parameter, flag in trained:
            parameter.requires_grad_(flag)
        raise


@contextlib.contextmanager
def about(layer: str) -> Iterator[None]:
    """Inside, an error says which layer it is about. (A name like "2" may be a number of its sentence.)"""
    try:
        yield
    except (RuntimeError, ValueError, TypeError) as error:
        if ("." in layer and layer in str(error)) or str(error).startswith(f"{layer}: "):
            raise
        raise type(error)(f"{layer}: {error}") from error
