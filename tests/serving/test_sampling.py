"""Drawing tokens: the distribution that is left, the draws from it, and that no request minds the others."""

import pytest
import torch

import models
from peftops.serving import Sampling, Server, pool_for

LOGITS = torch.randn(300, generator=torch.Generator().manual_seed(0)) * 3
OPTIONS = [
    {},
    {"temperature": 0.3},
    {"temperature": 4.0},
    {"top_k": 1},
    {"top_k": 20},
    {"top_k": 1000},
    {"top_p": 0.5},
    {"top_p": 1.0},
    {"top_p": 1e-6},
    {"temperature": 2.0, "top_k": 50, "top_p": 0.8},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_is_left_is_what_transformers_leaves(options):
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers = LogitsProcessorList()
    warpers.append(TemperatureLogitsWarper(float(options.get("temperature", 1.0))))
    if "top_k" in options:
        warpers.append(TopKLogitsWarper(options["top_k"]))
    if options.get("top_p", 1.0) < 1:
        warpers.append(TopPLogitsWarper(options["top_p"]))
    want = warpers(None, LOGITS[None].double())[0].softmax(-1)
    got = Sampling(**options).probabilities(LOGITS)
    assert torch.equal(got > 0, want > 0)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_ties_and_masked_tokens():
    even = torch.zeros(4)
    assert Sampling(top_k=2).probabilities(even).tolist() == [0.25] * 4  # as likely as the last
    assert Sampling(top_p=0.5).probabilities(even).tolist() == [0.5, 0.5, 0, 0]
    hidden = torch.tensor([-torch.inf, 1.0, -torch.inf])
    draw = Sampling(top_p=0.9, seed=0).drawer()
    assert {draw(hidden) for _ in range(20)} == {1}


def test_draws_have_their_shares():
    sampling = Sampling(top_k=6, temperature=3.0, seed=5)
    p, draw, count = sampling.probabilities(LOGITS), sampling.drawer(), 20_000
    seen = torch.bincount(torch.tensor([draw(LOGITS) for _ in range(count)]), minlength=300) / count
    assert not seen[p == 0].any()
    assert ((seen - p).abs() <= 5 * (p * (1 - p) / count).sqrt()).all()  # five deviations


def served(asked, **options):
    model = models.llama()
    with Server(model, pool_for(model), stop=[], **options) as server:
        numbers = [server.submit(prompt, max_new=12, sampling=sampling) for prompt, sampling in asked]
        answers = {completion.number: completion.ids for completion in server.run()}
    return [answers[number] for number in numbers]


def test_a_seed_says_the_same_in_any_company():
    hot = [([5, 6, 7], Sampling(temperature=5.0, seed=seed)) for seed in (1, 2, 1)]
    one, two, same = served(hot)
    assert one == same != two
    assert served([hot[1], ([9] * 9, None), ([8], Sampling(seed=3)), hot[0]], max_batch=2)[::3] == [two, one]
    fresh = [([5, 6, 7], Sampling(temperature=5.0))] * 2
    assert len({tuple(ids) for ids in served(fresh)}) == 2


def test_greedy_is_the_default_and_the_limit():
    prompts = [[5, 6, 7], [9, 10], [11]]
    want = served([(prompt, None) for prompt in prompts])
    assert served([(prompt, Sampling(top_k=1)) for prompt in prompts]) == want
    assert served([(prompt, Sampling(temperature=1e-6)) for prompt in prompts]) == want
    mixed = served([(prompts[0], None), (prompts[1], Sampling(temperature=9.0, seed=0)), (prompts[2], None)])
    assert mixed[::2] == want[::2] and mixed[1] != want[1]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": 0}, "temperature must be above 0; without sampling, the likeliest token is taken"),
        ({"temperature": -1.0}, "temperature must be a number from 0, not -1.0"),
        ({"top_k": 0}, "top_k must be a whole number from 1, not 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, not 0.0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, not 1.5"),
        ({"seed": -1}, "seed must be a whole number in"),
        ({"temperature": float("nan")}, "temperature must be a number from 0, not nan"),
    ],
)
def test_bad_input_gets_a_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


@pytest.mark.parametrize("temperature", [1e-308, 5e-324, 1e-30])
def test_a_temperature_next_to_nothing_takes_the_likeliest(temperature):
    """And no token that the model has not."""
    assert Sampling(temperature=temperature, seed=1).drawer()(LOGITS) == int(LOGITS.argmax())
    ties = torch.tensor([5.0, 7.0, 7.0])
    assert Sampling(temperature=temperature).probabilities(ties).tolist() == [0, 0.5, 0.5]
