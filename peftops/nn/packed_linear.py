"""Frozen linear layers over a packed weight."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from ..ops import GroupQuantTensor, MXFP4Tensor, NF4Tensor
from ..ops.packed_tensor import PackedTensor
from .experts_linear import ExpertsLinear
from .layers import EXPERTS, LINEAR, kind_of, matrix
from .quantized import StoredInParts, is_quantized, own_rows
from .undo import about


class PackedLinear(StoredInParts, nn.Linear):
    """``nn.Linear`` over a frozen packed weight. Each format has a subclass, which :meth:`over` finds.

    ``compute="int8"`` lets it round activations (and the codes of NF4) where that is faster.
    If it was quantised from a layer other than a plain ``nn.Linear``, ``dense_shell`` is that layer without parameters:
    dequantising makes such a layer again.
    """

    format: ClassVar[type[PackedTensor]]
    weight: PackedTensor

    def __init__(
        self,
        weight: PackedTensor,
        bias: Tensor | None = None,
        dense_shell: nn.Module | None = None,
        *,
        compute: Literal["float", "int8"] = "float",
    ):
        nn.Module.__init__(self)
        if dense_shell is None:
            dense_shell = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        self.__dict__["dense_shell"] = dense_shell  # no submodule
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.compute = compute

    @classmethod
    def of_format(cls, name: str) -> type[PackedLinear]:
        """The layers of a format: "nf4", "group", ..."""
        return next(kind for kind in cls.__subclasses__() if kind.format is PackedTensor.FORMATS[name])

    @classmethod
    def over(cls, weight: PackedTensor, bias: Tensor | None, dense_shell: nn.Module | None = None) -> PackedLinear:
        """A layer over a weight of any format."""
        return cls.of_format(weight.FORMAT)(weight, bias, dense_shell)

    @classmethod
    def from_dense(cls, linear: nn.Linear, **options: Any) -> PackedLinear:
        """Quantise ``linear`` (or a Conv1D of transformers). The options are those of the format's function, such as
        :func:`peftops.nf4_quantize`. The bias is shared, not copied."""
        return packed_layer(linear, cls.format.quantize(matrix(linear).contiguous(), **options))

    def with_codes(self, weight: PackedTensor, bias: Tensor | None) -> PackedLinear:
        """The same layer over another weight."""
        return type(self)(weight, bias, self.dense_shell, compute=self.compute)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.product(x, self.bias, compute=self.compute)

    def extra_repr(self) -> str:
        options = "".join(f", {name}={value}" for name, value in own_rows(self.weight).options().items())
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}{options}"
        )


class NF4Linear(PackedLinear):
    """Over an :class:`~peftops.NF4Tensor`: an eighth of the memory of float32."""

    format = NF4Tensor


class GroupLinear(PackedLinear):
    """Over a :class:`~peftops.GroupQuantTensor`, in 2, 3, 4 or 8 bits."""

    format = GroupQuantTensor


class MXFP4Linear(PackedLinear):
    """Over an :class:`~peftops.MXFP4Tensor`, in the format of gpt-oss."""

    format = MXFP4Tensor


def quantize_linears(
    model: nn.Module,
    chosen: Callable[[str], bool],
    *,
    format: str = "nf4",
    **options: Any,
) -> list[str]:
    """Replace the chosen dense linear layers of ``model`` by packed ones, and experts by layers over codes, in place
    and one by one.

    A dense weight is freed before the next one is quantised (unless other code refers to it), so the dense and the
    4-bit model never exist at once.

    Args:
        model: any module. Layers that are quantised already are left alone.
        chosen: tells by its dotted name whether a layer is to be quantised.
        format: "nf4" or another name in ``PackedTensor.FORMATS``.
        options: of the function that quantises to it, such as :func:`peftops.nf4_quantize`.

    Returns:
        The names of the layers that were replaced.
    """
    replaced, kind = [], PackedLinear.of_format(format)
    for name, parent, leaf in list(_dense_linears(model)):
        if chosen(name):
            dense = getattr(parent, leaf)
            with about(name):
                codes = kind.format.quantize(matrix(dense).contiguous(), **options)
                setattr(parent, leaf, packed_layer(dense, codes))
            replaced.append(name)
            del dense
    return replaced


def packed_layer(dense: nn.Module, codes: PackedTensor) -> nn.Module:
    """A linear layer, or one of experts, over codes in the place of its weight; the bias is shared."""
    if isinstance(dense, ExpertsLinear):
        return dense.with_codes(codes, dense.bias)
    return PackedLinear.over(codes, dense.bias, shell_of(dense)).train(dense.training)


def _dense_linears(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    for path, parent in model.named_modules():
        for leaf, child in parent.named_children():
            if kind_of(child) in (LINEAR, EXPERTS) and not is_quantized(child.weight):
                yield f"{path}.{leaf}".lstrip("."), parent, leaf


def shell_of(layer: nn.Module) -> nn.Module:
    """A layer like ``layer`` that holds no weights."""
    shell = copy.copy(layer)
    shell._parameters = dict.fromkeys(layer._parameters)
    return shell
