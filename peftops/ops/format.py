"""The formats of packed weights: the only list of them, and the operations that each has through the functions of its
name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor


class Format:
    """A format is a subclass of :class:`PackedTensor` whose name is one word. Its functions and operators begin with
    that word: ``nf4_quantize``, ``nf4_dequantize``, ``nf4_linear``."""

    FORMATS: ClassVar[dict[str, Any]] = {}  # all formats, by that word

    FORMAT: ClassVar[str]  # the word
    _OP: ClassVar[str]  # the name of its product
    PARTS: ClassVar[tuple[str, ...]]
    OPTIONAL: ClassVar[frozenset[str]] = frozenset()  # parts that are either all tensors or all None
    LAYOUT: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls) -> None:
        if "FORMAT" in cls.__dict__:
            cls.FORMATS[cls.FORMAT], cls._OP = cls, f"{cls.FORMAT}_linear"

    @classmethod
    def quantize(cls, dense: Tensor, **options: Any) -> Any:
        """A dense weight in this format, by the format's own function with these options."""
        return cls._function("quantize")(dense, **options)

    def quantize_like(self, dense: Tensor) -> Any:
        """A dense weight in the format of this one, with its options."""
        return self.quantize(dense, **self.options())

    def dequantize(self, *, dtype: torch.dtype | None = None) -> Tensor:
        """The numbers that it stands for, by the format's own function."""
        return self._function("dequantize")(self, dtype=dtype)

    @classmethod
    def _function(cls, verb: str) -> Any:
        from .. import ops  # they import this file

        return getattr(ops, f"{cls.FORMAT}_{verb}")

    def options(self) -> dict[str, Any]:
        """The options that it was quantised with."""
        return {name: getattr(self, name) for name in self.LAYOUT if name != "shape"}

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Any:
        """The weight of that shape, in any format, that consists of these parts of a file or a state dict.

        Raises:
            ValueError: the parts do not make a weight of that shape.
        """
        kind = max(cls.FORMATS.values(), key=lambda kind: len(parts.keys() & {*kind.PARTS}))
        needed = kind.PARTS if parts.keys() & kind.OPTIONAL else [n for n in kind.PARTS if n not in kind.OPTIONAL]
        if missing := [name for name in needed if name not in parts]:
            raise ValueError(f"{', '.join(f'weight.{name}' for name in missing)} is missing")
        numbers = {name: part for name, part in parts.items() if part.is_floating_point()}
        wrong = next((name for name, part in numbers.items() if not part.isfinite().all()), None)
        if wrong:
            raise ValueError(f"weight.{wrong} holds a NaN or an infinity")
        settings = kind._settings_of(parts, shape)
        return kind._make(tuple(parts.get(name) for name in kind.PARTS), settings, shape, dtype)

    @classmethod
    def _settings_of(cls, parts: Mapping[str, Tensor], shape: torch.Size) -> tuple[int, ...]:
        """The settings of a weight of these parts, by their shapes."""
        raise NotImplementedError

    @staticmethod
    def _check_parts(parts: Mapping[str, Tensor], wants: Mapping[str, tuple], shape: torch.Size) -> None:
        for name, part in parts.items():
            if name not in wants:
                raise ValueError(f"weight.{name} does not belong to {', '.join(wants)}")
            dtype, size = wants[name]
            if part.dtype != dtype or tuple(part.shape) != tuple(size):
                raise ValueError(
                    f"weight.{name} is {part.dtype} {list(part.shape)}, not {dtype} {list(size)} as in a weight of "
                    f"shape {list(shape)}"
                )
