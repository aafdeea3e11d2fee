"""What goes wrong at the command line is one sentence and status 2, and costs nothing that was there."""

import argparse
import ctypes
import json
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import models
import peftops
from peftops.cli import commands, finetune, give_blocks_back, job, main, report, training
from peftops.integrations.files import fingerprint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    for name, seed in (("model", 0), ("other", 5)):
        models.llama(tied=False, seed=seed).save_pretrained(folder / name)
        models.tokenizer().save_pretrained(folder / name)
    rows = [{"instruction": f"repeat {c}", "response": c * 6} for c in "abcdefgh"]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
    return folder


@pytest.fixture
def train(folder, tmp_path):
    def run(*more, model="model", out=tmp_path / "out"):
        argv = [
            "finetune",
            "--model",
            folder / model,
            "--train",
            folder / "rows.jsonl",
            "--out",
            out,
            "--steps",
            4,
            "--batch",
            4,
            "--method",
            "lora",
            "--r",
            2,
            "--eval-share",
            0.3,
            "--ask",
            "hi",
            *more,
        ]
        return main([str(part) for part in argv])

    return run


def interrupt(monkeypatch, at):
    """Ctrl-C after so many steps."""
    step = job.Job.one_step

    def one_step(self, parts):
        if self.step == at - 1:
            signal.raise_signal(signal.SIGINT)
        return step(self, parts)

    monkeypatch.setattr(job.Job, "one_step", one_step)


@pytest.mark.parametrize("option", ["lr", "clip", "alpha", "warmup", "weight-decay", "epochs", "dropout", "eval-share"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-5", "1e400"])
def test_numbers_that_mean_nothing_are_refused(train, capsys, option, value, tmp_path):
    try:
        status = train(f"--{option}={value}")
    except SystemExit as exit:  # a count that is no whole number
        status = exit.code
    assert status == 2 and option.replace("-", "_") in capsys.readouterr().err.replace("-", "_")
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_lost_ends_the_run(train, capsys, tmp_path):
    assert train("--lr", "1e30") == 2
    error = capsys.readouterr().err
    assert "is nan" in error and "--lr 1e+30 is too high" in error
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_adapters_that_are_not_finite_go_nowhere(folder, tmp_path, capsys):
    """Not into a file, out of one, or into weights."""
    model = peftops.attach(models.llama(tied=False), peftops.LoRAConfig(r=4))
    peftops.save(model, tmp_path / "adapter")
    factor = model.model.layers[0].self_attn.q_proj.adapters["default"].lora_B
    with torch.no_grad():
        factor[0] = float("nan")
    with pytest.raises(ValueError, match=r"adapter 'default' is not finite: .*q_proj\.lora_B"):
        peftops.save(model, tmp_path / "lost")
    assert not (tmp_path / "lost").exists()
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj: merging would give weights that"):
        peftops.merge(model)
    assert not model.model.layers[0].self_attn.k_proj.is_merged

    from safetensors.torch import load_file, save_file

    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0] = float("inf")
    save_file(tensors, file)
    (tmp_path / "requests.jsonl").write_text('{"prompt": "a", "adapter": "adapter"}\n')
    at = ["--model", folder / "model"]
    for argv in (
        ["generate", *at, "--adapter", tmp_path / "adapter", "a"],
        ["merge", *at, "--adapter", tmp_path / "adapter", "--out", tmp_path / "merged"],
        [
            "serve",
            *at,
            "--adapters",
            tmp_path / "adapter",
            "--requests",
            tmp_path / "requests.jsonl",
            "--out",
            tmp_path / "answers",
        ],
    ):
        assert main([*map(str, argv)]) == 2
        assert "is not finite" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists() and not (tmp_path / "answers").exists()


@pytest.mark.parametrize(
    "more, name",
    [
        (["--eval-share", "0"], "eval_share"),
        (["--clip", "0.001"], "clip"),
        (["--turns", "all"], "turns"),
        (["--eval", "others.jsonl"], "eval"),
        (["--weight-decay", "0.1"], "weight_decay"),
        ("other", "model"),
    ],
)
def test_a_run_goes_on_only_as_it_began(folder, train, monkeypatch, capsys, more, name):
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        assert train() == 130
    capsys.readouterr()
    model, more = ("other", []) if more == "other" else ("model", more)
    more = [str(folder / word) if word.endswith(".jsonl") else word for word in more]
    assert train("--resume", *more, model=model) == 2
    error = capsys.readouterr().err
    assert f"was made with other settings: {name}=" in error and error.count("\n") == 1
    assert train("--resume") == 0


def test_a_model_is_known_by_what_is_in_its_files(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "moved")
    assert fingerprint(tmp_path / "moved") == fingerprint(folder / "model") != fingerprint(folder / "other")
    (tmp_path / "moved" / "report.json").write_text("{}")
    assert fingerprint(tmp_path / "moved") == fingerprint(folder / "model")


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: s["adapter"].update({next(iter(s["adapter"])): torch.zeros(3)}),
        lambda s: s["adapter"].popitem(),
        lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.zeros(1)),
        lambda s: s["optimizer"]["state"][0].update(exp_avg_sq=s["optimizer"]["state"][0]["exp_avg_sq"].double()),
        lambda s: s["optimizer"]["state"].update({99: {}}),
        lambda s: s.update(step=7),
        lambda s: s.update(losses=[1.0]),
        lambda s: s.update(random=torch.zeros(3)),
        lambda s: s.update(question=[]),
        lambda s: s.pop("settings"),
        lambda s: s.pop("optimizer"),
    ],
)
def test_checkpoints_are_looked_at_before_anything_is_restored(train, monkeypatch, capsys, tmp_path, damage):
    """The optimizer's kernel trusts shapes: a wrong one would write beyond a tensor's end."""
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        assert train() == 130
    file = tmp_path / "out" / "checkpoint.pt"
    state = torch.load(file, weights_only=True)
    damage(state)
    torch.save(state, file)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: pytest.fail("a step was taken"))
    capsys.readouterr()
    assert train("--resume") == 2
    error = capsys.readouterr().err
    assert "checkpoint.pt" in error and ("damaged" in error or "does not fit" in error) and error.count("\n") == 1


