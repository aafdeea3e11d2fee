import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import peftops
from peftops.ops.gptq_quantize import output_error
from strategies import bit_widths, seeds


def calibration(rows, k, seed):
    """Inputs of a few strong directions, as activations have."""
    gen = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=gen) / k**0.5 + torch.eye(k)
    return torch.randn(rows, k, generator=gen) * torch.exp(torch.randn(k, generator=gen)) @ mix


def naive(weight, inputs, bits, group, damping=0.01):
    """GPTQ as its derivation has it: after each column the optimal update of all that remain, from the inverse
    of the moments of those alone, in float64."""
    w, x = weight.double().clone(), inputs.double()
    moments = x.T @ x / len(x)
    moments += damping * moments.diagonal().mean() * torch.eye(len(moments), dtype=torch.float64)
    codes = torch.empty_like(weight, dtype=torch.uint8)
    for i in range(w.shape[1]):
        if i % group == 0:
            part = w[:, i : i + group].float().contiguous()
            found = peftops.group_quantize(part, bits=bits, group_size=group, clip="mse")
            scale, zero = found.scales[:, 0].double(), found.zeros[:, 0].double()
        code = (w[:, i] / scale + zero).round().clamp(0, 2**bits - 1)
        codes[:, i] = code
        inverse = torch.linalg.inv(moments[i:, i:])
        error = (w[:, i] - (code - zero) * scale) / inverse[0, 0]
        w[:, i:] -= error[:, None] * inverse[0]
    return codes


@settings(max_examples=10)
@given(bits=bit_widths, group=st.sampled_from([8, 16, 32]), seed=seeds)
def test_is_the_optimal_update_of_each_column(bits, group, seed):
    """A code may differ where float32 and float64 fall on two sides of a tie, and what follows from that, too."""
    weight, x = torch.randn(24, 64, generator=torch.Generator().manual_seed(seed)), calibration(256, 64, seed + 1)
    got = peftops.gptq_quantize(weight, x, bits=bits, group_size=group)
    want = naive(weight, x, bits, group)
    assert (got.codes == want).all(1).double().mean() > 0.8
    dense = (want.double().unflatten(1, (-1, group)) - got.zeros[..., None]) * got.scales[..., None]
    error = ((dense.flatten(1).float() - weight) @ x.T).norm() / (weight @ x.T).norm()
    assert output_error(weight, got, x) <= error * 1.1


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape", [(48, 256, 32), (32, 320, 64), (16, 512, 256)])
def test_beats_rounding_on_what_the_layer_computes(bits, shape):
    n, k, group = shape
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(3))
    x, unseen = calibration(4096, k, 5).split(2048)
    rounded = peftops.group_quantize(weight, bits=bits, group_size=group)
    clipped = peftops.group_quantize(weight, bits=bits, group_size=group, clip="mse")
    found = peftops.gptq_quantize(weight, x.split(500), bits=bits, group_size=group)
    errors = [output_error(weight, q, unseen) for q in (rounded, clipped, found)]
    assert errors[2] < 0.85 * min(errors[:2])
    assert (found.shape, found.bits, found.group_size) == ((n, k), bits, group)


def test_without_correlation_it_is_plain_rounding():
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    got = peftops.gptq_quantize(weight, torch.eye(64))
    want = peftops.group_quantize(weight, clip="mse")
    assert torch.equal(got.scales, want.scales) and torch.equal(got.zeros, want.zeros)
    assert (got.codes == want.codes).double().mean() > 0.999


def test_dead_and_repeated_inputs():
    weight, x = torch.randn(16, 64), calibration(300, 64, 1)
    x[:, 5], x[:, 7] = 0, x[:, 6]
    got = peftops.gptq_quantize(weight.bfloat16(), x.bfloat16())
    assert got.dtype == torch.bfloat16
    assert output_error(weight.bfloat16(), got, x) < output_error(weight, peftops.group_quantize(weight), x) * 1.1
    few = peftops.gptq_quantize(weight, x[:3])  # fewer rows than columns: damping makes the moments definite
    assert peftops.group_dequantize(few).isfinite().all()


def test_bad_input():
    weight, x = torch.randn(16, 64), torch.randn(100, 64)
    call = peftops.gptq_quantize
    with pytest.raises(ValueError, match=r"the last dim of inputs must be 64, but a shape is \[100, 63\]"):
        call(weight, x[:, 1:])
    with pytest.raises(ValueError, match="inputs hold no row"):
        call(weight, x[:0])
    with pytest.raises(ValueError, match="inputs hold no row"):
        call(weight, [])
    with pytest.raises(ValueError, match="inputs hold a NaN or an infinity"):
        call(weight, x * float("nan"))
    with pytest.raises(ValueError, match="damping must be positive, not 0"):
        call(weight, x, damping=0)
    with pytest.raises(ValueError, match="weight holds a NaN"):
        call(weight * float("nan"), x)
    with pytest.raises(RuntimeError, match="in_features must be a multiple of group_size 128, but is 64"):
        call(weight, x, group_size=128)
