"""The first singular vectors of a weight, for methods that start from them or compute them in a loop."""

from __future__ import annotations

import torch
from torch import Tensor

EXTRA = 8  # vectors of a block beyond the wanted ones
DEPTH = 6  # blocks of a basis: the result is then within 2e-4 of the best, even if no singular value stands out


def leading(matrix: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """``u [m, r]``, ``s [r]`` and ``vt [r, n]`` such that ``u diag(s) vt`` is close to the best approximation of rank
    ``r``: in the block Krylov space of a random start (Musco & Musco 2015, arXiv:1504.05477), the same each time.

    The error of quantisation is noise, whose singular values lie close together. Power iterations are slow on such a
    matrix, because each one forgets the vectors before it; a Krylov space keeps them all. A small matrix, of which the
    space would be half, is solved exactly. A vector whose singular value is 0 may be 0. In both cases ``u diag(s) vt``
    is a projection of the matrix, so the remainder is never larger than the matrix.

    Args:
        matrix: ``[m, n]``, float32; or ``[E, m, n]`` for E of them, one after the other.
        r: from 1 to the smaller of m and n.
    """
    if matrix.dim() == 3:
        return tuple(torch.stack(parts) for parts in zip(*(leading(one, r) for one in matrix), strict=True))
    if matrix.shape[0] < matrix.shape[1]:
        u, s, vt = leading(matrix.t(), r)
        return vt.t(), s, u.t()
    # By a power of two, which changes no digit: what lies beyond 1e19 has a square that float32 has not.
    scale = torch.ldexp(torch.ones_like(largest := matrix.abs().amax()), torch.frexp(largest).exponent - 1)
    matrix = matrix / scale
    n, width = matrix.shape[1], r + EXTRA
    if DEPTH * width >= n // 2:
        basis, inside = None, matrix
    else:
        block = torch.randn(n, width, generator=torch.Generator().manual_seed(0)).to(matrix.device)
        blocks = []
        for _ in range(DEPTH):
            block = torch.linalg.qr(matrix.t() @ (matrix @ block)).Q
            blocks.append(block)
        basis = torch.linalg.qr(torch.cat(blocks, 1)).Q
        inside = matrix @ basis
    # Squaring costs half of the digits, hence float64.
    wide = inside.double()
    vectors = torch.linalg.eigh(wide.t() @ wide).eigenvectors[:, -r:].flip(1).float()
    left = inside @ vectors
    s = left.norm(dim=0)
    u = left / s.clamp(min=torch.finfo(s.dtype).tiny)
    return u, s * scale, (vectors if basis is None else basis @ vectors).t()


def size(t: Tensor) -> Tensor:
    """The Frobenius norm, float64: squares of large numbers have no float32."""
    return torch.linalg.vector_norm(t, dtype=torch.float64)


def shared(u: Tensor, s: Tensor, vt: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """A and B with ``scaling * B A = u diag(s) vt``, each with the root of the singular values."""
    root = (s / scaling).sqrt()
    return root.unsqueeze(-1) * vt, u * root.unsqueeze(-2)
