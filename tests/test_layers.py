"""The layering of the house, as tests: a file may include or import only what lies below it, every op is
whole, and no ISA build leaks into another."""

import ast
import io
import re
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import peftops
from peftops import _C

ROOT = Path(__file__).resolve().parents[1]
ORDER = [  # peftops/<layer>, lowest first
    "ops",
    "nn",
    "attaching",
    "optim",
    "factors",
    "prompts",
    "methods",
    "integrations",
    "influence",
    "serving",
    "planner",
    "cli",
]


def read(*patterns):
    paths = sorted(
        p for pattern in patterns for p in ROOT.glob(pattern) if p.is_file() and "__pycache__" not in p.parts
    )
    return [pytest.param(p, p.read_text(), id=str(p.relative_to(ROOT))) for p in paths]


SOURCES = read("csrc/**/*", "peftops/**/*.py", "tests/**/*.py", "bench/*.py", "examples/*.py", "docs/*.py")
BUDGETS = {  # lines of code at most, by the first pattern that a path matches; CONTRIBUTING.md states them
    r"csrc/kernels/": 300,
    r"csrc/ops/(?!.*\.h$)|peftops/(ops|methods)/(?!__init__)": 150,
    r"": 400,
}


def instructions_to_the_formatter(text):
    """Comments that keep a line, or a file, from ``ruff format``."""
    comments = (t.string for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT)
    return [comment for comment in comments if re.match(r"#\s*(fmt|yapf|ruff):", comment)]


@pytest.mark.parametrize("path, text", [source for source in SOURCES if source.values[0].suffix == ".py"])
def test_all_python_is_formatted(path, text):
    assert instructions_to_the_formatter(text) == []


def test_instructions_to_the_formatter_are_found():
    text = 'a = "# fmt: off"  # fmt: skip\n# fmt:off\n# fmt is fine\n# yapf: disable\n'
    assert instructions_to_the_formatter(text) == ["# fmt: skip", "# fmt:off", "# yapf: disable"]


def spelt_as_prose(text):
    """Identifiers with "quantis": the API has "quantize". The name of a test is a sentence, and so is prose."""
    for node in ast.walk(ast.parse(text)):
        found = (getattr(node, field, None) for field in ("id", "arg", "attr", "name", "asname"))
        names = [name for name in found if isinstance(name, str)]
        yield from (name for name in names if "quantis" in name.lower() and not name.startswith("test_"))


@pytest.mark.parametrize("path, text", read("peftops/**/*.py", "tests/**/*.py"))
def test_identifiers_are_spelt_as_the_api_is(path, text):
    assert [*spelt_as_prose(text)] == []


def test_identifiers_spelt_as_prose_are_found():
    text = "def quantise(quantised): self.requantised = f(dequantised=1)\ndef test_quantises(): 'quantised'\n"
    assert sorted(spelt_as_prose(text)) == ["dequantised", "quantise", "quantised", "requantised"]


def lines_of_code(path, text):
    """Lines that are neither blank nor a comment nor part of a docstring."""
    lines, documentation = text.splitlines(), set()
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)
            if documented:
                documentation.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    code = [line.strip() for number, line in enumerate(lines, 1) if number not in documentation]
    return sum(bool(line) and not line.startswith("#" if path.suffix == ".py" else "//") for line in code)


@pytest.mark.parametrize("path, text", SOURCES)
def test_files_keep_to_their_budget(path, text):
    name = str(path.relative_to(ROOT))
    budget = next(most for pattern, most in BUDGETS.items() if re.match(pattern, name))
    count = lines_of_code(path, text)
    assert count <= budget, f"{name} has {count} lines of code; does it hold two things?"


