"""``peftops quantize``, ``finetune --calibrate`` and ``merge --calibrate``: what they leave is what they measured."""

import json

import pytest
import torch

import models
import peftops
from integrations.test_calibration import llama
from peftops.cli import main
from peftops.cli.data import encode, read_rows
from peftops.cli.model import load_tokenizer
from peftops.cli.training import evaluate
from peftops.nn import NF4Linear

ROWS = [{"instruction": f"repeat {c} {i}", "response": c * 6} for c in "abcdefgh" for i in range(12)]
pytestmark = pytest.mark.filterwarnings("ignore:.* tokens are few to calibrate with", "ignore:.*quantising the merged")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantize")
    llama().save_pretrained(folder / "model")
    models.tokenizer().save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "text.txt").write_text("to be or not to be, that is the question. " * 60)
    return folder


def command(*argv):
    return main([str(part) for part in argv])


def finetune(folder, out, *more):
    rows = folder / "rows.jsonl"
    return command(
        "finetune",
        "--model",
        folder / "model",
        "--train",
        rows,
        "--eval",
        rows,
        "--out",
        out,
        "--steps",
        3,
        "--lr",
        0.02,
        "--batch",
        4,
        "--r",
        4,
        "--ask",
        "hi",
        "--max-length",
        64,
        *more,
    )


def loss(folder, model):
    return evaluate(model, encode(read_rows(folder / "rows.jsonl"), models.tokenizer(), 64), 4, 2)


@pytest.mark.parametrize("data", ["rows.jsonl", "text.txt"])
def test_quantize(folder, tmp_path, capsys, data, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.pyplot.close", drawn.append)
    out = tmp_path / "out"
    options = ["--model", folder / "model", "--calibrate", folder / data, "--out", out, "--max-length", 64]
    assert command("quantize", *options, "--tokens", 1000) == 0
    said, report = capsys.readouterr().out, json.loads((out / "calibration.json").read_text())
    assert "14 layers in NF4, calibrated on" in said and f"are in {out}" in said
    assert 1000 <= report["tokens"] < 1064 and (out / "calibration.png").read_bytes().startswith(b"\x89PNG")
    lines = (
        drawn[0].axes[0].lines
    )  # two for each of seven kinds of layers: plain and calibrated, a point for each block
    assert len(lines) == 14 and all(len(line.get_ydata()) == 2 for line in lines)
    model = peftops.load_model(out)
    assert sum(isinstance(m, NF4Linear) for m in model.modules()) == 14 and load_tokenizer(out)("hi")
    assert command("quantize", *options) == 2 and "holds files already" in capsys.readouterr().err
    assert command("generate", "--model", out, "--quantize", "--max-tokens", 3, "hi") == 0


@pytest.mark.parametrize(
    "options, words",
    [
        (["--tokens", 0], "--tokens must be at least 1, not 0"),
        (["--damping", -1], "damping must be positive"),
        (["--block-size", 48], "block_size must be one of"),
        (["--calibrate", "none.jsonl"], "no data file none.jsonl"),
    ],
)
def test_mistakes_leave_nothing(folder, tmp_path, capsys, options, words):
    argv = ["--model", folder / "model", "--calibrate", folder / "rows.jsonl", "--out", tmp_path / "out", *options]
    assert command("quantize", *argv) == 2 and words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["qlora", "loftq", "lqlora"])
def test_finetune_on_calibrated_codes_and_its_files_give_the_loss_again(folder, tmp_path, method, capsys):
    out = tmp_path / "out"
    assert finetune(folder, out, "--method", method, "--calibrate", "--eval-share", 0) == 0
    after = json.loads((out / "report.json").read_text())["loss_after"]
    base = folder / "model" if method == "lqlora" else out / "base"
    model = peftops.load(peftops.load_model(base, quantize=method != "lqlora"), out)
    assert loss(folder, model) == pytest.approx(after, rel=1e-5)
    if method == "qlora":
        named = json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert named == str(base)
        assert command("generate", "--model", base, "--adapter", out, "--max-tokens", 3, "hi") == 0
        assert finetune(folder, out, "--method", method, "--calibrate", folder / "text.txt", "--overwrite") == 0
        dense, x = llama(), torch.tensor([encode(read_rows(folder / "rows.jsonl"), models.tokenizer(), 64)[0].ids])
        bases = peftops.load_model(folder / "model"), peftops.load_model(base)
        plain, found = ((model(x).logits - dense(x).logits).norm() for model in bases)
        assert found < plain


def test_calibrate_is_for_methods_that_make_codes(folder, tmp_path, capsys):
    assert finetune(folder, tmp_path / "out", "--method", "lora", "--calibrate") == 2
    assert "lora makes none; it is for qlora, loftq, lqlora" in capsys.readouterr().err


def test_a_calibrated_merge_is_nearer_to_what_was_trained(folder, tmp_path):
    run, out = tmp_path / "run", tmp_path / "merged"
    assert finetune(folder, run, "--method", "qlora") == 0
    assert (
        command(
            "merge", "--model", folder / "model", "--adapter", run, "--calibrate", folder / "rows.jsonl", "--out", out
        )
        == 0
    )
    trained, today = (peftops.load(peftops.load_model(folder / "model"), run) for _ in range(2))
    peftops.merge(today)
    x = torch.tensor([encode(read_rows(folder / "rows.jsonl"), models.tokenizer(), 64)[0].ids])
    far = [(model(x).logits - trained(x).logits).norm() for model in (peftops.load_model(out), today)]
    assert far[0] < 0.8 * far[1]
