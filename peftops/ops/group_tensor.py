"""``GroupQuantTensor``: a frozen weight in 2, 3, 4 or 8 bits, with a scale and a float zero for every group."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .lora_linear import LoRATerm
from .packed_linear import Operands
from .packed_tensor import PackedTensor

_gradient = torch.ops.peftops.group_linear_backward.default


class GroupQuantTensor(PackedTensor):
    """A weight in group-wise affine codes: ``scales * (codes - zeros)`` (QA-LoRA, arXiv:2309.14717).

    A group is ``group_size`` columns in a row of the weight ``[out, in]``. It is made by
    :func:`peftops.group_quantize` (or :meth:`from_codes`) and used by :func:`peftops.group_linear`,
    :func:`peftops.qalora_linear` and :func:`peftops.group_dequantize`. Like an
    :class:`~peftops.NF4Tensor` it can be a (frozen) parameter, be copied, moved, pickled and saved, and any other
    operation raises an error. A stack ``[experts, out, in]`` is for :func:`peftops.experts_linear`; ``weight[e]`` is
    expert ``e``, a view.

    Attributes:
        packed: uint8, ``[..., out, in * bits / 8]``; each row a string of bits, the first code lowest.
        scales: float32, ``[..., out, in / group_size]``, none of them 0.
        zeros: float32, ``[..., out, in / group_size]``, in units of a code; any real number.
        bits: 2, 3, 4 or 8.
        group_size: a power of two from 8 to 4096.

    Examples:
        >>> weight = peftops.group_quantize(torch.randn(4, 64), bits=4, group_size=32)
        >>> weight.shape, weight.packed.shape, weight.scales.shape
        (torch.Size([4, 64]), torch.Size([4, 32]), torch.Size([4, 2]))
    """

    FORMAT = "group"
    PARTS = ("packed", "scales", "zeros")
    SETTINGS = ("bits", "group_size")
    BY_ROW = PARTS
    LAYOUT = ("shape", "bits", "group_size")
    NAME = "a GroupQuantTensor"
    INSTEAD = (
        "For a product use peftops.group_linear(x, weight); "
        "for the numbers ask for them: peftops.group_dequantize(weight)"
    )

    _linear = torch.ops.peftops.group_linear.default

    packed: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    group_size: int

    @staticmethod
    def __new__(
        cls,
        packed: Tensor,
        scales: Tensor,
        zeros: Tensor,
        bits: int,
        group_size: int,
        shape: torch.Size,
        dtype: torch.dtype,
    ) -> GroupQuantTensor:
        return cls._make((packed, scales, zeros), (bits, group_size), shape, dtype)

    @classmethod
    def from_codes(
        cls, codes: Tensor, scales: Tensor, zeros: Tensor, *, bits: int, dtype: torch.dtype = torch.float32
    ) -> GroupQuantTensor:
        """A weight from codes that exist already; the group size follows from the shapes.

        Args:
            codes: integers from 0 to ``2**bits - 1``, ``[out, in]`` or ``[experts, out, in]``.
            scales: ``[..., out, in / group_size]``, and zeros of the same shape; kept as float32.
            bits: 2, 3, 4 or 8.
            dtype: the dtype of the weight that it stands for.

        Raises:
            ValueError: shapes do not fit, a code is out of range, or a scale is 0 or not finite.
            TypeError: no weight of this dtype is quantised.
        """
        op = "GroupQuantTensor.from_codes"
        cls._checked_dtype(dtype)
        if bits not in (2, 3, 4, 8):
            raise ValueError(f"{op}: bits must be 2, 3, 4 or 8, not {bits}")
        if codes.dim() not in (2, 3) or codes.is_floating_point():
            raise ValueError(
                f"{op}: codes must be integers [out, in] or [experts, out, in], not {codes.dtype} {list(codes.shape)}"
            )
        *rows, k = codes.shape
        groups = scales.shape[-1] if scales.dim() else 0
        if list(scales.shape[:-1]) != rows or not 0 < groups <= k or k % groups:
            wanted = ", ".join(map(str, [*rows, "groups"]))
            raise ValueError(
                f"{op}: scales must have shape [{wanted}] with groups a divisor of {k}, not {list(scales.shape)}"
            )
        if zeros.shape != scales.shape:
            raise ValueError(
                f"{op}: zeros must have the shape of scales, {list(scales.shape)}, not {list(zeros.shape)}"
            )
        group = k // groups
        if not 8 <= group <= 4096 or group & (group - 1):
            raise ValueError(f"{op}: the group size must be a power of two from 8 to 4096, not {group}")
        if codes.numel() and not (0 <= int(codes.min()) and int(codes.max()) < 2**bits):
            raise ValueError(f"{op}: codes must be from 0 to {2**bits - 1}, not from {codes.min()} to {codes.max()}")
        scales, zeros = scales.float().contiguous(), zeros.float().contiguous()
        if not (scales.isfinite().all() and zeros.isfinite().all() and (scales != 0).all()):
            raise ValueError(f"{op}: scales must be finite and not 0, zeros finite")
        return cls(pack_bits(codes, bits), scales, zeros, bits, group, codes.shape, dtype)

    @staticmethod
    def product_gradient(g: Tensor, weight: Operands, term: LoRATerm | None, v: Tensor | None) -> Tensor:
        if term is None or not term.dropout[0]:
            return _gradient(g, *weight, v, None if term is None else term.A)
        dx = _gradient(g, *weight, None, None)
        term.expand_gradient_(dx, v)
        return dx

    @classmethod
    def _settings_of(cls, parts: Mapping[str, Tensor], shape: torch.Size) -> tuple[int, int]:
        *lead, k = shape
        groups, width = (parts[name].shape[-1] if parts[name].dim() else 0 for name in ("scales", "packed"))
        size, bits = k // max(groups, 1), width * 8 // k
        each = (torch.float32, (*lead, groups))
        cls._check_parts(parts, {"packed": (torch.uint8, (*lead, k // 8 * bits)), "scales": each, "zeros": each}, shape)
        if bits not in (2, 3, 4, 8) or not 8 <= size <= 4096 or size & (size - 1) or size * groups != k:
            raise ValueError(f"codes of {bits} bits in groups of {size} do not fit a weight of shape {list(shape)}")
        return bits, size

    @property
    def codes(self) -> Tensor:
        """uint8 ``[..., out, in]``: the codes, a byte each."""
        return unpack_bits(self.packed, self.bits)

    def with_zeros(self, zeros: Tensor) -> GroupQuantTensor:
        """A weight with the same codes and scales, which are shared and not copied, and other zeros."""
        if zeros.shape != self.scales.shape or zeros.dtype != torch.float32:
            raise ValueError(
                f"with_zeros: zeros must be float32 {list(self.scales.shape)}, not {zeros.dtype} {list(zeros.shape)}"
            )
        return GroupQuantTensor(self.packed, self.scales, zeros, self.bits, self.group_size, self.shape, self.dtype)


def all_finite(t: Tensor) -> bool:
    """Whether all elements are finite; true on the meta device, which has no numbers. A sum tells, unless it overflows,
    and is ten times faster than a test of each element."""
    return t.is_meta or bool(t.sum().isfinite()) or bool(t.isfinite().all())


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Rows of codes as rows of bits: ``[..., k]`` to uint8 ``[..., k * bits / 8]``, the first code lowest."""
    place = torch.arange(8, device=codes.device) * bits
    octets = (codes.long().unflatten(-1, (-1, 8)) << place).sum(-1)
    place = torch.arange(bits, device=codes.device) * 8
    return (octets[..., None] >> place & 255).to(torch.uint8).flatten(-2)


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`pack_bits`."""
    place = torch.arange(bits, device=packed.device) * 8
    octets = (packed.long().unflatten(-1, (-1, bits)) << place).sum(-1)
    place = torch.arange(8, device=packed.device) * bits
    return (octets[..., None] >> place & 2**bits - 1).to(torch.uint8).flatten(-2)


torch.serialization.add_safe_globals([GroupQuantTensor])
