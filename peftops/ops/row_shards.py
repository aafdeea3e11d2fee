"""Rows of a packed weight: how FSDP2 (``torch.distributed.fsdp.fully_shard``) shards it and puts it together again."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

_aten = torch.ops.aten


class RowShards:
    """The rows of a packed weight, which can be cut. Each rank keeps an equal share, and gets the rows of all ranks for
    a product. Codes are sent, a seventh of the bytes of a float32 weight.

    A part that cannot be cut by rows (the scales of double quantisation, two thousandths of the weight) stays whole on
    every rank. A share can only be stored: operators raise an error for it.
    """

    BY_ROW: ClassVar[tuple[str, ...]]  # parts with the same number of elements for every row

    def _place(self, name: str, row: int) -> int:
        """Where a row begins in a part."""
        size, rows = getattr(self, name).shape[0], self.shape[0]
        if rows == 0 or row * size % rows or self._is_ragged:
            raise ValueError(
                f"{self.NAME} of shape {list(self.shape)} cannot be cut before row {row}: no block begins there"
            )
        return row * size // rows

    @property
    def _is_ragged(self) -> bool:
        """Whether the last block has fewer elements than the others."""
        return False

    def _rows(self, start: int, stop: int) -> Any:
        cut = lambda name: getattr(self, name)[self._place(name, start) : self._place(name, stop)]
        return self.with_parts({name: cut(name) for name in self.BY_ROW}, (stop - start, *self.shape[1:]))

    def _zeros(self, rows: int) -> Any:
        zeros = lambda part, size: part.new_zeros((size, *part.shape[1:]))
        new = {name: zeros(getattr(self, name), self._place(name, rows)) for name in self.BY_ROW}
        return self.with_parts(new, (rows, *self.shape[1:]))

    def with_parts(self, parts: dict[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Any:
        """The same settings, with some of the parts in another shape."""
        every = tuple(parts.get(name, getattr(self, name)) for name in self.PARTS)
        settings = tuple(getattr(self, name) for name in self.SETTINGS)
        return self._make(every, settings, torch.Size(shape), dtype or self.dtype)

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: torch.Size, outer_stride: tuple, module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], torch.Size]:
        """The parts that are gathered from all ranks, and the settings that :meth:`fsdp_post_all_gather` needs."""
        return tuple(getattr(self, name) for name in self.BY_ROW), outer_size

    def fsdp_post_all_gather(
        self, gathered: tuple[Tensor, ...], shape: torch.Size, dtype: torch.dtype, *, out: Any = None
    ) -> tuple[Any, tuple] | None:
        """The whole weight; or nothing, if the parts were gathered into the memory of ``out``."""
        if out is not None:
            return None
        return self.with_parts(dict(zip(self.BY_ROW, gathered, strict=True)), shape, dtype), ()


def on_rows(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The result of a function that ``fully_shard`` or ``DTensor.full_tensor`` calls, or NotImplemented for any other
    ``func``."""
    weight, *rest = args
    if func.namespace == "_c10d_functional":
        return _gathered(func, weight, *rest)
    if any(value and value != getattr(weight, name, None) for name, value in kwargs.items()):
        return NotImplemented  # another dtype, device or offset
    if func is _aten.split.Tensor and rest[1:] in ([], [0]):
        rows, each = weight.shape[0], rest[0]
        if each < 1 or rows % each:
            raise ValueError(f"{weight.NAME} of {rows} rows cannot be sharded evenly, {each} rows each")
        return [weight._rows(start, start + each) for start in range(0, rows, each)]
    if func is _aten.slice.Tensor and (not rest or rest[0] == 0) and rest[3:] in ([], [1]):
        start, stop, _ = slice(*rest[1:3] if rest[2:] else (*rest[1:2], None)).indices(weight.shape[0])
        return weight._rows(start, max(start, stop))
    if func is _aten.new_zeros.default and tuple(rest[0][1:]) == weight.shape[1:]:
        return weight._zeros(rest[0][0])
    if func is _aten.view.default and list(rest[0]) in ([-1], [weight.numel()], list(weight.shape)):
        return weight.with_parts({}, weight.shape if list(rest[0]) == list(weight.shape) else (weight.numel(),))
    if func is _aten.as_strided.default and (tuple(rest[0]), tuple(rest[1])) == (weight.shape, weight.stride()):
        return NotImplemented if any(rest[2:]) else weight.with_parts({}, weight.shape)  # (the last is an offset)
    return NotImplemented


def _gathered(func: Any, weight: Any, *rest: Any) -> Any:
    """The rows of all ranks. Each part is gathered and waited for at once, so waiting for the weight does nothing."""
    functional = torch.ops._c10d_functional
    if func in (functional.wait_tensor.default, functional._wrap_tensor_autograd.default):
        return weight
    if func is not functional.all_gather_into_tensor.default:
        return NotImplemented
    ranks = rest[0]
    whole = {name: functional.wait_tensor(func(getattr(weight, name), *rest)) for name in weight.BY_ROW}
    return weight.with_parts(whole, (ranks * weight.shape[0], *weight.shape[1:]))
