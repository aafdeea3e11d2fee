import json
import math
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import models
import peftops
from peftops.cli import main
from peftops.cli.data import DataError, batches, collate, encode, in_order, read_rows
from peftops.cli.finetune import parse_target
from peftops.cli.training import answer_loss, learning_rate

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = models.llama(tied=False)
    # The head stays frozen; at the standard deviation of a fresh one, 0.02, no hidden state makes it sure of a token.
    with torch.no_grad():
        model.lm_head.weight *= 8
    model.save_pretrained(folder)
    models.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def train_file(tmp_path):
    """Something that a tiny model learns in a few steps: the answer is the question's letter, repeated."""
    rows = [{"instruction": f"repeat {c}", "response": c * 6} for c in "abcdefghij" for _ in range(4)]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(model, train, out, *more):
    return [
        "finetune",
        "--model",
        str(model),
        "--train",
        str(train),
        "--out",
        str(out),
        "--steps",
        "12",
        "--batch",
        "4",
        "--lr",
        "0.01",
        "--r",
        "4",
        "--eval-share",
        "0.2",
        *map(str, more),
    ]


@pytest.mark.parametrize(
    "method, option",
    [("ia3", "--r"), ("ia3", "--alpha"), ("headonly", "--dropout"), ("lora", "--every"), ("lora", "--block-size")],
)
def test_options_that_a_method_does_not_have_are_refused(model_folder, train_file, tmp_path, capsys, method, option):
    argv = arguments(model_folder, train_file, tmp_path / "out", "--method", method, option, 2)
    if method != "lora" and option != "--r":
        at = argv.index("--r")
        del argv[at : at + 2]
    assert main(argv) == 2
    assert f"{option} is not an option of {method}, which has " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_from_a_model_and_a_file_to_an_adapter(model_folder, train_file, tmp_path, capsys, method):
    out = tmp_path / "out"
    assert main(arguments(model_folder, train_file, out, "--method", method, "--eval-every", 5)) == 0
    text = capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert report["method"] == method and len(report["losses"]) == 12
    assert [step for step, _ in report["evaluations"]] == [0, 5, 10, 12]
    assert report["loss_after"] < report["loss_before"] - 0.5
    assert report["dense_bytes"] / report["frozen_bytes"] == (pytest.approx(7.7, abs=0.1) if method == "qlora" else 1)
    for line in ("held-out loss after", "peak memory in training", "tokens/s", "asked:  repeat a", "before:", "after:"):
        assert line in text
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "loss.png",
        "peftops.json",
        "report.json",
    ]
    model = peftops.load_model(model_folder, quantize=method == "qlora")
    peftops.load(model, out)
    rows = read_rows(train_file)[::5]
    examples = encode(rows, models.tokenizer(), 512)
    with torch.no_grad():
        loss = [answer_loss(model, batch, 2) for batch in in_order(examples, 4)]
    assert sum(x.item() for x, _ in loss) / sum(n for _, n in loss) == pytest.approx(report["loss_after"], rel=1e-4)
    assert main(["report", str(out), str(out)]) == 0
    assert capsys.readouterr().out.count(method) == 2


def test_the_same_seed_gives_the_same_adapter(model_folder, train_file, tmp_path):
    for name in ("a", "b"):
        more = ["--dropout", 0.1, "--seed", 7, "--threads", torch.get_num_threads()]
        assert main(arguments(model_folder, train_file, tmp_path / name, *more)) == 0
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_accumulating_batches_is_one_large_batch(model_folder, train_file, tmp_path):
    """Every target counts once, however they are split up."""
    losses = []
    for batch, accumulate in ((8, 1), (2, 4)):
        out = tmp_path / f"{batch}"
        argv = arguments(model_folder, train_file, out, "--accumulate", accumulate, "--eval-share", 0)
        argv[argv.index("--batch") + 1] = str(batch)
        argv[argv.index("--steps") + 1] = "1"
        assert main(argv) == 0
        losses.append(json.loads((out / "report.json").read_text())["losses"][0])
    assert all(math.isfinite(loss) for loss in losses)


