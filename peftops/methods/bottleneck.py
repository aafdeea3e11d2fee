"""Bottleneck adapters: Houlsby et al. 2019 (arXiv:1902.00751), Pfeiffer et al. 2020 (arXiv:2005.00052), and the
parallel ones of He et al. 2021 (arXiv:2110.04366).

    a(h) = s (W2 f(W1 h + b1) + b2)    W1 in R^(m x d), W2 in R^(d x m), m = d / reduction

    houlsby     y = h + a(h)    h = what attention adds to the stream, and what the feed-forward part adds
    pfeiffer    y = h + a(h)    h = what the feed-forward part adds
    parallel    y = h + a(x)    h as for pfeiffer, x = what the feed-forward part reads

W1 starts random (Kaiming uniform) and W2, b1, b2 at 0: the model starts as it was. (In other libraries it starts only
close to that.) Houlsby et al. train the norms and the head, too: ``modules_to_save=["LayerNorm", "classifier"]`` of a
BERT. AdapterHub's Pfeiffer adapter applies the block's norm to its h; this one does not. f is not linear, so the
adapter cannot be merged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..attaching import register
from ..attaching.config import Config, check_choice, check_range
from ..attaching.targets import sublayers
from ..nn import Adapter, base_of, module_at, sizes

_ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


@dataclass(frozen=True)
class BottleneckConfig(Config):
    """Options of bottleneck adapters.

    Args:
        placement: "houlsby", "pfeiffer" or "parallel".
        reduction: d / m.
        width: m, instead.
        activation: f, one of "relu", "gelu", "silu", "tanh".
        scaling: s (the paper of the parallel adapter takes 4).
        init: "zero", as above, or "houlsby": all weights normal of deviation 1e-3, cut at two deviations.

    Examples:
        >>> model = peftops.attach(llama(), peftops.BottleneckConfig(width=4))
        >>> peftops.summary(model).active
        'default'
    """

    peft_type: ClassVar[str] = "BOTTLENECK"

    placement: str = "pfeiffer"
    reduction: float = 16.0
    width: int | None = None
    activation: str = "relu"
    scaling: float = 1.0
    init: str = "zero"

    def __post_init__(self) -> None:
        check_choice("placement", self.placement, ("houlsby", "pfeiffer", "parallel"))
        check_choice("activation", self.activation, tuple(_ACTIVATIONS))
        check_choice("init", self.init, ("zero", "houlsby"))
        check_range("reduction", self.reduction, 0)
        if self.reduction == 0:
            raise ValueError(f"reduction must be above 0, not {self.reduction!r}")
        if self.width is not None:
            check_range("width", self.width, 1, whole=True)
        super().__post_init__()


@register(BottleneckConfig)
class Bottleneck(Adapter):
    peft_keys: ClassVar = {
        "down_weight": "adapter_down.weight",
        "down_bias": "adapter_down.bias",
        "up_weight": "adapter_up.weight",
        "up_bias": "adapter_up.bias",
    }

    @staticmethod
    def build(model: nn.Module, config: BottleneckConfig) -> dict[str, Adapter]:
        adapters: dict[str, Adapter] = {}
        layer = lambda path: base_of(module_at(model, path))
        for block in sublayers(model):
            first, last = block.feed_forward
            if config.placement == "parallel":
                read: list[Tensor] = []
                adapters[first] = Tap(read)
                adapters[last] = Bottleneck(layer(last), config, sizes(layer(first))[0], read)
                continue
            for path in [*block.attention, last] if config.placement == "houlsby" else [last]:
                adapters[path] = Bottleneck(layer(path), config, None, None)
        return adapters

    def __init__(self, base: nn.Module, config: BottleneckConfig, in_: int | None, read: list[Tensor] | None):
        super().__init__()
        out, device = sizes(base)[1], base.weight.device
        in_ = in_ or out
        width = config.width or max(1, int(in_ / config.reduction))
        self.activation, self.scaling = _ACTIVATIONS[config.activation], config.scaling
        self.read = read
        for name, shape in (("down", (width, in_)), ("up", (out, width))):
            weight, bias = torch.zeros(shape, device=device), torch.zeros(shape[0], device=device)
            if config.init == "houlsby":
                nn.init.trunc_normal_(weight, std=1e-3, a=-2e-3, b=2e-3)
            elif name == "down":
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            self.register_parameter(f"{name}_weight", nn.Parameter(weight))
            self.register_parameter(f"{name}_bias", nn.Parameter(bias))

    def adapt(self, base: nn.Module, x: Tensor) -> Tensor:
        h = base(x)
        source = h if self.read is None else self.read.pop()
        # In the model's own dtype: a cast then copies the small weights, not the large activations that backward keeps.
        cast = lambda parameter: parameter.to(source.dtype)
        z = self.activation(F.linear(source, cast(self.down_weight), cast(self.down_bias)))
        return h + self.scaling * F.linear(z, cast(self.up_weight), cast(self.up_bias))

    def extra_repr(self) -> str:
        return f"width={self.down_weight.shape[0]}, scaling={self.scaling:g}"


class Tap(Adapter):
    """At the first layer of a feed-forward part: passes that layer's input on to the adapter at the last layer."""

    def __init__(self, read: list[Tensor]):
        super().__init__()
        self.read = read

    def adapt(self, base: nn.Module, x: Any) -> Tensor:
        self.read[:] = [x]
        return base(x)
