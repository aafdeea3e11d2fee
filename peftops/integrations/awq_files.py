"""The tensors of an AWQ checkpoint (Lin et al. 2023, arXiv:2306.00978; AutoAWQ's layout "gemm"), from and to a
group-quantised weight.

AWQ packs along the outputs: ``qweight`` int32 ``[in, out / 8]``, ``qzeros`` int32 ``[in / group, out / 8]``, ``scales``
float16 ``[in / group, out]``. Of eight neighbouring outputs, a word has the even ones in its lower half and the odd
ones in its upper half. Zeros are stored without an offset.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..ops import GroupQuantTensor
from ..ops.group_tensor import pack_bits, unpack_bits
from .gptq_files import kind_of_part

AWQ_PARTS = ("qweight", "scales", "qzeros")
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the outputs in a word, lowest first


def from_awq(parts: Mapping[str, Tensor], dtype: torch.dtype = torch.float16) -> GroupQuantTensor:
    """A weight from a layer of an AWQ checkpoint, exactly.

    Raises:
        ValueError: a part is missing, or its dtype or shape does not fit the others.
    """
    missing = [name for name in AWQ_PARTS if name not in parts]
    if missing:
        raise ValueError(f"from_awq: {', '.join(missing)} is missing")
    for name in AWQ_PARTS:
        if not isinstance(parts[name], Tensor) or parts[name].layout != torch.strided or parts[name].is_meta:
            raise ValueError(f"from_awq: {name} must be a dense tensor{kind_of_part(parts[name])}")
    qweight, scales, qzeros = (parts[name] for name in AWQ_PARTS)
    for name, part, right in (
        ("qweight", qweight, qweight.dtype == torch.int32),
        ("qzeros", qzeros, qzeros.dtype == torch.int32),
        ("scales", scales, scales.is_floating_point()),
    ):
        if not right or part.dim() != 2:
            kinds = "float [groups, out]" if name == "scales" else "int32, of two dimensions"
            raise ValueError(f"from_awq: {name} must be {kinds}, not {part.dtype} {list(part.shape)}")
    groups, n = len(scales), 8 * qweight.shape[1]
    if scales.shape[1] != n or qzeros.shape != (groups, qweight.shape[1]):
        raise ValueError(
            f"from_awq: for qweight {list(qweight.shape)}, scales must be [groups, {n}] and qzeros [groups, "
            f"{qweight.shape[1]}], not {list(scales.shape)} and {list(qzeros.shape)}"
        )
    codes, zeros = (_columns(words) for words in (qweight, qzeros))
    return GroupQuantTensor.from_codes(codes.t(), scales.t(), zeros.t().float(), bits=4, dtype=dtype)


def to_awq(weight: GroupQuantTensor) -> dict[str, Tensor]:
    """The reverse, exactly. A weight with zeros that are not codes, or with scales that float16 cannot represent, is
    refused.

    Raises:
        TypeError: it is not a GroupQuantTensor.
        ValueError: it is such a weight, or a stack, or does not have 4 bits, or its outputs do not fill words.
    """
    if not isinstance(weight, GroupQuantTensor):
        raise TypeError(f"to_awq: weight must be a GroupQuantTensor, not a {type(weight).__name__}")
    if weight.dim() != 2 or weight.is_meta:
        raise ValueError(f"to_awq: weight must be a matrix with numbers, not {list(weight.shape)} on {weight.device}")
    n, zeros, scales = len(weight), weight.zeros, weight.scales
    if weight.bits != 4 or n % 8:
        raise ValueError(f"AWQ has codes of 4 bits, eight outputs a word, not {n} outputs of {weight.bits} bits")
    if not torch.equal(zeros, zeros.round().clamp(0, 15)) or not torch.equal(scales, scales.half().float()):
        raise ValueError(
            "AWQ has whole zeros from 0 to 15 and scales in float16, and this weight has others; layout='gptq' and "
            "layout='peftops' keep them"
        )
    return {
        "qweight": _words(weight.codes.t()),
        "scales": scales.t().half().contiguous(),
        "qzeros": _words(zeros.t().to(torch.uint8)),
    }


def _columns(words: Tensor) -> Tensor:
    """Codes, one for each output, out of words of eight."""
    nibbles = unpack_bits(words.contiguous().view(torch.uint8), 4).unflatten(1, (-1, 8))
    codes = torch.empty_like(nibbles)
    codes[..., _ORDER] = nibbles
    return codes.flatten(1)


def _words(codes: Tensor) -> Tensor:
    nibbles = codes.unflatten(1, (-1, 8))[..., _ORDER].flatten(1)
    return pack_bits(nibbles, 4).contiguous().view(torch.int32)
