"""The tolerance rules of the whole suite; no test writes an rtol of its own.

Elementwise results are exact. Sums are bounded from float64 by what rounding can do:

* n fp32 additions or fused multiply-adds in any order err by at most n * 2^-24 times the sum of magnitudes;
* a GPU's tensor core cuts where it adds, so an instruction errs by 2^-23: see ``cut_sums``;
* the result is rounded once to its dtype, and below the smallest normal number by its spacing there;
* a product in int16 (AVX-512, 16-bit activations) errs by what rounding to int16 does to its factors;
* a product in bf16 (AVX512-BF16, bf16 activations) by what rounding to bf16 does to the weight.
"""

import torch

import arm
import reference
import sim
from peftops import _C

FP32 = 2.0**-24
CODE16 = 4.27e-5  # |round(7854 c) / 7854 - c| for the sixteen codes c, at most
HALF_STEP_CODE = 0.5 / 7854  # for any other number scaled to 7854
HALF_STEP_X = 0.5 / 16384
BF16 = 2.0**-8  # of a number, rounded to bfloat16's eight bits: half of 2^-7, its spacing at 1


def assert_exact(got, want):
    """``want`` (float32 or float64) rounded once to float32 and once to the dtype of ``got``."""
    torch.testing.assert_close(got.detach(), want.detach().float().to(got.dtype), rtol=0, atol=0, equal_nan=True)


def assert_sums(got, want, magnitude, terms, extra=0.0):
    """Sums of ``terms`` numbers whose absolute values add up to ``magnitude`` (float64), within ``extra``."""
    info = torch.finfo(got.dtype)
    got, want = got.detach().double(), want.detach()
    # What comes before the last rounding may be off, so round the largest it may be.
    before = terms * FP32 * magnitude + extra
    bound = before + info.eps / 2 * (want.abs() + before) + info.smallest_normal * info.eps
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    excess = (got - want).abs() - bound
    assert got.numel() == 0 or (excess <= 0).all(), (
        f"beyond the bound of {bound.flatten()[excess.argmax()]:.3g} by {excess.max():.3g}"
    )


def assert_rounded(got, want, magnitude, terms, extra=0.0, then=lambda t: t):
    """The same, where only what comes before the last roundings may be off. Those are known: one to the dtype of
    ``got``, and what ``then`` does in that dtype, which must not fall where its argument rises. So ``got`` lies between
    what they make of the least and of the most that is allowed, and in 16 bits these are mostly one number."""
    before = terms * FP32 * magnitude + extra
    low, high = (then(end.float().to(got.dtype)) for end in (want - before, want + before))
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    outside = ~((low <= got) & (got <= high))
    assert not outside.any(), f"{got[outside][0]} is not between {low[outside][0]} and {high[outside][0]}"


def on_cuda(x):
    """Whether CUDA kernels compute with ``x``: on a GPU, or in the simulator."""
    return x.device.type == "cuda" or sim.active


def cut_sums(x, terms):
    """How many half-steps sums of ``terms`` numbers err by, where tensor cores of a GPU may add them up. One
    instruction adds eight products of tf32 and cuts the sum: two half-steps. Of two fp32 numbers it takes six, for the
    products of their parts, and a gradient is made in two such stages, each of which begins with a whole eight. In the
    simulator an instruction rounds its sum, one half-step: a stage of a single product has six in place of one."""
    if x.device.type == "cuda":
        return 1.5 * terms + 24
    return terms + 10 if sim.active else terms


def code_error(dtype):
    """The largest relative error of an NF4 code as CUDA's tensor cores get it: times a factor, in ``dtype``."""
    factor = {torch.bfloat16: 1.37451171875, torch.float16: 1.5751953125}[dtype]
    codes = reference.NF4.double()
    rounded = (codes * factor).to(dtype).double() / factor
    return ((rounded - codes).abs() / codes.abs().clamp(min=0.01)).max()


def product_of(x, regular, few=False):
    """How the CPU kernels multiply 16-bit activations ``x`` with a weight: in "fp32", "int16" or "bf16". ``regular``:
    rows of whole strips; ``few``: rows few enough for the dot products, which know bf16 with AVX512-BF16 alone."""
    if on_cuda(x) or x.dtype == torch.float32 or not regular:
        return "fp32"
    if isa().endswith("bf16") and x.dtype == torch.bfloat16 and (not few or isa() == "avx512bf16"):
        return "bf16"
    return "int16" if "avx512" in isa() else "fp32"


def isa():
    """The instruction set of the CPU kernels that run at the moment."""
    return arm.active or _C.isa()


def takes_int8(x, codes=True):
    """Whether the rows of ``x`` are multiplied in int8 where the caller allows it, and the weight does: by dot products
    for few rows of ``codes`` of four bits, by panels for more rows of any."""
    if on_cuda(x):
        return False
    dots = 12 if isa() == "avx2" else 8 if "avx512" in isa() else 0
    panels = "avx512" in isa() or isa() == "neonbf16"
    return (codes and len(x) <= dots) or (panels and len(x) > 4)


def int16_error(x):
    """The largest error of each element of ``x``, which a product rounds to int16 along the last dim: half a step of
    1/16384 of its segment's maximum. Where that is more than six times the mean of the others, the kernels hold 15 more
    bits, or do the row in fp32: so it is never more than half a step of six such means, 2^-15 of the mean beside what
    fp32 rounds. Segments have 32, 64 or 128 elements."""
    x = x.abs()
    worst = 0.0
    for length in (32, 64, 128):
        most = segment_max(x, -1, length)
        others = (segment_sum(x, -1, length) - most) / (length - 1)
        worst = torch.maximum(torch.minimum(most, 6.001 * others), torch.as_tensor(worst, dtype=x.dtype))
    return HALF_STEP_X * worst + 2.0**-22 * x


def segment_sum(t, dim, length):
    """The sum of each run of ``length`` along ``dim``, at every element of the run."""
    t = t.movedim(dim, -1)
    n = t.shape[-1]
    padded = torch.nn.functional.pad(t, (0, -n % length)).unflatten(-1, (-1, length))
    return padded.sum(-1, keepdim=True).expand_as(padded).flatten(-2)[..., :n].movedim(-1, dim)


def segment_max(t, dim, length):
    """The largest magnitude of each run of ``length`` along ``dim``, at every element of the run."""
    t = t.abs().movedim(dim, -1)
    n = t.shape[-1]
    padded = torch.nn.functional.pad(t, (0, -n % length)).unflatten(-1, (-1, length))
    return padded.amax(-1, keepdim=True).expand_as(padded).flatten(-2)[..., :n].movedim(-1, dim)
