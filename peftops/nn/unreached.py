"""Notices parameters that should train and got no gradient: their layer was not called, or its output was not used."""

from __future__ import annotations

import sys
import warnings
from functools import partial

from torch import nn
from torch.autograd import Variable
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.hooks import RemovableHandle

MOST = 3  # names in a sentence


def watch(parameters: dict[str, nn.Parameter]) -> None:
    """After the first backward that reaches one of these parameters, warn about those that it did not reach."""
    waiting = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    handles: list[RemovableHandle] = []
    queued: list[bool] = []

    def arrived(name: str, parameter: nn.Parameter) -> None:
        waiting.pop(name, None)
        if not queued:
            queued.append(True)
            Variable._execution_engine.queue_callback(settle)

    def settle() -> None:
        queued.clear()
        if _within_a_checkpoint():  # the backward of one block; others follow
            return
        for handle in handles:
            handle.remove()
        if waiting:
            rest = f" and {len(waiting) - MOST} more" if len(waiting) > MOST else ""
            names = ", ".join(list(waiting)[:MOST]) + rest
            warnings.warn(
                f"the first backward gave no gradient to {names}: their layers were not called, or the output was "
                "not used. Unless other inputs reach them, they do not learn (and merging them would change the model)",
                stacklevel=2,
            )
        waiting.clear()
        handles.clear()

    handles += [
        parameter.register_post_accumulate_grad_hook(partial(arrived, name)) for name, parameter in waiting.items()
    ]


def _within_a_checkpoint() -> bool:
    """Whether this runs at the end of a backward inside another one's, as reentrant checkpointing makes them."""
    frame = sys._getframe()
    while frame is not None and frame.f_code is not CheckpointFunction.backward.__code__:
        frame = frame.f_back
    return frame is not None
