"""``NF4Tensor``: a frozen weight in 4 bits with the shape and dtype of the dense weight that it stands for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .lora_linear import LoRATerm
from .packed_linear import Operands
from .packed_tensor import PackedTensor

_gradient = torch.ops.peftops.nf4_linear_backward.default


class NF4Tensor(PackedTensor):
    """A weight in NF4 (QLoRA, arXiv:2305.14314), bit for bit as bitsandbytes stores it.

    ``shape``, ``dtype`` and ``device`` are those of the weight that it stands for. It is made by
    :func:`peftops.nf4_quantize` and used by :func:`peftops.nf4_linear` and
    :func:`peftops.nf4_dequantize`. It can be a (frozen) parameter, be copied, moved, pickled and saved;
    ``.to(dtype)`` changes only the dtype that it stands for, not the codes. Any other operation raises an error: no
    operation dequantises it silently. A stack ``[experts, out, in]`` for :func:`peftops.experts_linear` is one flat
    weight. ``weight[e]`` is expert ``e``, a view, if no block has codes or absmax values of two experts.

    Attributes:
        packed: uint8, ``[ceil(numel / 2)]``; two codes a byte, the first element in the high nibble,
            over the row-major weight.
        block_size: elements that share one absmax; blocks are flat and may straddle rows.

    Examples:
        >>> weight = peftops.nf4_quantize(torch.randn(64, 64))
        >>> weight.shape, weight.dtype, weight.nbytes
        (torch.Size([64, 64]), torch.float32, 2120)
        >>> weight + 1
        Traceback (most recent call last):
        NotImplementedError: aten.add.Tensor does not work on an NF4Tensor. ...
    """

    FORMAT = "nf4"
    PARTS = ("packed", "_absmax", "_absmax_scale", "_absmax_offset")
    OPTIONAL = frozenset({"_absmax_scale", "_absmax_offset"})
    SETTINGS = ("block_size",)
    BY_ROW = ("packed", "_absmax")
    LAYOUT = ("shape", "block_size", "double_quant")
    NAME = "an NF4Tensor"
    INSTEAD = (
        "For a product use peftops.nf4_linear(x, weight); for the numbers ask for them: peftops.nf4_dequantize(weight)"
    )

    _linear = torch.ops.peftops.nf4_linear.default

    packed: Tensor
    block_size: int
    _absmax: Tensor  # float32 [blocks], or uint8 [blocks] when double-quantised
    _absmax_scale: Tensor | None  # float32 [ceil(blocks / 256)]
    _absmax_offset: Tensor | None  # float32, a scalar

    @staticmethod
    def __new__(
        cls,
        packed: Tensor,
        absmax: Tensor,
        absmax_scale: Tensor | None,
        absmax_offset: Tensor | None,
        block_size: int,
        shape: torch.Size,
        dtype: torch.dtype,
    ) -> NF4Tensor:
        return cls._make((packed, absmax, absmax_scale, absmax_offset), (block_size,), shape, dtype)

    @property
    def _operands(self) -> Operands:
        return (*self._arguments, *self.shape)

    @staticmethod
    def product_gradient(g: Tensor, weight: Operands, term: LoRATerm | None, v: Tensor | None) -> Tensor:
        *parts, _, k = weight
        return _gradient(g, *parts, k, v, *((None, 0.0, None) if term is None else (term.A, *term.dropout)))

    @classmethod
    def _settings_of(cls, parts: Mapping[str, Tensor], shape: torch.Size) -> tuple[int]:
        count, blocks, double = shape.numel(), parts["_absmax"].numel(), "_absmax_scale" in parts
        cls._check_parts(
            parts,
            {
                "packed": (torch.uint8, (-(-count // 2),)),
                "_absmax": (torch.uint8 if double else torch.float32, (blocks,)),
                "_absmax_scale": (torch.float32, (-(-blocks // 256),)),
                "_absmax_offset": (torch.float32, ()),
            },
            shape,
        )
        sizes = [2**i for i in range(5, 13) if -(-count // 2**i) == blocks]
        if not sizes:
            raise ValueError(f"weight._absmax has {blocks} blocks, which do not fit a weight of shape {list(shape)}")
        # If several block sizes give the same number of blocks, there is one block, and its numbers do not depend on
        # the size.
        return (64 if 64 in sizes else sizes[0],)

    @property
    def double_quant(self) -> bool:
        """Whether the absmax values are quantised themselves, to 8 bits."""
        return self._absmax_scale is not None

    def _expert(self, index: int) -> NF4Tensor:
        size = self.shape[1] * self.shape[2]
        group = self.block_size * (256 if self.double_quant else 1)
        if size % group:
            raise ValueError(
                f"an NF4Tensor of shape {list(self.shape)} has no view of one expert: blocks of {group} elements share "
                f"their scales, and {size} are no multiple of it; peftops.experts_linear takes the whole, "
                "peftops.nf4_dequantize(weight)[e] are the numbers"
            )
        expert = super()._expert(index)
        if self.double_quant:
            expert._absmax_scale = self._piece("_absmax_scale", index)
        return expert

    def _piece(self, name: str, index: int) -> Tensor:
        return getattr(self, name).unflatten(0, (self.shape[0], -1))[index]

    @property
    def _is_ragged(self) -> bool:
        return self.numel() % self.block_size != 0

    @property
    def absmax(self) -> Tensor:
        """float32 ``[blocks]``: the largest magnitude of each block, as dequantisation uses it."""
        if self._absmax_scale is None:
            return self._absmax
        return torch.ops.peftops.nf4_absmax(self._absmax, self._absmax_scale, self._absmax_offset)


torch.serialization.add_safe_globals([NF4Tensor])
