"""The tensors of a GPTQ checkpoint, from and to a group-quantised weight.

GPTQ packs along the inputs: ``qweight`` int32 ``[in * bits / 32, out]``, ``scales`` ``[in / group, out]``,
``qzeros`` int32 ``[in / group, out * bits / 32]``, and ``g_idx`` int32 ``[in]``. A stored zero is the zero minus one,
or in format "gptq_v2" the zero itself. The tensors do not tell which, so the configuration's ``checkpoint_format``
does. Our own form keeps ``scales`` and ``qzeros`` as float32, so that no change is lost that QA-LoRA has merged into
the zeros. GPTQ's kernels need whole zeros; :class:`ZeroRounding` tells the error of rounding to them.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import GroupQuantTensor, group_dequantize
from ..ops.group_tensor import pack_bits, unpack_bits

FORMATS = {"gptq": 1, "gptq_v2": 0}  # this is subtracted from a zero before it is stored
FORMAT = "gptq"  # the name of this layout in checkpoints
_PARTS = ("qweight", "scales", "qzeros")
GPTQ_PARTS = (*_PARTS, "g_idx")


@dataclass
class ZeroRounding:
    """The error of whole zeros, and of scales of 16 bits, in one weight."""

    largest_shift: float  # of a zero, in units of a code; 0.5 at most unless some are clamped
    clamped: int  # zeros outside of GPTQ's range from 1 to 2**bits
    weight_error: float  # of the dequantised weight, relative, in the Frobenius norm
    lost_change: float | None  # of the change from `before`, relative to it: 1 means that nothing of it is left


def to_gptq(weight: GroupQuantTensor) -> dict[str, Tensor]:
    """The weight in GPTQ's layout with float32 ``scales`` and ``qzeros``: our own form, without error.

    Raises:
        TypeError: it is not a GroupQuantTensor.
        ValueError: its rows do not fill int32 words, or it is a stack of matrices.
    """
    if not isinstance(weight, GroupQuantTensor):
        raise TypeError(f"to_gptq: weight must be a GroupQuantTensor, not a {type(weight).__name__}")
    if weight.dim() != 2:
        raise ValueError(f"to_gptq: GPTQ's layout has matrices, and this weight is a stack {list(weight.shape)}")
    k = weight.shape[1]
    if k * weight.bits % 32:
        raise ValueError(f"to_gptq: rows of {k} codes of {weight.bits} bits do not fill int32 words")
    return {
        "qweight": _words(weight.packed).t().contiguous(),
        "scales": weight.scales.t().contiguous(),
        "qzeros": weight.zeros.t().contiguous(),
        "g_idx": torch.arange(k, dtype=torch.int32, device=weight.device) // weight.group_size,
    }


def to_gptq_integers(
    weight: GroupQuantTensor, before: GroupQuantTensor | None = None
) -> tuple[dict[str, Tensor], ZeroRounding]:
    """The weight as GPTQ's own kernels read it, with whole zeros and float16 scales, and the error of that.

    Zeros are rounded, so this is not exact. A merged QA-LoRA adapter changes zeros by fractions, and rounding may
    remove all of its change. Read the report.

    Args:
        weight: the weight to export.
        before: the weight before a merge; the report then tells how much of the change is lost.

    Raises:
        TypeError, ValueError: as :func:`to_gptq`; or ``out`` does not fill int32 words.
    """
    parts = to_gptq(weight)
    n, bits = weight.shape[0], weight.bits
    if n * bits % 32:
        raise ValueError(f"to_gptq_integers: {n} zeros of {bits} bits do not fill int32 words")
    rounded = weight.zeros.round()
    whole = rounded.clamp(1, 2**bits)  # stored less one, in `bits` bits
    parts["qzeros"] = _words(pack_bits((whole - 1).t().to(torch.uint8), bits))
    parts["scales"] = parts["scales"].half()
    again = from_gptq(parts, bits=bits, checkpoint_format="gptq")
    want, got = (group_dequantize(w, dtype=torch.float32) for w in (weight, again))
    lost = None
    if before is not None:
        change = want - group_dequantize(before, dtype=torch.float32)
        lost = float((got - want).norm() / change.norm())
    return parts, ZeroRounding(
        largest_shift=float((whole - weight.zeros).abs().max()),
        clamped=int((rounded != whole).sum()),
        weight_error=float((got - want).norm() / want.norm()),
        lost_change=lost,
    )


def from_gptq(
    parts: dict[str, Tensor], *, bits: int, dtype: torch.dtype = torch.float32, checkpoint_format: str | None = None
) -> GroupQuantTensor:
    """A weight from a layer of a GPTQ checkpoint, with packed int32 ``qzeros`` or, from :func:`to_gptq`, float ones.

    Args:
        parts: ``qweight``, ``scales``, ``qzeros`` and, if there is one, ``g_idx``.
        bits: 2, 3, 4 or 8.
        dtype: the dtype of the weight that it stands for.
        checkpoint_format: "gptq" or "gptq_v2", from the checkpoint's ``quantization_config`` ("gptq" if that has none).
            With None, the zeros of a symmetric weight tell the format; other weights are read as "gptq", with a
            warning.

    Raises:
        KeyError: a part is missing.
        TypeError: a part is not a dense tensor.
        ValueError: the format is unknown, the shapes or dtypes do not fit, or ``g_idx`` permutes the columns
            (act-order): groups here are neighbouring columns.
    """
    if checkpoint_format not in (None, *FORMATS):
        raise ValueError(f"from_gptq: checkpoint_format must be one of {', '.join(FORMATS)}, not {checkpoint_format!r}")
    _check_parts(parts, bits)
    qweight, scales, qzeros = (parts[name] for name in _PARTS)
    codes = unpack_bits(_bytes(qweight.t()), bits)
    n, k = codes.shape
    if scales.shape[1] != n or not scales.shape[0] or k % scales.shape[0]:
        raise ValueError(
            f"from_gptq: scales must have shape [groups, {n}] with groups a divisor of {k}, not {list(scales.shape)}"
        )
    groups = scales.shape[0]
    if qzeros.dtype == torch.int32:
        if qzeros.shape != (groups, n * bits // 32):
            raise ValueError(
                f"from_gptq: qzeros must have shape [{groups}, {n * bits // 32}], not {list(qzeros.shape)}"
            )
        stored = unpack_bits(_bytes(qzeros), bits).float()
        zeros = stored + (_less(stored, bits) if checkpoint_format is None else FORMATS[checkpoint_format])
    elif qzeros.shape == scales.shape:
        zeros = qzeros
    else:
        shapes = f"{list(scales.shape)}, not {list(qzeros.shape)}"
        raise ValueError(f"from_gptq: zeros must have the shape of scales, {shapes}")
    order = torch.arange(k, device=qweight.device) // (k // groups)
    if parts.get("g_idx") is not None and not torch.equal(parts["g_idx"].long(), order):
        raise ValueError("from_gptq: g_idx permutes the columns (act-order); quantise without it")
    return GroupQuantTensor.from_codes(codes, scales.t(), zeros.t(), bits=bits, dtype=dtype)


def _less(stored: Tensor, bits: int) -> int:
    """The number that was subtracted from stored zeros. A symmetric weight tells it, because all of its zeros are the
    middle code."""
    middle = 2 ** (bits - 1)
    for less in FORMATS.values():
        if (stored + less == middle).all():
            return less
    warnings.warn(
        "from_gptq: nothing tells whether zeros are stored less one; they are read so, as in format 'gptq'. Pass the "
        "checkpoint_format of the checkpoint's quantization_config",
        stacklevel=3,
    )
    return FORMATS["gptq"]


def _check_parts(parts: dict[str, Tensor], bits: int) -> None:
    """Raise unless the parts have the types and dtypes of a layer's tensors."""
    if bits not in (2, 3, 4, 8):
        raise ValueError(f"from_gptq: bits must be 2, 3, 4 or 8, not {bits!r}")
    if not isinstance(parts, dict):
        raise TypeError(f"from_gptq: parts must be a dict of tensors, not a {type(parts).__name__}")
    missing = [name for name in _PARTS if name not in parts]
    if missing:
        raise KeyError(f"from_gptq: {', '.join(missing)} is missing")
    for name in GPTQ_PARTS:
        part, words = parts.get(name), name in ("qweight", "g_idx")
        if part is None and name == "g_idx":
            continue
        if not isinstance(part, Tensor) or part.layout != torch.strided or part.is_meta:
            raise TypeError(f"from_gptq: {name} must be a dense tensor{kind_of_part(part)}")
        kinds = "int32" if words else "float or int32" if name == "qzeros" else "float"
        fits = (part.dtype == torch.int32 and kinds != "float") or (part.is_floating_point() and not words)
        if part.dim() != (1 if name == "g_idx" else 2) or not (fits or (name == "g_idx" and part.dtype == torch.int64)):
            shape = "[in]" if name == "g_idx" else "[in * bits / 32, out]" if name == "qweight" else "[groups, out]"
            raise ValueError(f"from_gptq: {name} must be {kinds} {shape}, not {part.dtype} {list(part.shape)}")
    if parts["qweight"].shape[0] * 32 % (8 * bits) or not parts["qweight"].numel():  # codes are kept in eights
        raise ValueError(f"from_gptq: qweight {list(parts['qweight'].shape)} holds no eights of codes of {bits} bits")


def kind_of_part(part: object) -> str:
    """For an error: of which kind a part is that is no dense tensor with numbers."""
    return f", not {part.layout} on {part.device}" if isinstance(part, Tensor) else f", not a {type(part).__name__}"


def _words(packed: Tensor) -> Tensor:
    """Rows of bytes as rows of little-endian int32."""
    return _in_order(packed).view(torch.int32)


def _bytes(words: Tensor) -> Tensor:
    return _in_order(words).view(torch.uint8)


def _in_order(rows: Tensor) -> Tensor:
    """(For torch, rows of a single element are contiguous with any stride.)"""
    return rows.clone(memory_format=torch.contiguous_format)
