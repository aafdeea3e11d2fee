"""``NF4Tensor``: a frozen weight in 4 bits that passes for the tensor it stands for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_PARTS = ("packed", "_absmax", "_absmax_scale", "_absmax_offset")
_aten = torch.ops.aten


class NF4Tensor(Tensor):
    """A weight in NF4 (QLoRA, arXiv:2305.14314), bit for bit as bitsandbytes stores it.

    ``shape``, ``dtype`` and ``device`` are those of the weight that it stands for. It is made by
    :func:`peftops.nf4_quantize` and used by :func:`peftops.nf4_linear` and
    :func:`peftops.nf4_dequantize`. It can be a (frozen) parameter, be copied, moved, pickled and saved;
    ``.to(dtype)`` changes the dtype it stands for and leaves the codes alone. Any other operation
    raises: nothing dequantises it behind your back.

    Attributes:
        packed: uint8, ``[ceil(numel / 2)]``; two codes a byte, the first element in the high nibble,
            over the row-major weight.
        block_size: elements that share one absmax; blocks are flat and may straddle rows.
    """

    packed: Tensor
    block_size: int
    _absmax: Tensor  # float32 [blocks], or uint8 [blocks] when double-quantised
    _absmax_scale: Tensor | None  # float32 [ceil(blocks / 256)]
    _absmax_offset: Tensor | None  # float32, a scalar

    @staticmethod
    def __new__(
        cls,
        packed: Tensor,
        absmax: Tensor,
        absmax_scale: Tensor | None,
        absmax_offset: Tensor | None,
        block_size: int,
        shape: torch.Size,
        dtype: torch.dtype,
    ) -> NF4Tensor:
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=packed.device)
        self.packed = packed
        self._absmax = absmax
        self._absmax_scale = absmax_scale
        self._absmax_offset = absmax_offset
        self.block_size = block_size
        return self

    def __init__(self, *args: Any) -> None:
        pass

    @property
    def double_quant(self) -> bool:
        """Whether the absmax values are quantised themselves, to 8 bits."""
        return self._absmax_scale is not None

    @property
    def absmax(self) -> Tensor:
        """float32 ``[blocks]``: the largest magnitude of each block, as dequantisation uses it."""
        if self._absmax_scale is None:
            return self._absmax
        return torch.ops.peftops.nf4_absmax(self._absmax, self._absmax_scale, self._absmax_offset)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes: about 0.516 (0.5625 without double quantisation) per element."""
        return sum(part.nbytes for part in self._parts().values())

    @property
    def _arguments(self) -> tuple:
        """The weight as the operators take it."""
        return self.packed, self._absmax, self._absmax_scale, self._absmax_offset, self.block_size

    def _parts(self) -> dict[str, Tensor]:
        return {name: part for name in _PARTS if (part := getattr(self, name)) is not None}

    def _like(self, change, dtype: torch.dtype | None = None) -> NF4Tensor:
        """The same weight with ``change`` applied to each part."""
        parts = [None if (part := getattr(self, name)) is None else change(part) for name in _PARTS]
        return NF4Tensor(*parts, self.block_size, self.shape, dtype or self.dtype)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return (
            f"NF4Tensor(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}', "
            f"block_size={self.block_size}, double_quant={self.double_quant}, nbytes={self.nbytes})"
        )

    # How torch.compile takes it apart and puts it together.
    def __tensor_flatten__(self) -> tuple[list[str], tuple]:
        return list(self._parts()), (self.block_size, self.shape, self.dtype)

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], context: tuple, outer_size: Any, outer_stride: Any) -> NF4Tensor:
        return NF4Tensor(*(parts.get(name) for name in _PARTS), *context)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (_aten.detach.default, _aten.alias.default):
            return args[0]._like(lambda part: part)
        if func is _aten.clone.default:
            return args[0]._like(torch.clone)
        if func is _aten._to_copy.default:
            dtype = kwargs.pop("dtype", None) or args[0].dtype
            if dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise TypeError(f"an NF4Tensor can stand for float32, bfloat16 or float16, not {dtype}")
            kwargs.pop("layout", None), kwargs.pop("memory_format", None)
            return args[0]._like(lambda part: _aten._to_copy.default(part, **kwargs), dtype)
        if func is _aten.empty_like.default:
            return args[0]._like(lambda part: torch.empty_like(part, device=kwargs.get("device")), kwargs.get("dtype"))
        if func is _aten.copy_.default:
            target, source = args[0], args[1]
            _check_same_layout(target, source)
            for name, part in target._parts().items():
                part.copy_(getattr(source, name))
            return target
        if func is _aten.equal.default:
            return all(isinstance(t, NF4Tensor) for t in args[:2]) and _equal(*args[:2])
        if func is _aten.is_pinned.default:
            return args[0].packed.is_pinned()
        if func is _aten._pin_memory.default:
            return args[0]._like(Tensor.pin_memory)
        raise NotImplementedError(
            f"{func} does not work on an NF4Tensor. For a product use peftops.nf4_linear(x, weight); "
            "for the numbers ask for them: peftops.nf4_dequantize(weight)"
        )


def _layout(t: NF4Tensor) -> tuple:
    return t.shape, t.block_size, t.double_quant


def _check_same_layout(target: Any, source: Any) -> None:
    for t in (target, source):
        if not isinstance(t, NF4Tensor):
            raise TypeError(f"an NF4Tensor can only be copied to an NF4Tensor, not with a {type(t).__name__}")
    if _layout(target) != _layout(source):
        raise ValueError(
            "cannot copy between NF4Tensors of different (shape, block_size, double_quant): "
            f"{_layout(source)} to {_layout(target)}"
        )


def _equal(a: NF4Tensor, b: NF4Tensor) -> bool:
    return _layout(a) == _layout(b) and all(torch.equal(part, getattr(b, name)) for name, part in a._parts().items())


torch.serialization.add_safe_globals([NF4Tensor])
