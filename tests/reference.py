"""What each op means, in plain PyTorch. No kernel is right unless it agrees with this file.

Gradients have no entry: the reference gradient is autograd through these functions, in float64.
"""

import torch

NF4 = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)


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


E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E2M1 = torch.cat([E2M1, -E2M1])


def mxfp4_dequantize(codes, scales):
    """``codes`` [out, in] of four bits under ``scales`` [out, in / 32], in float64; OCP microscaling formats 1.0."""
    powers = torch.where(scales == 255, torch.nan, 2.0 ** (scales.double() - 127))
    return E2M1.double()[codes.long()] * powers.repeat_interleave(32, 1)


def mxfp4_quantize(weight):
    """Codes and scales: floor(log2) of a block's largest, less the 2 of 4 and 6; the nearest number, even at a tie."""
    blocks = weight.double().unflatten(1, (-1, 32))
    exponent = blocks.abs().amax(-1).frexp().exponent - 1  # of zero: -1
    exponent = torch.where((blocks != 0).any(-1), exponent, -1000)
    scales = (exponent - 2 + 127).clamp(min=0)
    scaled = blocks / 2.0 ** (scales.double() - 127)[..., None]
    far = (scaled.abs()[..., None] - E2M1[:8].double()).abs()
    even = torch.arange(8) % 2 == 0
    codes = torch.where(far == far.amin(-1, keepdim=True), 1 + even.int(), 0).argmax(-1)
    return (codes + 8 * scaled.signbit()).flatten(1).to(torch.uint8), scales.to(torch.uint8)


def dynamic_lines(signed):
    """Of kernels/adamw8bit.h: bounds of the decades, and slope and offset of the lines to a place and to a value."""
    f32 = torch.float32
    decades = [1e-6]
    for _ in range(6):
        decades.append(decades[-1] * 10)
    counts = [2.0 ** (e + (not signed)) for e in range(7)]
    slope = [n / (0.9 * ten) for n, ten in zip(counts, decades, strict=True)]
    offset = [n * (8 / 9) - (0.5 if signed else 1) + 2**-16 for n in counts]
    value = [(0.9 * ten / n, -0.8 * ten) for n, ten in zip(counts, decades, strict=True)]
    tensors = (torch.tensor(t, dtype=torch.float64).to(f32) for t in (decades[:6], slope, offset, value))
    return tuple(tensors)


def dynamic_encode(x, inverse, signed):
    """Codes of float32 ``x``, whose magnitude times ``inverse`` is no more than one."""
    bounds, slope, offset, _ = dynamic_lines(signed)
    scaled = x * inverse
    e = (scaled.abs()[..., None] > bounds).sum(-1)
    place = scaled.abs() * slope[e] + offset[e]
    if signed:
        return (place.copysign(scaled) + 127.5).trunc().to(torch.uint8)
    return torch.maximum(place.trunc(), (x > 0).float()).to(torch.uint8)


def dynamic_decode(codes, signed):
    number = codes.float() - 127 * signed
    value = dynamic_lines(signed)[3]
    place = number.abs() + (0.5 if signed else 1.5)
    e = place.log2().floor().long() - (0 if signed else 1)
    line = value[e.clamp(0, 6)]
    inside = place * line[..., 0] + line[..., 1]
    ends = (e > 6).float()
    return torch.where((e < 0) | (e > 6), ends, inside).copysign(number)


