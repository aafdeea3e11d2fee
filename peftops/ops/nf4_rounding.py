"""Rounding to NF4 with GPTQ's recursion (arXiv:2210.17323), in blocks.

    minimise tr (W - Q) H (W - Q)^T,    H = V V^T the inputs' moments, V upper triangular

For the errors E of the columns before a block b, the correction of the block is E V[before, b] U with U = V[b, b]^-1.
Within the block the recursion uses U. A block's constant is chosen when its turn comes, among a few near its largest
magnitude: the one with the least error in the recursion. With double quantisation a candidate is the 8-bit constant
that would be stored, so codes are rounded against the constant that dequantising uses. Blocks with large inputs go
first, because more blocks are then left to make up for their errors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .moments import damped
from .nf4_dequantize import ABSMAX_MAP, NF4_CODE
from .nf4_tensor import NF4Tensor

FACTORS = (1.0, 1.05, 0.95, 0.9, 0.85, 0.8)  # of a block's largest magnitude: candidates for its constant
_LONG = 256  # blocks with more columns have one candidate
_ROOM = 1.1  # blocks grow as errors are carried on to them


@torch.no_grad()
def round_nf4(
    weight: Tensor,
    plain: NF4Tensor,
    moments: Tensor,
    damping: float,
    *,
    factors: tuple[float, ...] = FACTORS,
    dtype: torch.dtype = torch.float64,
) -> NF4Tensor:
    """``weight`` in the format of ``plain``, its plain NF4.

    Args:
        weight: ``[out, in]``, finite.
        moments: float32 ``[in, in]``.
        damping: see :func:`~peftops.ops.moments.damped`.
        factors: candidates for each block's constant.
        dtype: that the moments are factored in.
    """
    (n, k), size = weight.shape, plain.block_size
    whole = k % size == 0  # no block straddles two rows
    constants = _Constants(plain, _ROOM if whole else 1.0)
    size = size if whole else k
    blocks = moments.diagonal().view(-1, size).mean(1).argsort(descending=True).tolist()
    order = torch.cat([torch.arange(b * size, (b + 1) * size, device=moments.device) for b in blocks])
    v = damped(moments if len(blocks) == 1 else moments[order][:, order], damping, dtype)
    lost = torch.empty((k, n), device=weight.device)
    codes = torch.empty((k, n), dtype=torch.uint8, device=weight.device)
    for i, b in enumerate(blocks):
        done, now, columns = i * size, slice(i * size, (i + 1) * size), slice(b * size, (b + 1) * size)
        unit = torch.eye(size, dtype=dtype, device=v.device)
        u = torch.linalg.solve_triangular(v[now, now], unit, upper=True).float()
        want = weight[:, columns].t().float()
        w = want + u.t() @ (v[:done, now].float().t() @ lost[:done])
        if whole:
            rows = torch.arange(n, device=w.device) * len(blocks) + b
            codes[columns], values = _block(w, u, constants, rows, factors if size <= _LONG else (1.0,))
        else:
            codes[columns], values = _ragged(w, u, constants, plain.block_size)
        torch.sub(want, values, out=lost[now])
    flat = torch.nn.functional.pad(codes.t().reshape(-1), (0, n * k % 2))
    return constants.tensor(flat[::2] << 4 | flat[1::2])


def _block(w: Tensor, u: Tensor, constants: _Constants, ids: Tensor, factors: tuple[float, ...]) -> tuple:
    """Codes and values ``[size, n]`` of a block of columns in which each row has its own constant."""
    largest = w.abs().amax(0)
    s = torch.stack([constants.near(ids, factor * largest) for factor in factors])  # [candidates, n]
    codes = torch.empty((len(w), *s.shape), dtype=torch.int32, device=w.device)
    errors, own = torch.empty(codes.shape, device=w.device), u.diagonal().tolist()
    grid, inverse = _Grid(w.device), torch.where(s == 0, 0, 1 / s)
    for j in range(len(w)):
        x = w[j] - (u[:j, j] @ errors[:j].flatten(1)).view_as(s)
        torch.bucketize(x * inverse, grid.edges, out_int32=True, out=codes[j])
        torch.sub(x, grid.values[codes[j]].mul_(s), out=errors[j]).div_(own[j])
    best = errors.square().sum(0).argmin(0, keepdim=True)
    s, codes = s.gather(0, best), codes.gather(1, best.expand(len(w), 1, -1)).squeeze(1)
    constants.keep(ids, s[0])
    return codes, grid.values[codes] * s


def _ragged(w: Tensor, u: Tensor, constants: _Constants, size: int) -> tuple:
    """The same for a whole weight whose blocks begin anywhere in a row. A block that continues in the next row keeps
    the constant of plain NF4."""
    k, n = w.shape
    first, codes = torch.arange(n, device=w.device) * k, torch.empty_like(w, dtype=torch.uint8)
    values, errors, grid = torch.empty_like(w), torch.empty_like(w), _Grid(w.device)
    for j in range(k):
        rows = ((first + j) % size == 0).nonzero()[:, 0] if j + size <= k else first[:0]
        if len(rows):
            part = w[j : j + size, rows] - u[:j, j : j + size].t() @ errors[:j, rows]
            constants.keep((first[rows] + j) // size, part.abs().amax(0))
        s, x = constants.values((first + j) // size), w[j] - u[:j, j] @ errors[:j]
        code = torch.bucketize(torch.where(s == 0, 0, x / s), grid.edges)
        codes[j], values[j] = code, grid.values[code] * s
        errors[j] = (x - values[j]) / u[j, j]
    return codes, values


class _Grid:
    """The numbers that codes stand for, times a constant; and where the nearest code changes."""

    def __init__(self, device: torch.device):
        self.values = NF4_CODE.to(device)
        self.edges = (self.values[1:] + self.values[:-1]) / 2


class _Constants:
    """The constants of a weight's blocks as they are stored: at first those of plain NF4.

    With double quantisation the offset and the scales of groups of 256 are those of plain NF4, too, with ``room`` in
    the scales: they must be known before the first code is chosen.
    """

    def __init__(self, plain: NF4Tensor, room: float):
        self.plain, self.stored = plain, plain._absmax.clone()
        self.scale = None if plain._absmax_scale is None else plain._absmax_scale * room

    def near(self, ids: Tensor, wanted: Tensor) -> Tensor:
        """The constants nearest to ``wanted`` that can be stored for these blocks."""
        return wanted if self.scale is None else self._expanded(ids, self._codes(ids, wanted))

    def keep(self, ids: Tensor, wanted: Tensor) -> None:
        self.stored[ids] = wanted if self.scale is None else self._codes(ids, wanted)

    def values(self, ids: Tensor) -> Tensor:
        return self.stored[ids] if self.scale is None else self._expanded(ids, self.stored[ids])

    def _codes(self, ids: Tensor, wanted: Tensor) -> Tensor:
        scale = self.scale[ids // 256]
        middle = ((ABSMAX_MAP[1:] + ABSMAX_MAP[:-1]) / 2).to(wanted.device)
        share = torch.where(scale > 0, (wanted - self.plain._absmax_offset) / scale, 0)
        return torch.bucketize(share, middle).to(torch.uint8)

    def _expanded(self, ids: Tensor, codes: Tensor) -> Tensor:
        return ABSMAX_MAP.to(codes.device)[codes.int()] * self.scale[ids // 256] + self.plain._absmax_offset

    def tensor(self, packed: Tensor) -> NF4Tensor:
        p = self.plain
        return NF4Tensor(packed, self.stored, self.scale, p._absmax_offset, p.block_size, p.shape, p.dtype)
