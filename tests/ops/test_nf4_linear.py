import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import peftops
import reference
import sim
from conftest import CUDA_DEVICES
from numerics import (
    BF16,
    CODE16,
    FP32,
    HALF_STEP_CODE,
    HALF_STEP_X,
    assert_exact,
    assert_sums,
    code_error,
    on_cuda,
    product_of,
    segment_max,
)
from peftops import _C
from strategies import block_sizes, dtypes, ins, layouts, normal, outs, ranks, rows, seeds, strided

TINY = torch.finfo(torch.bfloat16).tiny  # bf16 products take what is smaller for zero

leads = st.one_of(rows.map(lambda m: (m,)), st.sampled_from([(), (2, 3), (1, 0, 4), (2, 1, 9)]))


class Layer:
    """A quantised weight, everything that can go with it, and float64 copies for the reference."""

    def __init__(self, device, n, k, lead, dtype, seed, *, block_size=64, double_quant=True, r=0, adapter=None,
                 bias=False, layout="plain"):  # fmt: skip
        weight = normal((n, k), dtype, seed, device)
        self.weight = peftops.nf4_quantize(weight, block_size=block_size, double_quant=double_quant)
        leaf = lambda shape, dtype, i, how="plain": strided(
            normal(shape, dtype, seed + i, device), how
        ).requires_grad_()
        self.x = leaf((*lead, k), dtype, 1, layout)
        self.g = strided(normal((*lead, n), dtype, seed + 2, device), layout)
        adapter = adapter or dtype
        self.lora_A = leaf((r, k), adapter, 3) if r else None
        self.lora_B = leaf((n, r), adapter, 4) if r else None
        self.bias = leaf((n,), adapter, 5) if bias else None
        self.scaling = 0.375 if r else 1.0
        self.by_library = False  # whether torch multiplies the decoded weight, on CUDA
        self.dense = peftops.nf4_dequantize(self.weight, dtype=torch.float32).double()
        self.absmax = self.weight.absmax.double().repeat_interleave(block_size)[: n * k].view(n, k)

    def __call__(self, **kw):
        return peftops.nf4_linear(self.x, self.weight, self.bias, lora_A=self.lora_A, lora_B=self.lora_B,
                                  scaling=self.scaling, **kw)  # fmt: skip

    def leaves(self):
        return {name: t for name in ("x", "bias", "lora_A", "lora_B") if (t := getattr(self, name)) is not None}

    def reference(self, keep=None):
        """y and the gradients in float64."""
        leaves = {name: t.detach().double().requires_grad_() for name, t in self.leaves().items()}
        y = reference.linear(leaves["x"], self.dense, leaves.get("bias"), leaves.get("lora_A"), leaves.get("lora_B"),
                             self.scaling, keep)  # fmt: skip
        return y, dict(zip(leaves, torch.autograd.grad(y, leaves.values(), self.g.double()), strict=True))

    def magnitudes(self, keep=None):
        """The same with every factor replaced by its magnitude."""
        size = lambda t: None if t is None else t.detach().double().abs()
        x, g, A, B = size(self.x), size(self.g), size(self.lora_A), size(self.lora_B)
        y = reference.linear(x, self.dense.abs(), size(self.bias), A, B, self.scaling, keep)
        kept = x if keep is None else x * keep
        flat = lambda t: t.reshape(-1, t.shape[-1])
        result = {"x": g @ self.dense.abs(), "bias": flat(g).sum(0)}
        if A is not None:
            v = self.scaling * g @ B
            result["x"] = result["x"] + (v @ A) * (1 if keep is None else keep)
            result["lora_A"] = flat(v).T @ flat(kept)
            result["lora_B"] = self.scaling * flat(g).T @ flat(kept @ A.T)
        return y, result

    def check(self, keep=None, **kw):
        y = self(**kw)
        grads = dict(zip(self.leaves(), torch.autograd.grad(y, self.leaves().values(), self.g), strict=True))
        want_y, want = self.reference(keep)
        size_y, size = self.magnitudes(keep)
        n, k = self.weight.shape
        m = max(1, self.x.numel() // k)
        r = 0 if self.lora_A is None else self.lora_A.shape[0]

        assert y.dtype == self.x.dtype and y.is_contiguous()
        assert_sums(y, want_y, size_y, k + (3 * r + 8 if self.by_library else r + 4), self.narrow_forward())
        assert_sums(grads.pop("x"), want.pop("x"), size["x"], n + r + 4, self.narrow_backward())
        for name, grad in grads.items():  # a sum over the rows, of products of which u or v is a sum itself
            assert grad.dtype == self.leaves()[name].dtype
            terms = {"bias": m, "lora_A": m + n + 2, "lora_B": m + k + 2}[name]
            # torch sums 16-bit rows of a bias gradient in fp32, too, but in its own order
            assert_sums(grad, want[name], size[name], terms)

    def narrow_forward(self):
        """What multiplying in 16 bits adds to the error of y. In int16: the rounding of x to 1/16384 of the largest
        in 128 columns at most, and that of the codes. In bf16: the rounding of the weight."""
        x, k = self.x.detach(), self.weight.shape[1]
        if self.by_library:
            return self.narrow_operands(x)
        if on_cuda(x):  # 16-bit x meets the codes rounded to its dtype, where chunks of 64 columns share an absmax
            chunks = x.dtype != torch.float32 and k % 64 == 0 and self.weight.block_size >= 64
            return code_error(x.dtype) * x.double().abs() @ self.dense.abs().T if chunks else 0.0
        kind = product_of(x, k % 32 == 0, few=x.numel() // k <= 4)
        x = x.double()
        if kind == "fp32":
            return 0.0
        if kind == "bf16":
            return (BF16 * x.abs() + TINY) @ self.dense.abs().T
        x_error = HALF_STEP_X * segment_max(x, -1, 128)
        return x_error @ self.dense.abs().T + (x.abs() + x_error) @ (CODE16 * self.absmax.abs()).T

    def narrow_operands(self, x):
        """A library's operands hold the weight rounded to the dtype of x, and in bf16 two parts of u, lora_B and bias.
        What is left of a number has half a step of half a step; products of two such rests are left out."""
        if x.dtype == torch.float32:
            return 0.0
        info, size = torch.finfo(x.dtype), lambda t: t.detach().double().abs()
        error = size(x) @ (info.eps / 2 * self.dense.abs() + info.smallest_normal * info.eps / 2).T
        rest = (info.eps / 2) ** 2
        if self.lora_A is not None:
            parts = 1 if self.lora_B.dtype == x.dtype else 3
            error = error + parts * rest * self.scaling * size(x) @ size(self.lora_A).T @ size(self.lora_B).T
        return error if self.bias is None else error + rest * size(self.bias)

    def narrow_backward(self):
        """The same for dx, where int16 scales the rows of the weight to the largest absmax of 64 at most."""
        n, k = self.weight.shape
        if on_cuda(self.g):  # 16-bit g meets the weight rounded to its dtype, where both move in units of 16 bytes
            units = self.g.dtype != torch.float32 and k % 32 == 0 and n % 8 == 0
            info = torch.finfo(self.g.dtype)
            step = info.eps / 2 * self.dense.abs() + info.smallest_normal * info.eps / 2
            return self.g.double().abs() @ step if units else 0.0
        kind = product_of(self.g, k % 32 == 0)
        if kind == "bf16" and n % 8:
            kind = "int16"
        if kind == "int16" and n % 32:
            kind = "fp32"
        g = self.g.double()
        if kind == "fp32":
            return 0.0
        if kind == "bf16":
            return (BF16 * g.abs() + TINY) @ self.dense.abs()
        g_error = HALF_STEP_X * segment_max(g, -1, 64)
        w_error = HALF_STEP_CODE * segment_max(self.absmax, 0, 64)
        return g_error @ self.dense.abs() + (g.abs() + g_error) @ w_error


@given(data=st.data(), n=outs, k=ins, lead=leads, dtype=dtypes, block_size=block_sizes, double_quant=st.booleans(),
       bias=st.booleans(), layout=layouts, seed=seeds)  # fmt: skip
def test_matches_reference(device, data, n, k, lead, dtype, block_size, double_quant, bias, layout, seed):
    r = data.draw(st.one_of(st.just(0), ranks), label="r")
    adapter = data.draw(st.sampled_from([dtype, torch.float32]), label="adapter dtype")
    Layer(device, n, k, lead, dtype, seed, block_size=block_size, double_quant=double_quant, r=r, adapter=adapter,
          bias=bias, layout=layout).check()  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(300, 320, 576), (270, 288, 544), (5, 300, 1100), (257, 96, 33), (2, 40, 9000)])
