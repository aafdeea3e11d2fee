"""Memory whose pages CUDA moves to the host when the GPU is full, and back when they are used: ``cudaMallocManaged``.
The paged optimizers of QLoRA (arXiv:2305.14314, section 3) keep their state there."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import torch


def paged_memory(device: torch.device) -> AbstractContextManager[None]:
    """Inside ``with paged_memory(device):`` this thread's allocations on ``device`` are paged memory, for as long as
    they live. On the CPU this has no effect, because the host's own memory is paged already.

    Raises:
        RuntimeError: ``device`` is a GPU and this build of peftops has no CUDA kernels.
    """
    return torch.cuda.use_mem_pool(_pool(device.index), device) if device.type == "cuda" else nullcontext()


@functools.cache
def _pool(index: int) -> torch.cuda.MemPool:
    allocator = _allocator()
    with torch.cuda.device(index):  # the device of a pool
        return torch.cuda.MemPool(allocator.allocator())


@functools.cache
def _allocator() -> torch.cuda.memory.CUDAPluggableAllocator:
    library = find_spec("peftops._C_cuda")
    if library is None:
        raise RuntimeError(
            "paged memory needs peftops built with CUDA, and this build is without: PEFTOPS_CUDA=on "
            "pip install ... says why"
        )
    return torch.cuda.memory.CUDAPluggableAllocator(library.origin, "peftops_paged_alloc", "peftops_paged_free")
