"""Bit for bit bitsandbytes, where bitsandbytes is right."""

import pytest
import torch

import peftops
import reference

bnb = pytest.importorskip("bitsandbytes")
functional = pytest.importorskip("bitsandbytes.functional")

shapes = [(64, 64), (7, 96), (33, 100), (5, 13), (128, 1024), (1, 4096 * 3 + 5)]


def test_the_codes_and_maps_are_the_same():
    code = torch.arange(256, dtype=torch.uint8)
    got = torch.ops.peftops.nf4_absmax(code, torch.ones(1), torch.zeros(1))
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("torch.linspace rounds differently without AVX2, and so does bitsandbytes' own map")
    assert torch.equal(got, functional.create_dynamic_map())
    packed = torch.arange(16, dtype=torch.uint8) * 17
    values = torch.ops.peftops.nf4_dequantize(packed, torch.ones(1), None, None, 32, 1, 32, torch.float32)[0, ::2]
    assert torch.equal(values, functional.get_4bit_type("nf4", device="cpu"))


@pytest.mark.parametrize("shape", shapes)
@pytest.mark.parametrize("block_size", [64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantises_to_the_same_bits(shape, block_size, dtype):
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    packed, state = functional.quantize_4bit(weight, blocksize=block_size, quant_type="nf4", compress_statistics=False)
    ours = peftops.nf4_quantize(weight, block_size=block_size, double_quant=False)
    assert torch.equal(ours.packed, packed.flatten())
    assert torch.equal(ours.absmax, state.absmax)


@pytest.mark.parametrize("shape", [(64, 64), (33, 100), (512, 1024)])
def test_double_quantises_the_same_but_for_its_look_up_table(shape):
    """The CPU build of bitsandbytes searches a table of 65,536 entries, which misses the nearest value for
    some numbers near 0; its other backends do not. Where the codes differ, ours is nearer."""
    torch.manual_seed(0)
    weight = torch.randn(shape)
    absmax = peftops.nf4_quantize(weight, double_quant=False).absmax
    _, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    ours = peftops.nf4_quantize(weight)
    assert torch.equal(ours._absmax_scale, state.state2.absmax) and torch.equal(ours._absmax_offset, state.offset)
    differ = ours._absmax != state.absmax
    assert differ.double().mean() < 0.01
    expand = lambda code: torch.ops.peftops.nf4_absmax(code, state.state2.absmax, state.offset)
    error = lambda code: (expand(code) - absmax)[differ].abs()
    assert (error(ours._absmax) <= error(state.absmax)).all()


@pytest.mark.parametrize("shape", [(64, 128), (33, 101), (16, 1024)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantises_its_weights_to_the_same_bits(shape, dtype):
    """Shapes at which its CPU build is right: rows of whole blocks, or odd rows, which it leaves to PyTorch."""
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    ours = peftops.NF4Tensor(
        packed.flatten(), state.absmax, state.state2.absmax, state.offset, state.blocksize, weight.shape, dtype
    )
    assert torch.equal(peftops.nf4_dequantize(ours), functional.dequantize_4bit(packed, state).view(shape))


def test_rows_that_are_not_whole_blocks_are_right_here_and_wrong_there():
    torch.manual_seed(0)
    weight = torch.randn(8, 96)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=False)
    theirs = functional.dequantize_4bit(packed, state)
    ours = peftops.nf4_dequantize(peftops.nf4_quantize(weight, double_quant=False))
    assert (ours - weight).abs().max() < 0.5  # half a code step of the largest absmax
    if torch.equal(ours, theirs):
        pytest.skip("bitsandbytes has been mended on this machine")
    assert (theirs - weight).abs().max() > 0.5


@pytest.mark.parametrize("signed", [True, False])
def test_moments_in_8_bits_are_as_near(signed):
    """The same map and absmax, on the whole within 2% as near, and never farther off than the widest interval: on a CPU
    bitsandbytes finds the nearest code of large elements and misses it by up to six of small ones."""
    torch.manual_seed(0)
    code = functional.create_dynamic_map(signed)
    values = reference.dynamic_decode(torch.arange(256, dtype=torch.uint8), signed)
    assert ((values - code).abs() <= 1e-6 * code.abs()).all()
    x = torch.randn(64, 256).pow(1 if signed else 2)
    theirs, state = functional.quantize_blockwise(x, code=code, blocksize=256)
    ours = reference.dynamic_encode(x, (1 / state.absmax)[:, None], signed)
    off = [
        (reference.dynamic_decode(c.view_as(ours), signed) - x / state.absmax[:, None]).abs() for c in (ours, theirs)
    ]
    assert off[0].mean() <= 1.02 * off[1].mean() and off[0].max() <= off[1].max() + 2**-22
