"""A process of several that a test starts, met by gloo."""

import contextlib
import faulthandler
import os

import torch

PATIENCE = 180  # seconds; what the tests do takes ten


@contextlib.contextmanager
def met(rank, world, file):
    """Inside, this process is one of ``world`` that met at a file. One that waits for ever says where, and ends."""
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # whatever name and network the machine has
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    yield
    torch.distributed.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()
