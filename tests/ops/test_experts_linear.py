"""experts_linear: an expert's rows against a layer of that expert alone, by its bounds and, on the CPU, by its bits."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_nf4_linear import Layer as NF4Layer

import peftops
import reference
import sim
from group_layer import GroupLayer
from mxfp4_layer import MXFP4Layer
from numerics import assert_sums, on_cuda
from operator_samples import operators, samples
from packed_layer import PackedLayer
from packed_linear_tests import kernels_of
from peftops import NF4Tensor
from strategies import dtypes, ins, layouts, normal, outs, ranks, seeds, strided


class DenseLayer(PackedLayer):
    def narrow_forward(self):
        return 0.0

    def narrow_backward(self, keep=None):
        return 0.0


def nf4_layer(stack, layer, n, k):
    layer.dense = peftops.nf4_dequantize(stack, dtype=torch.float32).double()
    layer.size = layer.dense.abs()
    layer.absmax = stack.absmax.double().repeat_interleave(stack.block_size)[: stack.numel()].view(stack.shape)


def group_layer(stack, layer, n, k):
    codes, scales, zeros = (t.double().flatten(0, 1) for t in (stack.codes, stack.scales, stack.zeros))
    layer.pool = None
    layer.dense = reference.group_dequantize(codes, scales, zeros).view(stack.shape)
    layer.size = reference.group_dequantize(codes, scales, -zeros.abs()).view(stack.shape)


def mxfp4_layer(stack, layer, n, k):
    layer.dense = peftops.mxfp4_dequantize(stack, dtype=torch.float32).double()
    layer.size = layer.dense.abs()


def dense_layer(stack, layer, n, k):
    layer.dense, layer.size = stack.double(), stack.double().abs()


# How a stack is made of values, and how PackedLayer knows a layer over one of its weights.
FORMATS = {
    "nf4": (peftops.nf4_quantize, NF4Layer, nf4_layer),
    "nf4-single": (lambda w: peftops.nf4_quantize(w, double_quant=False, block_size=128), NF4Layer, nf4_layer),
    "group": (lambda w: peftops.group_quantize(w, group_size=8), GroupLayer, group_layer),
    "group-2": (lambda w: peftops.group_quantize(w, bits=2, group_size=64), GroupLayer, group_layer),
    "group-3": (lambda w: peftops.group_quantize(w, bits=3, group_size=32), GroupLayer, group_layer),
    "group-8": (lambda w: peftops.group_quantize(w, bits=8, group_size=64), GroupLayer, group_layer),
    "mxfp4": (peftops.mxfp4_quantize, MXFP4Layer, mxfp4_layer),
    "dense": (lambda w: w, DenseLayer, dense_layer),
    "transposed": (lambda w: w.transpose(1, 2).contiguous().transpose(1, 2), DenseLayer, dense_layer),
}
GROUPS = {
    "group": 8,
    "group-2": 64,
    "group-3": 32,
    "group-8": 64,
    "mxfp4": 32,
}  # what the number of columns is a multiple of
every_format = pytest.mark.parametrize("form", [form for form in FORMATS if form not in ("group-3", "group-8")])


class Experts:
    """A stack of layers and their rows: ``counts`` rows for each, and some more that are nobody's."""

    dx_by_library = False  # whether torch multiplies the decoded weights, on CUDA, for dx

    def __init__(
        self, device, form, counts, n, k, dtype, seed, *, rest=2, r=0, bias=False, adapter=torch.float32, layout="plain"
    ):
        make, self.kind, self.describe = FORMATS[form]
        experts, rows = len(counts), sum(counts) + rest
        draw = lambda shape, dtype, i: normal(shape, dtype, seed + i, device)
        leaf = lambda *args, how="plain": strided(draw(*args), how).requires_grad_()
        self.counts, self.weight = counts, make(draw((experts, n, k), dtype, 0))
        self.offsets = torch.tensor(counts, device=device).cumsum(0)
        self.x, self.g = leaf((rows, k), dtype, 1, how=layout), strided(draw((rows, n), dtype, 2), layout)
        self.bias = leaf((experts, n), adapter, 3) if bias else None
        self.lora_A = leaf((experts, r, k), adapter, 4) if r else None
        self.lora_B = leaf((experts, n, r), adapter, 5) if r else None
        self.scaling = 0.375 if r else 1.0

    def __call__(self, x=None, **kw):
        x, adapters = self.x if x is None else x, dict(lora_A=self.lora_A, lora_B=self.lora_B, scaling=self.scaling)
        return peftops.experts_linear(x, self.weight, self.offsets, self.bias, **(adapters | kw))

    leaves, gradients = PackedLayer.leaves, PackedLayer.gradients

    def each(self):
        """The place of each expert and of its rows, and its own layer over these."""
        (_, n, k), begin = self.weight.shape, 0
        whole = SimpleNamespace()
        self.describe(self.weight, whole, n, k)
        for e, count in enumerate(self.counts):
            layer, rows = self.kind.__new__(self.kind), slice(begin, begin + count)
            layer.weight = SimpleNamespace(shape=torch.Size((n, k)), block_size=getattr(self.weight, "block_size", 0))
            for name, value in vars(whole).items():
                setattr(layer, name, value[e] if torch.is_tensor(value) else value)
            layer.x, layer.g = self.x[rows].detach().requires_grad_(), self.g[rows]
            for name in ("bias", "lora_A", "lora_B"):
                stack = getattr(self, name)
                setattr(layer, name, None if stack is None else stack[e].detach().requires_grad_())
            layer.scaling, layer.dx_by_library = self.scaling, self.dx_by_library
            yield e, rows, layer
            begin += count

    def check(self):
        y = self()
        grads = self.gradients(y)
        assert y.dtype == self.x.dtype and y.is_contiguous() and y.shape == self.g.shape
        assert all(grad.dtype == self.leaves()[name].dtype for name, grad in grads.items())
        for e, rows, layer in self.each():
            (want_y, want), (size_y, size), terms = layer.reference(), layer.magnitudes(), layer.terms()
            assert_sums(y[rows], want_y, size_y, terms["y"], layer.narrow_forward())
            assert_sums(grads["x"][rows], want["x"], size["x"], terms["x"], layer.narrow_backward())
            for name in grads.keys() - {"x"}:
                assert_sums(grads[name][e], want[name], size[name], terms[name])
                assert rows.start < rows.stop or not grads[name][e].any()
        assert not y[sum(self.counts) :].any() and not grads["x"][sum(self.counts) :].any()


