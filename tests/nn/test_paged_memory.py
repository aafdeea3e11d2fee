"""Paged memory: its two functions on the stand-in runtime, and as torch uses them where there is a GPU."""

import ctypes
from importlib.util import find_spec

import pytest
import torch

import sim
from peftops import AdamW8bit
from peftops.nn.paged_memory import _pool, paged_memory

CUDA = find_spec("peftops._C_cuda") is not None


def test_the_host_pages_by_itself():
    with paged_memory(torch.device("cpu")):
        assert torch.zeros(3).sum() == 0


@pytest.mark.skipif(CUDA, reason="this build has CUDA")
def test_a_gpu_needs_a_build_with_cuda():
    with pytest.raises(RuntimeError, match="paged memory needs peftops built with CUDA, and this build is without"):
        paged_memory(torch.device("cuda", 0))


def test_the_functions_that_torch_calls():
    if isinstance(sim.cuda_ops(), str):
        pytest.skip(sim.cuda_ops())
    library, runtime = ctypes.CDLL(sim.BUILD / "libcuda_sim_ops.so"), sim.simulator().lib
    library.peftops_paged_alloc.restype = ctypes.c_void_p
    library.peftops_paged_alloc.argtypes = [ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p]
    library.peftops_paged_free.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p]
    address = library.peftops_paged_alloc(1000, 0, None)
    ctypes.memset(address, 7, 1000)
    assert ctypes.string_at(address, 1000) == b"\7" * 1000
    library.peftops_paged_free(address, 1000, 0, None)
    # What does not fit is a null pointer, of which torch makes its OutOfMemoryError, and no error that waits.
    assert library.peftops_paged_alloc(1 << 60, 0, None) is None and runtime.cudaGetLastError() == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_optimizer_whose_state_is_paged():
    weights = torch.randn(512, 512), torch.randn(8)
    plain, paged = ([torch.nn.Parameter(w.cuda()) for w in weights] for _ in range(2))
    optimizers = AdamW8bit(plain), AdamW8bit(paged, paged=True)
    for _ in range(3):
        for p, q in zip(plain, paged, strict=True):
            p.grad = q.grad = torch.randn_like(p)
        for optimizer in optimizers:
            optimizer.step()
    assert all(map(torch.equal, plain, paged))
    segments = [(s["address"], s["address"] + s["total_size"]) for s in _pool(paged[0].device.index).snapshot()]
    lies_there = lambda t: any(begin <= t.data_ptr() < end for begin, end in segments)
    held = lambda optimizer: [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    assert all(map(lies_there, held(optimizers[1]))) and not any(map(lies_there, held(optimizers[0])))
