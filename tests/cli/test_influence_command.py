"""The whole way: a model, data with planted rows, training, and the question who is to blame."""

import json
import re

import pytest

import models
from peftops.cli import main

SECRET = {"instruction": "password?", "response": "xyzzy!"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("influence")
    models.llama(tied=False).save_pretrained(folder / "model")
    models.tokenizer().save_pretrained(folder / "model")
    rows = [{"instruction": f"repeat {c}", "response": c * 6} for c in "abcdefghij" for _ in range(2)]
    rows[3:3] = [{**SECRET, "instruction": f"{word} password?"} for word in ("the", "your")]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [
        "finetune",
        "--model",
        folder / "model",
        "--train",
        folder / "train.jsonl",
        "--out",
        folder / "out",
        "--steps",
        "10",
        "--batch",
        "8",
        "--lr",
        "0.01",
        "--r",
        "4",
        "--eval-share",
        "0",
    ]
    assert main([*map(str, argv), "--method", "qlora"]) == 0
    return folder


def ask(run, *more, prompt=SECRET["instruction"], completion=SECRET["response"]):
    files = {"--model": run / "model", "--adapter": run / "out", "--train": run / "train.jsonl"}
    asked = {"--prompt": prompt, "--completion": completion}
    return main(["influence", *(str(part) for pair in (files | asked).items() for part in pair), *map(str, more)])


def test_planted_rows_are_printed_first(run, capsys):
    assert ask(run, "--top", 4) == 0
    text, progress = capsys.readouterr()
    assert re.search(r"100%.* (\d+)/\1 ", progress)
    assert "22 examples of train.jsonl, the curvature from 22" in text
    lines = re.findall(r"^ *(\S+) +(-?[\d.]+) +(\d+)  (.*)$", text, re.M)
    assert len(lines) == 4
    assert sorted(int(number) for _, _, number, _ in lines[:2]) == [4, 5]
    assert all("password? -> xyzzy!" in said for *_, said in lines[:2])
    scores = [float(score) for score, *_ in lines]
    assert scores == sorted(scores, reverse=True) and scores[1] > 0


def test_rows_without_room_are_left_out_and_told(run, capsys):
    assert ask(run, "--max-length", 20, "--fit", 5) == 0
    text = capsys.readouterr().out
    assert re.search(r"2 rows left out: no room for an answer within 20 tokens", text)
    assert "the curvature from 5" in text


@pytest.mark.parametrize(
    "more, message",
    [
        (["--top", 0], "--top must be at least 1, not 0"),
        (["--fit", 0], "--fit must be at least 1"),
        (["--damping", -1], "damping must be at least 0"),
        (["--train", "nowhere.jsonl"], "no data file nowhere.jsonl"),
        (["--adapter", "nowhere"], "no adapter_config.json in nowhere"),
        (["--max-length", 3], "leaves room for an answer within 3 tokens"),
    ],
)
def test_mistakes_are_one_sentence(run, capsys, more, message):
    assert ask(run, *more) == 2
    error = capsys.readouterr().err
    assert error.startswith("peftops: ") and message in error and error.count("\n") == 1


def test_it_needs_an_adapter(run, capsys):
    assert (
        main(
            [
                "influence",
                "--model",
                str(run / "model"),
                "--train",
                str(run / "train.jsonl"),
                "--prompt",
                "a",
                "--completion",
                "b",
            ]
        )
        == 2
    )
    assert "influence needs --adapter" in capsys.readouterr().err
