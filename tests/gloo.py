"""Two processes that a test starts, met by gloo."""

import contextlib
import faulthandler
import os
import time

import torch
from torch import multiprocessing

PATIENCE = 180  # seconds; what the tests do takes ten


def together(work, *arguments):
    """Run ``work(rank, 2, *arguments)`` in two processes. Raises what one of them raised, or if one never ends.

    A fork server's processes end without Python's shutdown. There, a thread of gloo that frees a tensor aborts.
    """
    pair = multiprocessing.start_processes(work, (2, *arguments), nprocs=2, start_method="forkserver", join=False)
    end = time.monotonic() + 1.5 * PATIENCE
    while not pair.join(timeout=5):
        if time.monotonic() > end:
            left = [rank for rank, process in enumerate(pair.processes) if process.is_alive()]
            for process in pair.processes:
                process.kill()
            raise TimeoutError(f"ranks {left} did not end, and met nobody, or they would have said where they wait")


@contextlib.contextmanager
def met(rank, world, file):
    """Inside, this process is one of ``world`` that met at a file. One that waits for ever, here or on its way out,
    says where, and ends.

    Whatever holds the group, as DistributedDataParallel does, is to be gone before this ends: see a function's locals.
    """
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # whatever name and network the machine has
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    yield
    torch.distributed.destroy_process_group()
