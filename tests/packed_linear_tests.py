"""What holds of every linear layer over a packed weight, whatever its format and its low-rank term. The test file of
each op makes a subclass, whose ``layer`` is a PackedLayer; what only that op does is tested beside it."""

from typing import ClassVar

import pytest
import torch

import sim
from conftest import CUDA_DEVICES
from group_layer import FEW
from numerics import FP32, assert_sums, isa, on_cuda
from peftops import _C
from strategies import normal


def check_what_is_not_finite(layer, bad, dense=None):
    """It comes through in the rows that hold it, as plain arithmetic has it, and nowhere else. ``dense`` is the weight
    as decoded in float32, where that may hold other zeros than the reference."""
    last = len(layer.x) - 1
    with torch.no_grad():
        layer.x[last, 70] = bad
        layer.g[last, 50] = bad
    layer.dense = layer.dense if dense is None else dense
    y = layer()
    want_y, want = layer.reference()
    for got, ref in ((y, want_y), (layer.gradients(y)["x"], want["x"])):
        assert got[:last].isfinite().all()
        assert torch.equal(got[last].isnan(), ref[last].isnan())
        assert torch.equal(got[last].isinf(), ref[last].isinf())
        infinite = ref[last].isinf()
        assert torch.equal(got[last][infinite].sign().double(), ref[last][infinite].sign())


on_any_cuda = pytest.mark.parametrize("device", CUDA_DEVICES, indirect=True)


def kernels_of(call):
    """Its result and, in the simulator, what was launched for it; elsewhere that cannot be told."""
    if not sim.active:
        return call(), None
    device = sim.simulator()
    device.forget()
    result = call()
    return result, " ".join(report["kernel"] for report in device.reports())


def check_by_library(layer, *args, **kw):
    """The library's product, and no kernel of ours but those for its operands; fp16 has none for every factor."""
    exact = layer.lora_A is None and (layer.bias is None or layer.bias.dtype == torch.float16)
    layer.by_library, layer.dx_by_library = layer.x.dtype != torch.float16 or exact, True
    with sim.nf4_library("always"):
        with torch.no_grad():
            y, names = kernels_of(layer)
        layer.check(*args, **kw)
    if names is not None and y.numel():
        decoded = "operands" in names or "dequantize" in names
        assert ("_rows" in names) != layer.by_library and decoded == layer.by_library, names


