"""One step of AdamW with moments in 8 bits, of a list of parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_step = torch.ops.peftops.adamw8bit_.default


@torch.library.register_fake("peftops::adamw8bit_")
def _(parameters, grads, exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax, *numbers):
    return None


@torch.no_grad()
def adamw8bit_(
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    exp_avg_absmax: Sequence[Tensor] = (),
    exp_avg_sq_absmax: Sequence[Tensor] = (),
    *,
    block_size: int = 256,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """AdamW's ``step``-th step (arXiv:1711.05101) in place, of all parameters in one go.

    Moments are codes of 8 bits with an absmax for each block of ``block_size`` (arXiv:2110.02861), or float32 if no
    absmax is given. csrc/kernels/adamw8bit.h has the formula, the codes and the rule for numbers that are not finite:
    such an element is treated apart from its block, and does not change the block's other elements. The result has the
    same bits for any number of threads, on any device. On CUDA the call does not wait for the device and may be
    captured into a graph, which then keeps the values of ``step`` and ``lr``.

    Args:
        parameters: float32, bfloat16 or float16, contiguous, on one device; grads: the same number of elements each, of
            any of these dtypes, contiguous.
        exp_avg, exp_avg_sq: the moments: uint8 in whole blocks, zeros at first, or float32.
        exp_avg_absmax, exp_avg_sq_absmax: float32, one for each block, zeros at first; none for float32 moments.

    Raises:
        RuntimeError: the lists do not fit, a tensor is of another dtype, size or device, or not contiguous.
    """
    if not parameters:
        return
    lists = map(list, (parameters, grads, exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax))
    _step(*lists, block_size, step, lr, *betas, eps, weight_decay)
