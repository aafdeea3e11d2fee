"""Trainable vectors before the embedded input: ``model([E; X])``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..nn import Prompt
from ..nn.prompt import cached, check_one_sequence, shifted


def without_front(output: Any, count: int) -> Any:
    """A body's output without its first positions, those of a prompt: the head sees the caller's positions alone."""
    drop = lambda hidden: hidden[:, count:]
    if isinstance(output, tuple):
        return (drop(output[0]), *output[1:])
    output.last_hidden_state = drop(output.last_hidden_state)
    return output


class SoftPrompt(Prompt):
    """The vectors.

    Args:
        start: their first values, ``[P, hidden]``.
    """

    def __init__(self, start: Tensor):
        super().__init__()
        self.keep, self._new = False, False  # keep: the prompt's own outputs stay in the body's
        self.prompt = nn.Parameter(start)

    def before(self, body: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        check_one_sequence(arguments)
        tokens = len(self.prompt)
        self._new = not cached(arguments)
        if not self._new:
            return shifted(arguments, tokens, new=False)
        arguments = shifted(arguments, tokens, new=True)
        ids, embeds = arguments.pop("input_ids", None), arguments.get("inputs_embeds")
        if embeds is None:
            embeds = body.get_input_embeddings()(ids)
        prompt = self.prompt.to(embeds.dtype).expand(len(embeds), -1, -1)
        types = arguments.get("token_type_ids")
        if types is not None:
            arguments["token_type_ids"] = torch.cat([types.new_zeros(len(types), tokens), types], 1)
        return {**arguments, "inputs_embeds": torch.cat([prompt, embeds], 1)}

    def after(self, body: nn.Module, output: Any) -> Any:
        if not self._new or self.keep:
            return output
        return without_front(output, len(self.prompt))

    def extra_repr(self) -> str:
        return f"tokens={self.prompt.shape[0]}"