def test_interrupted_and_resumed_is_the_same_as_in_one_go(model_folder, train_file, tmp_path):
    """Ctrl-C in a process of its own saves after the step; --resume ends with the very same adapter."""
    argv = arguments(model_folder, train_file, tmp_path / "whole", "--dropout", 0.1)
    argv[argv.index("--steps") + 1] = "60"
    assert main(argv) == 0
    argv[argv.index(str(tmp_path / "whole"))] = str(tmp_path / "parts")
    command = [sys.executable, "-m", "peftops", *argv]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    seen = b""
    while b"/60" not in seen or b" 0/60" in seen[-200:]:
        piece = process.stderr.read1(200)
        assert piece, seen.decode()
        seen += piece
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and b"go on with --resume" in out
    state = torch.load(tmp_path / "parts/checkpoint.pt", weights_only=True)
    assert 1 <= state["step"] < 60
    assert not (tmp_path / "parts/adapter_model.safetensors").exists()

    threads = torch.get_num_threads()
    assert main([*argv, "--resume"]) == 0
    torch.set_num_threads(threads)
    assert not (tmp_path / "parts/checkpoint.pt").exists()
    files = (tmp_path / name / "adapter_model.safetensors" for name in ("whole", "parts"))
    whole, parts = map(peftops.integrations.peft_files.load_file, files)
    assert all(torch.allclose(whole[key], parts[key], rtol=1e-4, atol=1e-6) for key in whole)
    reports = [json.loads((tmp_path / n / "report.json").read_text()) for n in ("whole", "parts")]
    assert len(reports[1]["losses"]) == 60 and reports[1]["loss_before"] == pytest.approx(reports[0]["loss_before"])


def test_resuming_needs_a_checkpoint_of_the_same_run(model_folder, train_file, tmp_path, capsys):
    argv = arguments(model_folder, train_file, tmp_path / "out")
    assert main([*argv, "--resume"]) == 2
    assert "nothing to resume: no" in capsys.readouterr().err
    settings = {"settings": {"r": 4, "lr": 0.5}}
    (tmp_path / "out").mkdir(exist_ok=True)
    torch.save(settings, tmp_path / "out/checkpoint.pt")
    assert main([*argv, "--resume"]) == 2
    assert "was made with other settings: " in capsys.readouterr().err
    (tmp_path / "out/checkpoint.pt").write_bytes(b"PK broken")
    assert main([*argv, "--resume"]) == 2
    assert "is damaged or cut short" in capsys.readouterr().err


def test_moments_in_8_bits(model_folder, train_file, tmp_path, capsys, monkeypatch):
    """--optimizer adamw8bit learns, and stopped and resumed ends with the very same adapter; the checkpoint belongs to
    its optimizer."""
    more = "--optimizer", "adamw8bit", "--target", "gate_proj,up_proj,down_proj", "--r", 64, "--save-every", 5
    whole, parts = (arguments(model_folder, train_file, tmp_path / name, *more) for name in ("whole", "parts"))
    assert main(whole) == 0
    report = json.loads((tmp_path / "whole/report.json").read_text())
    assert report["loss_after"] < report["loss_before"] - 0.5

    def stop(*args):
        raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(peftops.cli.finetune.Job, "finish", stop)
        assert main(parts) == 2
    state = torch.load(tmp_path / "parts/checkpoint.pt", weights_only=True)
    assert state["step"] == 10 and state["optimizer"]["state"][0]["exp_avg"].dtype == torch.uint8
    capsys.readouterr()
    assert main([*parts, "--resume", "--optimizer", "adamw"]) == 2
    assert "was made with other settings: optimizer='adamw8bit' (now 'adamw')" in capsys.readouterr().err
    assert main([*parts, "--resume"]) == 0
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]


