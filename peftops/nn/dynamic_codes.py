"""Numbers in 8 bits, block-wise, with the "dynamic" map: seven decades, an exact zero and an exact one.

    x ~ map[code] * absmax[block]     evenly spaced codes in each decade, half as many in the next smaller one

The map that bitsandbytes uses (Dettmers 2015, arXiv:1511.04561), in plain torch operations.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST_ABSMAX = 1e-38  # as of NF4: the reciprocal stays finite


def dynamic_map(signed: bool) -> Tensor:
    """The map in float32, sorted: 0, 1, and in decade e of 7 the midpoints of a uniform split of [0.1, 1], times
    10^(e - 6): 2^e of them with both signs, or 2^(e + 1). csrc/kernels/nf4.h has the signed one, whose every rounding
    this repeats."""
    low = torch.tensor(0.1)
    span = (1 - low).double()
    values = [torch.tensor([0.0, 1.0])]
    for e in range(7):
        n = 2 ** (e if signed else e + 1)
        i = torch.arange(n + 1, dtype=torch.float64)
        edges = torch.where(i < (n + 1) // 2, low.double() + span / n * i, 1 - span / n * (n - i)).float()
        middles = torch.tensor(10.0 ** (e - 6)) * ((edges[:-1] + edges[1:]) / 2)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values


class Codec(NamedTuple):
    """A map and how to find the nearest of its values without a search: the upper half of a float32's bits names a
    range of numbers so narrow that one code begins in it, or none."""

    values: Tensor  # [256], sorted
    base: Tensor  # [65536] uint8: the code at the low end of each range
    begins: Tensor  # [65536]: numbers above this have the next code


@cache
def codec(signed: bool, device: torch.device) -> Codec:
    """The signed codes, or those of numbers from zero; in the latter what is above zero never becomes zero."""
    values = dynamic_map(signed)
    midpoints = (values[:-1] + values[1:]) / 2
    if not signed:
        midpoints[0] = 0
    bits = torch.arange(65536, dtype=torch.int32) << 16
    lowest = torch.minimum(bits.view(torch.float32), (bits | 0xFFFF).view(torch.float32))
    base = torch.bucketize(lowest, midpoints)
    begins = torch.cat([midpoints, torch.tensor([math.inf])])[base]
    return Codec(values.to(device), base.to(device, torch.uint8), begins.to(device))


def encode(codec: Codec, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (uint8) and absmax [n] of float32 ``blocks`` [n, size]: the value nearest to element * (1 / absmax), the
    lower one at a tie. A NaN or an infinity makes its absmax one."""
    absmax = blocks.abs().amax(1)
    scaled = blocks * (1 / absmax.clamp(min=SMALLEST_ABSMAX))[:, None]
    key = (scaled.view(torch.int32) >> 16).bitwise_and_(0xFFFF).flatten()
    above = scaled.flatten() > codec.begins.index_select(0, key)
    return codec.base.index_select(0, key).add_(above).view_as(blocks), absmax


def decode(codec: Codec, codes: Tensor, absmax: Tensor) -> Tensor:
    """The reverse: float32 [n, size]."""
    return codec.values.index_select(0, codes.flatten().int()).view(codes.shape).mul_(absmax[:, None])
