"""Image prompts: a model that answers by an image alone, whose image is whose, and what is refused."""

import copy

import pytest
import torch

import models
import peftops
from peftops import LLaMAAdapterConfig
from peftops.attaching import adapted_layers, hosts
from peftops.prompts.images import ImagePrompts

ids = models.tokens()
images = torch.randn(2, 12, generator=torch.Generator().manual_seed(3))
CONFIG = LLaMAAdapterConfig(tokens=3, layers=2, image_features=12)


def built(build=models.llama, config=CONFIG, shake=True):
    torch.manual_seed(1)
    model = peftops.attach(build(), config)
    for parameter in model.parameters():
        if parameter.requires_grad and shake:
            torch.nn.init.normal_(parameter)
    return model


def projection_of(model):
    return next(a for _, host in hosts(model) for a in host.adapters.values() if isinstance(a, ImagePrompts)).projection


def logits(model, ids, features):
    with peftops.image_prompts(model, features):
        return model(ids).logits


def decided():
    """A model with a head that can be sure of an answer, as that of a trained one and unlike a fresh one's."""
    model = models.llama(tied=False)
    torch.nn.init.normal_(model.lm_head.weight)
    return model


def test_learns_to_answer_by_the_image_alone():
    """The question is always the same; which of eight answers is right, only the image tells."""
    torch.manual_seed(0)
    base, directions = decided(), torch.randn(8, 12)
    model = built(lambda: copy.deepcopy(base), shake=False)
    question, answers = ids[:1], torch.arange(20, 28)
    draw = lambda label: directions[label] + 0.3 * torch.randn(len(label), 12)
    assert torch.equal(logits(model, question, images[:1]), base(question).logits)  # gates are 0
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    losses = []
    for _ in range(120):
        label = torch.randint(8, (16,))
        with peftops.image_prompts(model, draw(label)):
            last = model(question.expand(16, -1)).logits[:, -1]
        loss = torch.nn.functional.cross_entropy(last, answers[label])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sum(losses[-10:]) / 10 < 0.05 * losses[0], losses[::10]
    label = torch.arange(8).repeat(8)
    with torch.no_grad():
        said = logits(model, question.expand(64, -1), draw(label))[:, -1].argmax(-1)
        assert (said == answers[label]).float().mean() > 0.9
        blind = model(question.expand(64, -1)).logits[:, -1].argmax(-1)
    assert (blind == answers[label]).float().mean() <= 1 / 8
    with peftops.image_prompts(model, directions):
        spoken = model.generate(question.expand(8, -1), max_new_tokens=1, do_sample=False, pad_token_id=2)[:, -1]
    assert (spoken == answers).float().mean() > 0.8


@pytest.mark.parametrize("build", [models.llama, models.qwen2, models.gemma, models.gpt2], ids=lambda b: b.__name__)
def test_an_image_is_a_change_of_the_prompt(build):
    """P + W f + b for each sample: the same as a prompt with that in it; and scales are one after the other."""
    model = built(build)
    got = logits(model, ids, images)
    for row in range(2):
        same = copy.deepcopy(model)
        with torch.no_grad():
            added = projection_of(model)(images[row])
            for _, host in hosts(same):
                if not isinstance(host.adapters["default"], ImagePrompts):
                    host.adapters["default"].prompt.add_(added)
            torch.testing.assert_close(got[row], same(ids).logits[row], rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model, ids, [images[:, :5], images[:, 5:]]), got)
    assert not torch.allclose(logits(model, ids, images.flip(0)), got, atol=1e-2)
    each = images[:, None].repeat(1, 3, 1)
    torch.testing.assert_close(logits(model, ids, each), got, rtol=1e-4, atol=1e-4)
    each[:, 1] += 1
    assert not torch.allclose(logits(model, ids, each), got, atol=1e-2)


def test_gradients_reach_the_projection_and_the_features():
    model, features = built(), images.clone().requires_grad_()
    grads = []
    for checkpointing in (False, True):
        model.zero_grad()
        features.grad = None
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.train()
        with peftops.image_prompts(model, features):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()  # outside: what is recomputed has its image still
        weight = projection_of(model).weight.grad
        assert (weight != 0).any(1).all() and (features.grad != 0).all()
        grads.append((weight.clone(), features.grad.clone()))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


