"""How GPTQ lays out the codes of a checkpoint, from its definition alone."""

import torch


def gptq_unpack(words, bits):
    """GPTQ's packing along dim 0, from its definition: 32 codes are `bits` words, the first code lowest."""
    words = words.long() & 0xFFFFFFFF
    codes = []
    for first in range(0, len(words), bits):
        string = [words[first + i] for i in range(bits)]
        for j in range(32):
            word, shift = divmod(j * bits, 32)
            code = string[word] >> shift
            if shift + bits > 32:
                code = code | string[word + 1] << (32 - shift)
            codes.append(code & 2**bits - 1)
    return torch.stack(codes)


def dense_layers(tensors, bits):
    """The weights of a checkpoint's layers, ``scale * (code - zero)`` as every reader of GPTQ computes them, with what
    it holds besides; zeros may be float32, as ours are."""
    made = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] in ("weight", "bias")}
    for layer in (name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")):
        parts = ("qweight", "scales", "qzeros", "g_idx")
        qweight, scales, zeros, group = (tensors[f"{layer}.{part}"] for part in parts)
        if zeros.dtype == torch.int32:
            zeros = gptq_unpack(zeros.t(), bits).t() + 1
        made[f"{layer}.weight"] = (scales[group] * (gptq_unpack(qweight, bits) - zeros[group])).t().contiguous()
    return made
