"""MXFP4 weights of any codes, and a layer over one, for the tests of its ops."""

import torch

import peftops
import reference
from numerics import BF16, HALF_STEP_CODE, int16_error, on_cuda, product_of, segment_max
from packed_layer import PackedLayer
from strategies import normal

TINY = torch.finfo(torch.bfloat16).tiny  # bf16 products take what is smaller for zero


def pack(codes):
    """Two codes a byte, the first in the low four bits."""
    return codes[:, ::2] | codes[:, 1::2] << 4


def unpack(blocks):
    return torch.stack([blocks & 15, blocks >> 4], -1).flatten(1)


def random_weight(n, k, seed, dtype=torch.float32, device="cpu", low=100, high=140):
    """All codes, -0 among them, under scales from ``low`` to ``high``."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda least, most, *shape: torch.randint(least, most, shape, dtype=torch.uint8, generator=generator)
    blocks, scales = pack(draw(0, 16, n, k)), draw(low, high, n, k // 32)
    return peftops.MXFP4Tensor.from_blocks(blocks.to(device), scales.to(device), dtype=dtype)


class MXFP4Layer(PackedLayer):
    def __init__(self, device, n, k, lead, dtype, seed, *, values=None, weight=None, **kw):
        values = normal((n, k), dtype, seed, device) if values is None else values.to(device)
        weight = peftops.mxfp4_quantize(values) if weight is None else weight
        super().__init__(weight, device, lead, dtype, seed, lora_columns=k, **kw)
        codes = unpack(weight.blocks.cpu())
        self.dense = reference.mxfp4_dequantize(codes, weight.scales.cpu()).to(device)
        self.size = self.dense.abs()

    def op(self, *args, **kw):
        return peftops.mxfp4_linear(*args, **kw)

    def narrow_forward(self):
        """What products in bf16 or int16 may add to the error of y: codes are exact in both."""
        if self.by_library:
            return self.narrow_operands()
        x = self.x.detach()
        kind = "fp32" if on_cuda(x) else product_of(x, True, few=x.numel() // x.shape[-1] <= 4)
        if kind == "fp32":
            return 0.0
        error = TINY if kind == "bf16" else int16_error(x.double())
        return (error + 0 * x.double()) @ self.size.T

    def narrow_backward(self, keep=None):
        """The same for dx, where int16 scales a column of the weight to the largest of 128 rows at most."""
        if self.dx_by_library:
            return self.narrow_gradient()
        n, g = self.weight.shape[0], self.g.double()
        kind = "fp32" if on_cuda(self.g) else product_of(self.g, True)
        kind = "int16" if kind == "bf16" and n % 8 else kind
        if kind == "fp32" or (kind == "int16" and n % 32):
            return 0.0
        if kind == "bf16":
            return (BF16 * 0 * g.abs() + TINY) @ self.size
        g_error, w_error = int16_error(g), HALF_STEP_CODE * segment_max(self.dense, 0, 128)
        return g_error @ self.size + (g.abs() + g_error) @ w_error
