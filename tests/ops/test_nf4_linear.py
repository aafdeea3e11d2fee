import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import peftops
import reference
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
from packed_layer import PackedLayer
from packed_linear_tests import Int8Tests, PackedLinearTests, check_what_is_not_finite
from peftops import _C
from strategies import block_sizes, dtypes, ins, layouts, normal, outs, ranks, rows, seeds, strided

CODE8 = 124.115  # the factor of codes in 8 bits, as in csrc/kernels/cpu/nf4_columns.h
TINY = torch.finfo(torch.bfloat16).tiny  # bf16 products take what is smaller for zero

leads = st.one_of(rows.map(lambda m: (m,)), st.sampled_from([(), (2, 3), (1, 0, 4), (2, 1, 9)]))


class Layer(PackedLayer):
    """A layer over an NF4 weight."""

    def __init__(self, device, n, k, lead, dtype, seed, *, block_size=64, double_quant=True, **kw):
        weight = normal((n, k), dtype, seed, device)
        weight = peftops.nf4_quantize(weight, block_size=block_size, double_quant=double_quant)
        super().__init__(weight, device, lead, dtype, seed, lora_columns=k, **kw)
        self.dense = peftops.nf4_dequantize(self.weight, dtype=torch.float32).double()
        self.size = self.dense.abs()
        self.absmax = self.weight.absmax.double().repeat_interleave(block_size)[: n * k].view(n, k)

    def op(self, *args, **kw):
        return peftops.nf4_linear(*args, **kw)

    def narrow_forward(self):
        """What multiplying in 16 bits adds to the error of y. In int16: the rounding of x to 1/16384 of the largest
        in 128 columns at most, and that of the codes. In bf16: the rounding of the weight."""
        x, k = self.x.detach(), self.weight.shape[1]
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

    def narrow_backward(self, keep=None):
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


class TestNF4Linear(PackedLinearTests, Int8Tests):
    name, layer, rounded_on_cuda, ragged = "nf4_linear", Layer, True, 1000


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


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", [32, 64, 256])
@pytest.mark.parametrize("n", [2, 33, 46, 288])
@pytest.mark.parametrize("k", [64, 96, 192, 576, 4032, 4160])
def test_one_row_against_rows_in_pairs(device, n, k, block_size, double_quant):
    """Rows of the weight that end in the middle of a strip are read two at a time, if there are two."""
    layer = Layer(device, n, k, (1,), torch.float32, n + k, block_size=block_size, double_quant=double_quant, bias=True)
    layer.check()
    for column in (0, k - 1):  # no lane of another row multiplies an infinity by nothing
        with torch.no_grad():
            layer.x.zero_()[0, column] = torch.inf
        assert torch.equal(layer().double().nan_to_num(nan=7.0), layer.reference()[0].nan_to_num(nan=7.0))


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


@pytest.mark.parametrize("m", [1, 3, 9, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("k", [320, 100])
def test_what_is_not_finite_comes_through(device, m, dtype, bad, k):
    check_what_is_not_finite(Layer(device, 64, k, (m,), dtype, 5, r=4, adapter=torch.float32), bad)


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


def takes_int8(layer):
    return "avx512" in _C.isa() and not on_cuda(layer.x) and len(layer.x) > 4 and layer.weight.shape[1] % 32 == 0


@given(n=outs, k=ins, m=rows, dtype=dtypes, block_size=block_sizes, double_quant=st.booleans(), bias=st.booleans(),
       r=st.one_of(st.just(0), ranks), layout=layouts, seed=seeds)  # fmt: skip
def test_int8_matches_reference(device, n, k, m, dtype, block_size, double_quant, bias, r, layout, seed):
    """Codes are rounded to a table of 8 bits, from which the reference is made; what is rounded of x, to half a step of
    the largest in as many columns as share an absmax in every row."""
    layer = Layer(device, n, k, (m,), dtype, seed, block_size=block_size, double_quant=double_quant, r=r, bias=bias,
                  layout=layout, adapter=torch.float32)  # fmt: skip
    y, narrow = layer(compute="int8"), layer.narrow_forward()
    if takes_int8(layer):
        packed = layer.weight.packed
        codes = torch.stack([packed >> 4, packed & 15], -1).flatten()[: n * k].view(n, k).long()
        layer.dense = (reference.NF4.double() * CODE8).round().to(device)[codes] / CODE8 * layer.absmax
        segment = min(block_size, 128, k & -k)
        step = segment_max(layer.x.detach().double(), -1, segment) / 127
        narrow = (step / 2 * (1 + 4 * FP32)) @ layer.dense.abs().T
    assert_sums(y, layer.reference()[0], layer.magnitudes()[0], k + r + 8, narrow)


def test_int8_error_is_what_the_docstring_says(device):
    layer = Layer(device, 512, 2048, (64,), torch.float32, 3)
    with torch.no_grad():
        want = layer.x.double() @ layer.dense.T
        error = ((layer(compute="int8").double() - want).norm() / want.norm()).item()
    assert 0.007 < error < 0.0085 if takes_int8(layer) else error < 1e-5


def test_bad_input(device):
    x, weight = torch.randn(5, 96, device=device), peftops.nf4_quantize(torch.randn(96, device=device))
    with pytest.raises(ValueError, match=r"weight must have two dims, \[out, in\], not shape \[96\]"):
        peftops.nf4_linear(x, weight)
