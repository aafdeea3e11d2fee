"""Many adapters on one frozen model, in one batch (S-LoRA, arXiv:2311.03285)."""

from .adapters import add_adapter, pool_for
from .server import Completion, Server

__all__ = ["Completion", "Server", "add_adapter", "pool_for"]
