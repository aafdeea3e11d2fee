"""Linear layers over a frozen weight in a packed format: the code that does not depend on the format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .lora_linear import LoRATerm, autocast, check_lora, draw_seed, sum_rows

if TYPE_CHECKING:
    from .packed_tensor import PackedTensor

Compute = Literal["float", "int8"]

# The tensors of a weight, some of them None, and then the numbers that the operators take.
Operands = tuple[Tensor | int | None, ...]


def of_another_kind(op: str, weight: object, kind: type[PackedTensor]) -> TypeError:
    maker = f"peftops.{kind.FORMAT}_quantize"
    return TypeError(f"{op}: weight must be {kind.NAME} (see {maker}), not a {type(weight).__name__}")


class PackedProduct:
    """``x W^T`` of a packed weight, differentiable. A format names its two operators."""

    _linear: ClassVar[Any]  # (x, *weight, bias, u, lora_B, scaling, int8): x W^T + bias + scaling * u B^T
    _operands: Operands  # the weight as those operators take it

    @staticmethod
    def product_gradient(g: Tensor, weight: Operands, term: LoRATerm | None, v: Tensor | None) -> Tensor:
        """``g W`` and, unless they are None, the gradient of x through the low-rank ``term``, given the gradient ``v``
        of its u. ``weight`` is the tuple of operands that a product keeps."""
        raise NotImplementedError

    def product(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        lora_A: Tensor | None = None,
        lora_B: Tensor | None = None,
        scaling: float = 1.0,
        dropout_p: float = 0.0,
        training: bool = False,
        compute: Compute = "float",
    ) -> Tensor:
        """``x W^T + bias + scaling * dropout(x) A^T B^T``; the format's function, such as ``nf4_linear``, documents it.

        Backward keeps ``x`` itself (only if ``lora_A`` needs a gradient), ``u = dropout(x) A^T`` (float32) and a seed.
        """
        kind = type(self)
        self.check_operand(op := kind._OP, x)
        if compute not in ("float", "int8"):
            raise ValueError(f"{op}: compute must be 'float' or 'int8', not {compute!r}")
        x, int8 = autocast(x), compute == "int8"
        if lora_A is None and lora_B is None:
            dropout_p, seed = 0.0, None
        else:
            check_lora(op, *self.shape, lora_A, lora_B, dropout_p)
            dropout_p, seed = draw_seed(x, dropout_p, training)
        if torch.is_grad_enabled():
            return _Product.apply(x, bias, lora_A, lora_B, self._operands, kind, scaling, dropout_p, seed, int8)
        u = None if lora_A is None else LoRATerm(lora_A, lora_B, scaling, dropout_p, seed).shrink(x)
        return kind._linear(x, *self._operands, bias, u, lora_B, scaling, int8)

    def check_operand(self, op: str, x: Tensor) -> None:
        """Raise an error unless ``op`` can multiply x with this weight."""
        if len(self.shape) != 2:
            raise ValueError(f"{op}: weight must have two dims, [out, in], not shape {list(self.shape)}")
        if x.device != self.device:
            raise ValueError(f"{op}: x is on {x.device}, weight on {self.device}")
        if self.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: weight requires a gradient, but codes cannot have one; freeze it")


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, lora_A, lora_B, weight, kind, scaling, dropout_p, seed, int8):
        u = None if lora_A is None else LoRATerm(lora_A, lora_B, scaling, dropout_p, seed).shrink(x)
        tensors = [part for part in weight if not isinstance(part, int)]
        # only the gradient of lora_A needs x
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, u, lora_A, lora_B, seed, *tensors)
        ctx.numbers, ctx.kind = weight[len(tensors) :], kind
        ctx.scaling, ctx.dropout_p = scaling, dropout_p
        ctx.bias_dtype = None if bias is None else bias.dtype
        return kind._linear(x, *weight, bias, u, lora_B, scaling, int8)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, u, lora_A, lora_B, seed, *tensors = ctx.saved_tensors
        need_x, need_bias, need_A, need_B = ctx.needs_input_grad[:4]
        term = v = dx = dbias = dA = dB = None
        if u is not None:
            term = LoRATerm(lora_A, lora_B, ctx.scaling, ctx.dropout_p, seed)
            v = term.shrink_gradient(g)
            dA = term.gradient_A(x, v) if need_A else None
            dB = term.gradient_B(g, u) if need_B else None
        if need_x:
            dx = ctx.kind.product_gradient(g, (*tensors, *ctx.numbers), term, v)
        if need_bias:
            dbias = sum_rows(g, ctx.bias_dtype)
        return dx, dbias, dA, dB, *[None] * 6
