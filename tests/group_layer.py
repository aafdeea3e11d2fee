"""A layer over a group-quantised weight and everything that can go with it, for the tests of group_linear and
qalora_linear: the reference in float64 and the bounds that numerics.py wants."""

import torch

import peftops
import reference
from numerics import BF16, HALF_STEP_CODE, HALF_STEP_X, assert_sums, product_of, segment_max
from strategies import normal, strided

TINY = torch.finfo(torch.bfloat16).tiny  # bf16 products take what is smaller for zero
FEW = 4  # rows up to which products are made straight from the codes, in fp32


class GroupLayer:
    """With ``pool``, the low-rank term is QA-LoRA's; without, it is LoRA's."""

    def __init__(self, device, n, k, lead, dtype, seed, *, bits=4, group=32, r=0, pool="sum", adapter=None, bias=False,
                 layout="plain", offset=0.0):  # fmt: skip
        weight = normal((n, k), dtype, seed, device) + offset
        self.weight = peftops.group_quantize(weight, bits=bits, group_size=group)
        leaf = lambda shape, dtype, i, how="plain": (
            strided(normal(shape, dtype, seed + i, device), how).requires_grad_()
        )
        self.x = leaf((*lead, k), dtype, 1, layout)
        self.g = strided(normal((*lead, n), dtype, seed + 2, device), layout)
        adapter = adapter or dtype
        self.lora_A = leaf((r, k // group if pool else k), adapter, 3) if r else None
        self.lora_B = leaf((n, r), adapter, 4) if r else None
        self.bias = leaf((n,), adapter, 5) if bias else None
        self.scaling, self.pool = 0.375, pool
        codes, scales, zeros = (t.double() for t in (self.weight.codes, self.weight.scales, self.weight.zeros))
        self.dense = reference.group_dequantize(codes, scales, zeros)
        self.size = reference.group_dequantize(codes, scales, -zeros.abs())  # what is summed: code * x and zero * x

    def __call__(self, **kw):
        if self.lora_A is None or self.pool is None:
            return peftops.group_linear(self.x, self.weight, self.bias, lora_A=self.lora_A, lora_B=self.lora_B,
                                        scaling=self.scaling, **kw)  # fmt: skip
        return peftops.qalora_linear(self.x, self.weight, self.bias, lora_A=self.lora_A, lora_B=self.lora_B,
                                     scaling=self.scaling, pool=self.pool, **kw)  # fmt: skip

    def leaves(self):
        return {name: t for name in ("x", "bias", "lora_A", "lora_B") if (t := getattr(self, name)) is not None}

    def _run(self, dense, of, keep):
        leaves = {name: of(t.detach().double()).requires_grad_() for name, t in self.leaves().items()}
        factors = () if self.pool else (leaves.get("lora_A"), leaves.get("lora_B"), self.scaling, keep)
        y = reference.linear(leaves["x"], dense, leaves.get("bias"), *factors)
        if self.lora_A is not None and self.pool:
            group = self.weight.group_size
            y = y + reference.qalora(leaves["x"], leaves["lora_A"], leaves["lora_B"], self.scaling, self.pool, group)
        g = of(self.g.double())
        return y, dict(zip(leaves, torch.autograd.grad(y, leaves.values(), g), strict=True))

    def reference(self, keep=None):
        """y and the gradients in float64."""
        return self._run(self.dense, lambda t: t.clone(), keep)

    def magnitudes(self, keep=None):
        """The same with every factor replaced by its magnitude."""
        return self._run(self.size, torch.abs, keep)

    def check(self, keep=None, **kw):
        y = self(**kw)
        grads = dict(zip(self.leaves(), torch.autograd.grad(y, self.leaves().values(), self.g), strict=True))
        want_y, want = self.reference(keep)
        size_y, size = self.magnitudes(keep)
        n, k = self.weight.shape
        m = max(1, self.x.numel() // k)
        r = 0 if self.lora_A is None else self.lora_A.shape[0]

        assert y.dtype == self.x.dtype and y.is_contiguous()
        assert_sums(y, want_y, size_y, k + r + 8, self.narrow_forward())
        narrow = self.narrow_backward()
        if keep is not None:  # the dropped term is added to a dx of the base that was rounded once
            narrow = narrow + torch.finfo(self.x.dtype).eps * (self.g.double().abs() @ self.size)
        assert_sums(grads.pop("x"), want.pop("x"), size["x"], n + r + 8, narrow)
        for name, grad in grads.items():
            pooled = self.weight.group_size if self.pool else 0
            terms = {"bias": m, "lora_A": m + n + pooled + 4, "lora_B": m + k + 4}[name]
            assert_sums(grad, want[name], size[name], terms)

    def narrow_forward(self):
        """What products in bf16 or int16 may add to the error of y."""
        m, k = self.x.numel() // self.weight.shape[1], self.weight.shape[1]
        kind = "fp32" if m <= FEW else product_of(self.x, True)
        return _narrow("fp32" if kind == "int16" and k % 32 else kind, self.x, self.dense.T, 128)

    def narrow_backward(self):
        n = self.weight.shape[0]
        kind = product_of(self.g, True)
        kind = "int16" if kind == "bf16" and n % 8 else kind
        return _narrow("fp32" if kind == "int16" and n % 32 else kind, self.g, self.dense, 128)


def _narrow(kind, x, w, segment):
    x = x.detach().double()
    if kind == "fp32":
        return 0.0
    if kind == "bf16":
        return (BF16 * x.abs() + TINY) @ w.abs()
    x_error = HALF_STEP_X * segment_max(x, -1, segment)
    w_error = HALF_STEP_CODE * segment_max(w, 0, segment)
    return x_error @ w.abs() + (x.abs() + x_error) @ w_error
