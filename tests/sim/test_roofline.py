"""The model that decides between the kernels and a library is the one of docs/cuda_roofline.md."""

import shutil

import pytest
import torch

import sim
from sim import roofline, sass


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
@pytest.mark.skipif(not sass.disassembler(), reason="needs nvidia-cuda-nvdisasm")
def test_the_document_is_the_one_that_is_generated():
    assert roofline.TABLE.read_text() == roofline.table(roofline.main_loops())


def test_its_rates_are_the_vendors():
    for gpu in roofline.GPUS:
        says = roofline.Crossover.of(int(gpu.arch))
        per_clock = 1 / gpu.multiprocessors / gpu.clock
        assert gpu.tensor / 2 * roofline.LIBRARY * per_clock == pytest.approx(says.multiply, rel=0.1)
        assert gpu.bandwidth * roofline.REACHED * per_clock == pytest.approx(says.bytes, rel=0.1)


@pytest.mark.parametrize(
    "direction, peers",
    [("forward", ("library", "dequantise + cuBLAS", "bitsandbytes")), ("backward", ("library", "bitsandbytes"))],
)
def test_no_way_that_was_measured_is_much_shorter_than_the_one_taken(direction, peers):
    """By what is in docs/gpu, the last run of bench/gpu.py on each card; a twentieth is a matter of the run. Forwards it is
    the way that the rule takes now."""
    gpu = roofline.GPUS[0]
    records, says = roofline.measured(gpu), roofline.Crossover.of(int(gpu.arch))
    assert records
    for (of, m, n, k), us in records.items():
        if of == direction:
            best = min(us[name] for name in peers if name in us)
            way = says.way(gpu.multiprocessors, m, n, k) if of == "forward" else "peftops"
            assert us[way] <= 1.05 * best, (way, m, n, k, us)


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
                for m in (16, 17, 64, 128, 192, 384, 640):
                    device.forget()
                    torch.ops.peftops.nf4_linear(torch.zeros(m, k).bfloat16(), *weight, n, k, None, None, None, 1.0)
                    kernel = device.reports()[0]["kernel"]
                    way = "library" if "dequantize" in kernel else "wgmma" if "wgmma" in kernel else "kernels"
                    assert way == says.way(multiprocessors, m, n, k), (m, n, k)
                    taken.add(way)
        finally:
            device.pretend()
    assert taken == {"kernels", "library"} | ({"wgmma"} if capability == 90 else set())
