"""LLaMA-Adapter, Zhang et al. 2023 (arXiv:2303.16199): a prompt beside the attention of the top layers, gated.

    y = W_o [softmax(q K^T / sqrt(d)) V + g softmax(q (W_k P)^T / sqrt(d)) (W_v P)]    for each head, of width d

The two softmaxes are separate; q is rotated, W_k P is not, and no mask hides a prompt from a word. g = tanh(z) as in
the authors' training, or z itself as in the paper and in their inference. P in R^(K x hidden) starts normal and z at 0:
the model starts as it was, bit for bit, and at first only the gates learn. The softmax over P depends on the input, so
the adapter cannot be merged. HF PEFT's variant, ADAPTION_PROMPT, has one raw gate a layer: ``gate="peft"`` is that
variant, and reads and writes PEFT's files.

``image_features`` adds an image's features to P (:func:`peftops.image_prompts`). V2, Gao et al. 2023
(arXiv:2304.15010), also trains the norms, and a scale and a bias of each linear layer but the head: ``v2=True``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from ..attaching import register
from ..attaching.config import Config, check_choice, check_range, needs, refuse
from ..attaching.targets import ALL_LINEAR, body_of, find_targets
from ..attaching.targets import layers as modules_of
from ..nn import PREFIX, Adapter, GatedPrompt, Stored, base_of, module_at
from ..nn.gated_prompt import check_attention, close_registry, is_attention
from ..nn.scale_bias import POSITIONS, ScaleBias
from ..prompts.images import ImagePrompts
from .norm_tuning import NormTuning, NormTuningConfig

PEFT_TYPE = "ADAPTION_PROMPT"
_ACTIVATIONS = {"tanh": "tanh", "raw": "none", "peft": "none"}


@dataclass(frozen=True)
class LLaMAAdapterConfig(Config):
    """Options of LLaMA-Adapter.

    Args:
        tokens: K, the length of each layer's prompt.
        layers: how many attentions get one, counted from the top; None for all but the lowest two.
        gate: "tanh" or "raw", one per head; or "peft", a raw one per layer.
        image_features: the width of an image's features, of all scales together; None for no images.
        v2: whether norms, and scales and biases of linear layers, train in the whole model.
        scale_position: whether V2 scales a linear layer's "output" (the paper) or "input" (the authors' 65B).

    Examples:
        >>> model = peftops.attach(llama(), peftops.LLaMAAdapterConfig(tokens=3, layers=1))
        >>> peftops.summary(model).trainable  # 3 vectors of 32 numbers, and a gate for each of 4 heads
        100
    """

    peft_type: ClassVar[str] = "LLAMA_ADAPTER"

    tokens: int = 10
    layers: int | None = None
    gate: str = "tanh"
    image_features: int | None = None
    v2: bool = False
    scale_position: str = "output"

    def __post_init__(self) -> None:
        check_range("tokens", self.tokens, 1, whole=True)
        check_choice("gate", self.gate, tuple(_ACTIVATIONS))
        check_choice("scale_position", self.scale_position, POSITIONS)
        for option in ("layers", "image_features"):
            if getattr(self, option) is not None:
                check_range(option, getattr(self, option), 1, whole=True)
        if self.gate == "peft" and (self.v2 or self.image_features):
            raise ValueError("gate='peft' has no images and no v2: PEFT's files cannot hold them")
        super().__post_init__()

    def as_built(self, adapters: dict[str, Any]) -> LLaMAAdapterConfig:
        return replace(self, layers=sum(isinstance(adapter, LLaMAAdapter) for adapter in adapters.values()))

    def to_peft(self) -> dict[str, Any]:
        if self.gate != "peft":
            return super().to_peft()
        return {
            "peft_type": PEFT_TYPE,
            "adapter_len": self.tokens,
            "adapter_layers": self.layers,
            "target_modules": "self_attn",
        }

    @classmethod
    def claims(cls, fields: dict[str, Any]) -> bool:
        return fields.get("peft_type") == PEFT_TYPE

    @classmethod
    def from_peft(cls, fields: dict[str, Any], **own: Any) -> LLaMAAdapterConfig:
        if not cls.claims(fields):
            return super().from_peft(fields, **own)
        needs(fields, "adapter_len", "adapter_layers")
        refuse(fields, target_modules="self_attn")
        return cls(tokens=fields["adapter_len"], layers=fields["adapter_layers"], gate="peft")


@register(LLaMAAdapterConfig)
class LLaMAAdapter(Adapter):
    peft_keys: ClassVar = {"prompt": "adapter_prompt", "gate": "adapter_gate"}
    merge_into = Stored.merge_into  # raises an error: an attention is not a matrix

    @staticmethod
    def build(model: nn.Module, config: LLaMAAdapterConfig) -> dict[str, Stored]:
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
            if config.gate == "peft":
                check_output(attention, path)
        adapters = {path: LLaMAAdapter(attention, config) for path, attention in chosen}
        others: dict[str, Stored] = unlocked(model, config.scale_position) if config.v2 else {}
        if config.image_features:
            images = ImagePrompts(model, config.image_features, adapters[chosen[0][0]].prompt)
            for adapter in adapters.values():
                adapter.images = [images]
            others[body_of(model)] = images
        return {**adapters, **others}

    def __init__(self, attention: nn.Module, config: LLaMAAdapterConfig):
        super().__init__()
        self.config = config
        self.images: list[ImagePrompts] = []  # in a list, so that it is no submodule: it belongs to the body
        activation, per_head = _ACTIVATIONS[config.gate], config.gate != "peft"
        self.gated = GatedPrompt(attention, config.tokens, activation, gate_per_head=per_head)

    prompt = property(lambda self: self.gated.prompt)
    gate = property(lambda self: self.gated.gate)

    def adapt(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        image = self.images[0].given_to(base, kwargs) if self.images else None
        return self.gated.attend(base, *args, image=image, **kwargs)

    def left(self) -> None:
        close_registry(self.gated)

    def file_key(self, name: str, layer: str) -> str:
        return f"{PREFIX}{layer}.adaption_{name}" if self.config.gate == "peft" else super().file_key(name, layer)

    def stored(self) -> dict[str, Tensor]:
        prompt = self.prompt[None] if self.config.gate == "peft" else self.prompt  # PEFT has a batch of one
        return {"prompt": prompt, "gate": self.gate}


def unlocked(model: nn.Module, position: str) -> dict[str, Stored]:
    """Norm tuning of all norms, and a :class:`ScaleBias` of every linear layer but the head."""
    linear = {path: base_of(module_at(model, path)) for path in find_targets(model, ALL_LINEAR)}
    norms = NormTuning.build(model, NormTuningConfig())
    return {**{path: ScaleBias(base, position) for path, base in linear.items()}, **norms}


def check_output(attention: nn.Module, name: str) -> None:
    """Raise an error if PEFT's variant would compute something else: it adds the output projection's bias twice, and
    knows only projections with LLaMA's names."""
    if getattr(getattr(attention, "o_proj", None), "bias", 0) is not None:
        raise TypeError(f"gate='peft' needs attentions with an o_proj without bias, which {name} has not")