def test_nothing_is_overwritten_without_a_word(folder, train, monkeypatch, capsys, tmp_path):
    out = tmp_path / "out"
    assert train("--lr", 0.01) == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert train("--method", "none") == 2
    assert "holds the results of another run; --overwrite deletes it" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert train("--overwrite", "--lr", "nan") == 2  # (deletes nothing before all is known to be right)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert train("--method", "none", "--overwrite") == 0
    assert [p.name for p in out.iterdir()] == ["report.json"]
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        assert train("--overwrite") == 130
    assert train() == 2 and "holds an unfinished run; --resume goes on" in capsys.readouterr().err
    assert train(out=folder / "model") == 2 and "holds a model, which an adapter's" in capsys.readouterr().err


def test_what_was_learnt_is_saved_before_anything_else(train, monkeypatch, capsys, tmp_path):
    answers = iter(["before"])

    def answer(*_):
        return next(answers, None) or (_ for _ in ()).throw(RuntimeError("out of memory"))

    monkeypatch.setattr(job, "answer", answer)
    assert train() == 2
    assert "RuntimeError: out of memory (--traceback shows where)" in capsys.readouterr().err
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("first\nsecond"),
        KeyError("x"),
        RecursionError(),
        MemoryError(),
        ZeroDivisionError("division by zero"),
        OSError(28, "No space left on device"),
        AssertionError(),
        ValueError("a" * 5000),
    ],
)
def test_no_error_is_shown_as_a_traceback_unless_it_is_asked_for(folder, monkeypatch, capsys, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(commands, "load_tokenizer", fail)
    argv = ["generate", "--model", str(folder / "model"), "a"]
    assert main(argv) == 2
    told = capsys.readouterr().err
    assert told.startswith("peftops: ") and told.count("\n") == 1 and len(told) < 1200
    assert main([*argv, "--traceback"]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_tokens_and_positions_that_the_model_lacks(folder, train, tmp_path, capsys):
    shutil.copytree(folder / "model", tmp_path / "m")
    small = models.llama(tied=False)
    small.resize_token_embeddings(100)
    small.save_pretrained(tmp_path / "m")
    assert train(model=tmp_path / "m") == 2
    assert "and the model has 100 of them" in capsys.readouterr().err
    for model, prompt, sentence in (
        (folder / "model", "a" * 600, "leaves no room for an answer in the model's 512 positions"),
        (tmp_path / "m", "é", "of the prompt, and the model knows the tokens from 0 to 99"),
    ):
        assert main(["generate", "--model", str(model), prompt]) == 2
        assert sentence in capsys.readouterr().err
    assert main(["generate", "--model", str(folder / "model"), "--max-tokens", "-1", "a"]) == 2
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b" * 600}) + "\n")
    assert train("--train", tmp_path / "long.jsonl", "--eval-share", 0, "--max-length", 700) == 2
    assert "positions; give --max-length 512" in capsys.readouterr().err


def test_an_encoder_is_no_causal_language_model(tmp_path, train, capsys):
    models.bert().save_pretrained(tmp_path / "bert")
    models.tokenizer().save_pretrained(tmp_path / "bert")
    for run in (
        lambda: main(["plan", "--model", str(tmp_path / "bert"), "--memory", "1GiB"]),
        lambda: train(model=tmp_path / "bert"),
    ):
        assert run() == 2
        assert "is not a causal language model: it holds a BertForSequenceClassification" in capsys.readouterr().err


def test_code_of_a_model_runs_only_if_it_is_asked_for(folder, tmp_path, capsys, monkeypatch):
    """Nobody is asked on stdin, either."""
    shutil.copytree(folder / "model", tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    ran = tmp_path / "ran"
    (tmp_path / "m" / "own.py").write_text(f"open({str(ran)!r}, 'w')\nraise SystemError('it ran')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "cache"))
    for argv in (["generate", "a"], ["plan", "--memory", "1GiB"]):
        assert main([argv[0], "--model", str(tmp_path / "m"), *argv[1:]]) == 2
    assert not ran.exists() and capsys.readouterr().err.count("allow it with --trust-remote-code") == 2
    assert main(["plan", "--model", str(tmp_path / "m"), "--memory", "1GiB", "--trust-remote-code"]) == 2
    assert ran.exists()


def test_reports_with_any_loss_and_damaged_ones(tmp_path, capsys):
    counts = "trainable total frozen_bytes dense_bytes peak_bytes steps rows_per_step seconds tokens".split()
    made = {"method": "lora", "loss_before": 800.0, "loss_after": None, **dict.fromkeys(counts, 3)}
    (tmp_path / report.FILE).write_text(json.dumps(made))
    assert main(["report", str(tmp_path)]) == 0 and "inf" in capsys.readouterr().out
    for change in ({"total": 0}, {"tokens": "3"}, {"loss_after": [1]}, {"method": None}, {"seconds": float("nan")}):
        (tmp_path / report.FILE).write_text(json.dumps({**made, **change}))
        assert main(["report", str(tmp_path)]) == 2 and "is damaged: its" in capsys.readouterr().err
    for text in ("[", "[]", "[" * 100_000):
        (tmp_path / report.FILE).write_text(text)
        assert main(["report", str(tmp_path)]) == 2 and "is damaged" in capsys.readouterr().err


def test_memory_without_the_pages_of_files(tmp_path, monkeypatch):
    """A mapped file is no memory of the process: the system takes its pages back when it likes."""
    import mmap

    (tmp_path / "file").write_bytes(bytes(64 << 20))
    before = training.memory_now()
    with open(tmp_path / "file", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[i] for i in range(0, 64 << 20, 4096)) == 0
        assert training.memory_now() - before < 16 << 20
    assert training.memory_peak() > 0
    monkeypatch.setattr(training, "_status", lambda name: (_ for _ in ()).throw(OSError))
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert training.memory_peak() == 0


@pytest.mark.skipif(not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc")
def test_freed_blocks_go_back_to_the_system():
    """By itself, glibc keeps what is freed once blocks of that size have come and gone."""
    code = """
import sys, torch
from peftops.cli import give_blocks_back
from peftops.cli.training import memory_now
if sys.argv[1] == "back":
    give_blocks_back()
torch.ones(4 << 20).sum()  # 16 MiB: from now on blocks of that size come from the heap
kept, held = [], []
for _ in range(8):
    held.append(torch.ones(2 << 20))
    kept.append(torch.ones(20_000))  # lies above, and holds the heap up
del held
print(memory_now())
"""
    run = lambda how: subprocess.run([sys.executable, "-c", code, how], cwd=ROOT, capture_output=True, text=True)
    back, kept = (int(run(how).stdout) for how in ("back", "kept"))
    assert kept - back > 40 << 20


def test_a_threshold_of_ones_own_is_left_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(ctypes, "CDLL", lambda _: types.SimpleNamespace(mallopt=lambda *args: asked.append(args)))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    give_blocks_back()
    assert asked == [(-3, 1 << 16)]
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "16777216")
    give_blocks_back()
    assert len(asked) == 1


def test_every_command_takes_the_flags_for_a_model():
    parser = argparse.ArgumentParser()
    finetune.add_arguments(parser)
    args = parser.parse_args(["--model", "m", "--train", "t", "--out", "o"])
    assert args.trust_remote_code is False and args.overwrite is False and args.turns == "last"


@pytest.mark.parametrize(
    "argv",
    [
        ["generate", "hi"],
        ["merge", "--adapter", "a", "--out", "m"],
        ["plan", "--memory", "1GiB"],
        ["finetune", "--train", "rows.jsonl", "--out", "run"],
        ["serve", "--requests", "rows.jsonl", "--out", "answers"],
        ["influence", "--adapter", "a", "--train", "rows.jsonl", "--prompt", "a", "--completion", "b"],
    ],
    ids=lambda argv: argv[0],
)
def test_every_command_says_that_there_is_no_such_model(argv, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n' if argv[0] == "serve" else '{"text": "a b c"}\n')
    peftops.save(peftops.attach(models.llama(), peftops.LoRAConfig(r=2)), tmp_path / "a")
    assert main([*argv, "--model", "nowhere"]) == 2
    assert "peftops: no model at nowhere" in capsys.readouterr().err
    assert not {"m", "answers"} & {path.name for path in tmp_path.iterdir()}
