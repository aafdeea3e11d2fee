"""The example in the docstring of each public name runs, after the beginning that docs/reference/index.md states."""

import doctest
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from test_docs import ENTRIES

import peftops

ROOT = Path(__file__).resolve().parents[2]
BEGINNING = re.search(r"```python\n(.*?)```", (ROOT / "docs/reference/index.md").read_text(), re.S)[1]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def things():
    found = {name: getattr(peftops, name) for name in peftops.__all__}
    return found | {path: thing for path in ENTRIES if (thing := pkgutil.resolve_name(path)) not in found.values()}


@pytest.fixture(scope="module")
def beginning():
    namespace = {}
    exec(BEGINNING, namespace)
    return namespace


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, thing", things().items(), ids=things())
def test_an_example_runs(name, thing, beginning, tmp_path, monkeypatch):
    example = doctest.DocTestParser().get_doctest(inspect.getdoc(thing), dict(beginning), name, None, 0)
    if not example.examples:
        assert name not in peftops.__all__, "a public name needs an example"
        pytest.skip("it has no example")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    said = []
    result = doctest.DocTestRunner(optionflags=OPTIONS).run(example, out=said.append)
    assert not result.failed, "".join(said)
