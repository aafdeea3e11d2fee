"""Lets mkdocs read the docstrings' Sphinx roles: a public name becomes a link to its entry, any other one is code."""

import ast
import re
from pathlib import Path
from typing import Any

import griffe

PACKAGE = Path(__file__).resolve().parents[1] / "peftops"


def listed(file: Path) -> set[str]:
    """The names in a file's ``__all__``, without those that it has from another one's."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return {name.value for name in node.value.elts if isinstance(name, ast.Constant)}
    raise ValueError(f"{file} has no __all__")


PUBLIC = listed(PACKAGE / "__init__.py") | listed(PACKAGE / "ops/__init__.py")


def entry(name: str) -> str:
    """The path of a public name in the reference: a function of its own module's name is found in that alone."""
    own = next(PACKAGE.glob(f"*/{name}.py"), None)
    return f"peftops.{own.parent.name}.{name}.{name}" if own else f"peftops.{name}"


def markdown(role: re.Match[str]) -> str:
    shown = role[1].lstrip("~").rpartition(".")[2] if role[1].startswith("~") else role[1]
    name = role[1].rpartition(".")[2].lstrip("~")
    return f"[`{shown}`][{entry(name)}]" if name in PUBLIC else f"`{shown}`"


class Roles(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r":(?:func|class|meth|data|attr|mod):`([^`]+)`", markdown, obj.docstring.value)
