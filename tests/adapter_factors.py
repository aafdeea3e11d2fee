"""Factors to put into an AdapterPool, and what its pages then hold."""

import torch

from strategies import normal


def stored(pool, name, layer):
    """A and B of a resident adapter, read back through its pages as the kernels do."""
    at, slot = pool.layer(layer), pool._resident[name].slot
    flat = pool.storage[at.pages[slot].long()].view(-1)
    a, b, r = at.where[slot].tolist()
    padded = lambda n: -(-n // 64) * 64
    k, n = at.in_features, at.out_features
    A, B = flat[a : a + r * padded(k)].view(r, -1), flat[b : b + r * padded(n)].view(r, -1)
    assert not A[:, k:].any() and not B[:, n:].any()
    return A[:, :k], B[:, :n].T


def pair(k, n, r, seed=0, dtype=torch.float32):
    return normal((r, k), dtype, seed), normal((n, r), dtype, seed + 1)
