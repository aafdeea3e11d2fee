"""The one shape of every weight-based PEFT layer: a frozen base and small changes, of which one is active."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ops import NF4Tensor, nf4_dequantize, nf4_quantize
from .nf4_linear import NF4Linear, dense_weight


class Adapter(nn.Module):
    """A trainable change of one layer. A method writes :meth:`adapt` and, if it can, :meth:`merged`.

    The base layer is passed in and never owned, so an adapter's state dict holds the adapter alone.
    """

    def adapt(self, base: nn.Module, x: Tensor) -> Tensor:
        """What the adapted layer computes."""
        raise NotImplementedError

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight and bias, float32, of one plain layer that computes the same from ``weight`` and ``bias``."""
        raise TypeError(f"{type(self).__name__} cannot be merged into the weights that it adapts")

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        return self.adapt(base, x)


class Switch:
    """Which adapter is active: one object for all layers of a model, so that switching touches no layer."""

    active: str | None = None


@dataclass
class MergeError:
    """What merging did to one layer, as Frobenius norms relative to that of the layer's weight."""

    change: float  # of the adapter
    rounding: float  # of casting, or quantising again, what came out


class AdaptedLayer(nn.Module):
    """A layer in its adapted form: ``base`` as it was, and one :class:`Adapter` per name."""

    def __init__(self, base: nn.Module, switch: Switch):
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.switch = switch
        self._unmerged: list[nn.Module] = []  # the base itself while a merged one stands in (a list hides it)

    def forward(self, x: Tensor) -> Tensor:
        name = self.switch.active
        if self._unmerged or name is None or name not in self.adapters:
            return self.base(x)
        return self.adapters[name](self.base, x)

    # Other code looks at a layer's weight for its dtype, shape or device.
    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def is_merged(self) -> bool:
        return bool(self._unmerged)

    @torch.no_grad()
    def merge(self, name: str, *, dense: bool) -> MergeError:
        """Let a plain layer with the adapter's change stand in for the base. An NF4 base is quantised again
        unless ``dense``."""
        base = self.base
        before, bias = dense_weight(base), None if base.bias is None else base.bias.float()
        weight, bias = self.adapters[name].merged(before, bias)
        dtype = base.weight.dtype
        bias = None if bias is None else bias.to(base.bias.dtype)
        if isinstance(base.weight, NF4Tensor) and not dense:
            kind = base.weight
            rounded = nf4_quantize(weight.to(dtype), block_size=kind.block_size, double_quant=kind.double_quant)
            merged = NF4Linear(rounded, bias)
            result = nf4_dequantize(rounded, dtype=torch.float32)
        else:
            merged = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
            result = weight.to(dtype)
            merged.weight = nn.Parameter(result, requires_grad=False)
            merged.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        size = before.norm().clamp(min=1e-30)
        error = MergeError(((weight - before).norm() / size).item(), ((result.float() - weight).norm() / size).item())
        self._unmerged = [base]
        self.base = merged.train(base.training)
        return error

    def unmerge(self) -> None:
        """Put the base back: the very same layer, so exact whatever :meth:`merge` computed."""
        if self._unmerged:
            (self.base,) = self._unmerged
            self._unmerged = []
