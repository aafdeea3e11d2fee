"""Soft prompt tuning, Lester et al. 2021 (arXiv:2104.08691): trainable vectors before the embedded input.

    model([E; X])    E in R^(P x d) trains, X in R^(S x d) are the embeddings of the input

The prompt has the positions 0 .. P-1, and all tokens see it. In an encoder-decoder it stands before the encoder's
input, and the decoder sees it, too. The model does not start as it was: no prompt of P vectors has the effect of an
empty prompt.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..attaching import register
from ..attaching.config import Config, check_choice, check_range, needs, refuse
from ..attaching.targets import body_of
from ..nn import Prompt
from ..prompts.soft import SoftPrompt
from ..prompts.start import encoded, frequent


@dataclass(frozen=True)
class PromptTuningConfig(Config):
    """Options of prompt tuning. It needs a learning rate 10 to 50 times LoRA's.

    Args:
        tokens: P.
        init: where the vectors start. "vocab": embeddings of P ids among the first 5,000, which are the most frequent
            ones; "text": those of ``text``, its first P tokens; "labels": a vector per label, the mean of its tokens'
            embeddings; "random": uniform in [-0.5, 0.5]. If text or labels give fewer than P vectors, the others start
            as with "vocab".
        text, labels: see ``init``.
        tokenizer: for text and labels; a path, by default that of the model.

    Examples:
        >>> model = peftops.attach(llama(), peftops.PromptTuningConfig(tokens=3))
        >>> peftops.summary(model).trainable
        96
    """

    peft_type: ClassVar[str] = "PROMPT_TUNING"
    peft_prefix: ClassVar[str] = "base_model."

    tokens: int = 20
    init: str = "vocab"
    text: str | None = None
    labels: tuple[str, ...] = ()
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        check_range("tokens", self.tokens, 1, whole=True)
        check_choice("init", self.init, ("vocab", "text", "labels", "random"))
        if self.init == "text" and not self.text:
            raise ValueError("init='text' needs a text")
        if self.init == "labels" and not 0 < len(self.labels) <= self.tokens:
            raise ValueError(f"init='labels' needs 1 to {self.tokens} labels, one per token, not {len(self.labels)}")
        super().__post_init__()

    def to_peft(self) -> dict[str, Any]:
        return {
            "peft_type": "PROMPT_TUNING",
            "num_virtual_tokens": self.tokens,
            "prompt_tuning_init": "RANDOM",
            "num_transformer_submodules": 1,
        }

    @classmethod
    def from_peft(cls, fields: dict[str, Any], **own: Any) -> PromptTuningConfig:
        needs(fields, "num_virtual_tokens")
        if fields.get("task_type") != "SEQ_2_SEQ_LM":
            refuse(fields, num_transformer_submodules=1)
        return cls(tokens=fields["num_virtual_tokens"], init="random", **own)

    @staticmethod
    def tensors_from_peft(fields: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        key, used = PromptTuning.peft_shared["prompt"], fields["num_virtual_tokens"]
        if fields.get("num_transformer_submodules") != 2 or len(tensors.get(key, ())) != 2 * used:
            return tensors
        warnings.warn(
            f"of the {2 * used} vectors of this prompt, PEFT uses the first {used}, before the encoder's input; "
            "the others are left out",
            stacklevel=2,
        )
        return {**tensors, key: tensors[key][:used]}


@register(PromptTuningConfig)
class PromptTuning(SoftPrompt):
    peft_shared: ClassVar = {"prompt": "prompt_embeddings"}

    @staticmethod
    def build(model: nn.Module, config: PromptTuningConfig) -> dict[str, Prompt]:
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        if not hasattr(embedding, "weight") or embedding.weight.dim() != 2 or not hasattr(embedding, "num_embeddings"):
            kind = type(model).__name__
            raise TypeError(f"PromptTuning needs a model of transformers that embeds tokens, not a {kind}")
        prompt = PromptTuning(model, embedding, config)
        if not model.config.is_encoder_decoder:
            return {body_of(model): prompt}
        name_of = {id(module): name for name, module in model.named_modules()}
        encoder, decoder = model.get_encoder(), model.get_decoder()
        prompt.keep = True
        return {name_of[id(encoder)]: prompt, name_of[id(decoder)]: LongerMemory(config.tokens)}

    def __init__(self, model: nn.Module, embedding: nn.Module, config: PromptTuningConfig):
        size = (config.tokens, embedding.weight.shape[1])
        super().__init__(torch.empty(size, device=embedding.weight.device).uniform_(-0.5, 0.5))
        if config.init == "random" or embedding.weight.is_meta:
            return
        with torch.no_grad():
            embed = lambda ids: embedding(torch.tensor(ids, device=embedding.weight.device)).float()
            rows = [embed(frequent(model, config.tokens))]
            if config.init == "text":
                rows.insert(0, embed(encoded(model, config.tokenizer, config.text)))
            if config.init == "labels":
                means = [embed(encoded(model, config.tokenizer, label)).mean(0) for label in config.labels]
                rows.insert(0, torch.stack(means))
            self.prompt.copy_(torch.cat(rows)[: config.tokens])


class LongerMemory(Prompt):
    """Stands before the decoder of an encoder-decoder: makes the mask of the encoder's output longer by the prompt."""

    def __init__(self, tokens: int):
        super().__init__()
        self.tokens = tokens

    def before(self, body: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        mask: Tensor | None = arguments.get("encoder_attention_mask")
        if mask is None:
            return arguments
        return {**arguments, "encoder_attention_mask": torch.cat([mask.new_ones(len(mask), self.tokens), mask], 1)}