class PackedLinearTests:
    drop: ClassVar = dict(dropout_p=0.5, training=True)  # empty for an op that knows no dropout
    rounded_on_cuda = False  # whether CUDA rounds the weight to bfloat16
    ragged = 1024  # columns that are no whole number of panels, if the format has such

    def test_a_row_does_not_depend_on_its_neighbours(self, device):
        """Among more than a few rows: the tile that a row falls into changes nothing."""
        layer = self.layer(device, 96, 320, (40,), torch.float32, 1, r=3)
        whole = layer()
        for begin, end in ((0, FEW + 1), (7, 20), (20, 40)):
            assert torch.equal(layer(layer.x[begin:end]), whole[begin:end])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_same_bits_for_any_number_of_threads(self, device, threads, dtype):
        for m, n, k in ((1, 700, 320), (37, 333, self.ragged), (300, 640, 576)):
            layer = self.layer(device, n, k, (m,), dtype, 1, r=16, bias=True)
            runs = []
            for count in (1, 2, 3, 5):
                threads(count)
                torch.manual_seed(0)
                y = layer(**self.drop)
                grads = layer.gradients(y)
                del grads["bias"]  # torch's own sum
                runs.append((y, *grads.values()))
            assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_16_bit_products_have_no_bias(self, device, dtype):
        """Roundings average out over many results; a wrong factor would not. 2e-5 is a third of one step of int16.
        A weight rounded to bf16 has few distinct values, whose errors average out less."""
        layer = self.layer(device, 512, 1024, (64,), dtype, 11)
        narrow = self.rounded_on_cuda if on_cuda(layer.x) else isa().endswith("bf16")
        bound = 1e-4 if narrow and dtype == torch.bfloat16 else 2e-5
        y = layer()
        want_y, want = layer.reference()
        for got, ref in ((y, want_y), (layer.gradients(y)["x"], want["x"])):
            off = got.detach().double() - ref.to(dtype)  # the result's own rounding may have a bias
            assert abs(((off * ref).sum() / ref.square().sum()).item()) < bound

    @pytest.mark.parametrize("m", [2, 24])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_tiny_and_huge_activations_keep_their_precision(self, device, m, dtype):
        """int16 scales by the largest of a segment; where that has no reciprocal in range, fp32 takes over."""
        info = torch.finfo(dtype)
        for factor in (info.tiny, info.smallest_normal * 64, info.max / 1024):
            layer = self.layer(device, 64, 256, (m,), dtype, 5)
            with torch.no_grad():
                layer.x.mul_(factor)
            want, size = layer.reference()[0], layer.magnitudes()[0]
            if want.abs().max() < info.max:
                assert_sums(layer(), want, size, layer.terms()["y"], layer.narrow_forward())

    @pytest.mark.parametrize("m", [1, 4, 24])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("outlier", [1e2, 2e3, 3e4])
    def test_outliers_leave_what_stands_beside_them(self, device, m, dtype, outlier):
        """Some columns of activations are a thousand times the others, and the weight may have nothing there: what is
        left must be as precise as without them. So must gradients."""
        values = normal((96, 512), dtype, 6)
        values[:, 7::101] = 0
        values[7::101] = 0
        layer = self.layer(device, 96, 512, (m,), dtype, 5, values=values)
        outlier = min(outlier, torch.finfo(dtype).max / 32)  # a row of them has a sum
        with torch.no_grad():
            for tensor in (layer.x, layer.g):
                tensor[:, 7::101] = outlier
                tensor[m // 2, 3] = -outlier
        y = layer()
        want_y, want = layer.reference()
        size_y, size = layer.magnitudes()
        assert_sums(y, want_y, size_y, layer.terms()["y"], layer.narrow_forward())
        assert_sums(layer.gradients(y)["x"], want["x"], size["x"], layer.terms()["x"], layer.narrow_backward())

    @pytest.mark.parametrize("m", [2, 4, 13, 40])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_bits_do_not_depend_on_what_neighbours_hold(self, device, m, dtype):
        k = 320 if m > FEW or sim.active else 9216  # more columns than few rows are multiplied with at a time
        layer = self.layer(device, 32, k, (m,), dtype, 1)
        info = torch.finfo(dtype)

        def results():
            y = layer()
            return y.detach(), layer.gradients(y)["x"]

        before = results()
        bads = (float("nan"), info.max) if sim.active else (float("nan"), float("inf"), info.max, info.tiny * 2, 3e4)
        for row in sorted({0, m // 2, m - 1}):
            for bad in bads:
                kept = [t.detach()[row].clone() for t in (layer.x, layer.g)]
                with torch.no_grad():
                    for t in (layer.x, layer.g):
                        t[row, slice(None) if bad == info.tiny * 2 else 20] = bad
                after = results()
                with torch.no_grad():
                    for t, old in zip((layer.x, layer.g), kept, strict=True):
                        t[row] = old
                others = [i for i in range(m) if i != row]
                for old, new in zip(before, after, strict=True):
                    assert torch.equal(old[others], new[others]), f"row {row} = {bad}"

    @pytest.mark.parametrize("m", [2, 24])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_constants_times_constants(self, device, m, dtype):
        """The largest sums that there are: no accumulator may overflow on the way, and all these numbers are exact."""
        values = torch.ones(96, 512, dtype=dtype)
        values[:, -1] = 0  # a group needs two values
        layer = self.layer(device, 96, 512, (m,), dtype, 1, values=values)
        with torch.no_grad():
            layer.x.fill_(1.0), layer.g.fill_(-1.0)
        y = layer()
        want_y, want = layer.reference()
        size_y, size = layer.magnitudes()
        assert_sums(y, want_y, size_y, layer.terms()["y"], layer.narrow_forward())
        assert_sums(layer.gradients(y)["x"], want["x"], size["x"], layer.terms()["x"], layer.narrow_backward())

    def test_inputs_are_left_alone(self, device):
        layer = self.layer(device, 64, 96, (20,), torch.float32, 1, r=4, bias=True)
        tensors = [*layer.leaves().values(), layer.g, *layer.weight.parts().values()]
        before = [t.detach().clone() for t in tensors]
        layer.gradients(layer(**self.drop))
        assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))

    def test_x_is_not_kept_without_an_adapter(self, device):
        layer = self.layer(device, 64, 96, (20,), torch.float32, 1, bias=True)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            layer()
        assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in layer.weight.parts().values()}

    def test_only_the_gradients_that_are_needed(self, device):
        layer = self.layer(device, 64, 96, (20,), torch.float32, 1, r=4, bias=True)
        full = layer.gradients(layer())
        for name, leaf in layer.leaves().items():
            for other in layer.leaves().values():
                other.requires_grad_(other is leaf)
            (grad,) = torch.autograd.grad(layer(), leaf, layer.g)
            assert torch.equal(grad, full[name])

    def test_second_derivative_raises_instead_of_being_wrong(self, device):
        layer = self.layer(device, 32, 32, (4,), torch.float32, 1, r=2)
        (dx,) = torch.autograd.grad(layer().square().sum(), layer.x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()

    @pytest.mark.parametrize("training", [False, True])
    def test_compiles_without_a_graph_break(self, device, training):
        layer = self.layer(device, 64, 96, (20,), torch.float32, 1, r=4, bias=True)
        call = lambda x: layer(x, **(self.drop if training else {}))
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        y = compiled(layer.x)
        grads = layer.gradients(y)
        if not (training and self.drop):  # the seed of a compiled graph is drawn at another moment
            want = call(layer.x)
            wants = layer.gradients(want)
            assert torch.equal(y, want) and all(torch.equal(grads[name], wants[name]) for name in grads)

    def test_autocast_casts_x_and_nothing_else(self, device):
        layer = self.layer(device, 64, 96, (20,), torch.float32, 1, r=4, bias=True)
        with torch.autocast(device, torch.bfloat16):
            y = layer()
        assert y.dtype == torch.bfloat16 and torch.equal(y, layer(layer.x.bfloat16()))
        dx, dA = torch.autograd.grad(y, (layer.x, layer.lora_A), layer.g.bfloat16())
        assert dx.dtype == dA.dtype == torch.float32

    def test_every_isa_agrees_closely(self):
        """Builds of one source: in fp32 they may differ in the order of sums, not by more."""
        layer = self.layer("cpu", 96, 320, (40,), torch.float32, 1, r=8)
        old, results = _C.isa_limit(), []
        try:
            for isa in _C.isas():
                _C.set_isa_limit(isa)
                results.append(layer().detach().double())
        finally:
            _C.set_isa_limit(old)
        size, _ = layer.magnitudes()
        for other in results[1:]:
            assert ((other - results[0]).abs() <= 2 * layer.terms()["y"] * FP32 * size).all()

    def test_bad_input_to_any_of_them(self, device):
        layer = self.layer(device, 64, 96, (5,), torch.float32, 1, r=4)
        op, x, weight, A, B = layer.op, layer.x.detach(), layer.weight, layer.lora_A.detach(), layer.lora_B.detach()
        call = lambda x=x, weight=weight, bias=None, lora_A=A, lora_B=B, **kw: op(
            x, weight, bias, lora_A=lora_A, lora_B=lora_B, **kw
        )
        with pytest.raises(TypeError, match=rf"{self.name}: weight must be {weight.NAME} \(.*\), not a Tensor"):
            call(weight=torch.randn(64, 96))
        with pytest.raises(ValueError, match=f"{self.name}: x is on meta, weight on"):
            call(x.to("meta"))
        with pytest.raises(ValueError, match=f"{self.name}: weight requires a gradient"):
            call(weight=torch.nn.Parameter(weight))
        alone = dict(lora_A=None, lora_B=None) if self.drop else {}
        for wrong, shape in ((x[:, 1:], r"\[5, 95\]"), (x[0, 0], r"\[\]")):
            with pytest.raises(RuntimeError, match=f"the last dim of x must be 96, but its shape is {shape}"):
                call(wrong, **alone)
        with pytest.raises(RuntimeError, match=r"bias must have shape \[64\], not \[63\]"):
            call(bias=torch.zeros(63, device=device))
        for dtype, name in ((torch.float64, "Double"), (torch.int64, "Long")):
            with pytest.raises(RuntimeError, match=f"x must be float32, bfloat16 or float16, not {name}"):
                call(x.to(dtype))
        with pytest.raises(RuntimeError, match="must be float32, bfloat16 or float16, not Double"):
            call(lora_A=A.double())
        columns = A.shape[1]
        for wrong, shape in ((A[:, 1:], rf"\[4, {columns - 1}\]"), (A[:0], rf"\[0, {columns}\]")):
            with pytest.raises(ValueError, match=rf"{self.name}: lora_A must have shape \[r, {columns}\], not {shape}"):
                call(lora_A=wrong)
        with pytest.raises(ValueError, match=rf"{self.name}: lora_B must have shape \[64, 4\], not \[64, 3\]"):
            call(lora_B=B[:, 1:])
        if self.drop:
            with pytest.raises(ValueError, match=f"{self.name}: lora_A and lora_B belong together, but lora_B is None"):
                call(lora_B=None)
            for p in (1.0, -0.1, float("nan")):
                with pytest.raises(ValueError, match=rf"{self.name}: dropout_p must be in \[0, 1\)"):
                    call(dropout_p=p)


class Int8Tests:
    """The same of those with compute="int8", where that is allowed and where it is done."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e-38])
    def test_int8_leaves_what_it_cannot_hold_to_fp32(self, device, dtype, bad):
        layer = self.layer(device, 64, 320, (9,), dtype, 5)
        with torch.no_grad():
            layer.x[8] = 0
            layer.x[8, 70] = bad
        y, want = layer(compute="int8"), layer()
        atol = 0.1 * float(want[:8].detach().abs().max())
        assert torch.allclose(y[:8].float(), want[:8].float(), rtol=0, atol=atol)
        assert torch.equal(y[8].isnan(), want[8].isnan()) and torch.equal(y[8].isinf(), want[8].isinf())
        finite = lambda t: t.detach().nan_to_num(0, 0, 0)
        assert_sums(finite(y[8]), finite(want[8]).double(), finite(want[8]).double().abs(), 8)

    def test_int8_same_bits_for_any_number_of_threads(self, device, threads):
        layer = self.layer(device, 333, 1024, (300,), torch.float32, 1)
        runs = []
        for count in (1, 2, 3):
            threads(count)
            runs.append(layer(compute="int8"))
        assert all(torch.equal(runs[0], run) for run in runs)

    def test_int8_gives_a_row_the_same_bits_among_others(self, device):
        layer = self.layer(device, 333, 1024, (12,), torch.float32, 1)
        if on_cuda(layer.x):
            return
        x = layer.x.detach().clone()
        want = layer(x, compute="int8")
        x[10] = float("nan")
        for rows in [slice(0, 12), slice(2, 11), *([slice(7, 8), slice(4, 7)] if isa() == "avx2" else [])]:
            got = layer(x[rows], compute="int8")
            assert torch.equal(got[~got.isnan().any(1)], want[rows][~x[rows].isnan().any(1)])

    def test_int8_of_more_columns_than_are_packed_at_a_time(self, device):
        layer = self.layer(device, 40, 9216, (7,), torch.float32, 1)
        if on_cuda(layer.x):
            return
        want = layer()
        assert (layer(compute="int8") - want).norm() < 0.02 * want.norm()

    def test_int8_changes_no_gradient(self, device):
        layer = self.layer(device, 64, 320, (9,), torch.float32, 5, r=4, bias=True)
        y, want = layer(compute="int8"), layer()
        grads, wants = layer.gradients(y), layer.gradients(want)
        assert all(torch.equal(grads[name], wants[name]) for name in grads)

    def test_int8_bad_input(self, device):
        layer = self.layer(device, 64, 96, (5,), torch.float32, 1)
        with pytest.raises(ValueError, match=f"{self.name}: compute must be 'float' or 'int8', not 'int4'"):
            layer(compute="int4")
