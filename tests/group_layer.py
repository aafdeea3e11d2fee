"""A layer over a group-quantised weight, for the tests of group_linear and qalora_linear."""

import torch

import peftops
import reference
from numerics import BF16, HALF_STEP_CODE, int16_error, product_of, segment_max
from packed_layer import PackedLayer
from strategies import normal

TINY = torch.finfo(torch.bfloat16).tiny  # bf16 products take what is smaller for zero
FEW = 4  # rows up to which products are made straight from the codes, in fp32


class GroupLayer(PackedLayer):
    """With ``pool``, the low-rank term is QA-LoRA's; without, it is LoRA's."""

    slack = 8

    def __init__(self, device, n, k, lead, dtype, seed, *, bits=4, group=32, pool="sum", offset=0.0, values=None, **kw):
        values = normal((n, k), dtype, seed, device) + offset if values is None else values.to(device)
        weight = peftops.group_quantize(values, bits=bits, group_size=group)
        super().__init__(weight, device, lead, dtype, seed, lora_columns=k // group if pool else k, **kw)
        self.pool = pool
        codes, scales, zeros = (t.double() for t in (weight.codes, weight.scales, weight.zeros))
        self.dense = reference.group_dequantize(codes, scales, zeros)
        self.size = reference.group_dequantize(codes, scales, -zeros.abs())  # what is summed: code * x and zero * x

    def op(self, *args, **kw):
        if self.lora_A is None or self.pool is None:
            return peftops.group_linear(*args, **kw)
        return peftops.qalora_linear(*args, pool=self.pool, **kw)

    def low_rank(self, x, lora_A, lora_B, keep):
        if self.pool is None:
            return super().low_rank(x, lora_A, lora_B, keep)
        return reference.qalora(x, lora_A, lora_B, self.scaling, self.pool, self.weight.group_size)

    def terms(self):
        terms = super().terms()
        return {**terms, "lora_A": terms["lora_A"] + (self.weight.group_size if self.pool else 0)}

    def narrow_forward(self):
        """What products in bf16 or int16 may add to the error of y."""
        if self.by_library:
            return self.narrow_operands()
        m, k = self.x.numel() // self.weight.shape[1], self.weight.shape[1]
        kind = "fp32" if m <= FEW else product_of(self.x, True)
        return _narrow("fp32" if kind == "int16" and k % 32 else kind, self.x, self.dense.T, 128)

    def narrow_backward(self, keep=None):
        """The same for dx, where a dropped term is added to a dx of the base that was rounded once."""
        if self.dx_by_library:
            return self.narrow_gradient()
        n = self.weight.shape[0]
        kind = product_of(self.g, True)
        kind = "int16" if kind == "bf16" and n % 8 else kind
        narrow = _narrow("fp32" if kind == "int16" and n % 32 else kind, self.g, self.dense, 128)
        return narrow if keep is None else narrow + torch.finfo(self.x.dtype).eps * (self.g.double().abs() @ self.size)


def _narrow(kind, x, w, segment):
    x = x.detach().double()
    if kind == "fp32":
        return 0.0
    if kind == "bf16":
        return (BF16 * x.abs() + TINY) @ w.abs()
    x_error = int16_error(x)
    w_error = HALF_STEP_CODE * segment_max(w, 0, segment)
    return x_error @ w.abs() + (x.abs() + x_error) @ w_error