def test_relora_needs_moments_that_it_can_prune(model_folder, train_file, tmp_path, capsys):
    argv = arguments(model_folder, train_file, tmp_path / "out", "--method", "relora", "--optimizer", "adamw8bit")
    assert main(argv) == 2
    assert "relora prunes the optimizer's moments, which adamw8bit keeps as codes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"\xff\xfe{}", "is not UTF-8: byte 0"),
        (b'{"instruction": "a", "response": "b"}\n{"instruction": "a", \n', "line 2 is not JSON"),
        (
            b'{"instruction": "a", "response": "b"}\n\n[1]\n',
            r"line 3: expected an object with instruction and response.*not list",
        ),
        (b'{"question": "a", "answer": "b"}\n', "line 1: expected instruction and response.*it has question, answer"),
        (b'{"instruction": 3, "response": "b"}\n', "line 1: expected instruction and response"),
        (b'{"messages": [{"role": "user", "content": "a"}]}\n', "line 1: the last of messages must be the assistant's"),
        (b'{"messages": [{"role": "assistant"}]}\n', "line 1: each of messages must have a role and a content"),
    ],
)
def test_bad_data_says_which_line_and_why_before_the_model_is_read(tmp_path, capsys, content, message):
    import re

    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    (tmp_path / "model").mkdir()
    assert main(arguments(tmp_path / "model", path, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1 and str(path) in error


def test_bad_options_are_sentences(model_folder, train_file, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    cases = [
        (["--steps", "0"], "--steps must be at least 1, not 0"),
        (["--batch", "-1"], "--batch must be at least 1"),
        (["--lr", "0"], "--lr and --epochs must be positive"),
        (["--r", "0"], "r must be a whole number from 1"),
        (["--dropout", "1"], "dropout must be a number in [0, 1), not 1.0"),
        (["--threads", "0"], "--threads must be at least 1 and at most 1024, not 0"),
        (["--threads", "1025"], "--threads must be at least 1 and at most 1024, not 1025"),
        (["--eval-share", "1"], "--eval-share must be in [0, 1)"),
        (["--target", "q_porj"], "did you mean"),
        (["--train", str(tmp_path / "none.jsonl")], "no data file"),
        (["--out", str(tmp_path / "file")], "cannot write to directory"),
        (["--model", str(tmp_path / "no")], "no model at"),
        (["--max-length", "5"], "leaves room for an answer within 5 tokens"),
        (["--set", "tokens=5"], "--set tokens=5: qlora takes NAME=VALUE with NAME one of r, alpha"),
        (["--set", "rslora"], "--set rslora: qlora takes NAME=VALUE"),
        (["--set", "block_size=48"], "block_size must"),
    ]
    for more, message in cases:
        assert main(arguments(model_folder, train_file, tmp_path / "out", *more)) == 2, more
        error = capsys.readouterr().err
        assert message in error and error.startswith("peftops: ") and error.count("\n") == 1, error


def test_generate_and_merge(model_folder, train_file, tmp_path, capsys):
    out = tmp_path / "out"
    argv = arguments(model_folder, train_file, out, "--method", "lora")
    argv[argv.index("--steps") + 1] = "60"
    assert main(argv) == 0
    capsys.readouterr()
    assert main(["merge", "--model", str(model_folder), "--adapter", str(out), "--out", str(tmp_path / "merged")]) == 0
    assert "14 layers merged" in capsys.readouterr().out
    common = ["--dense", "--max-tokens", "4", "repeat c"]
    assert main(["generate", "--model", str(model_folder), "--adapter", str(out), *common]) == 0
    adapted = capsys.readouterr().out
    assert main(["generate", "--model", str(tmp_path / "merged"), *common]) == 0
    assert capsys.readouterr().out == adapted
    assert main(["generate", "--model", str(model_folder), *common]) == 0
    assert capsys.readouterr().out != adapted
    assert main(["merge", "--model", str(model_folder), "--out", str(tmp_path / "x")]) == 2
    assert "merge needs --adapter" in capsys.readouterr().err


def test_info_starts_quickly_and_tells_what_is_in_use(capsys):
    begin = time.perf_counter()
    assert main(["info"]) == 0
    assert time.perf_counter() - begin < 2
    text = capsys.readouterr().out
    assert peftops._C.isa() in text and torch.__version__ in text and "CUDA" in text


def test_plain_text_and_conversations(tmp_path):
    tokenizer = models.tokenizer()
    text = tmp_path / "book.txt"
    text.write_text("once upon a time " * 20)
    (row,) = read_rows(text)
    examples = encode([row], tokenizer, 100)
    assert [len(e.ids) for e in examples] == [100, 100, 100, 41] and examples[0].targets == 99
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "ab"}]}\n'
        '{"prompt": "q", "completion": "ab"}\n{"text": "abc"}\n'
        '{"instruction": "q", "input": "i", "output": "ab"}\n'
    )
    chat, pair, plain, with_input = encode(read_rows(path), tokenizer, 100)
    assert chat == pair and chat.targets == 3 and plain.targets == 3 and len(with_input.ids) == len(pair.ids) + 3
    assert tokenizer.decode(chat.ids[-3:]) == "ab</s>"
    assert tokenizer.decode(chat.ids[:-3]) == "<s>u:q</s><s>a:"
    without = encode(read_rows(path), models.tokenizer(chat=False), 100)[0]
    assert models.tokenizer().decode(without.ids) == "q\nab</s>"


