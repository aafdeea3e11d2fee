"""The layers that low-rank methods can adapt, each seen as one matrix ``[out, in]``.

===================  ==========================================  =================================
layer                its weight                                  as a matrix
===================  ==========================================  =================================
``nn.Linear``        ``[out, in]``                               itself
``Conv1D`` (GPT-2)   ``[in, out]``                               transposed
``nn.Embedding``     ``[ids, width]``                            transposed: in = ids, out = width
``nn.Conv1d`` to 3d  ``[out, channels, ...]``                    in = channels * height * width
stacks of experts    ``[E, out, in]`` or ``[E, in, out]``         ``[E, out, in]``: one for each
===================  ==========================================  =================================
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .experts_linear import ExpertsLinear
from .quantized import dequantized, is_quantized

LINEAR, EMBEDDING, CONVOLUTION, EXPERTS = "linear", "embedding", "convolution", "experts"
CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


def is_conv1d(layer: nn.Module) -> bool:
    """Whether it is the transposed linear layer of GPT-2 (known by its shape: core code does not need transformers)."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nx") and hasattr(layer, "nf")


def kind_of(layer: nn.Module) -> str | None:
    """The kind of a layer, for a low-rank method; None if such a method cannot adapt it."""
    kind = type(layer)
    if isinstance(layer, nn.Linear):
        return LINEAR if is_quantized(layer.weight) or is_plain_linear(kind) else None
    if is_conv1d(layer):
        return LINEAR
    if isinstance(layer, ExpertsLinear):
        return EXPERTS
    # A subclass that does more than a look-up (Gemma's scales the result) does not depend on its weight alone.
    if isinstance(layer, nn.Embedding) and kind.forward is nn.Embedding.forward and layer.max_norm is None:
        return EMBEDDING
    plain = next((conv for conv in CONVOLUTIONS if isinstance(layer, conv)), None)
    if plain and layer.padding_mode == "zeros":
        own = kind.forward is plain.forward and kind._conv_forward is plain._conv_forward
        return CONVOLUTION if own else None
    return None


def is_convolution(layer: nn.Module) -> bool:
    """Whether a layer that :func:`kind_of` knows is one; a compiler can follow this."""
    return isinstance(layer, tuple(CONVOLUTIONS))


def convolved(layer: nn.Module, x: Tensor, weight: Tensor, *, groups: int = 1) -> Tensor:
    """``x`` under another kernel of the same size, without a bias, read as the convolution ``layer`` reads it."""
    return _convolve(layer)(x, weight.to(x.dtype), None, layer.stride, layer.padding, layer.dilation, groups)


def pointwise(layer: nn.Module, x: Tensor, weight: Tensor, *, groups: int = 1) -> Tensor:
    """``x`` under a kernel of size 1."""
    return _convolve(layer)(x, weight.to(x.dtype), groups=groups)


def _convolve(layer: nn.Module) -> Callable[..., Tensor]:
    return next(call for conv, call in CONVOLUTIONS.items() if isinstance(layer, conv))


def over_channels(layer: nn.Module, values: Tensor) -> Tensor:
    """One value for each output of a layer's matrix (or input channel), in a shape that broadcasts to its output (or
    input)."""
    return values.view(-1, *[1] * (layer.weight.dim() - 2)) if is_convolution(layer) else values


def is_plain_linear(kind: type[nn.Linear]) -> bool:
    """Whether a subclass of ``nn.Linear`` computes the same as ``nn.Linear``, from its weight and bias. (Routers of
    experts return more than a product, and BitNet's layers round their inputs. Falcon's layers compute the same,
    written in another way.)"""
    return kind.forward is nn.Linear.forward or _computes_a_product(kind)


@functools.cache
def _computes_a_product(kind: type[nn.Linear]) -> bool:
    with torch.device("cpu"), torch.no_grad():
        x, weight, bias = torch.arange(4.0).sin()[None], torch.arange(12.0).cos().view(3, 4), torch.arange(3.0)
        bare = nn.Linear.__new__(kind)
        nn.Module.__init__(bare)
        bare.in_features, bare.out_features, bare.weight = 4, 3, nn.Parameter(weight)
        for bare.bias in (None, nn.Parameter(bias)):
            try:
                y = kind.forward(bare, x)
            except Exception:  # it needs more than that
                return False
            if not isinstance(y, Tensor) or not torch.allclose(y, nn.functional.linear(x, weight, bare.bias)):
                return False
    return True


def as_matrix(layer: nn.Module, weight: Tensor) -> Tensor:
    """``weight``, stored as ``layer`` stores its own, as ``[out, in]``: a view."""
    if is_conv1d(layer) or isinstance(layer, nn.Embedding):
        return weight.t()
    if isinstance(layer, ExpertsLinear):
        return layer.as_matrices(weight)
    return weight.flatten(1) if is_convolution(layer) else weight


def matrix(layer: nn.Module) -> Tensor:
    """The layer's own weight as ``[out, in]``, no copy."""
    return as_matrix(layer, layer.weight)


def sizes(layer: nn.Module) -> tuple[int, int]:
    """``in`` and ``out`` of the matrix."""
    out, in_ = matrix(layer).shape[-2:]
    return in_, out


def dense_matrix(layer: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix of a dense or quantised layer as a new dense tensor."""
    if is_quantized(layer.weight):
        return dequantized(layer.weight, dtype)
    return matrix(layer).detach().to(dtype, copy=True)


def with_parameters(layer: nn.Module, parameters: dict[str, Tensor | None]) -> nn.Module:
    """A layer like ``layer`` with other, frozen, parameters; all else is shared with it."""
    result = copy.copy(layer)
    own = {name: None if t is None else nn.Parameter(t, requires_grad=False) for name, t in parameters.items()}
    result._parameters = {**layer._parameters, **own}
    return result


def with_matrix(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A dense layer like ``layer`` with the matrix ``weight``, stored as such a layer stores it."""
    layer = getattr(layer, "dense_shell", layer)
    if is_conv1d(layer) or isinstance(layer, nn.Embedding):
        weight = weight.t().contiguous()
    elif isinstance(layer, tuple(CONVOLUTIONS)):
        weight = weight.view(layer.weight.shape)
    elif isinstance(layer, ExpertsLinear):
        weight = layer.as_matrices(weight).contiguous()  # undoes the transposition of as_matrices
    parameters = {"weight": weight} if isinstance(layer, nn.Embedding) else {"weight": weight, "bias": bias}
    return with_parameters(layer, parameters)
