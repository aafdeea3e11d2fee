"""Where soft prompts start: embeddings of frequent tokens, of a text, of class labels, or random numbers."""

import pytest
import torch

import models
import peftops
from peftops import PromptTuningConfig
from peftops.attaching import hosts


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    models.tokenizer().save_pretrained(folder)
    return str(folder)


def started(**options):
    """The prompt, and the model's embeddings."""
    torch.manual_seed(3)
    model = peftops.attach(models.llama(), PromptTuningConfig(**options))
    return next(hosts(model))[1].adapters["default"].prompt.detach(), model.get_input_embeddings().weight


def rows_of(prompt, table):
    """The ids whose embeddings the prompt's vectors are."""
    return [(table == vector).all(1).nonzero().flatten().tolist() for vector in prompt]


def test_vocabulary():
    prompt, table = started(tokens=40)
    ids = [row[0] for row in rows_of(prompt, table)]
    assert len(set(ids)) == 40  # none twice
    prompt, table = started(tokens=400)  # more than there are
    assert all(rows_of(prompt, table))


def test_text(path):
    ids = models.tokenizer()("abcd", add_special_tokens=False)["input_ids"]
    prompt, table = started(tokens=6, init="text", text="abcd", tokenizer=path)
    assert torch.equal(prompt[:4], table[ids]) and all(rows_of(prompt[4:], table))
    prompt, table = started(tokens=2, init="text", text="abcd", tokenizer=path)
    assert torch.equal(prompt, table[ids[:2]])


def test_labels(path):
    encode = lambda text: models.tokenizer()(text, add_special_tokens=False)["input_ids"]
    prompt, table = started(tokens=3, init="labels", labels=("yes", "n"), tokenizer=path)
    torch.testing.assert_close(prompt[0], table[encode("yes")].mean(0))
    assert torch.equal(prompt[1], table[encode("n")[0]]) and all(rows_of(prompt[2:], table))


def test_random():
    prompt, _ = started(tokens=100, init="random")
    assert -0.5 <= prompt.min() < -0.45 and 0.45 < prompt.max() <= 0.5 and abs(prompt.mean()) < 0.02


@pytest.mark.parametrize(
    "options, message",
    [
        ({"init": "zeros"}, "init must be one of"),
        ({"init": "labels"}, "init='labels' needs 1 to 4 labels, one per token, not 0"),
        ({"init": "labels", "labels": tuple("abcde")}, "init='labels' needs 1 to 4 labels, one per token, not 5"),
        ({"init": "text", "text": "abc"}, "a prompt's text needs a tokenizer"),
    ],
)
def test_bad_input_gets_a_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        started(tokens=4, **options)
