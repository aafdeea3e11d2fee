"""A model that two processes share answers as it does in one."""

import contextlib
import json

import pytest
import torch
from torch import nn

import models
import peftops
from gloo import met, together
from peftops.cli import main
from peftops.nn import Parts
from peftops.serving import Server, pool_for

build = models.qwen2  # its columns have biases


def make(folder):
    build().save_pretrained(folder / "model")
    models.tokenizer().save_pretrained(folder / "model")
    for seed, (name, config) in enumerate(
        {"a": peftops.LoRAConfig(r=3), "b": peftops.LoRAConfig(r=2, target=["down_proj", "q_proj"])}.items()
    ):
        model = peftops.attach(build(), config)
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
        peftops.save(model, folder / "adapters" / name)
    rows = [
        {"prompt": "a prompt of some words", "adapter": "a"},
        {"prompt": "a prompt of some words", "adapter": "b"},
        {"prompt": "a prompt of some words"},
        {"prompt": "abc", "adapter": "a", "temperature": 3.0, "seed": 1},
        {"prompt": "abc", "adapter": "b", "temperature": 3.0},  # a draw that nobody can foresee, but all must have
        {"prompt": "a prompt of other words", "adapter": "a", "max_tokens": 9},
    ]
    (folder / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def words(folder, out):
    given = {"model": "model", "adapters": "adapters", "requests": "requests.jsonl", "out": out}
    argv = [part for name, value in given.items() for part in (f"--{name}", str(folder / value))]
    return ["serve", *argv, "--max-tokens", "6", "--max-batch", "4", "--resident", "1", "--max-cache", "256"]


def in_a_process(rank, world, folder):
    with met(rank, world, folder / "rendezvous"):
        assert main(words(folder, "together.jsonl")) == 0


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_are_one(tmp_path):
    make(tmp_path)
    together(in_a_process, tmp_path)
    assert main(words(tmp_path, "alone.jsonl")) == 0
    read = lambda name: {(row := json.loads(line))["row"]: row for line in (tmp_path / name).read_text().splitlines()}
    alone, both = read("alone.jsonl"), read("together.jsonl")
    assert alone.pop(5)["tokens"] > 0 and both.pop(5)["tokens"] > 0
    assert both == alone and len({row["answer"] for row in alone.values()}) > 3


def coded():
    return peftops.detach(peftops.attach(models.llama(), peftops.QLoRAConfig(r=2)))


@pytest.mark.parametrize(
    "build, world, why",
    [
        (models.llama, 4, "num_key_value_heads=2, which 4 ranks cannot share evenly"),
        (models.gpt2, 2, "no plan to cut a GPT2LMHeadModel"),
        (coded, 2, "not a dense linear layer"),
    ],
    ids=["heads", "plan", "codes"],
)
def test_what_cannot_be_cut_is_left_as_it_is(build, world, why):
    model = build()
    before = [(name, type(m), tuple(p.shape for p in m.parameters())) for name, m in model.named_modules()]
    with pytest.raises(ValueError, match=why):
        Parts(model, 0, world)
    assert [(name, type(m), tuple(p.shape for p in m.parameters())) for name, m in model.named_modules()] == before


def test_all_take_the_tokens_that_were_agreed_on():
    """And a pass that fails is not tried again by one of several."""
    model = models.llama()
    pool = pool_for(model)
    with Server(model, pool, stop=[], agree=lambda tokens: [7] * len(tokens), prefetch=0) as server:
        server.submit([5, 6], max_new=3)
        server.submit([5, 9], max_new=3)
        assert [c.ids for c in server.run()] == [[7, 7, 7]] * 2
        server.submit([5, 6], max_new=3)
        server.batch.model.run = None
        with pytest.raises(TypeError):
            list(server.run())


def test_http_is_one_process(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("peftops.cli.serve._ranks", lambda: contextlib.nullcontext((0, 2)))
    assert main(["serve", "--model", str(tmp_path), "--port", "0"]) == 2
    assert "serve --port is one process, and not 2" in capsys.readouterr().err
