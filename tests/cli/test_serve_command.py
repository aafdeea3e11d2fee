"""A file of requests for several adapters, answered in one batch as each is alone."""

import json

import pytest
import torch
from torch import nn

import models
import peftops
from peftops.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    models.llama(tied=False).save_pretrained(folder / "model")
    models.tokenizer().save_pretrained(folder / "model")
    for seed, (name, r) in enumerate({"a": 4, "b": 2}.items(), 1):
        model = peftops.attach(models.llama(tied=False), peftops.LoRAConfig(r=r, rank_pattern={"q_proj": 6}))
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
        peftops.save(model, folder / "adapters" / name)
    peftops.save(peftops.attach(models.llama(tied=False), peftops.HeadOnlyConfig()), folder / "other" / "head")
    return folder


def serve(folder, rows, *more):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "requests.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "out.jsonl").unlink(missing_ok=True)
    argv = [
        "serve",
        "--model",
        folder / "model",
        "--requests",
        folder / "requests.jsonl",
        "--out",
        folder / "out.jsonl",
        "--max-tokens",
        6,
        *(more or ("--adapters", folder / "adapters")),
    ]
    status, out = main([*map(str, argv)]), folder / "out.jsonl"
    answers = [json.loads(line) for line in out.read_text().split("\n") if line] if out.exists() else []
    return status, {answer["row"]: answer for answer in answers}


def test_answers_are_those_of_generate(folder, capsys):
    rows = [
        {"prompt": "abc", "adapter": "a"},
        {"prompt": "abc", "adapter": "b", "max_tokens": 3},
        {"prompt": "abc"},
        {"messages": [{"role": "user", "content": "xyz"}], "adapter": "a"},
        {"prompt": "abc", "adapter": "a", "temperature": 5.0, "seed": 1},
        {"prompt": "abc", "adapter": "a", "temperature": 5.0, "seed": 1},
    ]
    status, answers = serve(folder, rows)
    assert status == 0 and sorted(answers) == [1, 2, 3, 4, 5, 6]
    assert [answers[i]["adapter"] for i in range(1, 7)] == ["a", "b", None, "a", "a", "a"]
    assert answers[2]["tokens"] <= 3 and answers[5]["answer"] == answers[6]["answer"] != answers[1]["answer"]
    printed = capsys.readouterr().out
    total = sum(a["tokens"] for a in answers.values())
    assert f"6 answers of 2 adapters, {total} tokens in " in printed and " tokens/s, in " in printed
    for number, (prompt, adapter) in {1: ("abc", "a"), 3: ("abc", None), 4: ("xyz", "a")}.items():
        of = ["--adapter", folder / "adapters" / adapter] if adapter else []
        assert main([*map(str, ["generate", "--model", folder / "model", *of, "--max-tokens", 6, prompt])]) == 0
        assert capsys.readouterr().out.strip("\n") == answers[number]["answer"]


@pytest.mark.parametrize(
    "rows, sentence",
    [
        (["{"], "requests.jsonl, row 1: Expecting property name"),
        ([{"prompt": "a"}, {}], "row 2: a request has a prompt or messages, one of them"),
        (["[]"], "row 1: expected an object, not a list"),
        ([{"prompt": "a", "adapter": "c"}], "row 1: no adapter named 'c' in --adapters; there is a, b"),
        ([{"prompt": "a", "temprature": 1}], "row 1: temprature: not of prompt, messages, adapter, max_tokens"),
        ([{"prompt": "a", "top_p": 2.0}], "row 1: top_p must be above 0 and at most 1, not 2.0"),
        ([{"prompt": 3}], "row 1: a prompt is text, and each of messages has a role and a content"),
        ([{"messages": [{"role": "user"}]}], "row 1: a prompt is text, and each of messages has"),
        ([], "requests.jsonl is empty"),
    ],
)
def test_wrong_requests_get_a_sentence_before_a_model_is_read(folder, rows, sentence, capsys, monkeypatch):
    monkeypatch.setattr("peftops.cli.serve.load_base", lambda *a, **k: pytest.fail("a model was read"))
    assert serve(folder, rows)[0] == 2
    assert sentence in capsys.readouterr().err and not (folder / "out.jsonl").exists()


def test_wrong_folders_and_limits_get_a_sentence(folder, capsys):
    row = [{"prompt": "a"}]
    for more, sentence in (
        (["--adapters", folder / "model"], "no adapter_config.json in"),
        (["--adapters", folder / "adapters", folder / "adapters" / "a"], "are two adapters of one name"),
        (["--adapters", folder / "other"], "is an adapter of HeadOnly; a pool holds only A and B, as in LoRA"),
        (["--max-batch", 0], "--max-batch must be at least 1, not 0"),
    ):
        assert serve(folder, row, *more)[0] == 2
        assert sentence in capsys.readouterr().err
    assert serve(folder, [{"prompt": "a" * 30, "max_tokens": 10}], "--max-cache", 20)[0] == 2
    assert "requests.jsonl, row 1: Server: " in capsys.readouterr().err and not (folder / "out.jsonl").exists()


def test_answers_go_where_nothing_is_lost(folder, capsys, monkeypatch):
    monkeypatch.setattr("peftops.cli.serve.load_base", lambda *_, **__: pytest.fail("the model was read"))
    requests, text = folder / "kept.jsonl", '{"prompt": "abc"}\n'
    requests.write_text(text)
    (folder / "file").write_text("")
    for out, sentence in [
        (requests, "--out must be a file of its own"),
        (folder / "adapters" / ".." / "kept.jsonl", "--out must be a file of its own"),
        (folder, "--out must be a file of its own"),
        (folder / "file" / "out.jsonl", "file"),
    ]:
        argv = ["serve", "--model", folder / "model", "--requests", requests, "--out", out]
        assert main([*map(str, argv)]) != 0
        assert sentence in capsys.readouterr().err and requests.read_text() == text
