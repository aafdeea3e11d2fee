"""A layer over a packed weight and everything that can go with it: the reference in float64 and the bounds that
numerics.py wants, for the tests of nf4_linear, group_linear and qalora_linear."""

import torch

import reference
from numerics import assert_sums, cut_sums
from strategies import normal, strided


class PackedLayer:
    """What a format adds: ``op``, the function under test; ``dense``, the weight in float64; ``size``, the magnitudes
    of what is summed to make it; ``slack``, additions beyond those of the products; what narrow products err by."""

    slack = 4
    by_library = dx_by_library = False  # whether torch multiplies the decoded weight, on CUDA, for y and for dx

    def __init__(
        self, weight, device, lead, dtype, seed, *, lora_columns, r=0, adapter=None, bias=False, layout="plain"
    ):
        draw = lambda shape, dtype, i: normal(shape, dtype, seed + i, device)
        leaf = lambda *args, how="plain": strided(draw(*args), how).requires_grad_()
        (n, k), adapter = weight.shape, adapter or dtype
        self.weight = weight
        self.x = leaf((*lead, k), dtype, 1, how=layout)
        self.g = strided(draw((*lead, n), dtype, 2), layout)
        self.lora_A = leaf((r, lora_columns), adapter, 3) if r else None
        self.lora_B = leaf((n, r), adapter, 4) if r else None
        self.bias = leaf((n,), adapter, 5) if bias else None
        self.scaling = 0.375 if r else 1.0

    def __call__(self, x=None, **kw):
        x = self.x if x is None else x
        return self.op(x, self.weight, self.bias, lora_A=self.lora_A, lora_B=self.lora_B, scaling=self.scaling, **kw)

    def leaves(self):
        return {name: t for name in ("x", "bias", "lora_A", "lora_B") if (t := getattr(self, name)) is not None}

    def gradients(self, y):
        return dict(zip(self.leaves(), torch.autograd.grad(y, self.leaves().values(), self.g), strict=True))

    def low_rank(self, x, lora_A, lora_B, keep):
        """What is added to the base product, in float64."""
        return self.scaling * ((x if keep is None else x * keep) @ lora_A.T) @ lora_B.T

    def _run(self, dense, of, keep):
        leaves = {name: of(t.detach().double()).requires_grad_() for name, t in self.leaves().items()}
        y = reference.linear(leaves["x"], dense, leaves.get("bias"))
        if self.lora_A is not None:
            y = y + self.low_rank(leaves["x"], leaves["lora_A"], leaves["lora_B"], keep)
        grads = torch.autograd.grad(y, leaves.values(), of(self.g.double()))
        return y.detach(), dict(zip(leaves, grads, strict=True))

    def reference(self, keep=None):
        """y and the gradients in float64."""
        return self._run(self.dense, lambda t: t.clone(), keep)

    def magnitudes(self, keep=None):
        """The same with every factor replaced by its magnitude."""
        return self._run(self.size, torch.abs, keep)

    def terms(self):
        """How many numbers are added up: for a gradient over the rows, products of which u or v is a sum itself."""
        n, k = self.weight.shape
        m, r = max(1, self.x.numel() // k), 0 if self.lora_A is None else self.lora_A.shape[0]
        outer, inner = self.slack, self.slack // 2
        terms = {"y": k + r + outer, "x": n + r + outer, "bias": m, "lora_A": m + n + inner, "lora_B": m + k + inner}
        if self.by_library:
            terms["y"] = k + 3 * r + 8
        return {name: cut_sums(self.x, count) for name, count in terms.items()}

    def narrow_operands(self):
        """What a library's product may add to the error of y. Its operands hold the weight rounded to the dtype of x,
        and in bf16 two parts of u, lora_B and bias. What is left of a number has half a step of half a step; products
        of two such rests are left out."""
        x = self.x.detach()
        if x.dtype == torch.float32:
            return 0.0
        info, size = torch.finfo(x.dtype), lambda t: t.detach().double().abs()
        error = size(x) @ (info.eps / 2 * self.dense.abs() + info.smallest_normal * info.eps / 2).T
        rest = (info.eps / 2) ** 2
        if self.lora_A is not None:
            parts = 1 if self.lora_B.dtype == x.dtype else 3
            error = error + parts * rest * self.low_rank(size(x), size(self.lora_A), size(self.lora_B), None)
        return error if self.bias is None else error + rest * size(self.bias)

    def narrow_gradient(self):
        """The same for dx: the weight is rounded, and so is its product, before the low-rank term is added to that."""
        if self.g.dtype == torch.float32:
            return 0.0
        info, g = torch.finfo(self.g.dtype), self.g.double().abs()
        error = g @ (info.eps / 2 * self.dense.abs() + info.smallest_normal * info.eps / 2)
        return error if self.lora_A is None else error + info.eps / 2 * (g @ self.dense.abs() + error)

    def check(self, keep=None, **kw):
        y, terms = self(**kw), self.terms()
        grads = self.gradients(y)
        (want_y, want), (size_y, size) = self.reference(keep), self.magnitudes(keep)
        assert y.dtype == self.x.dtype and y.is_contiguous()
        assert_sums(y, want_y, size_y, terms["y"], self.narrow_forward())
        narrow = {"x": self.narrow_backward(keep)}
        for name, grad in grads.items():  # torch sums 16-bit rows of a bias gradient in fp32, too, but in its own order
            assert grad.dtype == self.leaves()[name].dtype
            assert_sums(grad, want[name], size[name], terms[name], narrow.get(name, 0.0))
