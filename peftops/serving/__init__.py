"""Many adapters on one frozen model, in one batch (S-LoRA, arXiv:2311.03285)."""

from .adapter_pool import AdapterPool, PoolFull
from .adapters import add_adapter, pool_for
from .batch import Logprob
from .sampling import Sampling
from .server import Cancelled, Completion, Server

__all__ = [
    "AdapterPool",
    "Cancelled",
    "Completion",
    "Logprob",
    "PoolFull",
    "Sampling",
    "Server",
    "add_adapter",
    "pool_for",
]
