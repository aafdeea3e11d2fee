import pytest

import models
from peftops.cli import main
from peftops.cli.plan import parse_bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    models.llama().save_pretrained(folder)
    return folder


def plan(folder, *more):
    return main(["plan", "--model", str(folder), "--batch", "2", "--max-length", "32", *map(str, more)])


def test_a_line_per_method_and_a_choice_with_reasons(folder, capsys):
    assert plan(folder, "--memory", "16GiB", "--tasks", 3, "--r", 4) == 0
    text = capsys.readouterr().out
    assert "0.1 M parameters, float32, 2 rows of 32 tokens, 16GiB" in text
    lines = {line.split()[0]: line for line in text.splitlines() if line}
    assert " yes " in lines["lora"] and "bitfit" in lines and "not for this model" in lines["bitfit"]
    assert "choose: lora" in text and "All 3 adapters together" in text and "Not counted" in text


def test_what_does_not_fit_is_told(folder, capsys):
    assert plan(folder, "--memory", "2K", "--checkpointing") == 0
    text = capsys.readouterr().out
    assert "choose: nothing of these" in text and "lora does not fit" in text and " no " in text


def test_wishes_change_the_choice(folder, capsys):
    assert plan(folder, "--memory", "1GB", "--want", "mixture") == 0
    assert "choose: multilora" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, size",
    [
        ("16GiB", 16 << 30),
        ("24GB", 24 * 10**9),
        ("1.5 g", 3 << 29),
        ("800M", 800 << 20),
        ("12B", 12),
    ],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "more, message",
    [
        (["--memory", "much"], "--memory must be a size such as 16GiB, 24GB or 800M, not 'much'"),
        (["--memory", "0G"], "--memory must be a size"),
        (["--memory", "16"], "--memory 16 has no unit: 16GiB, for instance, or 16B for bytes"),
        (["--memory", "4 elephants"], "--memory must be a size"),
        (["--memory", "1G", "--batch", 0], "batch and length must be at least 1"),
        (["--memory", "1G", "--max-length", 9999], "length at most 512"),
        (["--memory", "1G", "--tasks", 0], "memory and tasks must be at least 1"),
        (["--memory", "1G", "--r", 0], "r must be a whole number from 1"),
        (["--memory", "1G", "--model", "nowhere"], "no model at nowhere"),
    ],
)
def test_mistakes_are_one_sentence(folder, capsys, more, message):
    assert plan(folder, *more) == 2
    error = capsys.readouterr().err
    assert error.startswith("peftops: ") and message in error and error.count("\n") == 1