def test_only_the_answers_count_and_padding_changes_nothing():
    """The loss of a batch is the sum of its rows' own, and that of the full logits at the answers."""
    model = models.llama()
    examples = encode([_pair(answer) for answer in ("a" * 3, "b" * 17, "c" * 40)], models.tokenizer(), 512)
    with torch.no_grad():
        total, count = answer_loss(model, examples, 2)
        alone = [answer_loss(model, [e], 2) for e in examples]
        expected = 0.0
        for e in examples:
            logits = model(torch.tensor([e.ids])).logits[0].double().log_softmax(-1)
            positions = range(len(e.ids) - e.targets, len(e.ids))
            expected -= sum(logits[i - 1, e.ids[i]].item() for i in positions)
    assert count == sum(e.targets for e in examples) == sum(n for _, n in alone)
    assert total.item() == pytest.approx(sum(loss.item() for loss, _ in alone), rel=1e-5)
    assert total.item() == pytest.approx(expected, rel=1e-5)


def _pair(answer):
    from peftops.cli.data import Row

    return Row([{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}])


def test_batches_cover_every_row_once_an_epoch_in_an_order_of_the_seed():
    from itertools import islice

    examples = encode([_pair("ab" * (i % 7 + 1)) for i in range(50)], models.tokenizer(), 512)
    for i, e in enumerate(examples):
        e.ids[0] = 1000 + i
    epoch = lambda seed: [[e.ids[0] for e in b] for b in islice(batches(examples, 8, seed), 14)]
    first = epoch(0)
    assert sorted(i for b in first[:7] for i in b) == sorted(i for b in first[7:] for i in b) == list(range(1000, 1050))
    assert first[:7] != first[7:] and first == epoch(0) != epoch(1)


def test_learning_rate():
    rates = [learning_rate(i, 100, 2.0, 10) for i in range(100)]
    assert rates[0] == 0.2 and rates[9] == 2.0 and rates[10] == 2.0 and rates[55] == pytest.approx(1.0)
    assert all(a >= b for a, b in pairwise(rates[10:])) and 0 < rates[-1] < 0.01


def test_targets_on_the_command_line():
    assert parse_target("all-linear") == "all-linear" and parse_target("re:.*q") == ".*q"
    assert parse_target("q_proj, v_proj") == ["q_proj", "v_proj"]


def test_left_padding():
    examples = encode([_pair("a"), _pair("bbbb")], models.tokenizer(), 512)
    batch = collate(examples, 2)
    assert batch["attention_mask"][0].tolist() == [0, 0, 0] + [1] * (batch["input_ids"].shape[1] - 3)
    assert batch["position_ids"][0, :5].tolist() == [0, 0, 0, 0, 1]
    assert (batch["labels"][0] != -100).sum() == 2 and (batch["labels"][1] != -100).sum() == 5


def test_a_file_that_is_not_there():
    with pytest.raises(DataError, match=r"no data file nowhere\.jsonl"):
        read_rows(Path("nowhere.jsonl"))