def test_budgets_are_those_that_are_stated():
    stated = re.findall(r"^\| .* \| (\d+) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    assert [int(number) for number in stated] == list(BUDGETS.values())


@pytest.mark.parametrize("path, text", read("*.md", "docs/*.md", "docs/guides/*.md", "docs/reference/*.md"))
def test_documents_have_120_columns(path, text):
    if path.name.startswith("cuda_"):
        return  # a program writes it
    long = [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")]
    assert long == []


@pytest.mark.parametrize("path, text", read("csrc/kernels/**/*.*"))
def test_kernels_know_nothing_of_torch_or_python(path, text):
    assert not re.search(r'#include [<"](torch|ATen|c10|Python|pybind11|ops/)', text)


@pytest.mark.parametrize("path, text", read("csrc/kernels/cpu/*"))
def test_isa_files_include_no_stl_and_do_not_dispatch(path, text):
    if path.stem == "isa":
        return
    assert set(re.findall(r"#include <([\w./]+)>", text)) <= {"cstdint", "cstring", "immintrin.h", "arm_neon.h"}
    assert "cpu/isa.h" not in text


@pytest.mark.parametrize("path, text", read("csrc/ops/*"))
def test_bindings_keep_to_the_stable_abi(path, text):
    assert not re.search(r"#include <(ATen|c10|torch/(?!csrc/stable|headeronly))", text)


def layers_imported(path, text):
    """The layers that a file of the package imports, wherever in it: ``..nn.undo`` is ``nn``."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) + 1 - node.level]] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            modules = [module] if len(module) > 1 else [[*module, alias.name] for alias in node.names]
        else:
            continue
        yield from (module[1] for module in modules if module[0] == "peftops" and len(module) > 1)


@pytest.mark.parametrize("path, text", read("peftops/*/**/*.py"))
def test_python_layers_import_downwards(path, text):
    layer = path.relative_to(ROOT).parts[1]
    assert not set(layers_imported(path, text)) & set(ORDER[ORDER.index(layer) + 1 :])


def test_imports_are_found():
    path = ROOT / "peftops/nn/sub/file.py"
    text = """
from ...ops import a
from ..undo import b
def f():
    from peftops.cli.data import c
    from ... import planner
    import peftops.serving.http
    import torch
"""
    assert [*layers_imported(path, text)] == ["ops", "nn", "cli", "planner", "serving"]


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def private_names_defined(text):
    """Functions, classes, variables, and attributes of ``self`` and ``cls``."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names = [node.id]
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names = [node.attr] if ast.unparse(node.value) in ("self", "cls") else []
        else:
            continue
        yield from filter(is_private, names)


def private_names_used(text):
    """Attributes of anything but torch, by a dot or by ``getattr`` and its kin, and what is imported by name."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute):
            names = [] if ast.unparse(node.value) == "torch" else [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "delattr"):
            names = [arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)]
        else:
            continue
        yield from filter(is_private, names)


PACKAGE = [(p.values[0].relative_to(ROOT).parts[1], p.values[1]) for p in read("peftops/*/**/*.py")]
PRIVATE = {layer: {n for of, text in PACKAGE if of == layer for n in private_names_defined(text)} for layer in ORDER}
PRIVATE["attaching"].add("_peftops")  # the attribute of an adapted model


@pytest.mark.parametrize("path, text", read("peftops/*/**/*.py"))
def test_private_names_stay_in_their_layer(path, text):
    layer = path.relative_to(ROOT).parts[1]
    others = set().union(*(names for of, names in PRIVATE.items() if of != layer)) - PRIVATE[layer]
    assert set(private_names_used(text)) & others == set()


def test_private_names_are_found():
    defined = "class _A:\n    _b: int\n    def __init__(self): self._c = other._d = 1\n    async def _e(self): ...\n"
    assert sorted(private_names_defined(defined)) == ["_A", "_b", "_c", "_e"]
    used = 'from .x import _f, g\na._h.b\nself._i()\ngetattr(a, "_j", None)\n_k = a.__dict__\ndel a._l\ntorch._m()\n'
    assert sorted(private_names_used(used)) == ["_f", "_h", "_i", "_j", "_l"]


@pytest.mark.parametrize("path, text", read("peftops/methods/*.py"))
def test_a_file_of_methods_is_a_method(path, text):
    assert path.stem == "__init__" or "\n@register(" in text


def test_every_op_is_whole():
    """One stem from the contract to the bench: `git ls-files | grep <stem>` prints the whole op."""
    stems = {p.stem for p in ROOT.glob("csrc/kernels/*.h")} - {"dtype", "dropout", "nf4", "group", "mxfp4", "linear"}
    assert stems
    for stem in stems:
        for part in (
            "csrc/kernels/cpu/{}.cpp",
            "csrc/ops/{}.cpp",
            "peftops/ops/{}.py",
            "tests/ops/test_{}.py",
            "bench/bench_{}.py",
        ):
            assert (ROOT / part.format(stem)).exists(), part.format(stem)


def test_every_binding_has_kernels_of_its_stem():
    """CMakeLists.txt binds to CUDA what has a .cu of its stem; an operator of another file would be missing there."""
    operators = re.findall(r'm\.def\("(\w+)\(', (ROOT / "csrc/ops/library.cpp").read_text())
    bindings = {p.stem: p.read_text() for p in ROOT.glob("csrc/ops/*.cpp") if p.stem != "library"}
    kernels = {p.stem for p in ROOT.glob("csrc/kernels/cuda/*.cu") if not p.stem.endswith("_sm90")}
    lacking = [f"csrc/ops/{stem}.cpp" for stem in kernels - bindings.keys()]
    lacking += [f"csrc/kernels/cuda/{stem}.cu" for stem in bindings.keys() - kernels]
    assert not lacking, f"missing: {', '.join(sorted(lacking))}"
    assert sorted(re.findall(r'm\.impl\("(\w+)"', "".join(bindings.values()))) == sorted(operators)


def test_every_op_is_public():
    """A file of ``peftops/ops`` with a binding and a function of its own name is an op."""
    from peftops import ops

    bound = {path.stem for path in ROOT.glob("csrc/ops/*.cpp")}
    files = [path for path in ROOT.glob("peftops/ops/*.py") if path.stem in bound]
    own = {path.stem for path in files if f"\ndef {path.stem}(" in path.read_text()}
    assert len(own) > 15 and own <= set(ops.__all__), f"not in peftops/ops/__init__.py: {own - set(ops.__all__)}"


def test_every_operator_has_a_fake():
    import torch

    text = (ROOT / "csrc/ops/library.cpp").read_text()
    operators = re.findall(r'm\.def\("(\w+)\(', text)
    assert len(operators) >= 9
    fakes = "".join(p.read_text() for p in (ROOT / "peftops/ops").glob("*.py"))
    for name in operators:
        assert f'register_fake("peftops::{name}")' in fakes, name
        assert hasattr(torch.ops.peftops, name)


def test_everything_public_is_documented_and_annotated():
    import inspect

    for name in peftops.__all__:
        thing = getattr(peftops, name)
        assert inspect.getdoc(thing), name
        if inspect.isfunction(thing):
            signature = inspect.signature(thing)
            assert signature.return_annotation is not inspect.Signature.empty, name
            assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values()), name


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("objdump"), reason="needs binutils")
def test_isa_builds_stay_apart(tmp_path):
    """The kernel library builds by itself, without Python or torch; no ISA object has a weak symbol that the
    linker could merge with another's, and none uses registers above its own. Where the package's own build is newer
    than the sources, the plain C++ kernels alone are built once more."""
    build = lambda *args: subprocess.run(["cmake", *map(str, args)], check=True, capture_output=True)
    build("-S", ROOT, "-B", tmp_path, *(["-G", "Ninja"] if shutil.which("ninja") else []))
    own = ROOT / "build" / f"editable-{sys.implementation.cache_tag}"
    sources = [*(ROOT / "csrc/kernels").glob("*.h"), *(ROOT / "csrc/kernels/cpu").glob("*.*")]
    newest = max(p.stat().st_mtime for p in sources)
    library = own / "libpeftops_kernels.a"
    if library.exists() and library.stat().st_mtime > newest:
        build("--build", tmp_path, "--parallel", 2, "--target", "kernels_scalar")
        built, program = own, tmp_path / "main.cpp"
    else:
        build("--build", tmp_path, "--parallel", 2)
        library, built, program = tmp_path / "libpeftops_kernels.a", tmp_path, tmp_path / "main.cpp"
    assert library.exists()
    forbidden = {"scalar": r"%[yz]mm", "avx2": r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])"}
    for isa in _C.isas():
        registers = forbidden.get(isa)
        objects = list((built / "CMakeFiles" / f"kernels_{isa}.dir").rglob("*.o"))
        assert objects
        symbols = subprocess.run(["nm", "--format=posix", *objects], check=True, capture_output=True, text=True).stdout
        assert not re.findall(r"^\S+ [VWu] .*", symbols, re.M)
        if registers:
            code = subprocess.run(["objdump", "-d", *objects], check=True, capture_output=True, text=True).stdout
            assert not re.search(registers, code)
    program.write_text(
        '#include "kernels/nf4_quantize.h"\n#include "kernels/cpu/isa.h"\nusing namespace peftops;\n'
        "int main() {\n  float w[64], absmax; uint8_t packed[32];\n  for (int i = 0; i < 64; ++i) w[i] = i - 31.f;\n"
        "  PEFTOPS_PICK(nf4_quantize)({w, packed, &absmax, 64, 64, DType::f32}, 0, 1, nullptr);\n"
        "  return absmax == 32.f ? 0 : 1;\n}\n"
    )
    compiler = shutil.which("c++") or "g++"
    command = [compiler, "-std=c++17", f"-I{ROOT / 'csrc'}", program, library, "-o", program.with_suffix("")]
    subprocess.run([str(part) for part in command], check=True)
    subprocess.run([str(program.with_suffix(""))], check=True)
