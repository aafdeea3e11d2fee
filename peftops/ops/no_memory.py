"""A tensor that consists of others has no memory of its own, so code that asks for its memory must get an error."""

from __future__ import annotations

from typing import Any

import torch
from torch._guards import TracingContext


class NoMemory:
    """Stands for a packed weight's storage where torch, numpy and others reach for memory, and raises an error."""

    def data_ptr(self) -> int:
        """0, as for every tensor without memory of its own."""
        return 0

    def _has_no_memory(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"{self.NAME} has no memory of its own, only parts that have, and cannot be handed out as one block of "
            f"numbers. {self.INSTEAD}"
        )

    storage = _typed_storage = __dlpack__ = _has_no_memory

    def untyped_storage(self) -> torch.UntypedStorage:
        if TracingContext.try_get() is None:
            self._has_no_memory()
        return super().untyped_storage()  # torch.compile compares the address, and reads nothing

    def __dlpack_device__(self) -> Any:
        return self._has_no_memory()

    def share_memory_(self) -> Any:
        """Move the parts to memory that processes share."""
        for part in self.parts().values():
            part.share_memory_()
        return self

    def is_shared(self) -> bool:
        return all(part.is_shared() for part in self.parts().values())
