"""Prefix tuning, Li and Liang 2021 (arXiv:2101.00190): trainable keys and values before those of every block.

    attention(q, [PK_l; K], [PV_l; V])    PK_l, PV_l in R^(Hkv x P x hd), one softmax over all P + S columns

With ``hidden``, an MLP makes them during training: W2 tanh(W1 e_p + b1) + b2, with an embedding e_p per position. The
MLP trains in their place, and is folded into a plain prefix when it is saved. The prefix is in transformers' cache; its
keys are not rotated, and the input has the positions from P on. The model does not start as it was: even a prefix of
zeros takes a share of the softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..attaching import register
from ..attaching.config import Config, check_choice, check_range, needs, refuse
from ..attaching.targets import body_of
from ..nn import Prompt
from ..nn.prompt import cached, check_one_sequence, shifted
from ..prompts.prefix_cache import PrefixCache, keeping_the_cache, prefilled
from ..prompts.start import encoded, frequent


@dataclass(frozen=True)
class PrefixTuningConfig(Config):
    """Options of prefix tuning. It needs a learning rate 10 to 50 times LoRA's.

    Args:
        tokens: P.
        hidden: width of the MLP (512 in the paper); None for no MLP: the prefix itself trains.
        init: where a prefix without MLP starts. "vocab": at the base model's keys and values of P frequent tokens;
            "text": of the first P tokens of ``text``; "random": normal; "zero".
        text, tokenizer: as in :class:`PromptTuningConfig`.

    Examples:
        >>> model = peftops.attach(llama(), peftops.PrefixTuningConfig(tokens=3))
        >>> model(ids).logits.shape
        torch.Size([2, 8, 64])
    """

    peft_type: ClassVar[str] = "PREFIX_TUNING"
    peft_prefix: ClassVar[str] = "base_model."

    tokens: int = 20
    hidden: int | None = None
    init: str = "vocab"
    text: str | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        check_range("tokens", self.tokens, 1, whole=True)
        check_choice("init", self.init, ("vocab", "text", "random", "zero"))
        if self.hidden is not None:
            check_range("hidden", self.hidden, 1, whole=True)
        if self.init == "text" and not self.text:
            raise ValueError("init='text' needs a text")
        super().__post_init__()

    def to_peft(self) -> dict[str, Any]:
        return {
            "peft_type": "PREFIX_TUNING",
            "num_virtual_tokens": self.tokens,
            "prefix_projection": False,
            "num_transformer_submodules": 1,
        }

    @classmethod
    def from_peft(cls, fields: dict[str, Any], **own: Any) -> PrefixTuningConfig:
        """(PEFT's file, like ours, has the plain prefix that its MLP made.)"""
        needs(fields, "num_virtual_tokens")
        refuse(fields, num_transformer_submodules=1)
        return cls(tokens=fields["num_virtual_tokens"], init="zero", **own)


@register(PrefixTuningConfig)
class PrefixTuning(Prompt):
    peft_shared: ClassVar = {"prefix": "prompt_embeddings"}

    @staticmethod
    def build(model: nn.Module, config: PrefixTuningConfig) -> dict[str, PrefixTuning]:
        sizes = getattr(model, "config", None)
        if sizes is None or sizes.is_encoder_decoder or not getattr(model, "can_generate", lambda: False)():
            kind = type(model).__name__
            raise TypeError(f"PrefixTuning needs a decoder of transformers that keeps keys and values, not a {kind}")
        return {body_of(model): PrefixTuning(model, config)}

    def __init__(self, model: nn.Module, config: PrefixTuningConfig):
        super().__init__()
        sizes, weight = model.config.get_text_config(), model.get_input_embeddings().weight
        heads = getattr(sizes, "num_key_value_heads", None) or sizes.num_attention_heads
        width = getattr(sizes, "head_dim", None) or sizes.hidden_size // sizes.num_attention_heads
        self.shape = (config.tokens, 2 * sizes.num_hidden_layers, heads, width)
        row = 2 * sizes.num_hidden_layers * heads * width
        if config.hidden is None:
            self.flat = nn.Parameter(torch.zeros(config.tokens, row, device=weight.device))
            self._start(model, config)
        else:
            layers = (nn.Linear(sizes.hidden_size, config.hidden), nn.Tanh(), nn.Linear(config.hidden, row))
            self.flat = None
            self.mlp = nn.Sequential(nn.Embedding(config.tokens, sizes.hidden_size), *layers).to(weight.device)

    @torch.no_grad()
    def _start(self, model: nn.Module, config: PrefixTuningConfig) -> None:
        if config.init == "random":
            nn.init.normal_(self.flat)
        if config.init in ("random", "zero") or self.flat.is_meta:
            return
        ids = encoded(model, config.tokenizer, config.text) if config.init == "text" else []
        ids = (ids + frequent(model, config.tokens))[: config.tokens]
        pairs = prefilled(model, torch.tensor([ids], device=self.flat.device))  # 2 L of [Hkv, P, hd]
        self.flat.copy_(torch.stack(pairs).permute(2, 0, 1, 3).flatten(1))

    @property
    def prefix(self) -> Tensor:
        """``[P, 2 L Hkv hd]``; a row is key, value of layer 0, key, value of layer 1, and so on."""
        if self.flat is not None:
            return self.flat
        embedding, *layers = self.mlp
        return nn.Sequential(*layers)(embedding.weight)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.flat.copy_(tensors["prefix"])

    def before(self, body: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        check_one_sequence(arguments)
        old = cached(arguments)
        arguments = shifted(arguments, self.shape[0], new=False)
        if old:
            return arguments
        given = arguments.get("inputs_embeds") if arguments.get("input_ids") is None else arguments["input_ids"]
        dtype = body.get_input_embeddings().weight.dtype
        pairs = self.prefix.to(dtype).view(self.shape).permute(1, 2, 0, 3)[:, None].expand(-1, len(given), -1, -1, -1)
        cache = arguments.get("cache")
        wanted = arguments.get("use_cache")
        goes_on = (body.config.use_cache if wanted is None else wanted) and not body.training
        if cache is None and not goes_on:
            keeping_the_cache(body, True)
            return {**arguments, "cache": PrefixCache(pairs)}
        if cache is None:
            from transformers import DynamicCache

            cache = DynamicCache(config=body.config)
        for layer in range(len(pairs) // 2):
            cache.update(pairs[2 * layer], pairs[2 * layer + 1], layer)
        return {**arguments, "cache": cache}

    def after(self, body: nn.Module, output: Any) -> Any:
        keeping_the_cache(body, False)
        name = "cache" if hasattr(output, "cache") else "past_key_values"
        if isinstance(getattr(output, name, None), PrefixCache):
            setattr(output, name, None)
        return output

    def extra_repr(self) -> str:
        return f"tokens={self.shape[0]}"