@given(
    data=st.data(),
    form=st.sampled_from(list(FORMATS)),
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=5),
    n=outs,
    k=ins,
    dtype=dtypes,
    bias=st.booleans(),
    rest=st.integers(0, 3),
    layout=layouts,
    seed=seeds,
)
def test_matches_reference(device, data, form, counts, n, k, dtype, bias, rest, layout, seed):
    k = -(-k // GROUPS.get(form, 1)) * GROUPS.get(form, 1)
    r = data.draw(st.one_of(st.just(0), ranks), label="r")
    adapter = data.draw(st.sampled_from([dtype, torch.float32]), label="adapter dtype")
    Experts(device, form, counts, n, k, dtype, seed, rest=rest, r=r, bias=bias, adapter=adapter, layout=layout).check()


LOADS = {
    "nobody": [0, 0, 0],
    "one has all": [0, 0, 30, 0],
    "one row": [0, 1, 0],
    "one expert": [17],
    "many, few rows": [i % 7 == 3 for i in range(256)],
    "uneven": [1, 300, 0, 4, 5, 2],
}


@pytest.mark.parametrize("counts", LOADS.values(), ids=LOADS)
@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_load(device, form, counts, dtype):
    n, k = (24, 64) if sim.active or len(counts) > 9 else (96, 192)
    counts = [min(int(c), 70) for c in counts] if sim.active else list(map(int, counts))
    Experts(device, form, counts, n, k, dtype, 3, r=4, bias=True).check()


LIBRARY_FORMATS = ["nf4", "nf4-single", "group", "group-2", "group-3", "group-8", "mxfp4"]


@pytest.mark.parametrize("counts", [*LOADS.values(), [3, 0, 0, 2, 0]], ids=[*LOADS, "few of them"])
@pytest.mark.parametrize("form", LIBRARY_FORMATS)
@pytest.mark.parametrize("r", [0, 4])
def test_dx_by_library(device, form, counts, r):
    """Torch's grouped product over the weights of those experts that have rows; rows of nobody have zeros."""
    counts = [min(int(c), 70) for c in counts]
    layers = Experts(device, form, counts, 24, 192, torch.bfloat16, 3, r=r, bias=True)
    layers.dx_by_library = on_cuda(layers.x)
    with sim.nf4_library("always"):
        layers.check()
        y = layers()
        _, names = kernels_of(lambda: layers.gradients(y))
    assert names is None or ("stack_decode" in names and "_back" not in names), names


@pytest.mark.parametrize("form", LIBRARY_FORMATS)
@pytest.mark.parametrize("capability, way, decoded", [(90, "never", False), (90, "auto", True), (80, "auto", False)])
def test_who_multiplies_dx(device, form, capability, way, decoded):
    """On an H100 torch does, unless the NF4 kernel needs one short wave; elsewhere its product waits for the host."""
    if not sim.active:
        pytest.skip("there is no choice, or no report of it")
    layers = Experts(device, form, [3, 0, 5], 24, 192, torch.bfloat16, 3)
    layers.dx_by_library = decoded = decoded and not form.startswith("nf4")
    chip = sim.simulator()
    chip.pretend(capability, 132)
    try:
        with sim.nf4_library(way):
            layers.check()
            y = layers()
            _, names = kernels_of(lambda: layers.gradients(y))
    finally:
        chip.pretend()
    assert ("stack_decode" in names) == decoded and ("_back" in names) != decoded, names


@pytest.mark.parametrize("offsets", [[5, 2, 4], [9, -3, 2], [3, 99, 99]])
def test_the_library_has_no_group_of_less_than_no_rows(device, offsets):
    """Of offsets that decrease or exceed the rows, which CUDA does not check: rows beyond the last are zero."""
    if not on_cuda(torch.empty(0, device=device)):
        pytest.skip("the CPU refuses them")
    blocks, scales = peftops.mxfp4_quantize(normal((3 * 24, 64), torch.float32, 1, device))._arguments
    g, ends = normal((10, 24), torch.bfloat16, 2, device), torch.tensor(offsets, device=device)
    with sim.nf4_library("always"):
        dx = torch.ops.peftops.experts_mxfp4_backward(g, blocks, scales, ends, None, None)
    assert dx.isfinite().all() and not dx[offsets[-1] :].any()


def test_slots_without_an_expert_have_no_rows(device):
    """They end where the last expert ended, and so torch is given no group of less than no rows."""
    if not sim.active:
        pytest.skip("torch's product on CUDA cannot be replaced")
    layers, given = Experts(device, "mxfp4", [3, 0, 0, 2, 0], 24, 64, torch.bfloat16, 3), []

    def grouped(left, right, offs=None, bias=None, out_dtype=None):
        given.append(offs.tolist())
        return left.new_zeros(len(left), right.shape[2])

    library = torch.library.Library("aten", "IMPL")
    try:
        library.impl("_grouped_mm", grouped, "CPU", allow_override=True)
        with sim.nf4_library("always"):
            layers.gradients(layers())
    finally:
        library._destroy()
    assert given == [[3, 5, 5, 5, 5]]


@pytest.mark.parametrize("dtype, n, k", [(torch.float32, 24, 64), (torch.float16, 24, 64), (torch.bfloat16, 20, 64)])
def test_the_library_takes_bfloat16_in_whole_packs(device, dtype, n, k):
    with sim.nf4_library("always"):
        Experts(device, "mxfp4", [3, 0, 5], n, k, dtype, 3, r=4).check()


def views(stack):
    """Its experts as weights of their own; of double-quantised ones with plain absmax, which share no block."""
    if isinstance(stack, NF4Tensor) and stack.double_quant:
        stack = NF4Tensor(stack.packed, stack.absmax, None, None, stack.block_size, stack.shape, stack.dtype)
    return [stack[e] for e in range(stack.shape[0])]


@pytest.mark.parametrize("n, k", [(33, 128), (46, 64), (288, 576), (16, 40)])
@pytest.mark.parametrize("form", [form for form in FORMATS if form.startswith(("nf4", "group", "mxfp4"))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_bits_of_each_layer_alone(device, form, n, k, dtype):
    """On every instruction set: the same kernel does them, whatever its neighbours in the stack."""
    if sim.active or device == "cuda" or k % GROUPS.get(form, 1) or n * k % 128:
        pytest.skip("on CUDA, tiles differ; or the format does not have such columns, or experts share a block")
    layers = Experts(device, form, [5, 0, 1, 4, 33], n, k, dtype, 7, r=5, bias=True)
    grads = layers.gradients(layers())
    op = getattr(peftops, f"{layers.weight.FORMAT}_linear")
    for (e, rows, layer), weight in zip(layers.each(), views(layers.weight), strict=True):
        for compute in ("int8", "float"):
            own = op(
                layer.x,
                weight,
                layer.bias,
                lora_A=layer.lora_A,
                lora_B=layer.lora_B,
                scaling=layer.scaling,
                compute=compute,
            )
            assert torch.equal(layers(compute=compute)[rows], own)
        for name, grad in layer.gradients(own).items():
            if name != "bias":  # torch's own sum
                assert torch.equal(grads[name][rows if name == "x" else e], grad), name


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_number_of_threads(device, threads, form, dtype):
    layers, runs = Experts(device, form, [0, 400, 1, 3, 0, 37, 2], 200, 320, dtype, 1, r=16, bias=True), []
    for count in (1, 2, 3, 5):
        threads(count)
        y = layers()
        runs.append((y, *layers.gradients(y).values()))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_offsets_of_either_type(device, dtype):
    layers = Experts(device, "nf4", [3, 0, 5], 32, 64, torch.float32, 1)
    want = layers()
    layers.offsets = layers.offsets.to(dtype)
    assert torch.equal(layers(), want)


def test_gradients_that_are_not_needed_are_not_made(device):
    layers = Experts(device, "nf4", [3, 0, 5], 32, 64, torch.float32, 1, r=4, bias=True)
    full = layers.gradients(layers())
    for name, leaf in layers.leaves().items():
        for other in layers.leaves().values():
            other.requires_grad_(other is leaf)
        (grad,) = torch.autograd.grad(layers(), leaf, layers.g)
        assert torch.equal(grad, full[name])


def test_what_backward_keeps(device):
    """x (the tensor, no copy) with an adapter that trains, u = x A^T in float32, the weight's own parts."""
    for r in (0, 4):
        layers = Experts(device, "nf4", [3, 0, 5], 32, 64, torch.bfloat16, 1, r=r)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=saved: to.append(t) or t, lambda t: t):
            layers()
        own = {t.data_ptr() for t in (*layers.weight.parts().values(), layers.offsets, *layers.leaves().values())}
        extra = [t for t in saved if t.data_ptr() not in own]
        assert [(t.dtype, t.shape) for t in extra] == ([(torch.float32, (10, r))] if r else [])
        assert (layers.x.data_ptr() in {t.data_ptr() for t in saved}) == bool(r)


def test_second_derivative_raises_instead_of_being_wrong(device):
    layers = Experts(device, "group", [3, 2], 32, 32, torch.float32, 1, r=2)
    (dx,) = torch.autograd.grad(layers().square().sum(), layers.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@every_format
def test_compiles_without_a_graph_break(device, form):
    layers = Experts(device, form, [3, 0, 5], 32, 64, torch.float32, 1, r=4, bias=True)
    want = layers()
    compiled = torch.compile(lambda x: layers(x), fullgraph=True, backend="aot_eager")
    y = compiled(layers.x)
    wants, grads = layers.gradients(want), layers.gradients(y)
    assert torch.equal(y, want) and all(torch.equal(grads[name], wants[name]) for name in grads)


@pytest.mark.parametrize("name", sorted(name for name in operators() if name.startswith("experts_")))
def test_registration(device, name):
    torch.library.opcheck(operators()[name], samples()[name])


def test_autocast_casts_x_and_a_dense_weight(device):
    for form in ("nf4", "dense"):
        layers = Experts(device, form, [3, 0, 5], 32, 64, torch.float32, 1, r=4, bias=True)
        with torch.autocast(device, torch.bfloat16):
            y = layers()
        assert y.dtype == torch.bfloat16
        if form == "dense":
            layers.weight = layers.weight.bfloat16()
        assert torch.equal(y, layers(layers.x.bfloat16()))


def test_bad_input(device):
    layers = Experts(device, "nf4", [3, 0, 2], 32, 64, torch.float32, 1, r=4, rest=0)
    x, A, B = (t.detach() for t in (layers.x, layers.lora_A, layers.lora_B))
    weight, offsets = layers.weight, layers.offsets

    def call(x=x, weight=weight, offsets=offsets, bias=None, lora_A=A, lora_B=B, **kw):
        return peftops.experts_linear(x, weight, offsets, bias, lora_A=lora_A, lora_B=lora_B, **kw)

    with torch.device(device):
        cases = (
            (
                dict(weight=torch.randn(32, 64)),
                r"weight must have three dims, \[experts, out, in\], not shape \[32, 64\]",
            ),
            (
                dict(weight=torch.nn.Parameter(torch.randn(3, 32, 64))),
                "weight requires a gradient, but this op makes none",
            ),
            (dict(x=x.to("meta")), "x is on meta, weight on"),
            (dict(x=x[:, 1:]), r"x must have shape \[rows, 64\], not \[5, 63\]"),
            (dict(x=x[0]), r"x must have shape \[rows, 64\], not \[64\]"),
            (dict(offsets=offsets[:2]), r"offsets must be int32 or int64 of shape \[3\], .*, not torch.int64 \[2\]"),
            (
                dict(offsets=offsets.float()),
                r"offsets must be int32 or int64 of shape \[3\], .*, not torch.float32 \[3\]",
            ),
            (dict(bias=torch.zeros(32)), r"bias must have shape \[3, 32\], not \[32\]"),
            (dict(lora_B=None), "lora_A and lora_B belong together, but lora_B is None"),
            (dict(lora_A=A[:, :, 1:]), r"lora_A must have shape \[3, r, 64\], not \[3, 4, 63\]"),
            (dict(lora_A=A[:, :0]), r"lora_A must have shape \[3, r, 64\], not \[3, 0, 64\]"),
            (dict(lora_B=B[:2]), r"lora_B must have shape \[3, 32, 4\], not \[2, 32, 4\]"),
            (dict(compute="int4"), "compute must be 'float' or 'int8', not 'int4'"),
        )
    for wrong, message in cases:
        with pytest.raises(ValueError, match=f"experts_linear: {message}"):
            call(**wrong)
    with pytest.raises(TypeError, match="experts_linear: x is torch.float32, weight torch.bfloat16"):
        call(weight=torch.randn(3, 32, 64, dtype=torch.bfloat16, device=device))
    with pytest.raises(RuntimeError, match="x must be float32, bfloat16 or float16, not Double"):
        call(x=x.double(), lora_A=None, lora_B=None)
    if sim.active or device == "cuda":
        return  # nobody waits for the device to say what is wrong
    for values, message in (
        ([3, 2, 5], r"offsets must not decrease, but offsets\[1\] is 2 after 3"),
        ([-1, 3, 5], r"offsets must not decrease, but offsets\[0\] is -1 after 0"),
        ([3, 3, 6], r"offsets must not exceed the 5 rows, but offsets\[2\] is 6"),
    ):
        for adapters in ({}, dict(lora_A=None, lora_B=None)):
            with pytest.raises(RuntimeError, match=message):
                call(offsets=torch.tensor(values), **adapters)


def test_a_packed_weight_without_a_product_is_refused():

    class Unknown(peftops.ops.packed_tensor.PackedTensor):
        PARTS, SETTINGS, BY_ROW, LAYOUT, NAME, INSTEAD = ("p",), (), ("p",), ("shape",), "an Unknown", ""

    stack = Unknown._make((torch.zeros(2, 4, 8),), (), torch.Size((2, 4, 8)), torch.float32)
    sentence = "weight must be dense or one of NF4Tensor, GroupQuantTensor, MXFP4Tensor.*, not a Unknown"
    with pytest.raises(TypeError, match=sentence):
        peftops.experts_linear(torch.zeros(3, 8), stack, torch.tensor([1, 3]))