def test_matches_reference_beyond_one_block(device, dtype, shape):
    """More rows, columns and depth than one task, panel and packed piece of x hold."""
    m, n, k = shape
    Layer(device, n, k, (m,), dtype, 7, r=24, bias=True, adapter=torch.float32).check()


@given(n=outs, k=ins, m=rows, dtype=dtypes, r=ranks, p=st.sampled_from([0.05, 0.5, 0.9]), seed=seeds)
def test_dropout_matches_reference(device, n, k, m, dtype, r, p, seed):
    layer = Layer(device, n, k, (m,), dtype, seed, r=r, bias=True)
    torch.manual_seed(seed)
    drawn = int(torch.randint(0, 2**62, ()))  # what the op will draw
    keep = reference.dropout_mask(drawn, m, k, p).double() / (1 - p)
    torch.manual_seed(seed)
    layer.check(keep, dropout_p=p, training=True)


def test_dropout_is_off_in_evaluation_and_drops_the_right_share(device):
    layer = Layer(device, 64, 512, (400,), torch.float32, 3, r=8)
    with torch.no_grad():
        assert torch.equal(layer(dropout_p=0.5), layer())
        assert not torch.equal(layer(dropout_p=0.5, training=True), layer(dropout_p=0.5, training=True))
    seed = torch.tensor(12345, device=device)
    kept = torch.ops.peftops.lora_shrink(
        torch.ones(400, 512, device=device), torch.eye(512, device=device), True, 1.0, 0.3, seed
    )
    share = (kept != 0).double().mean().item()
    assert abs(share - 0.7) < 5 * (0.3 * 0.7 / kept.numel()) ** 0.5
    rows_share, cols_share = (kept != 0).double().mean(1), (kept != 0).double().mean(0)
    assert rows_share.std() < 1.5 * (0.21 / 512) ** 0.5 and cols_share.std() < 1.5 * (0.21 / 400) ** 0.5
    assert_exact(kept[kept != 0], torch.tensor(1 / 0.7).expand(int((kept != 0).sum())).to(device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_products_have_no_bias(device, dtype):
    """Roundings average out over many results; a wrong factor would not. 2e-5 is a third of one step of int16.
    A weight rounded to bf16 has few distinct values, whose errors average out less."""
    layer = Layer(device, 512, 1024, (64,), dtype, 11)
    narrow = _C.isa() == "avx512bf16" or on_cuda(layer.x)
    bound = 1e-4 if narrow and dtype == torch.bfloat16 else 2e-5
    y = layer()
    (dx,) = torch.autograd.grad(y, layer.x, layer.g)
    want_y, want = layer.reference()
    for got, ref in ((y, want_y), (dx, want["x"])):
        gain = ((got.detach().double() * ref).sum() / ref.square().sum()).item()
        assert abs(gain - 1) < bound


@pytest.mark.parametrize("m", [1, 3, 9, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("k", [320, 100])
def test_what_is_not_finite_comes_through(device, m, dtype, bad, k):
    """In the rows that hold it, as plain arithmetic has it, and nowhere else."""
    layer = Layer(device, 64, k, (m,), dtype, 5, r=4, adapter=torch.float32)
    with torch.no_grad():
        layer.x[m - 1, 70] = bad
        layer.g[m - 1, 50] = bad
    y = layer()
    (dx,) = torch.autograd.grad(y, layer.x, layer.g)
    want_y, want = layer.reference()
    for got, ref in ((y, want_y), (dx, want["x"])):
        assert got[: m - 1].isfinite().all()
        assert torch.equal(got[m - 1].isnan(), ref[m - 1].isnan())
        assert torch.equal(got[m - 1].isinf(), ref[m - 1].isinf())
        infinite = ref[m - 1].isinf()
        assert torch.equal(got[m - 1][infinite].sign().double(), ref[m - 1][infinite].sign())


@pytest.mark.parametrize("m", [2, 24])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tiny_and_huge_activations_keep_their_precision(device, m, dtype):
    """int16 scales by the largest of a segment; where that has no reciprocal in range, fp32 takes over."""
    info = torch.finfo(dtype)
    for factor in (info.tiny, info.smallest_normal * 64, info.max / 1024):
        layer = Layer(device, 64, 256, (m,), dtype, 5)
        with torch.no_grad():
            layer.x.mul_(factor)
        want, _ = layer.reference()
        size, _ = layer.magnitudes()
        if want.abs().max() < info.max:
            assert_sums(layer(), want, size, 260, layer.narrow_forward())


def test_a_nan_block_spoils_its_rows_and_columns_only(device):
    packed = torch.randint(0, 256, (64 * 32,), dtype=torch.uint8, device=device)
    absmax = torch.rand(64, device=device) + 0.5
    absmax[20] = float("nan")  # row 20
    for dtype in (torch.float32, torch.bfloat16):
        for m in (1, 8, 20):
            x = torch.randn(m, 64, device=device).to(dtype)
            y = torch.ops.peftops.nf4_linear(x, packed, absmax, None, None, 64, 64, 64, None, None, None, 1.0)
            assert y[:, 20].isnan().all() and y.isnan().sum() == m
            dx = torch.ops.peftops.nf4_linear_backward(x, packed, absmax, None, None, 64, 64, None, None, 0.0, None)
            assert dx.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_number_of_threads(device, threads, dtype):
    for m, n, k in ((1, 700, 320), (37, 333, 1000), (300, 640, 576)):
        layer = Layer(device, n, k, (m,), dtype, 1, r=16, bias=True)
        runs = []
        for count in (1, 2, 3, 5):
            threads(count)
            torch.manual_seed(0)
            y = layer(dropout_p=0.1, training=True)
            runs.append((y, *torch.autograd.grad(y, layer.leaves().values(), layer.g)))
        for run in runs[1:]:
            # the bias gradient is torch's own sum
            assert all(torch.equal(a, b) for i, (a, b) in enumerate(zip(runs[0], run, strict=True)) if i != 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_without_rows_or_columns(device, dtype):
    """Nothing of it is read, and what is left is the low-rank term."""
    op, nothing = torch.ops.peftops, (torch.zeros(0, dtype=torch.uint8, device=device), torch.zeros(0, device=device))
    thin, wide = torch.randn(20, 3, device=device), torch.randn(3, 64, device=device)
    dx = op.nf4_linear_backward(thin.new_zeros(20, 0, dtype=dtype), *nothing, None, None, 64, 64, thin, wide, 0.0, None)
    y = op.nf4_linear(thin.new_zeros(20, 0, dtype=dtype), *nothing, None, None, 64, 64, 0, None, thin, wide.T, 1.0)
    for got in (dx, y):
        assert_sums(got, thin.double() @ wide.double(), thin.double().abs() @ wide.double().abs(), 4)


def test_inputs_are_left_alone(device):
    layer = Layer(device, 64, 96, (20,), torch.float32, 1, r=4, bias=True)
    before = {name: t.detach().clone() for name, t in layer.leaves().items()}
    codes, g = layer.weight.packed.clone(), layer.g.clone()
    torch.autograd.grad(layer(dropout_p=0.5, training=True), layer.leaves().values(), layer.g)
    assert all(torch.equal(before[name], t) for name, t in layer.leaves().items())
    assert torch.equal(codes, layer.weight.packed) and torch.equal(g, layer.g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_keeps_x_itself_and_a_thin_product(device, dtype):
    """Saved: x (the tensor, no copy), u = x A^T in float32, a seed. Nothing of the size of the weight."""
    layer = Layer(device, 256, 128, (100,), dtype, 1, r=8, bias=True, adapter=torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(dropout_p=0.5, training=True)
    inputs = [layer.x, layer.lora_A, layer.lora_B, *layer.weight._parts().values()]
    extra = [t for t in saved if not any(t.data_ptr() == i.data_ptr() for i in inputs)]
    assert any(t.data_ptr() == layer.x.data_ptr() for t in saved)
    assert sorted(tuple(t.shape) for t in extra) == [(), (100, 8)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        saved.clear()
        peftops.nf4_linear(layer.x, layer.weight)
    assert not any(t.data_ptr() == layer.x.data_ptr() for t in saved)  # not even x without an adapter


def test_only_the_gradients_that_are_needed(device):
    layer = Layer(device, 64, 96, (20,), torch.float32, 1, r=4, bias=True)
    full = dict(zip(layer.leaves(), torch.autograd.grad(layer(), layer.leaves().values(), layer.g), strict=True))
    for name, leaf in layer.leaves().items():
        for other in layer.leaves().values():
            other.requires_grad_(other is leaf)
        (grad,) = torch.autograd.grad(layer(), leaf, layer.g)
        assert torch.equal(grad, full[name])


def test_second_derivative_raises_instead_of_being_wrong(device):
    layer = Layer(device, 32, 32, (4,), torch.float32, 1, r=2)
    (dx,) = torch.autograd.grad(layer().square().sum(), layer.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("layout", ["plain", "transposed"])
def test_registration(device, layout):
    layer = Layer(device, 64, 96, (20,), torch.float32, 1)
    x, g = strided(layer.x.detach(), layout), strided(layer.g, layout)
    u, v = torch.randn(20, 4, device=device), torch.randn(20, 4, device=device)
    A, B = torch.randn(4, 96, device=device), torch.randn(64, 4, device=device)
    weight = layer.weight._arguments
    op = torch.ops.peftops
    torch.library.opcheck(op.nf4_linear.default, (x, *weight, 64, 96, None, u, B, 0.5))
    torch.library.opcheck(op.nf4_linear_backward.default, (g, *weight, 96, v, A, 0.0, None))
    seed = torch.tensor(3, device=device)
    torch.library.opcheck(op.nf4_linear_backward.default, (g, *weight, 96, v, A, 0.5, seed))


@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_a_graph_break(device, training):
    layer = Layer(device, 64, 96, (20,), torch.float32, 1, r=4, bias=True)
    call = lambda x: peftops.nf4_linear(x, layer.weight, layer.bias, lora_A=layer.lora_A, lora_B=layer.lora_B,
                                        scaling=0.5, dropout_p=0.3, training=training)  # fmt: skip
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    y = compiled(layer.x)
    grads = torch.autograd.grad(y, layer.leaves().values(), layer.g)
    if not training:  # the seed of a compiled graph is drawn at another moment
        want = call(layer.x)
        assert torch.equal(y, want)
        wants = torch.autograd.grad(want, layer.leaves().values(), layer.g)
        assert all(torch.equal(a, b) for a, b in zip(grads, wants, strict=True))


def test_autocast_casts_x_and_nothing_else(device):
    layer = Layer(device, 64, 96, (20,), torch.float32, 1, r=4, bias=True)
    with torch.autocast(device, torch.bfloat16):
        y = layer()
    want = peftops.nf4_linear(layer.x.bfloat16(), layer.weight, layer.bias, lora_A=layer.lora_A, lora_B=layer.lora_B,
                              scaling=layer.scaling)  # fmt: skip
    assert y.dtype == torch.bfloat16 and torch.equal(y, want)
    dx, dA = torch.autograd.grad(y, (layer.x, layer.lora_A), layer.g.bfloat16())
    assert dx.dtype == dA.dtype == torch.float32


def test_bad_input(device):
    weight = peftops.nf4_quantize(torch.randn(64, 96, device=device))
    x, A, B = (torch.randn(*shape, device=device) for shape in ((5, 96), (4, 96), (64, 4)))
    call = peftops.nf4_linear
    with pytest.raises(TypeError, match="weight must be an NF4Tensor .*, not a Tensor"):
        call(x, torch.randn(64, 96))
    with pytest.raises(ValueError, match=r"weight must have two dims, \[out, in\], not shape \[96\]"):
        call(x, peftops.nf4_quantize(torch.randn(96, device=device)))
    with pytest.raises(RuntimeError, match=r"the last dim of x must be 96, but its shape is \[5, 95\]"):
        call(x[:, 1:], weight)
    with pytest.raises(RuntimeError, match=r"the last dim of x must be 96, but its shape is \[\]"):
        call(torch.tensor(1.0, device=device), weight)
    for dtype, name in ((torch.float64, "Double"), (torch.int64, "Long")):
        with pytest.raises(RuntimeError, match=f"x must be float32, bfloat16 or float16, not {name}"):
            call(x.to(dtype), weight)
    with pytest.raises(ValueError, match="x is on meta, weight on"):
        call(x.to("meta"), weight)
    with pytest.raises(RuntimeError, match=r"bias must have shape \[64\], not \[63\]"):
        call(x, weight, torch.zeros(63, device=device))
    with pytest.raises(ValueError, match="lora_A and lora_B belong together, but lora_B is None"):
        call(x, weight, lora_A=A)
    with pytest.raises(ValueError, match=r"lora_A must have shape \[r, 96\], not \[4, 95\]"):
        call(x, weight, lora_A=A[:, 1:], lora_B=B)
    with pytest.raises(ValueError, match=r"lora_A must have shape \[r, 96\], not \[0, 96\]"):
        call(x, weight, lora_A=A[:0], lora_B=B[:, :0])
    with pytest.raises(ValueError, match=r"lora_B must have shape \[64, 4\], not \[64, 3\]"):
        call(x, weight, lora_A=A, lora_B=B[:, 1:])
    with pytest.raises(RuntimeError, match="the factor must be float32, bfloat16 or float16, not Double"):
        call(x, weight, lora_A=A.double(), lora_B=B)
    for p in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"dropout_p must be in \[0, 1\)"):
            call(x, weight, lora_A=A, lora_B=B, dropout_p=p)
    with pytest.raises(ValueError, match="weight requires a gradient"):
        call(x, torch.nn.Parameter(weight))


def test_every_isa_agrees_closely():
    """Three builds of one source: they may differ in the order of sums, and by int16, not by more."""
    layer = Layer("cpu", 96, 320, (40,), torch.float32, 1, r=8)
    old, results = _C.isa_limit(), []
    try:
        for isa in ("scalar", "avx2", "avx512", "avx512bf16"):
            _C.set_isa_limit(isa)
            results.append(layer().detach().double())
    finally:
        _C.set_isa_limit(old)
    size, _ = layer.magnitudes()
    for other in results[1:]:
        assert ((other - results[0]).abs() <= 2 * 340 * FP32 * size).all()


on_any_cuda = pytest.mark.parametrize("device", CUDA_DEVICES, indirect=True)


def kernels_of(call):
    """What was launched for it, in the simulator; it cannot be told elsewhere."""
    device = sim.simulator()
    device.forget()
    result = call()
    names = " ".join(report["kernel"] for report in device.reports()) if sim.active else None
    return result, names


def check_by_library(layer, **kw):
    """The library's product, and no kernel of ours but the one for its operands; fp16 has none for every factor."""
    exact = layer.lora_A is None and (layer.bias is None or layer.bias.dtype == torch.float16)
    layer.by_library = layer.x.dtype != torch.float16 or exact
    with sim.nf4_library("always"):
        with torch.no_grad():
            y, names = kernels_of(layer)
        layer.check(**kw)
    if names is not None and y.numel():
        multiplied = any(name in names for name in ("few_rows", "many_rows", "any_rows"))
        assert multiplied != layer.by_library and ("operands" in names) == layer.by_library, names


@on_any_cuda
@given(data=st.data(), n=outs, k=ins, lead=leads, dtype=dtypes, block_size=block_sizes, double_quant=st.booleans(),
       bias=st.booleans(), layout=layouts, seed=seeds)  # fmt: skip
def test_by_library_matches_reference(device, data, n, k, lead, dtype, block_size, double_quant, bias, layout, seed):
    r = data.draw(st.one_of(st.just(0), ranks), label="r")
    adapter = data.draw(st.sampled_from([dtype, torch.float32, torch.float16]), label="adapter dtype")
    check_by_library(Layer(device, n, k, lead, dtype, seed, block_size=block_size, double_quant=double_quant, r=r,
                           adapter=adapter, bias=bias, layout=layout))  # fmt: skip


@on_any_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(70, 320, 2112), (270, 33, 1100), (3, 40, 8232)])
@pytest.mark.parametrize("r", [0, 24])
def test_by_library_beyond_one_block(device, dtype, shape, r):
    """More packs than a lane decodes at a time, in rows of whole packs and in ragged ones."""
    m, n, k = shape
    check_by_library(Layer(device, n, k, (m,), dtype, 7, r=r, bias=r > 0, adapter=torch.float32))


@on_any_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_by_library_what_is_not_finite_comes_through(device, dtype, bad):
    """In x, u, lora_B and the bias: numbers in parts make no NaN of what is infinite."""
    n, k, m, r = 24, 64, 6, 3
    packed, absmax = torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8), torch.rand(n) + 0.5
    shapes = {"x": (m, k), "u": (m, r), "lora_B": (n, r), "bias": (n,)}
    tensors = {name: torch.randn(*shape).to(dtype if name == "x" else torch.float32) for name, shape in shapes.items()}
    dense = reference.nf4_dequantize(packed, absmax, 64, torch.Size([n, k])).double()
    for name, at in (("x", (4, 7)), ("u", (4, 1)), ("lora_B", (4, 1)), ("bias", (4,))):
        x, u, lora_B, bias = ({**tensors, name: tensors[name].index_put(tuple(map(torch.tensor, at)), torch.tensor(
            bad, dtype=tensors[name].dtype))}[key] for key in tensors)  # fmt: skip
        want = x.double() @ dense.T + bias.double() + 0.5 * u.double() @ lora_B.double().T
        arguments = (x, packed, absmax, None, None, 64, n, k, bias, u, lora_B, 0.5)
        with sim.nf4_library("always"):
            y = torch.ops.peftops.nf4_linear(*(t.to(device) if torch.is_tensor(t) else t for t in arguments)).cpu()
        assert torch.equal(y.isnan(), want.isnan()) and torch.equal(y.isinf(), want.isinf()), name
        assert torch.equal(y[want.isinf()].sign().double(), want[want.isinf()].sign())


@on_any_cuda
def test_by_library_fits_in(device):
    """Registration, autocast, empty products, and the switch."""
    layer = Layer(device, 40, 64, (20,), torch.bfloat16, 1, r=4, adapter=torch.float32, bias=True)
    u, B = torch.randn(20, 4, device=device), torch.randn(40, 4, device=device)
    op = torch.ops.peftops.nf4_linear.default
    with sim.nf4_library("always"):
        arguments = (layer.x.detach(), *layer.weight._arguments, 40, 64, layer.bias.detach(), u, B, 0.5)
        torch.library.opcheck(op, arguments)
        y = op(*arguments)
        with torch.autocast(device, torch.float16):  # x has been cast already, and is not once more
            assert torch.equal(y, op(*arguments))
        assert peftops.nf4_linear(layer.x[:0], layer.weight).shape == (0, 40)
    sentence = "nf4_linear: PEFTOPS_NF4_LIBRARY must be auto, always or never, not sometimes"
    with sim.nf4_library("sometimes"), pytest.raises(RuntimeError, match=sentence):
        layer()


def test_the_shorter_way_is_taken():
    """As csrc/kernels/cuda/nf4_crossover.cuh reckons it, for one multiprocessor of several GPUs."""
    if isinstance(sim.cuda_ops(), str):
        pytest.skip(sim.cuda_ops())
    gpus = {"A100": (80, 1), "H100": (90, 1), "B200": (100, 1), "RTX 5090": (120, 1)}
    BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
    cases = [  # rows, columns, dtype, ranks, and who calls the library
        (1024, 512, BF16, 0, {"H100", "B200"}),  # tensor cores that mma.sync does not exhaust
        (64, 512, BF16, 0, set()),  # too few rows to write the weight for
        (16, 512, BF16, 0, set()),
        (1, 512, FP32, 0, {"A100", "H100", "B200"}),  # fp32 tiles of 64 rows, where memory is fast
        (1, 100, BF16, 4, set(gpus)),  # as are those of ragged chunks
        (1, 100, FP16, 4, set()),  # fp16 does not hold every factor
    ]
    with sim.on_cpu_tensors(library="auto") as device:
        try:
            for m, k, dtype, r, wants in cases:
                layer = Layer("cpu", 512, k, (m,), dtype, 3, r=r)
                for name, gpu in gpus.items():
                    device.pretend(*gpu)
                    with torch.no_grad():
                        _, names = kernels_of(layer)
                    assert ("operands" in names) == (name in wants), (name, m, k, dtype)
            # 1024 outputs are too few blocks of threads for a whole GPU, not for a small one.
            layer = Layer("cpu", 1024, 64 * 20, (32,), BF16, 3)
            for multiprocessors, library in ((8, False), (108, True)):
                device.pretend(80, multiprocessors)
                assert ("operands" in kernels_of(lambda: layer(training=False))[1]) == library
        finally:
            device.pretend()