def greedy(model, ids, features, steps):
    for _ in range(steps):
        ids = torch.cat([ids, logits(model, ids, features)[:, -1:].argmax(-1)], 1)
    return ids


def test_generates_with_a_cache_and_beams_as_without():
    model = built()
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=2, eos_token_id=None)
    with torch.no_grad():
        want = [greedy(model, ids, f, 5) for f in (images, images.flip(0))]
    assert not torch.equal(*want)
    for features, expected in zip((images, images.flip(0)), want, strict=True):  # nothing stays of the one before
        with peftops.image_prompts(model, features), torch.inference_mode():
            assert torch.equal(model.generate(ids, **options), expected)
    both = {}
    for rows in (slice(0, 2), slice(0, 1), slice(1, 2)):
        with peftops.image_prompts(model, images[rows]):
            both[str(rows)] = model.generate(ids[rows], num_beams=3, **options)
    whole, *rows = both.values()
    assert torch.equal(whole, torch.cat(rows))


def test_outside_there_is_no_image_and_inside_another_one_may_be():
    model = built()
    without, first, second = model(ids).logits, logits(model, ids, images), logits(model, ids, -images)
    changing = images.clone()
    with peftops.image_prompts(model, changing):
        assert torch.equal(model(ids).logits, first)
        changing.zero_()  # they were copied
        assert torch.equal(model(ids).logits, first)
    with peftops.image_prompts(model, images):
        assert torch.equal(logits(model, ids, -images), second)
        assert torch.equal(model(ids).logits, first) and not torch.equal(first, without)
    assert torch.equal(model(ids).logits, without)
    with pytest.raises(RuntimeError), peftops.image_prompts(model, images):
        raise RuntimeError
    assert torch.equal(model(ids).logits, without)


@pytest.mark.parametrize(
    "features, shown",
    [
        (torch.zeros(2, 11), r"\[2, 11\]"),
        (torch.zeros(12), r"\[12\]"),
        (torch.zeros(2, 4, 12), r"\[2, 4, 12\]"),
        (torch.zeros(0, 12), r"\[0, 12\]"),
        ([], "nothing"),
        (torch.tensor(1.0), r"\[\]"),
        ([torch.zeros(2, 6), torch.zeros(3, 6)], r"\[2, 6\], \[3, 6\]"),
    ],
)
def test_features_of_another_shape(features, shown):
    with pytest.raises(ValueError, match=rf"must have shape \[rows, 12\] or \[rows, 3, 12\], .*, not {shown}"):
        logits(built(), ids, features)


def test_a_batch_of_other_rows():
    model = built()
    for rows in (1, 3, 4):  # twice as many are beams only where there is a cache
        with pytest.raises(ValueError, match=f"a batch of {rows} rows, but features of 2 images"):
            logits(model, models.tokens(rows=rows), images)


def test_without_an_adapter_that_reads_images():
    with pytest.raises(ValueError, match="has no adapters"):
        logits(models.llama(), ids, images)
    model = peftops.attach(built(), LLaMAAdapterConfig(tokens=3, layers=2), name="blind")
    with pytest.raises(ValueError, match="the active adapter, 'blind', reads no images; attach a LLaMAAdapterConfig"):
        logits(model, ids, images)
    peftops.activate(model, "default")
    logits(model, ids, images)
    with peftops.disabled(model), pytest.raises(ValueError, match="the active adapter, None, reads no images"):
        logits(model, ids, images)


def test_another_adapter_leaves_the_projection_alone():
    alone = peftops.attach(models.llama(), peftops.LoRAConfig(r=4))
    model = peftops.attach(built(), peftops.LoRAConfig(r=4), name="second")
    assert [p for p, m in adapted_layers(model) if "second" in m.adapters] == [p for p, _ in adapted_layers(alone)]


def test_models_that_cannot():
    with pytest.raises(TypeError, match="image_features needs a decoder, not a T5"):
        peftops.attach(models.t5(), CONFIG)
    model = built()
    attention = model.model.layers[1].self_attn
    with peftops.image_prompts(model, images), pytest.raises(TypeError, match="does not pass on to its LlamaAttention"):
        attention(torch.zeros(2, 7, 64), position_embeddings=None, attention_mask=None)
