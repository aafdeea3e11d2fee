"""The script that breaks the code on purpose: its mutants are other programs that parse, and faults are caught."""

import ast
import random
import subprocess
import sys

import pytest

import mutate


@pytest.mark.parametrize("file", ["peftops/serving/cache.py", "peftops/attaching/patterns.py", "peftops/nn/undo.py"])
def test_mutants_are_other_programs(file):
    text = (mutate.ROOT / file).read_text()
    found = list(mutate.mutants(mutate.ROOT / file, 30, random.Random(1)))
    assert len(found) > 5 and len({text[:start] + new + text[end:] for start, end, new in found}) == len(found)
    for start, end, new in found:
        assert ast.dump(ast.parse(text[:start] + new + text[end:])) != ast.dump(ast.parse(text))


def test_kernels_have_mutants_outside_comments():
    files = [file for file, _ in mutate.files_of(["csrc"])]
    assert sum(len(mutate.changes(mutate.ROOT / file)) > 5 for file in files) > 20  # others have a few lines
    for file in files:
        text = (mutate.ROOT / file).read_text()
        found = mutate.changes(mutate.ROOT / file)
        lines = text.splitlines()
        for start, _, _ in found:
            line = lines[text.count("\n", 0, start)]
            assert "//" not in line or line.index("//") > start - text.rfind("\n", 0, start) - 1


def test_a_fault_is_caught_and_a_change_of_words_is_not(tmp_path):
    mutate.copy_of(mutate.ROOT, tmp_path)
    file, tests = "peftops/prompts/few_shot.py", ["methods/test_hard_prompt.py"]
    text = (tmp_path / file).read_text()
    for old, new, want in (
        ("len(choice.encode())", "len(choice)", "caught"),
        ("The log-probability of each", "The chance of each", "SURVIVED"),
    ):
        assert text.count(old) == 1
        (tmp_path / file).write_text(text.replace(old, new))
        call = f"mutate.judge(Path({str(tmp_path)!r}), {file!r}, {tests}, 300)"
        code = f"from pathlib import Path; import mutate; print({call})"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=mutate.ROOT / "tests")
        assert run.stdout.split() == [want], run.stderr


def test_a_total_is_spread_over_files():
    drawn = [file for file, _, _ in mutate.draw(["peftops/nn/u", "peftops/nn/ties"], 5, 6, 1)]
    assert len(drawn) == 6 and len(set(drawn[:4])) == len(set(drawn)) == 4
    assert mutate.draw(["peftops/nn/u"], 5, 4, 1) == mutate.draw(["peftops/nn/u"], 5, 4, 1)


def test_every_place_exists():
    for place, tests in mutate.TESTS.items():
        assert (mutate.ROOT / place).exists() and all((mutate.ROOT / "tests" / name).exists() for name in tests)
