"""A frozen linear layer in 4 bits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Literal

from torch import Tensor, nn

from ..ops import NF4Tensor, nf4_linear, nf4_quantize
from .experts_linear import ExpertsLinear
from .layers import EXPERTS, LINEAR, kind_of, matrix
from .quantized import StoredInParts, is_quantized
from .undo import about


class NF4Linear(StoredInParts, nn.Linear):
    """``nn.Linear`` whose weight is an :class:`~peftops.NF4Tensor`: frozen, an eighth of the memory of float32.

    ``compute="int8"`` lets it round activations and codes where that is faster, see :func:`peftops.nf4_linear`.
    ``dense_shell`` is the layer it was quantised from, without parameters, if that was no plain ``nn.Linear``:
    dense again, it has to become such a layer.
    """

    weight: NF4Tensor

    def __init__(
        self, weight: NF4Tensor, bias: Tensor | None = None, dense_shell: nn.Module | None = None, *,
        compute: Literal["float", "int8"] = "float",
    ):  # fmt: skip
        nn.Module.__init__(self)
        if dense_shell is None:
            dense_shell = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        self.__dict__["dense_shell"] = dense_shell  # no submodule
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.compute = compute

    @classmethod
    def from_dense(cls, linear: nn.Linear, *, block_size: int = 64, double_quant: bool = True) -> NF4Linear:
        """Quantise ``linear`` (or a Conv1D of transformers); the bias is shared, not copied."""
        weight = nf4_quantize(matrix(linear).contiguous(), block_size=block_size, double_quant=double_quant)
        return nf4_layer(linear, weight)

    def with_codes(self, weight: NF4Tensor, bias: Tensor | None) -> NF4Linear:
        """The same layer over another weight."""
        return NF4Linear(weight, bias, self.dense_shell, compute=self.compute)

    def forward(self, x: Tensor) -> Tensor:
        return nf4_linear(x, self.weight, self.bias, compute=self.compute)

    def extra_repr(self) -> str:
        block = f"block_size={self.weight.block_size}, double_quant={self.weight.double_quant}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {block}"
        )


def quantize_linears(
    model: nn.Module,
    chosen: Callable[[str], bool],
    *,
    block_size: int = 64,
    double_quant: bool = True,
) -> list[str]:
    """Replace the chosen dense linear layers of ``model`` by :class:`NF4Linear`, and experts' by layers over codes, in
    place and one by one.

    A dense weight is freed before the next one is quantised (unless something else refers to it), so the
    dense and the 4-bit model never exist at once.

    Args:
        model: any module. Layers that are quantised already are left alone.
        chosen: tells by its dotted name whether a layer is to be quantised.

    Returns:
        The names of the layers that were replaced.
    """
    replaced = []
    for name, parent, leaf in list(_dense_linears(model)):
        if chosen(name):
            dense = getattr(parent, leaf)
            with about(name):
                codes = nf4_quantize(matrix(dense).contiguous(), block_size=block_size, double_quant=double_quant)
                setattr(parent, leaf, nf4_layer(dense, codes))
            replaced.append(name)
            del dense
    return replaced


def nf4_layer(dense: nn.Module, codes: NF4Tensor) -> nn.Module:
    """A linear layer, or one of experts, over codes in the place of its weight; the bias is shared."""
    if isinstance(dense, ExpertsLinear):
        return dense.with_codes(codes, dense.bias)
    return NF4Linear(codes, dense.bias, shell_of(dense)).train(dense.training)


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
