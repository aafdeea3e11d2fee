"""The base of quantised weights: a tensor that consists of others, with the shape and dtype of the dense weight that it
stands for."""

from __future__ import annotations

from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor

from .format import Format
from .no_memory import NoMemory
from .packed_linear import PackedProduct
from .row_shards import RowShards, on_rows

_aten = torch.ops.aten


class PackedTensor(Format, PackedProduct, NoMemory, RowShards, Tensor):
    """A frozen weight that is stored as something else. A subclass names its format, its parts and its settings; the
    operators and functions of a format have its name: ``nf4_linear``, ``nf4_quantize``, ``nf4_dequantize``.

    ``shape``, ``dtype`` and ``device`` are those of the weight that it stands for. It can be a (frozen)
    parameter, be copied, moved, pickled and saved; ``.to(dtype)`` changes only the dtype that it stands for, not the
    parts; FSDP2 can shard it. Any other operation raises an error: no operation dequantises it silently.
    """

    PARTS: ClassVar[tuple[str, ...]]  # attributes that hold its tensors, or None where it has no such part
    SETTINGS: ClassVar[tuple[str, ...]]  # attributes that hold plain numbers
    LAYOUT: ClassVar[tuple[str, ...]]  # shape and options: one tensor can be copied to another if both have the same
    NAME: ClassVar[str]  # for sentences, with an article
    INSTEAD: ClassVar[str]  # the op to use instead of an operation that it does not have
    _arguments: property  # the weight as the operators take it: parts and settings

    def __init_subclass__(cls) -> None:
        cls._arguments = property(attrgetter(*cls.PARTS, *cls.SETTINGS))  # a loop takes a microsecond
        if not hasattr(cls, "_operands"):
            cls._operands = cls._arguments
        super().__init_subclass__()

    @classmethod
    def _make(cls, parts: tuple, settings: tuple, shape: torch.Size, dtype: torch.dtype) -> Any:
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=parts[0].device, storage_size=0)
        torch._C._set_throw_on_mutable_data_ptr(self)  # otherwise C++ code that takes its address would read from 0 on
        for name, value in zip(cls.PARTS + cls.SETTINGS, (*parts, *settings), strict=True):
            setattr(self, name, value)
        return self

    def __init__(self, *args: Any) -> None:
        pass

    @property
    def nbytes(self) -> int:
        """Bytes of memory of all parts, with scales."""
        parts = self.parts().values()
        return sum(part.numel() * part.element_size() for part in parts)  # (part.nbytes knows no symbolic sizes)

    def element_size(self) -> float:
        """Bytes per element, mostly a fraction: code that counts memory multiplies it with ``numel()``."""
        return self.nbytes / max(self.numel(), 1)

    def parts(self) -> dict[str, Tensor]:
        """The tensors that it is made of, by their names."""
        return {name: part for name in self.PARTS if (part := getattr(self, name)) is not None}

    def like(self, change, dtype: torch.dtype | None = None) -> Any:
        """The same weight with ``change`` applied to each part."""
        parts = tuple(None if (part := getattr(self, name)) is None else change(part) for name in self.PARTS)
        settings = tuple(getattr(self, name) for name in self.SETTINGS)
        return self._make(parts, settings, self.shape, dtype or self.dtype)

    def become(self, other: Tensor) -> bool:
        """Take the parts, dtype and device of another weight of the same format; or say that it is not possible."""
        if other is self:
            return True
        if type(other) is not type(self) or {self.device.type, other.device.type} > {"meta"}:
            return False
        self.data = other  # the dtype and the device that it stands for
        for name in self.PARTS + self.SETTINGS:
            setattr(self, name, getattr(other, name))
        return True

    def _expert(self, index: int) -> Any:
        """Weight ``index`` of a stack of weights; its parts are views of the stack's parts."""
        return self.with_parts({name: self._piece(name, index) for name in self.BY_ROW}, self.shape[1:])

    def _piece(self, name: str, index: int) -> Tensor:
        """The share of weight ``index`` of a stack in a part."""
        return getattr(self, name)[index]

    def _layout(self) -> tuple:
        return tuple(getattr(self, name) for name in self.LAYOUT)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        layout = "".join(f"{name}={value}, " for name, value in self.options().items())
        return (
            f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}', "
            f"{layout}nbytes={self.nbytes})"
        )

    # For torch.compile, which takes the tensor apart and puts it together.
    def __tensor_flatten__(self) -> tuple[list[str], tuple]:
        settings = tuple(getattr(self, name) for name in self.SETTINGS)
        return list(self.parts()), (type(self), settings, self.shape, self.dtype)

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], context: tuple, outer_size: Any, outer_stride: Any) -> Any:
        cls, settings, shape, dtype = context
        return cls._make(tuple(parts.get(name) for name in cls.PARTS), settings, shape, dtype)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (_aten.detach.default, _aten.alias.default):
            return args[0].like(lambda part: part)
        if func is _aten.clone.default:
            return args[0].like(torch.clone)
        if func is _aten._to_copy.default:
            dtype = cls._checked_dtype(kwargs.pop("dtype", None) or args[0].dtype)
            kwargs.pop("layout", None), kwargs.pop("memory_format", None)
            return args[0].like(lambda part: _aten._to_copy.default(part, **kwargs), dtype)
        if func is _aten.empty_like.default:
            dtype = cls._checked_dtype(kwargs.get("dtype") or args[0].dtype)
            return args[0].like(lambda part: torch.empty_like(part, device=kwargs.get("device")), dtype)
        if func is _aten.copy_.default:
            target, source = args[0], args[1]
            cls._check_same_layout(target, source)
            for name, part in target.parts().items():
                part.copy_(getattr(source, name))
            return target
        if func is _aten.equal.default:
            return all(isinstance(t, cls) for t in args[:2]) and _equal(*args[:2])
        if func is _aten.is_pinned.default:
            return args[0]._arguments[0].is_pinned()
        if func is _aten._pin_memory.default:
            return args[0].like(Tensor.pin_memory)
        if func is _aten.select.int and args[0].dim() == 3 and args[1] == 0:
            return args[0]._expert(args[2])
        if (done := on_rows(func, args, kwargs)) is not NotImplemented:
            return done
        raise NotImplementedError(f"{func} does not work on {cls.NAME}. {cls.INSTEAD}")

    @classmethod
    def _checked_dtype(cls, dtype: torch.dtype) -> torch.dtype:
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"{cls.NAME} can stand for float32, bfloat16 or float16, not {dtype}")
        return dtype

    @classmethod
    def _check_same_layout(cls, target: Any, source: Any) -> None:
        for t in (target, source):
            if not isinstance(t, cls):
                raise TypeError(f"{cls.NAME} can only be copied to {cls.NAME}, not with a {type(t).__name__}")
        if target._layout() != source._layout():
            raise ValueError(
                f"cannot copy between {cls.__name__}s of different ({', '.join(cls.LAYOUT)}): "
                f"{source._layout()} to {target._layout()}"
            )


def _equal(a: PackedTensor, b: PackedTensor) -> bool:
    return a._layout() == b._layout() and all(torch.equal(part, getattr(b, name)) for name, part in a.parts().items())
