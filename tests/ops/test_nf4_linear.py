import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import peftops
import reference
import sim
from numerics import (
    BF16,
    CODE16,
    FP32,
    HALF_STEP_CODE,
    assert_exact,
    assert_sums,
    code_error,
    int16_error,
    isa,
    on_cuda,
    product_of,
    segment_max,
    takes_int8,
)
from packed_layer import PackedLayer
from packed_linear_tests import (
    Int8Tests,
    PackedLinearTests,
    check_by_library,
    check_what_is_not_finite,
    kernels_of,
    on_any_cuda,
)
from strategies import block_sizes, dtypes, ins, layouts, normal, outs, ranks, rows, seeds, strided

CODE8 = 124.115  # the factor of codes in 8 bits, as in csrc/kernels/cpu/nf4_decode.h
TINY = torch.finfo(torch.bfloat16).tiny  # bf16 products take what is smaller for zero

leads = st.one_of(rows.map(lambda m: (m,)), st.sampled_from([(), (2, 3), (1, 0, 4), (2, 1, 9)]))


class Layer(PackedLayer):
    """A layer over an NF4 weight."""

    def __init__(self, device, n, k, lead, dtype, seed, *, block_size=64, double_quant=True, values=None, **kw):
        weight = normal((n, k), dtype, seed, device) if values is None else values.to(device)
        weight = peftops.nf4_quantize(weight, block_size=block_size, double_quant=double_quant)
        super().__init__(weight, device, lead, dtype, seed, lora_columns=k, **kw)
        self.dense = peftops.nf4_dequantize(self.weight, dtype=torch.float32).double()
        self.size = self.dense.abs()
        self.absmax = self.weight.absmax.double().repeat_interleave(block_size)[: n * k].view(n, k)

    def op(self, *args, **kw):
        return peftops.nf4_linear(*args, **kw)

    def narrow_forward(self):
        """What multiplying in 16 bits adds to the error of y. In int16: the rounding of x, and that of the codes. In
        bf16: the rounding of the weight."""
        x, k = self.x.detach(), self.weight.shape[1]
        if self.by_library:
            return self.narrow_operands()
        if on_cuda(x):  # 16-bit x meets the codes rounded to its dtype, where chunks of 64 columns share an absmax
            chunks = x.dtype != torch.float32 and k % 64 == 0 and self.weight.block_size >= 64
            return code_error(x.dtype) * x.double().abs() @ self.dense.abs().T if chunks else 0.0
        m = x.numel() // k
        kind = product_of(x, k % 32 == 0, few=m <= 4)
        x = x.double()
        if kind == "fp32":
            return 0.0
        if kind == "bf16" and isa() == "avx512bf16" and m <= 24:  # the codes alone are rounded
            return (code_error(torch.bfloat16) * x.abs() + TINY) @ self.dense.abs().T
        if kind == "bf16":
            return (BF16 * x.abs() + TINY) @ self.dense.abs().T
        x_error = int16_error(x)
        return x_error @ self.dense.abs().T + (x.abs() + x_error) @ (CODE16 * self.absmax.abs()).T

    def narrow_backward(self, keep=None):
        """The same for dx, where int16 scales the rows of the weight to the largest absmax of 64 at most."""
        n, k = self.weight.shape
        if self.dx_by_library:
            return self.narrow_gradient()
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
        g_error = int16_error(g)
        w_error = HALF_STEP_CODE * segment_max(self.absmax, 0, 64)
        return g_error @ self.dense.abs() + (g.abs() + g_error) @ w_error


class TestNF4Linear(PackedLinearTests, Int8Tests):
    name, layer, rounded_on_cuda, ragged = "nf4_linear", Layer, True, 1000


