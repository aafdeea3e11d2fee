"""(IA)^3, Liu et al. 2022 (arXiv:2205.05638): a learned factor per output, or per input.

    y = l * (W x + b)    l in R^out,    and where the feed-forward part is read:    y = W (l * x) + b    l in R^in

l starts at 1: the model starts as it was. The paper scales keys, values and the input of the last feed-forward layer.
For a LLaMA, that is ``target=["k_proj", "v_proj", "down_proj"]`` and ``feedforward=["down_proj"]``. A convolution has a
factor for each channel.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..attaching import each_target, register
from ..attaching.config import Config, check_target, needs
from ..attaching.targets import ALL_LINEAR, Target, matches
from ..nn import CONVOLUTION, LINEAR, Adapter, kind_of, over_channels, sizes


@dataclass(frozen=True)
class IA3Config(Config):
    """Options of (IA)^3.

    Args:
        target: as in :class:`LoRAConfig`.
        feedforward: those of these layers whose input is scaled instead of their output; in the same form as target.

    Examples:
        >>> model = peftops.attach(nn.Sequential(nn.Linear(8, 4)), peftops.IA3Config())
        >>> peftops.summary(model).trainable  # a factor for each output
        4
    """

    peft_type: ClassVar[str] = "IA3"

    target: Target = ALL_LINEAR
    feedforward: Target = ()

    def __post_init__(self) -> None:
        check_target(self.target)
        super().__post_init__()

    def as_built(self, adapters: dict[str, Any]) -> IA3Config:
        """An expression for whole names: PEFT reads a list as ends of names, and requires that its members are in the
        target."""
        inputs = [path for path, adapter in adapters.items() if isinstance(adapter, IA3) and adapter.scales_input]
        short = rf"(.*\.)?({'|'.join(sorted({re.escape(path.rpartition('.')[2]) for path in inputs}))})"
        exact = all((re.fullmatch(short, path) is not None) == (path in inputs) for path in adapters)
        return replace(self, feedforward=(short if exact else "|".join(map(re.escape, inputs))) if inputs else ())

    def to_peft(self) -> dict[str, Any]:
        feedforward = self.feedforward if isinstance(self.feedforward, str) else list(self.feedforward)
        return {
            "peft_type": "IA3",
            "feedforward_modules": feedforward,
            "fan_in_fan_out": False,
            "init_ia3_weights": True,
        }

    @classmethod
    def from_peft(cls, fields: dict[str, Any], **own: Any) -> IA3Config:
        needs(fields, "target_modules", "feedforward_modules")
        feedforward = fields["feedforward_modules"]
        if feedforward and not isinstance(feedforward, str):
            feedforward = rf".*({'|'.join(map(re.escape, feedforward))})"  # ends of names
        return cls(target=fields["target_modules"], feedforward=feedforward, **own)


@register(IA3Config)
class IA3(Adapter):
    layers: ClassVar = (LINEAR, CONVOLUTION)
    peft_keys: ClassVar = {"ia3_l": "ia3_l"}

    @staticmethod
    def build(model: nn.Module, config: IA3Config) -> dict[str, IA3]:
        found = matches(model, config.feedforward, "feedforward") if config.feedforward else []
        inputs = {path for path, _ in found}
        return {path: IA3(base, path in inputs) for path, base in each_target(IA3, model, config).items()}

    def __init__(self, base: nn.Module, scales_input: bool):
        super().__init__()
        in_, out = sizes(base)
        self.scales_input, self.groups = scales_input, getattr(base, "groups", 1)
        shape: tuple[int, ...] = (1, in_) if scales_input else (out, 1)  # those of PEFT's files
        if kind_of(base) == CONVOLUTION:
            shape = (1, base.in_channels if scales_input else out, *[1] * len(base.kernel_size))
        self.ia3_l = nn.Parameter(torch.ones(shape, device=base.weight.device))

    def adapt(self, base: nn.Module, x: Tensor) -> Tensor:
        factor = over_channels(base, self.ia3_l.flatten())
        if self.scales_input:
            return base(x * factor.to(x.dtype))
        y = base(x)
        return y * factor.to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        factor = self.ia3_l.flatten()
        if not self.scales_input:
            return weight * factor[:, None], None if bias is None else bias * factor
        columns = weight.shape[1] * self.groups // len(factor)  # of the matrix, for one channel
        rows = factor.view(self.groups, -1).repeat_interleave(columns, 1)
        return weight * rows.repeat_interleave(len(weight) // self.groups, 0), bias
