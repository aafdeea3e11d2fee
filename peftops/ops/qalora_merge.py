"""Merging QA-LoRA into the zeros of a group-quantised weight."""

import torch
from torch import Tensor

from .group_tensor import GroupQuantTensor, all_finite
from .lora_linear import check_lora
from .qalora_linear import Pool, pool_factor

_merge = torch.ops.peftops.qalora_merge.default


@torch.library.register_fake("peftops::qalora_merge")
def _(scales, zeros, lora_A, lora_B, factor):
    return torch.empty(zeros.shape, dtype=torch.float32, device=zeros.device)


@torch.no_grad()
def qalora_merge(
    weight: GroupQuantTensor, lora_A: Tensor, lora_B: Tensor, *, scaling: float = 1.0, pool: Pool = "sum"
) -> GroupQuantTensor:
    """A weight that includes a QA-LoRA adapter: ``zeros - scaling * B A / scales`` (arXiv:2309.14717).

    Codes and scales are those of ``weight``, shared and not copied; only the zeros are new. The product with the merged
    weight equals :func:`peftops.qalora_linear` to float32 rounding, and takes no more time than the base.

    Args:
        weight: ``[out, in]``.
        lora_A: ``[r, in / group_size]``, and lora_B: ``[out, r]``; of any float dtype.
        scaling: factor of the low-rank term, and pool: its convention, as in :func:`peftops.qalora_linear`.

    Raises:
        TypeError: weight is not a GroupQuantTensor.
        ValueError: shapes do not fit, pool is unknown, or a merged zero is not finite.

    Examples:
        >>> weight = peftops.group_quantize(torch.randn(32, 64), group_size=32)
        >>> x, A, B = torch.randn(2, 64), torch.randn(4, 2), torch.randn(32, 4)
        >>> merged = peftops.qalora_merge(weight, A, B)
        >>> y = peftops.qalora_linear(x, weight, lora_A=A, lora_B=B)
        >>> torch.allclose(peftops.group_linear(x, merged), y, rtol=1e-3, atol=1e-3)
        True
    """
    if not isinstance(weight, GroupQuantTensor):
        raise TypeError(f"qalora_merge: weight must be a GroupQuantTensor, not a {type(weight).__name__}")
    check_lora("qalora_merge", weight.shape[0], weight.scales.shape[1], lora_A, lora_B, 0.0)
    factor = scaling * pool_factor("qalora_merge", pool, weight)
    zeros = _merge(weight.scales, weight.zeros, lora_A, lora_B, factor)
    if not torch.compiler.is_compiling() and not all_finite(zeros):
        raise ValueError(
            "qalora_merge: a merged zero is not finite; lora_A or lora_B holds a NaN or an infinity, or overflows"
        )
    return weight.with_zeros(zeros)