@pytest.fixture
def fields_file(tmp_path):
    """Rows of fields that no convention knows."""
    path = tmp_path / "fields.jsonl"
    rows = [{"letter": c, "answer": c * 6} for c in "abcdefghij" for _ in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_without_a_method_the_model_is_measured_as_it_is(model_folder, fields_file, tmp_path, capsys):
    """The baseline of hard prompts: nothing trains, and demonstrations change the loss."""
    losses = {}
    for shots in (0, 3):
        out = tmp_path / str(shots)
        more = ("--method", "none", "--template", r"repeat {letter}\n|||{answer}", "--shots", shots)
        assert main(arguments(model_folder, fields_file, out, *more)) == 0
        report = json.loads((out / "report.json").read_text())
        assert report["trainable"] == report["steps"] == 0 and report["losses"] == []
        assert report["loss_before"] == report["loss_after"]
        assert [p.name for p in out.iterdir()] == ["report.json"]
        losses[shots] = report["loss_before"]
    text = capsys.readouterr().out
    assert losses[0] != losses[3] and "report.json is in" in text and "asked:  repeat a" in text
    prompt = peftops.HardPrompt("repeat {letter}\n|||{answer}", chat=True)
    model = peftops.load_model(model_folder, quantize=False)
    examples = encode(read_rows(fields_file, prompt)[::5], models.tokenizer(), 512, prompt)
    with torch.no_grad():
        loss = [answer_loss(model, batch, 2) for batch in in_order(examples, 4)]
    assert sum(x.item() for x, _ in loss) / sum(n for _, n in loss) == pytest.approx(losses[0], rel=1e-4)


def test_a_template_is_the_data_side_of_a_method(model_folder, fields_file, train_file, tmp_path):
    """With the template of the convention's own words, training is the same to the bit."""
    peftops.HardPrompt("repeat {letter}|||{answer}").save(tmp_path / "prompt.json")
    files = []
    for name, file, more in (("a", fields_file, ("--template", tmp_path / "prompt.json")), ("b", train_file, ())):
        assert main(arguments(model_folder, file, tmp_path / name, "--method", "lora", *more)) == 0
        files.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize(
    "more, message",
    [
        (("--template", "{letter}"), "exactly once"),
        (("--template", "{word}|||x"), "line 1: the template needs word"),
        (("--shots", 2), "--shots must be at least 0 and needs --template"),
        (("--template", "{letter}|||x", "--shots", 99), "k must be a whole number in"),
    ],
)
def test_bad_templates_get_a_sentence(model_folder, fields_file, tmp_path, capsys, more, message):
    assert main(arguments(model_folder, fields_file, tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err


def test_relora_restarts_and_is_saved_with_its_base(model_folder, train_file, tmp_path):
    out = tmp_path / "out"
    argv = arguments(model_folder, train_file, out, "--method", "relora", "--every", 4, "--save-every", 1000)
    assert main(argv) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["loss_after"] < report["loss_before"] - 0.3
    model = peftops.load(peftops.load_model(model_folder, quantize=False), out)
    assert model._peftops.configs["default"].restarts == 3
    rows = encode(read_rows(train_file)[::5], models.tokenizer(), 512)
    with torch.no_grad():
        loss = [answer_loss(model, batch, 2) for batch in in_order(rows, 4)]
    assert sum(x.item() for x, _ in loss) / sum(n for _, n in loss) == pytest.approx(report["loss_after"], rel=1e-4)


def test_relora_goes_on_after_restarts(model_folder, train_file, tmp_path, monkeypatch):
    """A checkpoint has the base that restarts changed: cut in the middle, a run ends where it would have."""
    from peftops.cli import finetune

    argv = lambda out: arguments(model_folder, train_file, out, "--method", "relora", "--every", 4)
    assert main(argv(tmp_path / "whole")) == 0
    step = finetune.Job.one_step

    def interrupted(job, parts):
        if job.step == 6:
            signal.raise_signal(signal.SIGINT)
        return step(job, parts)

    monkeypatch.setattr(finetune.Job, "one_step", interrupted)
    assert main(argv(tmp_path / "parts")) == 130
    monkeypatch.setattr(finetune.Job, "one_step", step)
    assert main([*argv(tmp_path / "parts"), "--resume"]) == 0
    files = (tmp_path / name / "adapter_model.safetensors" for name in ("whole", "parts"))
    whole, parts = map(peftops.integrations.peft_files.load_file, files)
    assert whole.keys() == parts.keys() and any("base_weight" in key for key in whole)
    assert all(torch.allclose(whole[key], parts[key], rtol=1e-4, atol=1e-6) for key in whole)
