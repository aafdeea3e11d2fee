import warnings
from functools import partial

import pytest
import torch

import peftops
from gptq_layout import gptq_unpack
from peftops.integrations.gptq_files import from_gptq, to_gptq, to_gptq_integers
from peftops.ops.group_tensor import pack_bits, unpack_bits

every_width = pytest.mark.parametrize("bits", [2, 3, 4, 8])


@every_width
def test_the_layout_is_gptqs(bits):
    weight = peftops.group_quantize(torch.randn(64, 192), bits=bits)
    parts = to_gptq(weight)
    assert parts["qweight"].shape == (192 * bits // 32, 64) and parts["qweight"].dtype == torch.int32
    assert torch.equal(gptq_unpack(parts["qweight"], bits), weight.codes.long().t())
    assert torch.equal(parts["scales"], weight.scales.t()) and torch.equal(parts["qzeros"], weight.zeros.t())
    assert parts["g_idx"].tolist() == [i // 32 for i in range(192)]
    integers, _ = to_gptq_integers(weight)
    zeros = gptq_unpack(integers["qzeros"].t(), bits).t()
    assert integers["qzeros"].shape == (6, 64 * bits // 32)
    assert torch.equal(zeros + 1, weight.zeros.t().round().clamp(1, 2**bits).long())
    # and a layer made of them computes scale * (code - zero), as every reader of GPTQ does
    dense = integers["scales"].float().repeat_interleave(32, 0) * (
        gptq_unpack(integers["qweight"], bits) - (zeros + 1).repeat_interleave(32, 0)
    )
    assert torch.equal(peftops.group_dequantize(from_gptq(integers, bits=bits, checkpoint_format="gptq")), dense.t())


@pytest.mark.parametrize(
    "n, k, bits, group",
    [
        (32, 16, 2, 8),
        (32, 8, 4, 8),
        (1, 8, 4, 8),
        (8, 64, 4, 64),
        (16, 16, 8, 16),
    ],
)
def test_weights_of_one_word_or_one_group(n, k, bits, group):
    """A row, or a column, of one element has strides of its own."""
    weight = peftops.group_quantize(torch.randn(n, k), bits=bits, group_size=group)
    assert torch.equal(from_gptq(to_gptq(weight), bits=bits), weight)
    assert torch.equal(from_gptq(to_gptq(weight) | {"g_idx": None}, bits=bits), weight)
    if n * bits % 32 == 0:
        integers, _ = to_gptq_integers(weight)
        made = from_gptq(integers, bits=bits, checkpoint_format="gptq")
        assert torch.equal(made.codes, weight.codes)
        assert torch.equal(made.zeros, weight.zeros.round().clamp(1, 2**bits))


@every_width
def test_our_own_form_is_exact_after_a_merge(bits):
    weight = peftops.group_quantize(torch.randn(64, 192).bfloat16(), bits=bits)
    merged = peftops.qalora_merge(weight, torch.randn(4, 6), torch.randn(64, 4))
    back = from_gptq(to_gptq(merged), bits=bits, dtype=torch.bfloat16)
    assert torch.equal(back, merged) and back.dtype == merged.dtype


@every_width
def test_the_report_on_whole_zeros_is_honest(bits):
    """Its numbers, computed here from the definitions; and a small adapter does get lost."""
    torch.manual_seed(0)
    weight = peftops.group_quantize(torch.randn(64, 192), bits=bits, symmetric=True)
    parts, report = to_gptq_integers(weight)
    assert report.largest_shift == 0 and report.clamped == 0 and report.weight_error < 2**-11
    merged = peftops.qalora_merge(weight, torch.randn(4, 6), 1e-3 * torch.randn(64, 4))
    parts, report = to_gptq_integers(merged, weight)
    dense = lambda w: peftops.group_dequantize(w).double()
    want, got = dense(merged), dense(from_gptq(parts, bits=bits, checkpoint_format="gptq"))
    assert report.weight_error == pytest.approx(float((got - want).norm() / want.norm()), rel=1e-4)
    assert report.lost_change == pytest.approx(float((got - want).norm() / (want - dense(weight)).norm()), rel=1e-4)
    shift = (merged.zeros.round().clamp(1, 2**bits) - merged.zeros).abs()
    assert report.largest_shift == pytest.approx(float(shift.max())) and 0 < report.largest_shift <= 0.5
    if bits < 8:
        assert 0.9 < report.lost_change < 1.5  # zeros moved by less than a half: back to where they were


def test_zeros_out_of_range_are_counted():
    weight = peftops.group_quantize(torch.randn(64, 64) + 3)
    _, report = to_gptq_integers(weight)
    assert report.clamped == int((weight.zeros.round() < 1).sum()) > 0 and report.weight_error > 0.1


def test_bad_input():
    weight = peftops.group_quantize(torch.randn(64, 192))
    parts = to_gptq(weight)
    with pytest.raises(TypeError, match="to_gptq: weight must be a GroupQuantTensor, not a Tensor"):
        to_gptq(torch.randn(64, 192))
    with pytest.raises(ValueError, match="rows of 40 codes of 3 bits do not fill int32 words"):
        to_gptq(peftops.group_quantize(torch.randn(64, 40), bits=3, group_size=8))
    with pytest.raises(ValueError, match="63 zeros of 4 bits do not fill int32 words"):
        to_gptq_integers(peftops.group_quantize(torch.randn(63, 64)))
    permuted = parts["g_idx"].flip(0)
    integers, _ = to_gptq_integers(weight)
    for bad, message in (
        ({"g_idx": permuted}, r"g_idx permutes the columns \(act-order\)"),
        ({"scales": parts["scales"][:, 1:]}, r"scales must have shape \[groups, 64\] with groups a divisor of 192"),
        ({"scales": parts["scales"][1:]}, r"groups a divisor of 192, not \[5, 64\]"),
        ({"qzeros": parts["qzeros"][1:]}, "zeros must have the shape of scales"),
        ({"qzeros": integers["qzeros"][1:]}, r"qzeros must have shape \[6, 8\], not \[5, 8\]"),
        ({"qweight": parts["qweight"].float()}, r"qweight must be int32 \[in \* bits / 32, out\], not torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            from_gptq({**parts, **bad}, bits=4)
    short = {name: tensor[:1] for name, tensor in parts.items()}
    with pytest.raises(ValueError, match=r"qweight \[1, 64\] holds no eights of codes of 8 bits"):
        from_gptq(short, bits=8)
    with pytest.raises(KeyError, match="qzeros"):
        from_gptq({name: t for name, t in parts.items() if name != "qzeros"}, bits=4)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_both_formats_are_read_and_told_apart_where_they_can_be(bits, symmetric):
    weight = peftops.group_quantize(torch.randn(64, 128), bits=bits, symmetric=symmetric)
    weight = peftops.GroupQuantTensor.from_codes(
        weight.codes,
        weight.scales.half().float(),
        weight.zeros.round().clamp(1, 2**bits - 1),
        bits=bits,
        dtype=torch.float32,
    )
    first, _ = to_gptq_integers(weight)
    zeros = unpack_bits(first["qzeros"].view(torch.uint8), bits) + 1
    second = first | {"qzeros": pack_bits(zeros, bits).contiguous().view(torch.int32)}
    want = peftops.group_dequantize(weight)
    for name, parts in (("gptq", first), ("gptq_v2", second)):
        read = partial(lambda parts, **options: peftops.group_dequantize(from_gptq(parts, bits=bits, **options)), parts)
        assert torch.equal(read(checkpoint_format=name), want)
        if symmetric:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert torch.equal(read(), want)
        else:
            with pytest.warns(UserWarning, match="nothing tells whether zeros are stored less one"):
                assert torch.equal(read(), want) == (name == "gptq")
    with pytest.raises(ValueError, match="checkpoint_format must be one of gptq, gptq_v2, not 'marlin'"):
        from_gptq(first, bits=bits, checkpoint_format="marlin")
