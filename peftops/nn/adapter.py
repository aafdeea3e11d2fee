"""The one shape of every weight-based PEFT layer: a frozen base and small changes, of which one is active."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .layers import LINEAR, dense_matrix, kind_of, sizes, with_matrix
from .quantized import dequantized, is_quantized, quantized_like

PREFIX = "base_model.model."  # the start of PEFT's keys, for its wrappers around the model
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # attributes with the inner module


class Switch:
    """Which adapter is active: one object for all layers of a model, so that switching does not change the layers."""

    active: str | None = None


@dataclass
class MergeError:
    """The effect of merging on one layer, as Frobenius norms relative to that of the layer's weight."""

    change: float  # by the adapter
    rounding: float  # by casting the merged weight, or quantising it again
    quantized: bool = False  # whether it was quantised again

    @classmethod
    def between(cls, before: Tensor, after: Tensor, rounded: Tensor, *, quantized: bool = False) -> MergeError:
        size = lambda t: torch.linalg.vector_norm(t, dtype=torch.float64)  # squares of large weights overflow float32
        relative = lambda t: (size(t) / size(before).clamp(min=1e-30)).item()
        return cls(relative(after - before), relative(rounded.float() - after), quantized)


class Stored(nn.Module):
    """The part of an adapter at one place of a model, and its names in HF PEFT's files."""

    peft_keys: ClassVar[dict[str, str]] = {}  # parameter: the end of its key, after the name of the layer
    peft_shared: ClassVar[dict[str, str]] = {}  # parameter that all layers share: its whole key

    def file_key(self, name: str, layer: str) -> str:
        """The whole key of one of the tensors of :meth:`stored`."""
        return self.peft_shared.get(name) or f"{PREFIX}{layer}.{self.peft_keys[name]}"

    def stored(self) -> dict[str, Tensor]:
        """The tensors of a file, by the names of ``peft_keys`` and ``peft_shared``."""
        values = {name: getattr(self, name, None) for name in (*self.peft_keys, *self.peft_shared)}
        return {name: value for name, value in values.items() if value is not None}

    def complete(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """All tensors of :meth:`stored`, from those of a file: the base supplies the tensors that such files leave
        out."""
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The reverse, under ``torch.no_grad()``; the shapes are those of :meth:`stored`."""
        own = self.stored()
        for name, value in tensors.items():
            own[name].copy_(value)

    def left(self) -> None:
        """Called after the adapter is taken off its model."""

    def merge_into(self, base: nn.Module, *, dense: bool) -> tuple[nn.Module, MergeError]:
        """A plain layer that computes the same as the adapted one."""
        raise TypeError(f"{type(self).__name__} cannot be merged into the weights that it adapts")


class Adapter(Stored):
    """A trainable change of one layer. A method writes :meth:`adapt` and, if it can, :meth:`merged`.

    The base layer is an argument and not a submodule, so an adapter's state dict holds only the adapter.
    """

    layers: ClassVar[tuple[str, ...]] = (LINEAR,)  # kinds of layers it can adapt, as nn.layers has them
    rank: int = 0  # of the product that it adds to a weight, if it adds one; more than the weight's own rank is useless

    def adapt(self, base: nn.Module, x: Tensor) -> Tensor:
        """The output of the adapted layer."""
        raise NotImplementedError

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight ``[out, in]`` and bias, float32, of one plain layer that computes the same from ``weight``
        and ``bias``."""
        raise TypeError(f"{type(self).__name__} cannot be merged into the weights that it adapts")

    def begin(self, base: nn.Module) -> nn.Module:
        """The layer to stand on, as the adapter is put into a model; usually ``base`` itself."""
        return base

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return self.adapt(base, *args, **kwargs)

    def merge_into(self, base: nn.Module, *, dense: bool) -> tuple[nn.Module, MergeError]:
        before, bias = dense_matrix(base), getattr(base, "bias", None)
        dtype, bias_dtype = base.weight.dtype, base.weight.dtype if bias is None else bias.dtype
        weight, bias = self.merged(before, None if bias is None else bias.detach().float())
        bias = None if bias is None else bias.to(bias_dtype)
        quantized = is_quantized(base.weight) and not dense
        if quantized:
            codes = quantized_like(weight.to(dtype), base.weight)
            result: nn.Module = base.with_codes(codes, bias)
            rounded = dequantized(codes, torch.float32)
        else:
            rounded = weight.to(dtype)
            result = with_matrix(base, rounded, bias)
        return result.train(base.training), MergeError.between(before, weight, rounded, quantized=quantized)


class AdaptedLayer(nn.Module):
    """A layer in its adapted form: ``base`` as it was, and one :class:`Adapter` per name."""

    def __init__(self, base: nn.Module, switch: Switch):
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.switch = switch
        self._unmerged: list[nn.Module] = []  # the base under a merged layer; in a list, so that it is no submodule

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        name = self.switch.active
        if self._unmerged or name is None or name not in self.adapters:
            return self.base(*args, **kwargs)
        return self.adapters[name](self.base, *args, **kwargs)

    @classmethod
    def put(cls, model: nn.Module, path: str, name: str, adapter: Adapter, switch: Switch) -> None:
        """Let the layer at ``path`` have one more adapter."""
        owner, leaf = owner_of(model, path)
        layer = unwrapped(getattr(owner, leaf))
        if not isinstance(layer, cls):
            layer = cls(adapter.begin(layer), switch).train(layer.training)
            setattr(owner, leaf, layer)
        layer.adapters[name] = adapter

    def leave(self, model: nn.Module, path: str) -> None:
        """Put the base where the adapted layer is."""
        owner, leaf = owner_of(model, path)
        setattr(owner, leaf, self.base)

    # Other code looks at a layer's weight for its dtype, shape or device.
    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    @property
    def in_features(self) -> int:
        return self._sizes()[0]

    @property
    def out_features(self) -> int:
        return self._sizes()[1]

    @out_features.setter
    def out_features(self, count: int) -> None:
        self.base.out_features = count

    def _sizes(self) -> tuple[int, int]:
        if kind_of(self.base) is None:
            raise AttributeError(f"a {type(self.base).__name__} has no in_features and out_features")
        return sizes(self.base)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """(Code that ties weights sets parameters. A merged layer has a weight of its own and cannot be tied.)"""
        if name not in ("weight", "bias") or "base" not in self._modules:
            super().register_parameter(name, param)
        elif not self.is_merged:
            setattr(self.base, name, param)
        elif getattr(self.base, name) is not param:
            raise ValueError(f"an adapter is merged into this {name}; unmerge it before it is tied to another one")

    @property
    def is_merged(self) -> bool:
        return bool(self._unmerged)

    @property
    def _tied_weights_keys(self) -> dict[str, str]:
        """Names that transformers leaves out of a file if another name has the same tensor. For all other names it
        raises an error."""
        return {name: name for name, _ in self.named_parameters()}

    @torch.no_grad()
    def merge(self, name: str, *, dense: bool) -> MergeError:
        """Put a plain layer with the adapter's change in place of the base. An NF4 base is quantised again unless
        ``dense``."""
        merged, error = self.adapters[name].merge_into(self.base, dense=dense)
        self._unmerged = [self.base]
        self.base = merged
        return error

    def unmerge(self) -> None:
        """Put the base back. It is the same layer as before, so this is exact."""
        if self._unmerged:
            (self.base,) = self._unmerged
            self._unmerged = []


def unwrapped_name(name: str) -> str:
    """A parameter's name without the parts that torch's wrappers add, as files and checkpoints have it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside torch's wrappers (``torch.compile``, DistributedDataParallel, checkpointing); usually
    ``module`` itself. Names of a model's layers leave out the wrappers."""
    while True:
        leaf = next((leaf for leaf in WRAPPERS if leaf in module._modules), None)
        if leaf is None and isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            leaf = "module"
        if leaf is None:
            return module
        module = module._modules[leaf]


def base_of(module: nn.Module) -> nn.Module:
    """The layer that an adapted layer was, or the layer itself."""
    module = unwrapped(module)
    return module.base if isinstance(module, AdaptedLayer) else module


def module_at(model: nn.Module, path: str) -> nn.Module:
    """``model.get_submodule(path)``, by the names that modules have in the model without adapters. So a layer within an
    adapted attention keeps its name."""
    module = model
    for leaf in path.split(".") if path else ():
        module = getattr(base_of(module), leaf)
    return unwrapped(module)


def owner_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds the module at ``path``, and the name of the attribute."""
    parent, _, leaf = path.rpartition(".")
    return base_of(module_at(model, parent)), leaf
