"""The machine code of the main loops: what should be in them, and that no register is spilt."""

import shutil

import pytest

from sim import KERNELS, sass

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc"),
    pytest.mark.skipif(not sass.disassembler(), reason="needs nvidia-cuda-nvdisasm"),
]

# By kernel: what its main loop does, or all of it if it has none.
LOOPS = {
    "many_rows": ("HMMA.16816", "LDGSTS.E.BYPASS.128", "LDS.128", "LDG.E.64", "LDGDEPBAR"),
    "many_back": ("HMMA.16816", "LDGSTS.E.BYPASS.128", "LDSM.16.M88.4", "LDSM.16.MT88.4", "STS.128", "LDGDEPBAR"),
    "few_rows": ("HMMA.16816", "LDG.E.128", "LDG.E.64"),
}
WHOLE = {
    "shrink<float": ("HMMA.1688.F32.TF32", "LDG.E.128"),
    "shrink<__nv_bfloat16": ("HMMA.1688.F32.TF32", "LDG.E.64"),
    "expand<float": ("HMMA.1688.F32.TF32", "LDG.E.128", "STG.E.128"),
    "gradient<float": ("HMMA.1688.F32.TF32", "LDS.128", "STS.128"),
    "multi_shrink<float": ("HMMA.1688.F32.TF32", "LDG.E.128"),
    "dequantize<__half, true>": ("STG.E.128",),
    "operands<__half, true, Nf4Source": ("LDG.E.128", "STG.E.128"),
    "operands<__half, true, GroupSource": ("LDG.E.128", "STG.E.128"),
    "quantize<__half, true>": ("LDG.E.128",),
}


@pytest.fixture(scope="module", params=["80", "90"])
def kernels(request):
    found = {}
    for source in KERNELS:
        found |= sass.kernels(sass.disassemble(source, request.param))
    return found


def has(opcodes, wanted):
    return [w for w in wanted if not any(op.startswith(w) for op in opcodes)]


def test_nothing_is_in_local_memory(kernels):
    assert len(kernels) > 20
    assert not {name for name, (opcodes, _) in kernels.items() if {"LDL", "STL"} & set(sass.histogram(opcodes))}


@pytest.mark.parametrize("kernel", LOOPS)
def test_main_loops(kernels, kernel):
    ours = {name: code for name, code in kernels.items() if name.startswith(kernel + "<")}
    assert len(ours) == (8 if kernel == "few_rows" else 4)
    for name, code in ours.items():
        assert not has(sass.main_loop(*code), LOOPS[kernel]), name


@pytest.mark.parametrize("kernel", WHOLE)
def test_wide_instructions(kernels, kernel):
    ours = {name: opcodes for name, (opcodes, _) in kernels.items() if name.startswith(kernel)}
    assert ours
    for name, opcodes in ours.items():
        assert not has(opcodes, WHOLE[kernel]), name


@pytest.mark.parametrize("kernel, most", [("many_rows<__half, 2>", 8.0), ("many_back<__half, 128>", 8.5)])
def test_a_product_takes_few_instructions(kernels, kernel, most):
    """Per mma, decoding and all else that is in the loop. A multiprocessor of an A100 issues eight in the time of one."""
    loop = sass.main_loop(*kernels[kernel])
    assert len(loop) <= most * sass.histogram(loop)["HMMA"]
