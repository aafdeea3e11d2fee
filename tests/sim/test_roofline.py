"""The model that decides between the kernels and a library is the one of docs/cuda_roofline.md."""

import shutil

import pytest
import torch

import sim
from sim import roofline, sass


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
@pytest.mark.skipif(not sass.disassembler(), reason="needs nvidia-cuda-nvdisasm")
def test_its_numbers_are_those_of_the_machine_code():
    """Where they moved by more than a tenth, a kernel did: see what nf4_crossover.cuh should say now."""
    loops = roofline.main_loops()
    for gpu in roofline.GPUS:
        says = roofline.Crossover.of(int(gpu.arch))
        per_clock = 1 / gpu.multiprocessors / gpu.clock
        of = [loops[gpu.arch][f"many_rows<__half, {stripes}>"] for stripes in (1, 2)]
        assert [roofline.chunk_clocks(gpu, i + 1, of[i]) for i in (0, 1)] == pytest.approx(says.chunk, rel=0.1)
        assert gpu.tensor / 2 * roofline.LIBRARY * per_clock == pytest.approx(says.multiply, rel=0.1)
        assert gpu.bandwidth * roofline.REACHED * per_clock == pytest.approx(says.bytes, rel=0.1)


@pytest.mark.parametrize("capability, multiprocessors", [(80, 108), (90, 132), (89, 128)])
def test_the_binding_decides_as_the_table_says(capability, multiprocessors):
    """Only the last blocks of threads run; the products are of no matter."""
    if isinstance(sim.cuda_ops(), str):
        pytest.skip(sim.cuda_ops())
    says, taken = roofline.Crossover.of(capability), set()
    with sim.on_cpu_tensors(library="auto", last_blocks=1) as device:
        device.pretend(capability, multiprocessors)
        try:
            for n, k in ((4096, 1024), (1024, 4096), (2048, 2048)):
                weight = torch.zeros(n * k // 2, dtype=torch.uint8), torch.zeros(n * k // 64), None, None, 64
                for m in (16, 17, 64, 128, 384, 640):
                    device.forget()
                    torch.ops.peftops.nf4_linear(torch.zeros(m, k).bfloat16(), *weight, n, k, None, None, None, 1.0)
                    by_library = "operands" in device.reports()[0]["kernel"]
                    assert by_library == says.prefers_library(multiprocessors, m, n, k), (m, n, k)
                    taken.add(by_library)
        finally:
            device.pretend()
    assert taken == {True, False}
