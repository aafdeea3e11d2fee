"""Norm tuning, Zhao et al. 2023 (arXiv:2312.11420): the weights and biases of the normalisation layers train.

    y = g * (x - mean) / deviation + h    g and h train (RMSNorm has no mean and no h)

Their values do not change at the start, so the model starts as it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..attaching import register
from ..attaching.config import Config, needs
from ..attaching.selection import copies
from ..attaching.targets import Target, check_called, matches
from ..nn import Select


@dataclass(frozen=True)
class NormTuningConfig(Config):
    """Options of norm tuning.

    Args:
        norms: "all", or names of layers or their last parts, or a regular expression, as a target: all named layers are
            tuned, as in HF PEFT, except BatchNorm.

    Examples:
        >>> model = peftops.attach(llama(), peftops.NormTuningConfig())
        >>> peftops.summary(model).trainable  # five norms of 32
        160
    """

    peft_type: ClassVar[str] = "LN_TUNING"
    target_field: ClassVar[str] = "norms"

    norms: Target = "all"

    def __post_init__(self) -> None:
        if not self.norms:
            raise ValueError(f"norms must be 'all', names or a regular expression, not {self.norms!r}")
        super().__post_init__()

    def to_peft(self) -> dict[str, Any]:
        return {"peft_type": "LN_TUNING"}

    @classmethod
    def from_peft(cls, fields: dict[str, Any], **own: Any) -> NormTuningConfig:
        needs(fields, "target_modules")
        return cls(norms=fields["target_modules"], **own)


def is_norm(layer: nn.Module) -> bool:
    """Whether its class has "Norm" in its name, as all norms of torch and transformers have."""
    return "Norm" in type(layer).__name__ and not is_batch_norm(layer) and not any(True for _ in layer.children())


def is_batch_norm(layer: nn.Module) -> bool:
    """BatchNorm is left out: its result depends on more than its weights."""
    return "BatchNorm" in type(layer).__name__


@register(NormTuningConfig)
class NormTuning(Select):
    peft_keys: ClassVar = {leaf: f"ln_tuning_layers.{leaf}" for leaf in ("weight", "bias")}

    @staticmethod
    def build(model: nn.Module, config: NormTuningConfig) -> dict[str, NormTuning]:
        every = config.norms == "all"
        named = set() if every else {path for path, _ in matches(model, config.norms, "norms")}
        check_called(model, named, f"norms {config.norms!r}")
        chosen = lambda path, layer, leaf: is_norm(layer) if every else path in named and not is_batch_norm(layer)
        return copies(NormTuning, model, chosen, "norms" if every else f"norms {config.norms}")
