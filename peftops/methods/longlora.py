"""LongLoRA, Chen et al. 2023 (arXiv:2309.12307): training on long contexts at the cost of short ones.

    half of the heads attend, causally, within the groups of tokens [0, g), [g, 2 g), ...
    the other half          within the groups [0, g/2), [g/2, 3 g/2), ...

so information flows from a group to the next. LoRA on the attentions' linear layers, embeddings and norms train; rotary
positions are stretched to the new length. In eval mode, and after merging, the model uses full attention. It starts as
the (stretched) base. The authors roll the sequence, so its first g/2 tokens see its last ones. These groups do not
wrap: no token sees a later one, and g need not divide the length.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..attaching import each_target, register, state_of
from ..attaching.config import Config, check_pattern, check_range, check_scaling, check_target
from ..attaching.selection import copies
from ..attaching.targets import body_of, is_linear
from ..attaching.targets import layers as modules_of
from ..nn import MergeError, Prompt, Select, Stored, base_of
from ..nn.gated_prompt import ARGUMENT, check_attention, close_registry, is_attention, open_registry
from ..nn.prompt import check_one_sequence
from ..nn.rope import stretch, stretches
from ..nn.shifted_attention import ShiftedAttention
from .lora import LoRA, LoRAConfig
from .norm_tuning import is_norm


@dataclass(frozen=True)
class LongLoRAConfig(LoRAConfig):
    """Options of LongLoRA: those of :class:`LoRAConfig`, and

    Args:
        target: by default None, all linear layers of the attentions.
        group: g, in tokens; None for a quarter of each sequence.
        shift: whether half of the heads has its groups shifted by g/2.
        length: tokens of the new context: rotary positions are divided by ``ceil(length / old length)``. None, or
            no more than the old one, leaves them as they are.
        extras: whether embeddings and norms train. Without them the model does not learn long contexts.

    Examples:
        >>> model = peftops.attach(llama(), peftops.LongLoRAConfig(r=2, group=4))
        >>> peftops.summary(model).layers > 0
        True
    """

    peft_type: ClassVar[str] = "LONGLORA"
    target_field: ClassVar[str | None] = None  # a file has tensors of other layers, too
    to_peft = Config.to_peft
    from_peft = classmethod(Config.from_peft.__func__)

    r: int = 8
    target: Any = None
    group: int | None = None
    shift: bool = True
    length: int | None = None
    extras: bool = True

    def __post_init__(self) -> None:
        check_pattern("rank_pattern", self.rank_pattern)
        check_pattern("alpha_pattern", self.alpha_pattern)
        check_scaling(self.alpha, self.alpha_pattern)
        for r in (self.r, *self.rank_pattern.values()):
            check_range("r", r, 1, whole=True)
        check_range("dropout", self.dropout, 0, 1)
        if self.target is not None:
            check_target(self.target)
        if self.group is not None:
            check_range("group", self.group, 2, whole=True)
        if self.length is not None:
            check_range("length", self.length, 1, whole=True)
        super(LoRAConfig, self).__post_init__()  # LoRA's own wants a target


@register(LongLoRAConfig)
class LongLoRA(LoRA):
    @staticmethod
    def build(model: nn.Module, config: LongLoRAConfig) -> dict[str, Stored]:
        found = {path: module for path, module in modules_of(model) if is_attention(base_of(module))}
        if not found:
            raise TypeError(f"LongLoRA needs a model of transformers that decodes, not a {type(model).__name__}")
        for path, attention in found.items():
            check_attention(base_of(attention), path)
            kind = type(base_of(attention))
            if "position_bias" in inspect.signature(kind.forward).parameters:
                raise TypeError(f"LongLoRA needs attentions without position biases, not {path}, a {kind.__name__}")
        for heads in ("num_attention_heads", "num_key_value_heads"):
            if getattr(model.config, heads, 0) % 2:
                raise TypeError(f"LongLoRA splits heads into halves, and {heads} is {getattr(model.config, heads)}")
        if config.length is not None and stretches(model, config.length) and state_of(model) is not None:
            raise ValueError(
                "length would change the positions of adapters that are already attached; attach this one before them"
            )
        if config.target is None:
            inside = lambda path: any(path.startswith(f"{attention}.") for attention in found)
            chosen = {path: base_of(m) for path, m in modules_of(model) if is_linear(m) and inside(path)}
        else:
            chosen = each_target(LongLoRA, model, config)
        adapters: dict[str, Stored] = {path: LongLoRA(base, config, path) for path, base in chosen.items()}
        if config.extras:
            extra = lambda path, m, leaf: path not in adapters and (is_norm(m) or isinstance(m, nn.Embedding))
            adapters |= copies(Select, model, extra, "norms or embeddings")
        return adapters | {body_of(model): Groups(model, config)}

    @staticmethod
    def prepare(model: nn.Module, config: LongLoRAConfig) -> None:
        """Stretch the positions. :func:`peftops.detach` does not undo that."""
        if config.length is not None:
            stretch(model, config.length)


class Groups(Prompt):
    """Not a prompt of vectors: it changes the attention of the body's layers while the model trains."""

    def __init__(self, model: nn.Module, config: LongLoRAConfig):
        super().__init__()
        self._attentions = [m for _, module in modules_of(model) if is_attention(m := base_of(module))]
        self.attend = ShiftedAttention(config.group, config.shift)

    def before(self, body: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        if not body.training:
            return arguments
        check_one_sequence(arguments, "LongLoRA trains on groups of one")  # whose groups would begin in another
        for attention in self._attentions:
            open_registry(attention, self)
        return {**arguments, ARGUMENT: self.attend}

    def left(self) -> None:
        close_registry(self)

    def merge_into(self, base: nn.Module, *, dense: bool) -> tuple[nn.Module, MergeError]:
        return base, MergeError(0.0, 0.0)  # a merged model uses full attention

    def extra_repr(self) -> str:
        return f"group={self.attend.group}, shift={self.attend.shift}"
