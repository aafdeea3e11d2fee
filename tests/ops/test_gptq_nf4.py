"""``gptq_quantize(format="nf4")``: NF4 that bitsandbytes could have written, and never worse than what it writes."""

import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gptq_quantize import calibration

import peftops
import peftops.ops.gptq_nf4
from peftops.integrations.bitsandbytes_files import to_bitsandbytes
from peftops.ops.gptq_quantize import output_error
from peftops.ops.moments import Moments
from peftops.ops.nf4_dequantize import NF4_CODE
from peftops.ops.nf4_rounding import round_nf4
from strategies import seeds


def calibrated(weight, x, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return peftops.gptq_quantize(weight, x, format="nf4", **options)


def random(n, k, seed, dtype=torch.float32):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=30)
@given(
    n=st.integers(1, 70),
    k=st.sampled_from([32, 64, 96, 100, 128, 192, 33]),
    seed=seeds,
    double=st.booleans(),
    block_size=st.sampled_from([32, 64, 128, 512]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    damping=st.sampled_from([None, 0.01, 1.0]),
    rows=st.sampled_from([0, 1, 5, 40, 300]),
)
def test_never_worse_than_plain_nf4_and_in_its_layout(n, k, seed, double, block_size, dtype, damping, rows):
    weight, x = random(n, k, seed, dtype), calibration(rows, k, seed + 1)
    plain = peftops.nf4_quantize(weight, block_size=block_size, double_quant=double)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = peftops.gptq_quantize(
            weight, x, format="nf4", block_size=block_size, double_quant=double, damping=damping
        )
    assert got._layout() == plain._layout() and got.dtype == dtype
    assert {name: (t.shape, t.dtype) for name, t in got.parts().items()} == {
        name: (t.shape, t.dtype) for name, t in plain.parts().items()
    }
    if rows:
        assert output_error(weight, got, x) <= output_error(weight, plain, x)
    assert bool(said) == torch.equal(got, plain)


@pytest.mark.parametrize("shape, block_size", [((48, 256), 64), ((32, 320), 32), ((40, 96), 64), ((24, 512), 512)])
@pytest.mark.parametrize("double", [False, True])
def test_halves_the_error_on_rows_that_it_has_not_seen(shape, block_size, double):
    weight, (x, unseen) = random(*shape, 3), calibration(4096, shape[1], 5).split(2048)
    plain = peftops.nf4_quantize(weight, block_size=block_size, double_quant=double)
    got = calibrated(weight, x.split(500), block_size=block_size, double_quant=double)
    assert output_error(weight, got, unseen) < 0.6 * output_error(weight, plain, unseen)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape, block_size", [((70, 256), 64), ((33, 96), 64), ((9, 100), 128)])
def test_codes_are_rounded_against_the_constant_that_is_stored(double, shape, block_size):
    """Inputs that have nothing to do with each other ask nothing of other columns: each code is the nearest."""
    weight = random(*shape, 0)
    plain = peftops.nf4_quantize(weight, block_size=block_size, double_quant=double)
    got = round_nf4(weight, plain, torch.eye(shape[1]), 0.01)
    s = got.absmax.repeat_interleave(block_size)[: weight.numel()].view(shape)
    distance = (NF4_CODE * s[..., None] - weight[..., None]).abs()
    chosen = (peftops.nf4_dequantize(got) - weight).abs()
    assert torch.allclose(chosen, distance.amin(-1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("whole", [True, False])
def test_the_recursion_is_the_optimal_update_of_each_column(whole):
    """Against the update from the inverse of the moments of the columns that remain, in float64."""
    n, k, size = 24, 128 if whole else 96, 64
    weight, x = random(n, k, 1), calibration(512, k, 2)
    h = Moments.of(x, k, x.device).mean()
    plain = peftops.nf4_quantize(weight, double_quant=False)
    got = round_nf4(weight, plain, h, 0.01, factors=(1.0,))
    damped, w = h.double() + 0.01 * h.diagonal().mean() * torch.eye(k, dtype=torch.float64), weight.double().clone()
    s = got.absmax.repeat_interleave(size).view(n, k).double()
    blocks = h.diagonal().view(-1, size).mean(1).argsort(descending=True) if whole else [0]
    left = [int(b) * size + i for b in blocks for i in range(size if whole else k)]
    values = torch.empty_like(w)
    while left:
        i = left[0]
        values[:, i] = NF4_CODE.double()[((w[:, i] / s[:, i])[:, None] - NF4_CODE.double()).abs().argmin(1)] * s[:, i]
        inverse = torch.linalg.inv(damped[left][:, left])
        w[:, left] -= ((w[:, i] - values[:, i]) / inverse[0, 0])[:, None] * inverse[0]
        left = left[1:]
    same = (values - peftops.nf4_dequantize(got)).abs() < 1e-5
    assert same.all(1).double().mean() > 0.8  # a tie, and what follows from it, may fall the other way in a row


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bitsandbytes_dequantises_the_same_bits(dtype, double):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = random(48, 256, 0, dtype)
    got = calibrated(weight, calibration(600, 256, 1), double_quant=double)
    tensors = {name.removeprefix("weight."): t for name, t in to_bitsandbytes(got).items()}
    state = functional.QuantState.from_dict(
        {name: t for name, t in tensors.items() if name != "weight"}, device=torch.device("cpu")
    )
    theirs = functional.dequantize_4bit(tensors["weight"], state)
    assert theirs.dtype == dtype and torch.equal(peftops.nf4_dequantize(got), theirs)


@pytest.mark.parametrize(
    "rows, words",
    [
        (lambda x: x[:0], "there are no calibration rows"),
        (lambda x: x[:1], "1 calibration rows are too few for 64 inputs"),
        (lambda x: x[:7], "7 calibration rows are too few for 64 inputs"),
        (lambda x: x[:1].expand(300, 64), "the calibration rows have 1 directions, too few for 64 inputs"),
        (lambda x: x[:, :3] @ torch.randn(3, 64), "the calibration rows have [34] directions, too few for 64 inputs"),
        (lambda x: torch.zeros(300, 64), "the calibration rows are all 0"),
    ],
)
def test_inputs_that_tell_nothing_give_plain_nf4_and_a_warning(rows, words):
    weight, x = random(16, 64, 0), calibration(300, 64, 1)
    with pytest.warns(UserWarning, match=f"gptq_quantize: {words}: this is plain NF4"):
        got = peftops.gptq_quantize(weight, rows(x), format="nf4")
    assert torch.equal(got, peftops.nf4_quantize(weight))


@pytest.mark.parametrize("n, tried", [(40, 40), (300, 300), (2048, 256)])
def test_damping_is_chosen_by_rows_of_the_whole_weight(n, tried, monkeypatch):
    seen = []

    def watched(rows, *args, **options):
        seen.append(rows[:, 0])
        return round_nf4(rows, *args, **options)

    monkeypatch.setattr(sys.modules["peftops.ops.gptq_nf4"], "round_nf4", watched)
    weight = random(n, 64, 0)
    weight[:, 0] = torch.linspace(-1, 1, n)
    calibrated(weight, calibration(300, 64, 1))
    *trials, whole = seen
    assert len(whole) == n and trials and all(len(rows) == tried for rows in trials)
    assert trials[0][0] == -1 and trials[0][-1] > 0.98


def test_inputs_that_change_ask_for_nothing():
    """Where the halves of the rows contradict each other, plain NF4 is the safer one."""
    gen = torch.Generator().manual_seed(0)
    one, other = (torch.randn(40, 4, generator=gen) @ torch.randn(4, 256, generator=gen) for _ in range(2))
    x = torch.cat([one, other]) + 0.3 * torch.randn(80, 256, generator=gen)
    weight = random(64, 256, 0)
    halves = Moments.of(x, 256, x.device).halves()
    plain = peftops.nf4_quantize(weight)
    risky = round_nf4(weight, plain, halves[0], 1e-4)
    assert output_error(weight, risky, other) > output_error(weight, plain, other)  # what is guarded against
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = peftops.gptq_quantize(weight, x, format="nf4")
    assert output_error(weight, got, other) <= output_error(weight, plain, other)


def test_zero_rows_of_the_weight_and_dead_inputs():
    weight, x = random(16, 128, 0), calibration(400, 128, 1)
    weight[3], x[:, 5] = 0, 0
    got = peftops.nf4_dequantize(calibrated(weight, x, double_quant=False))
    assert torch.equal(got[3], torch.zeros(128)) and got.isfinite().all()


def test_bad_input():
    weight, x = random(16, 64, 0), calibration(300, 64, 1)
    call = peftops.gptq_quantize
    with pytest.raises(ValueError, match="format must be 'group' or 'nf4', not 'mxfp9'"):
        call(weight, x, format="mxfp9")
    with pytest.raises(TypeError, match="format 'nf4' takes block_size, double_quant, damping, not bits, clip"):
        call(weight, x, format="nf4", bits=4, clip="mse")
    with pytest.raises(TypeError, match="format 'group' takes bits, .* not double_quant"):
        call(weight, x, double_quant=False)
    with pytest.raises(ValueError, match="inputs hold a NaN or an infinity"):
        call(weight, x * float("nan"), format="nf4")
    with pytest.raises(ValueError, match=r"the last dim of inputs must be 64, but a shape is \[300, 63\]"):
        call(weight, x[:, 1:], format="nf4")
    with pytest.raises(ValueError, match="damping must be positive, not -1"):
        call(weight, x, format="nf4", damping=-1)
    with pytest.raises(ValueError, match="weight holds a NaN"):
        call(weight * float("nan"), x, format="nf4")
    with pytest.raises(ValueError, match=r"weight must be \[out, in\], but its shape is \[1024\]"):
        call(weight.flatten(), x, format="nf4")
    with pytest.raises(RuntimeError, match="block_size"):
        call(weight, x, format="nf4", block_size=48)
