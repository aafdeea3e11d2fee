"""The documents say nothing that is no longer so: names, links, commands, variables and sentences exist."""

import ast
import inspect
import pkgutil
import re
import subprocess
from pathlib import Path

import choose
import pytest

import peftops
from peftops.cli import _COMMANDS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "gpu" not in page.relative_to(DOCS).parts)
WRITTEN = [page for page in PAGES if not page.name.startswith("cuda_")]  # others are printed by tests/sim
FRONT = [ROOT / "README.md", *WRITTEN]
each_page = pytest.mark.parametrize("page", [*FRONT, ROOT / "CONTRIBUTING.md"], ids=lambda p: str(p.relative_to(ROOT)))

NAV = re.findall(r"^ +- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
ENTRIES = {path: page for page in PAGES for path in re.findall(r"^::: (\S+)$", page.read_text(), re.M)}


def test_every_page_is_in_the_site_once():
    assert sorted(NAV) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


def test_every_public_name_has_an_entry_in_the_reference():
    """An entry whose module has the name of its function must say so, or the site would show the module."""
    found = {}
    for path in ENTRIES:
        thing = pkgutil.resolve_name(path)
        assert not inspect.ismodule(thing), path
        if thing.__module__.endswith(f".{thing.__name__}"):
            whole = f"{thing.__module__}.{thing.__name__}"
            assert path == whole, f"write ::: {whole}"
        found[thing.__name__] = thing
    for name in peftops.__all__:
        assert found.get(name) is getattr(peftops, name), f"docs/reference has no entry of peftops.{name}"


def parameters_described(thing):
    """The names before the colons of a docstring's section ``Args``, where one entry may be of several."""
    section = re.search(r"^Args:\n((?:    .*\n|\n)*)", inspect.getdoc(thing) + "\n", re.M)
    entries = re.findall(r"^    (\w+(?:, \w+)*): ", section[1], re.M) if section else []
    return [name for entry in entries for name in entry.split(", ")]


@pytest.mark.parametrize("name", [name for name in peftops.__all__ if callable(getattr(peftops, name))])
def test_docstrings_describe_parameters_that_exist(name):
    thing = getattr(peftops, name)
    parameters = inspect.signature(thing).parameters
    if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters.values()):
        assert set(parameters_described(thing)) <= set(parameters)


def test_parameters_described_are_found():
    def function(a, b, c): ...

    function.__doc__ = "One.\n\nArgs:\n    a, b: of x: y.\n        d: more.\n    c: z.\n\nReturns:\n    e: f.\n"
    assert parameters_described(function) == ["a", "b", "c"]


def anchors(page):
    """Those of the headings, as mkdocs makes them, and of the reference's entries."""
    text = page.read_text()
    plain = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in re.findall(r"^#+ (.*)$", text, re.M)]
    own = re.findall(r"\{#(\S+)\}", text)
    return {*(re.sub(r"[\s-]+", "-", heading) for heading in plain), *own, *re.findall(r"^::: (\S+)$", text, re.M)}


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        assert not re.match(r"https?:", target), f"{target}: nothing here depends on another server"
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target
        assert page.name == "README.md" or not file or DOCS in there.parents or page.parent == ROOT, target


@each_page
def test_commands_and_files_exist(page):
    text = page.read_text()
    for file in re.findall(r"\bpython ([\w/.-]+\.py)", text):
        assert (ROOT / file).exists(), file
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for target in re.findall(r"(?:`|^    )make ([a-z][\w-]*)", text, re.M):
        assert target in targets, f"make {target}"
    for file in re.findall(r"`((?:tests|bench|examples|peftops|csrc)/[\w./-]+)`", text):
        assert (ROOT / file).exists(), file
    for command in re.findall(r"(?:`|^    |```sh\n)peftops ([a-z]+) ", text, re.M):
        assert command in _COMMANDS, command


def test_the_command_line_is_whole():
    page = (DOCS / "command_line.md").read_text()
    assert [name for name in _COMMANDS if f"peftops {name} " not in page] == []


def test_what_depends_on_the_planner_is_as_it_says():
    assert choose.PAGE.read_text() == choose.page(), "run: .venv/bin/python tests/docs/choose.py"


def test_every_environment_variable_has_its_line():
    files = subprocess.run(
        ["git", "ls-files", "peftops", "csrc", "tests", "bench", "setup.py"], cwd=ROOT, capture_output=True, text=True
    )
    if files.returncode:
        pytest.skip("no git, so no list of files")
    read = re.compile(r"(?:getenv\(|environ(?:\.get\(|\[))\"(PEFTOPS_\w+)\"")
    used = {
        name
        for file in files.stdout.split()
        if file.endswith((".py", ".h", ".cpp", ".cu", ".cuh"))
        for name in read.findall((ROOT / file).read_text())
    }
    assert used == set(re.findall(r"^\| `(PEFTOPS_\w+)` \|", (DOCS / "environment.md").read_text(), re.M))


def test_docstrings_and_help_texts_have_a_subject():
    """ "What was asked" is a question; "the question" is an answer."""
    asking = []
    for file in (ROOT / "peftops").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            helps = isinstance(node, ast.keyword) and node.arg == "help"
            text = (ast.get_docstring(node) or "") if documented else words(node.value) if helps else ""
            asking += [f"{file.name}: {text}"] if text.lower().startswith("what ") else []
    assert asking == []


def words(node):
    """The text of a string, with … for each part that is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(words(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def test_every_sentence_of_troubleshooting_is_said():
    """Each fragment between two … of a quoted sentence is in one string of the source, in the same order."""
    files = [*(ROOT / "peftops").rglob("*.py"), ROOT / "setup.py"]
    said = [
        words(node)
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.JoinedStr | ast.Constant)
    ]
    quoted = re.findall(r"^> (.*)$", (DOCS / "troubleshooting.md").read_text(), re.M)
    assert len(quoted) > 20
    for sentence in quoted:
        parts = [re.escape(part) for part in sentence.split("…") if part.strip()]
        assert any(re.search(".*".join(parts), text, re.S) for text in said), sentence


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@each_page
def test_sentences_have_a_subject(page):
    """A sentence that begins with "what" makes its reader wait for the subject. A heading or a cell may."""
    prose = "\n".join(line for line in page.read_text().splitlines() if not line.startswith(("|", "#", "    ", ">")))
    assert re.findall(r"(?:^|[.:;] )What .*", prose, re.M) == []
