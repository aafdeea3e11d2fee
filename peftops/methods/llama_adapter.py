"""LLaMA-Adapter, Zhang et al. 2023 (arXiv:2303.16199): a prompt beside the attention of the top layers, gated.

    y = W_o [softmax(q K^T / sqrt(d)) V + g softmax(q (W_k P)^T / sqrt(d)) (W_v P)]    for each head, of width d

The two softmaxes are apart; q is rotated, W_k P is not, and no mask hides a prompt from a word. g = tanh(z), as
the authors' training has it, or z itself, as the paper and their inference have it. P in R^(K x hidden) starts
normal and z at 0: the model starts as it was, bit for bit, and at first the gates alone learn. What softmax makes
of P depends on the input, so nothing can be merged. (HF PEFT's variant, ADAPTION_PROMPT, has one raw gate a layer;
its files are not read.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..nn import Adapter, GatedPrompt, Stored
from ..nn.gated_prompt import check_attention, is_attention
from . import register
from .config import Config, check_choice, check_range
from .targets import base_of
from .targets import layers as modules_of

_ACTIVATIONS = {"tanh": "tanh", "raw": "none"}


@dataclass(frozen=True)
class LLaMAAdapterConfig(Config):
    """Options of LLaMA-Adapter.

    Args:
        tokens: K, the length of each layer's prompt.
        layers: how many attentions get one, counted from the top; None for all but the lowest two.
        gate: "tanh" or "raw".
    """

    peft_type: ClassVar[str] = "LLAMA_ADAPTER"

    tokens: int = 10
    layers: int | None = None
    gate: str = "tanh"

    def __post_init__(self) -> None:
        check_range("tokens", self.tokens, 1, whole=True)
        check_choice("gate", self.gate, tuple(_ACTIVATIONS))
        if self.layers is not None:
            check_range("layers", self.layers, 1, whole=True)


@register(LLaMAAdapterConfig)
class LLaMAAdapter(Adapter):
    peft_keys: ClassVar = {"prompt": "adapter_prompt", "gate": "adapter_gate"}
    merge_into = Stored.merge_into  # says that it cannot: an attention is no matrix

    @staticmethod
    def build(model: nn.Module, config: LLaMAAdapterConfig) -> dict[str, Adapter]:
        found = {path: base_of(module) for path, module in modules_of(model) if is_attention(base_of(module))}
        count = len(found) - 2 if config.layers is None else config.layers
        if not 0 < count <= len(found):
            raise ValueError(
                f"layers={config.layers}, but {type(model).__name__} has {len(found)} attentions of transformers that "
                "decode; layers must be from 1 to that (None leaves out the lowest two)"
            )
        chosen = list(found.items())[-count:]
        for path, attention in chosen:
            check_attention(attention, path)
        return {path: LLaMAAdapter(attention, config) for path, attention in chosen}

    def __init__(self, attention: nn.Module, config: LLaMAAdapterConfig):
        super().__init__()
        self.gated = GatedPrompt(attention, config.tokens, _ACTIVATIONS[config.gate])

    @property
    def prompt(self) -> nn.Parameter:
        return self.gated.prompt

    @property
    def gate(self) -> nn.Parameter:
        return self.gated.gate

    def adapt(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.gated.attend(base, *args, **kwargs)
