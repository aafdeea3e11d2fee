"""``MXFP4Tensor``: a frozen weight in 4-bit floats that share an exponent."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .lora_linear import LoRATerm
from .packed_linear import Operands
from .packed_tensor import PackedTensor

BLOCK = 32  # columns that share a scale
_gradient = torch.ops.peftops.mxfp4_linear_backward.default


class MXFP4Tensor(PackedTensor):
    """A weight in MXFP4 (OCP's microscaling formats, specification 1.0), as in checkpoints of gpt-oss.

    An element is ``E2M1[code] * 2**(scale - 127)``: one of 0, 0.5, 1, 1.5, 2, 3, 4 and 6 with a sign, and a scale for
    each 32 columns of a row. It is made by :func:`peftops.mxfp4_quantize` (or :meth:`from_blocks`) and used by
    :func:`peftops.mxfp4_linear` and :func:`peftops.mxfp4_dequantize`. Like an :class:`~peftops.NF4Tensor` it can be a
    (frozen) parameter, be copied, moved, pickled and saved, and any other operation raises an error. A stack
    ``[experts, out, in]`` is kept and dequantised; ``weight[e]`` is expert ``e``, a view, for products.

    Attributes:
        blocks: uint8, ``[..., out, in / 2]``; two codes a byte, the first in the low four bits. The highest bit of a
            code is its sign.
        scales: uint8, ``[..., out, in / 32]``; exponents, less 127. 255 is NaN, and so is its block.

    Examples:
        >>> weight = peftops.mxfp4_quantize(torch.randn(4, 64))
        >>> weight.shape, weight.blocks.shape, weight.scales.shape
        (torch.Size([4, 64]), torch.Size([4, 32]), torch.Size([4, 2]))
    """

    FORMAT = "mxfp4"
    PARTS = ("blocks", "scales")
    SETTINGS = ()
    BY_ROW = PARTS
    LAYOUT = ("shape",)
    NAME = "an MXFP4Tensor"
    INSTEAD = (
        "For a product use peftops.mxfp4_linear(x, weight); "
        "for the numbers ask for them: peftops.mxfp4_dequantize(weight)"
    )

    _linear = torch.ops.peftops.mxfp4_linear.default

    blocks: Tensor
    scales: Tensor

    @staticmethod
    def __new__(cls, blocks: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> MXFP4Tensor:
        return cls._make((blocks, scales), (), shape, dtype)

    @classmethod
    def from_blocks(cls, blocks: Tensor, scales: Tensor, *, dtype: torch.dtype = torch.bfloat16) -> MXFP4Tensor:
        """A weight from the tensors of a checkpoint, which are kept and not copied.

        Args:
            blocks: uint8, ``[..., out, in / 32, 16]`` as transformers writes ``*_blocks``, or ``[..., out, in / 2]``.
            scales: uint8, ``[..., out, in / 32]``; with a first dim for experts, or without.
            dtype: the dtype of the weight that it stands for.

        Raises:
            ValueError: a dtype is not uint8, or shapes do not fit together.
        """
        for name, part in (("blocks", blocks), ("scales", scales)):
            if part.dtype != torch.uint8:
                raise ValueError(f"MXFP4Tensor.from_blocks: {name} must be uint8, not {part.dtype}")
        if scales.dim() not in (2, 3):
            raise ValueError(
                "MXFP4Tensor.from_blocks: scales must be [out, in / 32] or [experts, out, in / 32], "
                f"not {list(scales.shape)}"
            )
        *rows, groups = scales.shape
        apart, together = [*rows, groups, BLOCK // 2], [*rows, groups * BLOCK // 2]
        if list(blocks.shape) not in (apart, together):
            raise ValueError(
                f"MXFP4Tensor.from_blocks: blocks must have shape {apart} or {together} beside scales of "
                f"{list(scales.shape)}, not {list(blocks.shape)}"
            )
        return cls(blocks.reshape(together), scales, torch.Size((*rows, groups * BLOCK)), dtype)

    @staticmethod
    def product_gradient(g: Tensor, weight: Operands, term: LoRATerm | None, v: Tensor | None) -> Tensor:
        return _gradient(g, *weight, v, *((None, 0.0, None) if term is None else (term.A, *term.dropout)))

    @classmethod
    def _settings_of(cls, parts: Mapping[str, Tensor], shape: torch.Size) -> tuple[()]:
        *lead, k = shape
        if k % BLOCK:
            raise ValueError(f"a weight of shape {list(shape)} has no whole blocks of {BLOCK} columns")
        wants = {"blocks": (torch.uint8, (*lead, k // 2)), "scales": (torch.uint8, (*lead, k // BLOCK))}
        cls._check_parts(parts, wants, shape)
        return ()


torch.serialization.add_safe_globals([MXFP4Tensor])
