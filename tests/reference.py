"""What each op means, in plain PyTorch. No kernel is right unless it agrees with this file.

Gradients have no entry: the reference gradient is autograd through these functions, in float64.
"""

import torch

NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def dynamic_map(signed=True):
    """The dynamic code of 8 bits (arXiv:1511.04561), as bitsandbytes computes it."""
    values = [0.0, 1.0]
    for e in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (e + (not signed)) + 1)
        middles = (10 ** (e - 6)) * ((edges[:-1] + edges[1:]) / 2)
        values += middles.tolist() + (-middles).tolist() * signed
    return torch.tensor(sorted(values))


def quantize_blocks(flat, block_size, code):
    """Codes and absmax of float32 ``flat``: the number of midpoints below value * (1 / absmax)."""
    n = flat.numel()
    blocks = torch.nn.functional.pad(flat, (0, -n % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(1)
    scaled = blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]
    midpoints = (code[:-1] + code[1:]) / 2
    return torch.bucketize(scaled.flatten()[:n], midpoints), absmax


def nf4_quantize(weight, block_size):
    codes, absmax = quantize_blocks(weight.float().flatten(), block_size, NF4)
    pairs = torch.nn.functional.pad(codes, (0, codes.numel() % 2), value=7).view(-1, 2)
    return (pairs[:, 0] * 16 + pairs[:, 1]).to(torch.uint8), absmax


def nf4_dequantize(packed, absmax, block_size, shape):
    """In float32."""
    n = shape.numel()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[:n].long()
    return (NF4.to(packed.device)[codes] * absmax.repeat_interleave(block_size)[:n]).view(shape)


def linear(x, weight, bias=None, lora_A=None, lora_B=None, scaling=1.0, keep=None):
    """``keep`` is the dropout mask of x, its ones already divided by 1 - p."""
    y = x @ weight.T
    if bias is not None:
        y = y + bias
    if lora_A is not None:
        dropped = x if keep is None else x * keep
        y = y + scaling * (dropped @ lora_A.T) @ lora_B.T
    return y


def dropout_mask(seed, rows, cols, p):
    """kernels/dropout.h in Python: which elements stay, [rows, cols]."""
    mask32 = (1 << 32) - 1
    row = torch.arange(rows)[:, None]
    col = torch.arange(cols)[None]
    c0, c1, c2, c3 = 16 * (col // 64) + col % 16 + 0 * row, row + 0 * col, 0 * (row + col), 0 * (row + col)
    k0, k1 = seed & mask32, seed >> 32
    for _ in range(10):
        a, b = _product(0xD2511F53, c0), _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = b[0] ^ c1 ^ k0, b[1], a[0] ^ c3 ^ k1, a[1]
        k0, k1 = (k0 + 0x9E3779B9) & mask32, (k1 + 0xBB67AE85) & mask32
    word = torch.stack([c0, c1, c2, c3]).gather(0, (col // 16 % 4 + 0 * row)[None])[0]
    return word >= int(p * 2**32)


def _product(a, b):
    """High and low half of a 32 x 32 bit product; int64 holds no more than 63 bits, so in two pieces."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def group_quantize(weight, bits, group_size, symmetric):
    """Codes [n, k], scales and zeros [n, groups], in float32, for groups that are not constant."""
    w = weight.float().unflatten(1, (-1, group_size))
    low, high, top = w.amin(-1), w.amax(-1), 2**bits - 1
    scales = (2 * torch.maximum(high, -low) if symmetric else high - low) / top
    zeros = torch.full_like(scales, 2.0 ** (bits - 1)) if symmetric else -low / scales
    codes = (w * (1 / scales)[..., None] + zeros[..., None]).round().clamp(0, top)
    return codes.flatten(1).to(torch.uint8), scales, zeros


def group_dequantize(codes, scales, zeros):
    """In the dtype of scales."""
    q = codes.to(scales.dtype).unflatten(1, (scales.shape[1], -1))
    return ((q - zeros[..., None]) * scales[..., None]).flatten(1)


def pooled(x, group_size):
    """The sum of every group of columns."""
    return x.unflatten(-1, (-1, group_size)).sum(-1)


def pool_factor(pool, group_size, groups):
    """What each convention multiplies the sum of a group with."""
    return {"sum": 1.0, "mean": 1.0 / group_size, "peft": groups / group_size}[pool]


def qalora(x, lora_A, lora_B, scaling, pool, group_size):
    """The low-rank term of QA-LoRA."""
    factor = scaling * pool_factor(pool, group_size, lora_A.shape[1])
    return factor * (pooled(x, group_size) @ lora_A.T) @ lora_B.T


def qalora_merge(scales, zeros, lora_A, lora_B, scaling, pool, group_size):
    """New zeros."""
    return zeros - scaling * pool_factor(pool, group_size, lora_A.shape[1]) * (lora_B @ lora_A) / scales


def gated_prompt(out, query, prompt_key, prompt_value, gate, tanh=True, scale=None):
    """The prompt's part of zero-init gated attention, added to ``out``; prompts have three dims or four."""
    group = query.shape[1] // prompt_key.shape[-3]
    key, value = (t.repeat_interleave(group, -3) for t in (prompt_key, prompt_value))
    p = torch.softmax(query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale), -1)
    return out + (gate.tanh() if tanh else gate).reshape(-1, 1, 1) * (p @ value)
