"""Layers whose weights another module reads without calling the layer: an adapter in place of such a layer would do
nothing.

``nn.MultiheadAttention`` passes ``self.out_proj.weight`` to a function, ``nn.TransformerEncoderLayer`` in eval mode
passes all its weights, and so do some of transformers' modules (WavLM's attention, Mamba's mixers with their fused
kernels). Only the code of their ``forward`` shows this, so this file reads that code.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterable, Iterator

from torch import nn

# Attributes of a weight that can be read without its values.
_LOOKS = {"device", "dim", "dtype", "is_meta", "layout", "ndim", "numel", "requires_grad", "shape", "size"}
_TESTS = {"isinstance", "hasattr", "getattr"}


def uncalled(named: Iterable[tuple[str, nn.Module]]) -> set[str]:
    """The names of the layers among these modules whose weights another one of them reads."""
    return {f"{path}.{name}".lstrip(".") for path, module in named for name in read_by(type(module))}


@functools.cache
def read_by(kind: type[nn.Module]) -> frozenset[str]:
    """The layers, as ``self.NAME`` or ``self.NAME.NAME``, of which a class's forward reads a weight.

    A layer that the forward also calls counts if the whole weight is passed on, as a faster way to do the same. (Parts
    of a weight are read only in rare cases of old models, and do not count.)
    """
    read, whole, called, done, to_do = set(), set(), set(), set(), ["forward"]
    while to_do:
        method = to_do.pop()
        done.add(method)
        for body in _bodies(kind, method):
            aside = {id(node) for node in _not_values(body)}
            parts = {id(n.value) for n in ast.walk(body) if isinstance(n, ast.Attribute | ast.Subscript)}
            for node in ast.walk(body):
                if isinstance(node, ast.Call) and (name := _own(node.func)):
                    called.add(name)
                name = _own(node)
                if name and "." not in name and name not in done and callable(getattr(kind, name, None)):
                    to_do.append(name)
                layer, _, leaf = (name or "").rpartition(".")
                if layer and leaf in ("weight", "bias") and isinstance(node.ctx, ast.Load) and id(node) not in aside:
                    read.add(layer)
                    whole |= set() if id(node) in parts else {layer}
    return frozenset(layer for layer in read if layer in whole or layer not in called)


def _bodies(kind: type, method: str) -> Iterator[ast.AST]:
    """A method, as each of a class and its bases writes it: they may call one another."""
    for base in kind.__mro__:
        if base in (nn.Module, object) or method not in vars(base):
            continue
        try:
            yield ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(vars(base)[method]))))
        except (OSError, TypeError, SyntaxError):  # made by a program, or not in Python
            continue


def _own(node: ast.AST) -> str | None:
    """``a.b`` of ``self.a.b``."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed(parts)) if parts and isinstance(node, ast.Name) and node.id == "self" else None


def _not_values(body: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(body):
        if isinstance(node, ast.Attribute) and node.attr in _LOOKS:
            yield node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _TESTS:
            yield from node.args
        elif isinstance(node, ast.Compare) and all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
            yield node.left
