"""The loss in pieces is the loss, and holds a piece of the logits at a time."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import models
import peftops
from peftops.nn import language_model_loss, splits
from peftops.planner.trace import Ledger

PIECES = "peftops.nn.language_loss.PIECE"


def heads():
    torch.manual_seed(0)
    dense = nn.Linear(64, 50)
    frozen = nn.Linear(64, 50, bias=False).requires_grad_(False)
    quantized = nn.Sequential(nn.Linear(64, 50))
    peftops.attach(quantized, peftops.QLoRAConfig(r=4, target=".*"))
    half = nn.Linear(64, 50, bias=False).bfloat16()
    return {"dense": dense, "frozen": frozen, "QLoRA": quantized[0], "bfloat16": half}


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("name", ["dense", "frozen", "QLoRA", "bfloat16"])
def test_matches_cross_entropy(monkeypatch, name, rows):
    monkeypatch.setattr(PIECES, 50 * rows)
    head = heads()[name]
    dtype = head.weight.dtype if name == "bfloat16" else torch.float32
    hidden = torch.randn(23, 64, dtype=dtype, requires_grad=True)
    labels = torch.randint(50, (23,)).index_fill_(0, torch.tensor([3, 22]), -100)
    leaves = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    want = F.cross_entropy(head(hidden).float(), labels, reduction="sum")
    wants = torch.autograd.grad(want / 21, leaves)
    got = peftops.head_loss(head, hidden, labels)
    grads = torch.autograd.grad(got / 21, leaves)
    # A sum of 23 float32 numbers, and gradients that are rounded to the dtype once more where pieces are added.
    torch.testing.assert_close(got, want, rtol=23 * 2**-24, atol=0)
    for grad, wanted in zip(grads, wants, strict=True):
        step = torch.finfo(dtype).eps
        assert grad.dtype == wanted.dtype
        torch.testing.assert_close(grad, wanted, rtol=4 * step, atol=8 * step * wanted.abs().max().item())
    with torch.no_grad():
        torch.testing.assert_close(peftops.head_loss(head, hidden, labels), want, rtol=23 * 2**-24, atol=0)


def test_bad_input():
    head = nn.Linear(8, 5)
    with pytest.raises(ValueError, match=r"hidden must be \[tokens, width\] and labels \[tokens\], not \[2, 3, 8\]"):
        peftops.head_loss(head, torch.randn(2, 3, 8), torch.zeros(6, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"labels must have the shape of input_ids, \[1, 4\], not \[1, 3\]"):
        peftops.language_model_loss(models.llama(), torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 3))


def test_second_derivative_raises():
    hidden = torch.randn(3, 8, requires_grad=True)
    loss = peftops.head_loss(nn.Linear(8, 5), hidden, torch.zeros(3, dtype=torch.int64))
    (grad,) = torch.autograd.grad(loss.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def capped():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
        )
    )


@pytest.mark.parametrize(
    "make, is_split", [(models.llama, True), (models.gpt2, True), (capped, False)], ids=["llama", "gpt2", "gemma2"]
)
def test_a_language_model_has_its_own_loss(monkeypatch, make, is_split):
    """Whatever it does to its logits: a cap on them is seen."""
    monkeypatch.setattr(PIECES, 300)
    model = make().eval()
    assert splits(model) == is_split
    ids = torch.randint(1, 60, (2, 9))
    labels = ids.clone()
    labels[0, :4] = -100
    weight = next(p for p in model.parameters() if p.dim() == 2)
    own = model(input_ids=ids, labels=labels).loss
    (want,) = torch.autograd.grad(own, weight)
    loss, count = language_model_loss(model, ids, labels)
    (got,) = torch.autograd.grad(loss / count, weight)
    torch.testing.assert_close(loss / count, own, rtol=1e-5, atol=0)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5 * want.abs().max().item())


def test_a_cap_costs_no_logits_before_the_first_label():
    model, ids, made = capped().eval(), torch.randint(1, 60, (2, 9)), []
    assert not splits(model)
    model.lm_head.register_forward_hook(lambda module, args, out: made.append(out.shape[1]))
    for begin, tokens in ((1, 9), (6, 4), (9, 9)):  # (no label at all: nothing can be left out)
        labels = ids.clone()
        labels[:, :begin] = -100
        loss, count = language_model_loss(model, ids, labels)
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        want = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        assert made[-2] == tokens and count == 2 * (9 - begin)
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "config",
    [
        peftops.LoRAConfig(r=2),
        peftops.PromptTuningConfig(tokens=3),
        peftops.PrefixTuningConfig(tokens=3),
        peftops.HeadOnlyConfig(),
    ],
    ids=lambda c: type(c).__name__,
)
def test_methods_change_it_as_they_change_the_model(config):
    model = models.llama()
    peftops.attach(model, config)
    model.eval()
    ids = torch.randint(1, 60, (2, 9))
    own = model(input_ids=ids).logits[:, -9:-1]
    want = F.cross_entropy(own.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    loss, count = language_model_loss(model, ids, ids)
    assert count == 16
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)


def test_logits_are_never_all_there(monkeypatch):
    words, tokens = 5000, 64
    monkeypatch.setattr(PIECES, 4 * words)
    head = nn.Linear(16, words, bias=False).requires_grad_(False)
    hidden = torch.randn(tokens, 16, requires_grad=True)
    labels = torch.randint(words, (tokens,))
    with Ledger([head.weight, hidden, labels]) as ledger:
        peftops.head_loss(head, hidden, labels).backward()
    assert ledger.peak < 8 * 4 * words * 4 + 8 * hidden.nbytes  # of four tokens, not of 64