def adamw8bit(p, g, moments, block_size, step, lr, betas, eps, weight_decay):
    """One step of one parameter, to the bit: the new parameter and moments (two float32 ones, or codes and absmax)."""
    f32 = lambda x: torch.tensor(x, dtype=torch.float64).float()
    root = (1 - betas[1] ** step) ** 0.5
    decay, size, floor = f32(1 - lr * weight_decay), f32(lr * root / (1 - betas[0] ** step)), f32(eps * root)
    n, coded = p.numel(), len(moments) == 4
    blocks = lambda t: torch.nn.functional.pad(t.flatten(), (0, -n % block_size)).view(-1, block_size)
    if coded:
        first, second, first_absmax, second_absmax = moments
        first, second = first.view(-1, block_size), second.view(-1, block_size)
        m = dynamic_decode(first, True) * first_absmax[:, None]
        v = dynamic_decode(second, False) * second_absmax.abs()[:, None]
        marked = second_absmax.signbit()[:, None] & (second == 0) & (first >= 191)
        m = m.masked_fill(marked, 0)
        v = torch.where(marked, (first.int() << 23).view(torch.float32), v)
        p32, g = blocks(p.float()), blocks(g.float())
    else:
        (m, v), p32, g = (t.flatten() for t in moments), p.float().flatten(), g.float().flatten()
    m = f32(betas[0]) * m + f32(1 - betas[0]) * g
    v = f32(betas[1]) * v + f32(1 - betas[1]) * g * g
    p32 = decay * p32 - size * m / (v.double().sqrt().float() + floor)  # torch.sqrt may be off by one
    new = p32.flatten()[:n].to(p.dtype).view_as(p)
    if not coded:
        return new, (m.view_as(moments[0]), v.view_as(moments[1]))
    apart = ~(v <= 2.0**63) | ~m.isfinite()
    marks = torch.where(m.isfinite() & v.isfinite(), ((v.view(torch.int32).long() + 0x7FFFFF) >> 23), 255)
    m, v = m.masked_fill(apart, 0), v.masked_fill(apart, 0)
    first_absmax, second_absmax = m.abs().amax(1), v.amax(1)
    inverse = lambda absmax: (1 / absmax.clamp(min=1e-38))[:, None]
    first, second = dynamic_encode(m, inverse(first_absmax), True), dynamic_encode(v, inverse(second_absmax), False)
    some = apart.any(1)
    second[some[:, None] & (second == 0) & (first >= 191)] = 1
    first[apart], second[apart] = marks[apart].to(torch.uint8), 0
    return new, (first, second, first_absmax, torch.where(some, -second_absmax, second_absmax))


def nf4_quantize(weight, block_size):
    codes, absmax = quantize_blocks(weight.float().flatten(), block_size, NF4)
    pairs = torch.nn.functional.pad(codes, (0, codes.numel() % 2), value=7).view(-1, 2)
    return (pairs[:, 0] * 16 + pairs[:, 1]).to(torch.uint8), absmax


def nf4_quantize_absmax(absmax, offset):
    """Codes and scales of float32 absmax less their mean; a code whose value overflows is the largest that does not."""
    code, scale = quantize_blocks(absmax - offset, 256, dynamic_map())
    while (over := (nf4_absmax(code, scale, offset) == torch.inf)).any():
        code = code - over.long()
    return code, scale


def nf4_absmax(code, scale, offset):
    return dynamic_map()[code] * scale.repeat_interleave(256)[: code.numel()] + offset


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


def paged_attention(query, keys, values, table, lengths, scale=None, window=None):
    """A sequence and a query at a time, over its tokens gathered from their pages."""
    batch, heads, rows, d = query.shape
    y = query.new_zeros(batch, heads, rows, values.shape[-1])
    for s, length in enumerate(lengths.tolist()):
        wide = [
            pages[table[s].long()].transpose(0, 1).flatten(1, 2).repeat_interleave(heads // pages.shape[1], 0)
            for pages in (keys, values)
        ]
        for i in range(max(0, rows - length), rows):
            at = length - rows + i
            seen = slice(0 if window is None else max(0, at + 1 - window), at + 1)
            scores = (wide[0][:, seen] @ query[s, :, i, :, None])[..., 0] * (d**-0.5 if scale is None else scale)
            y[s, :, i] = (scores.softmax(-1)[:, None] @ wide[1][:, seen])[:, 0]
    return y


def gated_prompt(out, query, prompt_key, prompt_value, gate, tanh=True, scale=None):
    """The prompt's part of zero-init gated attention, added to ``out``; prompts have three dims or four."""
    group = query.shape[1] // prompt_key.shape[-3]
    key, value = (t.repeat_interleave(group, -3) for t in (prompt_key, prompt_value))
    p = torch.softmax(query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale), -1)
    return out + (gate.tanh() if tanh else gate).reshape(-1, 1, 1) * (p @ value)