@given(
    data=st.data(),
    n=outs,
    k=ins,
    lead=leads,
    dtype=dtypes,
    block_size=block_sizes,
    double_quant=st.booleans(),
    bias=st.booleans(),
    layout=layouts,
    seed=seeds,
)
def test_matches_reference(device, data, n, k, lead, dtype, block_size, double_quant, bias, layout, seed):
    r = data.draw(st.one_of(st.just(0), ranks), label="r")
    adapter = data.draw(st.sampled_from([dtype, torch.float32]), label="adapter dtype")
    Layer(
        device,
        n,
        k,
        lead,
        dtype,
        seed,
        block_size=block_size,
        double_quant=double_quant,
        r=r,
        adapter=adapter,
        bias=bias,
        layout=layout,
    ).check()


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
    drawn = int(torch.randint(0, 2**62, (), device=device))  # what the op will draw
    keep = reference.dropout_mask(drawn, m, k, p).double().to(device) / (1 - p)
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
def test_a_weight_without_rows_or_columns(device, dtype):
    """Nothing of it is read, and what is left is the low-rank term."""
    op, nothing = torch.ops.peftops, (torch.zeros(0, dtype=torch.uint8, device=device), torch.zeros(0, device=device))
    thin, wide = torch.randn(20, 3, device=device), torch.randn(3, 64, device=device)
    dx = op.nf4_linear_backward(thin.new_zeros(20, 0, dtype=dtype), *nothing, None, None, 64, 64, thin, wide, 0.0, None)
    y = op.nf4_linear(thin.new_zeros(20, 0, dtype=dtype), *nothing, None, None, 64, 64, 0, None, thin, wide.T, 1.0)
    for got in (dx, y):
        assert_sums(got, thin.double() @ wide.double(), thin.double().abs() @ wide.double().abs(), 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_keeps_x_itself_and_a_thin_product(device, dtype):
    """Saved: x (the tensor, no copy), u = x A^T in float32, a seed. Nothing of the size of the weight."""
    layer = Layer(device, 256, 128, (100,), dtype, 1, r=8, bias=True, adapter=torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(dropout_p=0.5, training=True)
    inputs = [layer.x, layer.lora_A, layer.lora_B, *layer.weight.parts().values()]
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


@given(
    n=outs,
    k=ins,
    m=rows,
    dtype=dtypes,
    block_size=block_sizes,
    double_quant=st.booleans(),
    bias=st.booleans(),
    r=st.one_of(st.just(0), ranks),
    layout=layouts,
    seed=seeds,
)
def test_int8_matches_reference(device, n, k, m, dtype, block_size, double_quant, bias, r, layout, seed):
    """Codes are rounded to a table of 8 bits, from which the reference is made; what is rounded of x, to half a step of
    the largest in as many columns as share an absmax in every row."""
    layer = Layer(
        device,
        n,
        k,
        (m,),
        dtype,
        seed,
        block_size=block_size,
        double_quant=double_quant,
        r=r,
        bias=bias,
        layout=layout,
        adapter=torch.float32,
    )
    y, narrow = layer(compute="int8"), layer.narrow_forward()
    if takes_int8(layer.x) and k % 32 == 0:
        packed = layer.weight.packed
        codes = torch.stack([packed >> 4, packed & 15], -1).flatten()[: n * k].view(n, k).long()
        layer.dense = (reference.NF4.double() * CODE8).round().to(device)[codes] / CODE8 * layer.absmax
        segment = min(block_size, 128, k & -k)
        step = segment_max(layer.x.detach().double(), -1, segment) / 127
        narrow = (step / 2 * (1 + 4 * FP32)) @ layer.dense.abs().T
    assert_sums(y, layer.reference()[0], layer.magnitudes()[0], k + r + 8, narrow)


def test_int8_error_is_what_the_docstring_says(device):
    layer = Layer(device, 512, 2048, (16,), torch.float32, 3)
    with torch.no_grad():
        want = layer.x.double() @ layer.dense.T
        error = ((layer(compute="int8").double() - want).norm() / want.norm()).item()
    assert 0.006 < error < 0.0085 if takes_int8(layer.x) else error < 1e-5


def test_bad_input(device):
    x, weight = torch.randn(5, 96, device=device), peftops.nf4_quantize(torch.randn(96, device=device))
    with pytest.raises(ValueError, match=r"weight must have two dims, \[out, in\], not shape \[96\]"):
        peftops.nf4_linear(x, weight)


@on_any_cuda
@given(
    data=st.data(),
    n=outs,
    k=ins,
    lead=leads,
    dtype=dtypes,
    block_size=block_sizes,
    double_quant=st.booleans(),
    bias=st.booleans(),
    layout=layouts,
    seed=seeds,
)
def test_by_library_matches_reference(device, data, n, k, lead, dtype, block_size, double_quant, bias, layout, seed):
    r = data.draw(st.one_of(st.just(0), ranks), label="r")
    adapter = data.draw(st.sampled_from([dtype, torch.float32, torch.float16]), label="adapter dtype")
    check_by_library(
        Layer(
            device,
            n,
            k,
            lead,
            dtype,
            seed,
            block_size=block_size,
            double_quant=double_quant,
            r=r,
            adapter=adapter,
            bias=bias,
            layout=layout,
        )
    )


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
        x, u, lora_B, bias = (
            {
                **tensors,
                name: tensors[name].index_put(
                    tuple(map(torch.tensor, at)), torch.tensor(bad, dtype=tensors[name].dtype)
                ),
            }[key]
            for key in tensors
        )
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
    """As csrc/kernels/cuda/crossover.cuh has it, for one multiprocessor of several GPUs."""
    if isinstance(sim.cuda_ops(), str):
        pytest.skip(sim.cuda_ops())
    gpus = {"A100": (80, 1), "H100": (90, 1), "B200": (100, 1), "RTX 5090": (120, 1)}
    BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
    cases = [  # rows, columns, dtype, ranks, and who calls the library
        (1024, 512, BF16, 0, set(gpus)),  # what is decoded serves many rows
        (64, 512, BF16, 0, set()),  # too few rows to write the weight for
        (16, 512, BF16, 0, set()),
        (1, 512, FP32, 0, set(gpus)),  # fp32 tiles of 64 rows
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
                    decoded = "operands" in names or "dequantize" in names
                    assert decoded == (name in wants), (name, m, k, dtype)
        finally:
            device.pretend()
