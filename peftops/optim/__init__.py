"""For training adapters: an optimizer in 8 bits, groups of parameters with rates of their own, restarts."""

from .adamw8bit import AdamW8bit
from .loraplus import loraplus_groups
from .restarts import prune_state, relora_schedule

__all__ = ["AdamW8bit", "loraplus_groups", "prune_state", "relora_schedule"]
