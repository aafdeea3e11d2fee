"""A request that goes wrong is the only one that notices."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import models
import peftops
from peftops.serving import Cancelled, Sampling, Server, add_adapter, pool_for
from peftops.serving.paged import PagedBatch
from peftops.serving.rows import RowBatch

GOOD = ([5, 6, 7, 8], "good", 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("good", "other")):
        model = peftops.attach(models.llama(), peftops.LoRAConfig(r=4))
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
        peftops.save(model, folder / name)
    return folder


def server_of(folder, **options):
    """A server of a model with two adapters, and one whose numbers are infinite in one layer, as an overflow is."""
    model = models.llama()
    pool = pool_for(model, adapters=4, rank=8)
    for name in ("good", "other"):
        add_adapter(pool, name, folder / name)
    bad = {"model.layers.0.self_attn.v_proj": (torch.full((2, 64), 1e38), torch.full((32, 2), 1e38))}
    pool.add("overflow", bad, 1.0)
    return Server(model, pool, stop=[], **options)


def answers(server, *asked, **sampling):
    """By request, what became of each."""
    numbers = [server.submit(prompt, adapter=a, max_new=n, **sampling) for prompt, a, n in asked]
    done = {completion.number: completion for completion in server.run()}
    assert not any(server.pool._pins.values()) and server.idle
    return [done[number] for number in numbers]


@pytest.fixture(scope="module")
def alone(folder):
    with server_of(folder) as server:
        return answers(server, GOOD)[0].ids


@pytest.mark.parametrize("sampling", [{}, {"sampling": Sampling(seed=1)}], ids=["greedy", "drawn"])
def test_numbers_that_are_not_finite_end_their_own_request(folder, alone, sampling):
    with server_of(folder, max_batch=2) as server:
        other, failed, good = answers(server, ([3] * 4, "other", 20), ([5] * 30, "overflow", 3), GOOD, **sampling)
    assert "its logits are not finite" in str(failed.error) and failed.ids == []
    assert len(other.ids) == 20 and other.error is good.error is None and len(good.ids) == 12
    if not sampling:
        assert good.ids == alone


def test_a_row_is_empty_beyond_its_end_whoever_had_it(folder):
    """What a mask hides is multiplied by 0, and would show through if it were not finite."""
    with server_of(folder, max_batch=3, paged=False) as server:
        for adapter, length in (("overflow", 30), ("good", 3), ("other", 9), ("overflow", 5), ("good", 12), (None, 2)):
            server.submit([5] * length, adapter=adapter, max_new=6)
        while not server.idle:
            server.step()
            ends = [request.cached for request in server.batch.running]
            for store in (store for pair in server.batch.cache.pairs for store in pair):
                for row, kept in enumerate(store):
                    end = ends[row] if row < len(ends) else 0
                    assert not kept[:, end:].any() and kept.isfinite().all(), row


def refuses(monkeypatch, refused):
    """Passes with a prompt of this length fail, as one that runs out of memory does."""
    forward = PagedBatch._forward

    def fails(batch, requests, *rest):
        if any(len(request.prompt) == refused for request in requests):
            raise RuntimeError("out of memory")
        return forward(batch, requests, *rest)

    monkeypatch.setattr(PagedBatch, "_forward", fails)


def test_a_pass_that_fails_is_made_again_without_its_cause(folder, alone, monkeypatch):
    with server_of(folder) as server:
        refuses(monkeypatch, 5)
        failed, good, other = answers(server, ([3] * 5, "other", 4), GOOD, ([3] * 6, None, 4))
    assert str(failed.error) == "out of memory" and good.ids == alone and len(other.ids) == 4 and other.error is None


def test_a_token_that_fails_ends_its_own_request(folder, alone, monkeypatch):
    with server_of(folder) as server:
        numbers = [server.submit(p, adapter=a, max_new=n) for p, a, n in (GOOD, ([3] * 5, "other", 4))]
        first = server.step()
        refuses(monkeypatch, 5)
        good, failed = sorted([*first, *server.run()], key=lambda completion: completion.number)
        assert [good.number, failed.number] == numbers
    assert good.ids == alone and str(failed.error) == "out of memory" and len(failed.ids) == 2


@pytest.mark.parametrize("paged", [True, False], ids=["pages", "rows"])
@pytest.mark.parametrize("where", ["join", "decode", "_reserve"])
def test_an_interrupt_loses_nothing(folder, alone, monkeypatch, where, paged):
    kind = PagedBatch if paged else RowBatch
    original = getattr(kind, where)
    with server_of(folder, paged=paged) as server:
        numbers = [server.submit(p, adapter=a, max_new=n) for p, a, n in (GOOD, ([3] * 5, "other", 4))]
        if where == "decode":
            assert server.step() == []

        def interrupted(batch, *args, **kw):
            original(batch, *args, **kw)
            raise KeyboardInterrupt

        monkeypatch.setattr(kind, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            server.step()
        monkeypatch.setattr(kind, where, original)
        done = {completion.number: completion for completion in server.run()}
        assert not any(server.pool._pins.values())
    assert done[numbers[0]].ids == alone and len(done[numbers[1]].ids) == 4


def test_an_adapter_too_large_for_the_pool_fails_its_request_alone(folder):
    with server_of(folder) as server:
        held = server.pool.alloc(len(server.pool.storage) - server.batch.blocks.layers)  # a block of tokens is left
        failed, good = answers(server, GOOD, ([5], None, 2))
        assert "AdapterPool" in str(failed.error) and isinstance(failed.error, RuntimeError) and len(good.ids) == 2
        server.pool.free(held)


def test_requests_can_be_cancelled(folder, alone):
    with server_of(folder, max_batch=2) as server:
        runs = server.submit([5], adapter="other", max_new=50)
        good = server.submit(GOOD[0], adapter=GOOD[1], max_new=GOOD[2])
        waits = server.submit([7], max_new=50)
        assert server.step() == []
        assert server.cancel(runs) and server.cancel(waits) and not server.cancel(99)
        done = {completion.number: completion for completion in server.step()}
        assert done.keys() == {runs, waits} and all(isinstance(c.error, Cancelled) for c in done.values())
        assert len(done[runs].ids) == 2 and done[waits].ids == []
        (last,) = server.run()
        assert last.number == good and last.ids == alone and not server.cancel(good)
        assert not any(server.pool._pins.values())


@pytest.mark.parametrize(
    "bad, error, sentence",
    [
        (dict(max_new=2.5), ValueError, "max_new must be a whole number from 1, not 2.5"),
        (dict(max_new="3"), ValueError, "max_new must be a whole number from 1, not '3'"),
        (dict(max_new=True), ValueError, "max_new must be a whole number from 1, not True"),
        (dict(prompt=[5.5]), TypeError, "float"),
        (dict(prompt=["5"]), TypeError, "str"),
    ],
)
def test_what_is_no_request_is_refused_at_once(folder, bad, error, sentence):
    with server_of(folder) as server:
        with pytest.raises(error, match=sentence):
            server.submit(**{"prompt": [5], **bad})
        assert server.idle


def test_one_server_per_model_and_none_after_closing(folder):
    server = server_of(folder)
    with pytest.raises(ValueError, match="another server runs on this model"):
        Server(server.model, server.pool)
    server.submit([5])
    server.close()
    server.close()
    for call in (lambda: server.submit([5]), server.step):
        with pytest.raises(RuntimeError, match="it is closed"):
            call()
    assert not any(type(module).__name__ == "PooledLinear" for module in server.model.modules())
    with Server(server.model, server.pool) as again:
        assert len(answers(again, ([5], None, 2))[0].ids) == 2


@pytest.mark.parametrize("kinds", [["sliding_attention", "full_attention"], ["full_attention", "sliding_attention"]])
def test_a_window_of_any_layer_bounds_a_request(kinds):
    model = models._causal("Qwen2", sliding_window=8, layer_types=kinds, use_sliding_window=True)
    with Server(model, pool_for(model), stop=[], paged=False) as server:
        with pytest.raises(ValueError, match="attention slides, 8"):
            server.submit([3] * 5, max_new=4)
        served = answers(server, ([3, 9, 4], None, 5), ([7], None, 7))
    for prompt, completion in zip(([3, 9, 4], [7]), served, strict=True):
        ids = torch.tensor([prompt])
        want = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=len(completion.ids),
            do_sample=False,
            eos_token_id=None,
        )
        assert completion.ids == want[0, len(prompt) :].tolist()


@pytest.mark.parametrize("alphas", [{"q_proj": 0.0}, {"k_proj": 5.0}, {}], ids=str)
def test_scalings_of_zero_are_scalings(tmp_path, alphas):
    config = peftops.LoRAConfig(r=2, alpha=0.0, target=["q_proj", "k_proj"], alpha_pattern=alphas)
    model = peftops.attach(models.llama(), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    peftops.save(model, tmp_path)
    served = models.llama()
    pool = pool_for(served)
    add_adapter(pool, "a", tmp_path)
    with Server(served, pool, stop=[]) as server:
        (got,) = answers(server, ([5, 6, 7], "a", 6))
    ids = torch.tensor([[5, 6, 7]])
    want = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    assert got.ids == want[0, 3:].tolist()


def test_an_adapter_without_its_other_half_is_refused(folder, tmp_path):
    tensors = load_file(folder / "good" / "adapter_model.safetensors")
    name = next(name for name in tensors if "v_proj.lora_B" in name)
    shutil.copytree(folder / "good", tmp_path / "half")
    save_file({n: t for n, t in tensors.items() if n != name}, tmp_path / "half" / "adapter_model.safetensors")
    pool = pool_for(models.llama())
    with pytest.raises(ValueError, match=f"half lacks {name}"):
        add_adapter(pool, "half", tmp_path / "half")
    add_adapter(pool, "half", folder / "good")  # the name is still free


def test_twice_as_many_small_adapters_find_room():
    pool = pool_for(models.llama(), adapters=3, rank=8)
    for name in "abcdef":
        pool.add(name, {"model.layers.0.self_attn.v_proj": (torch.ones(1, 64), torch.ones(32, 1))})
        pool.load(name)
    assert pool.resident == list("abcdef")
