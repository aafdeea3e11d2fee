"""The programs of README and docs run as they are written, on a tiny random model and in an empty folder.

A page's blocks run in order: Python in one namespace, the lines of a shell block one after the other. A Python block
with a title is a file of that name.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import models
from peftops.attaching import METHODS
from peftops.cli import main

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(python|sh)(?: title=\"(.*)\")?\n(.*?)^```$", re.M | re.S)
ELSEWHERE = ROOT / "docs/frameworks.md"  # of which tests/integrations/test_frameworks.py runs the lines
FILES = [ROOT / "README.md", *sorted({*(ROOT / "docs").rglob("*.md")} - {ELSEWHERE})]
PAGES = [path for path in FILES if BLOCK.search(path.read_text())]


@pytest.fixture(scope="session")
def given(tmp_path_factory):
    """The files that the pages call the reader's own."""
    folder = tmp_path_factory.mktemp("given")
    models.llama().save_pretrained(folder / "model")
    models.tokenizer().save_pretrained(folder / "model")
    rows = [{"instruction": f"repeat {c}", "response": c * 6} for c in "abcdefghij"]
    asked = [{"prompt": "abc", "adapter": "summaries"}, {"prompt": "abc"}]
    for name, lines in {"rows": rows, "requests": asked}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def shell(line):
    program, *arguments = shlex.split(line)
    if program == "peftops":
        assert main(arguments) == 0, line
        return
    assert program == "torchrun", f"no test runs {program}"
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_page_runs_as_it_is(page, given, tmp_path, monkeypatch):
    if "import peft\n" in page.read_text():
        pytest.importorskip("peft")
    for file in given.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    before, namespace, text = dict(METHODS), {"__name__": "page"}, page.read_text()
    try:
        for block in BLOCK.finditer(text):
            language, title, source = block.groups()
            if title:
                Path(title).write_text(source)
            elif language == "sh":
                for line in source.splitlines():
                    shell(line)
            else:
                lines_before = text.count("\n", 0, block.start(3))
                exec(compile("\n" * lines_before + source, str(page), "exec"), namespace)
    finally:  # a page may register a method of its own
        METHODS.clear()
        METHODS.update(before)
