"""Keys and values in pages of the adapters' pool: shared where prompts begin alike, and never too few."""

import random
from functools import partial

import pytest
import torch

import models
import peftops
from peftops.serving import Server, pool_for
from peftops.serving.paged import peak_tokens
from peftops.serving.pages import Blocks, Layout

llama = partial(models.llama, tied=False)  # says different things after different prompts
COMMON = [7 + i % 50 for i in range(40)]  # two blocks of 16, and a half


def adapter(seed):
    draw = torch.Generator().manual_seed(seed)
    one = lambda *shape: torch.randn(shape, generator=draw) / 4
    return {f"model.layers.{i}.self_attn.v_proj": (one(2, 64), one(32, 2)) for i in range(2)}


def server_of(adapters="ab", tokens=1024, **options):
    model = llama()
    pool = pool_for(model, adapters=2, rank=2, tokens=tokens)
    for seed, name in enumerate(adapters):
        pool.add(name, adapter(seed))
    return Server(model, pool, stop=[], paged=True, **options)


def answers(server, *asked):
    numbers = [server.submit(prompt, adapter=name, max_new=new) for prompt, name, new in asked]
    done = {completion.number: completion for completion in server.run()}
    assert [done[n].error for n in numbers] == [None] * len(numbers)
    return [done[n].ids for n in numbers]


def alone(asked):
    """By rows, one after the other; tests/serving/test_server.py compares these with `generate`."""
    model = llama()
    pool = pool_for(model, adapters=2, rank=2, tokens=0)
    for seed, name in enumerate("ab"):
        pool.add(name, adapter(seed))
    with Server(model, pool, stop=[], max_batch=1, paged=False) as server:
        return answers(server, *asked)


def is_clean(server):
    """All pages are the pool's again, and those that held tokens hold nothing."""
    server.close()
    pool = server.pool
    owned = sum(pool.pages_of(name) for name in pool.resident)
    lent = server.batch.blocks.held
    return lent == 0 and pool.free_pages == len(pool.storage) - owned and pool.fixed_pages == 0


def test_prompts_that_begin_alike_share_pages():
    """As they arrive together, and later; an adapter's are its own."""
    asked = [([*COMMON, i], name, 6) for name in (None, "a", "b") for i in (3, 4, 5)]
    server = server_of(max_batch=9)
    got = answers(server, *asked)
    assert got == alone(asked) and len({tuple(ids) for ids in got}) > 5
    assert server.batch.reused_tokens == 3 * 2 * 32, "two of each three found two blocks of 16"
    before = server.batch.blocks.held
    assert answers(server, asked[3]) == alone(asked[3:4]) and server.batch.reused_tokens == 7 * 32
    assert server.batch.blocks.held == before, "nobody else's blocks, and its own are given back"
    assert is_clean(server)


def test_the_last_token_of_a_prompt_is_run():
    """Even if all of its blocks are known."""
    server, asked = server_of(), (COMMON[:32], "a", 5)
    assert answers(server, asked) == answers(server, asked) == alone([asked]) and server.batch.reused_tokens == 16
    assert is_clean(server)


def test_an_answer_is_the_beginning_of_the_next_prompt():
    server = server_of()
    (first,) = answers(server, (COMMON, "a", 30))
    asked = [([*COMMON, *first, 9, 9], "a", 4)]
    assert answers(server, *asked) == alone(asked) and server.batch.reused_tokens == (len(COMMON) + 29) // 16 * 16
    assert is_clean(server)


def test_an_adapter_that_changes_shares_nothing_with_what_it_was():
    server, pool = server_of(adapters=""), None
    pool, factors = server.pool, adapter(0)
    pool.add("a", factors, trainable=True)
    asked = (COMMON, "a", 5)
    answers(server, asked)
    for _, B in factors.values():
        B.mul_(-3)
    answers(server, asked)
    assert server.batch.reused_tokens == 0
    answers(server, asked)
    assert server.batch.reused_tokens == 32
    pool.remove("a")
    pool.add("a", factors)
    answers(server, asked)
    assert server.batch.reused_tokens == 32
    assert is_clean(server)


def test_no_request_that_is_admitted_lacks_pages():
    """Any mix of lengths in a pool that holds few of them; blocks are taken as they are needed, and not before."""
    draw = random.Random(0)
    asked = [
        (
            COMMON[: draw.choice([1, 17, 33])] + [draw.randrange(3, 320) for _ in range(draw.randint(1, 40))],
            draw.choice([None, "a", "b"]),
            draw.randint(1, 40),
        )
        for _ in range(30)
    ]
    server = server_of(tokens=140, max_batch=8, max_tokens=4096)
    numbers = [server.submit(prompt, adapter=name, max_new=new) for prompt, name, new in asked]
    done, together = {}, 0
    while not server.idle:
        done |= {completion.number: completion for completion in server.step()}
        together = max(together, len(server.batch.running))
        assert all(len(r.blocks) == -(-r.cached // 16) for r in server.batch.running)
    assert [done[n].error for n in numbers] == [None] * 30 and together > 2
    assert [done[n].ids for n in numbers] == alone(asked)
    assert is_clean(server)


def test_a_request_that_could_never_run_is_refused():
    server = server_of(tokens=64, max_tokens=4096)
    with pytest.raises(ValueError, match=r"Server: tokens and adapter need \d+ pages, and the pool has \d+"):
        server.submit([5] * 5, max_new=500)
    whole = server.longest
    assert 64 <= whole < 200 and answers(server, ([5], None, whole - 1)) != []
    assert is_clean(server)


def test_pages_given_back_hold_nothing():
    """Of whoever had them, whose numbers may be anything."""
    server = server_of()
    storage = server.pool.storage
    first = server.batch.blocks.take(3)
    for block in first:
        storage[block.pages] = torch.nan
    server.batch.blocks.release(first)
    assert not storage[[page for block in first for page in block.pages]].any()
    assert is_clean(server)


def test_an_answer_that_failed_is_no_beginning():
    server = server_of()
    bad = {"model.layers.0.self_attn.v_proj": (torch.full((2, 64), 1e38), torch.full((32, 2), 1e38))}
    server.pool.add("overflow", bad)
    for _ in range(2):
        server.submit([5] * 40, adapter="overflow", max_new=3)
    done = list(server.run())
    assert all("not finite" in str(c.error) for c in done) and len(done) == 2 and server.batch.reused_tokens == 0
    assert server.batch.blocks.held == 0 and is_clean(server)


def test_an_interrupt_among_the_tokens_of_a_pass(monkeypatch):
    """Some have their token and others have not: these come first, and nobody joins meanwhile."""
    asked = [([5, 6, 7], "a", 12), ([8, 9], None, 12), ([4], "b", 12)]
    server = server_of()
    stop = iter([False] * 4 + [True] + [False] * 99)

    def watch(*_):
        if next(stop):
            raise KeyboardInterrupt

    ask = lambda prompt, name, new: server.submit(prompt, adapter=name, max_new=new, watch=watch)
    numbers = [ask(*one) for one in asked[:2]]
    with pytest.raises(KeyboardInterrupt):
        while True:
            server.step()
    assert [len(r.ids) for r in server.batch.running] == [3, 2]
    numbers.append(ask(*asked[2]))
    assert server.step() == [] and server.waiting == 1 and [len(r.ids) for r in server.batch.running] == [3, 3]
    done = {completion.number: completion.ids for completion in server.run()}
    assert [done[n] for n in numbers] == alone(asked)
    assert is_clean(server)


@pytest.mark.parametrize("kinds", [None, ["sliding_attention", "full_attention"]], ids=["all", "some"])
def test_windows_bound_nothing_in_pages(kinds):
    """A prompt longer than the window, and an answer that leaves it."""
    build = lambda: models._causal(
        "Qwen2" if kinds else "Mistral",
        sliding_window=8,
        **({"layer_types": kinds, "use_sliding_window": True} if kinds else {}),
    )
    model, prompts = build(), [[3, 9, 4], list(range(5, 40))]
    with Server(model, pool_for(model), stop=[], paged=True) as server:
        got = answers(server, *((prompt, None, 20) for prompt in prompts))
    for prompt, ids in zip(prompts, got, strict=True):
        given = torch.tensor([prompt])
        want = model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=20, do_sample=False, eos_token_id=None
        )
        assert ids == want[0, len(prompt) :].tolist()


def test_models_that_pages_do_not_fit_are_told_of():
    gemma2 = lambda: models._causal("Gemma2", sliding_window=64)  # caps its scores
    for build, why in ((gemma2, "its attention takes softcap"), (flex, "its attention is flex_attention")):
        model = build()
        pool = pool_for(model)
        with pytest.raises(ValueError, match=f"cannot lie in pages: {why}"):
            Server(model, pool, paged=True)
        assert not any(type(m).__name__ == "PooledLinear" for m in model.modules())
        with pytest.warns(UserWarning, match=f"lie in rows, and not in pages: {why}"), Server(model, pool) as server:
            assert type(server.batch).__name__ == "RowBatch"
    model = models.llama()
    small = pool_for(model, tokens=0, page_size=64, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="pages of 128 bytes, and a token needs"), Server(model, small):
        pass
    with pytest.raises(ValueError, match="tokens must not be negative, but is -1"):
        pool_for(model, tokens=-1)


def flex():
    model = models.llama()
    model.config._attn_implementation = "flex_attention"
    return model


def test_a_model_attends_in_its_own_way_between_passes():
    server = server_of(adapters="")
    model, ids = server.model, torch.tensor([COMMON])
    number = server.submit(COMMON, max_new=3)
    server.step()
    assert torch.equal(model(ids).logits, llama()(ids).logits) and model.config._attn_implementation == "sdpa"
    assert [c.number for c in server.run()] == [number] and is_clean(server)


def test_peak_in_whole_pages():
    """By hand: as the second one ends, three hold 12, 22 and 7 tokens, which fill 1, 2 and 1 pages of 16."""
    assert peak_tokens([(10, 30), (20, 2), (5, 2)], 16) == max(3 * 16, (1 + 2 + 1) * 16)
    assert peak_tokens([(1, 1)], 16) == 16 and peak_tokens([], 16) == 0


def test_pages_hold_what_a_layout_says():
    """Layers of different sizes, and 16-bit numbers in a pool of 32."""
    pool = peftops.AdapterPool({"x": (64, 64)}, pages=6, page_size=64)
    layout = Layout(((2, 4, 8), (1, 8, 8)), (None, None), torch.bfloat16)
    blocks = Blocks(pool, layout, 100)
    assert blocks.size == 5 and [tuple(t.shape for t in pair) for pair in blocks.views] == [
        ((6, 2, 5, 4), (6, 2, 5, 8)),
        ((6, 1, 5, 8), (6, 1, 5, 8)),
    ]
    for keys, values in blocks.views:
        pool.storage.zero_()
        keys.fill_(1), values.fill_(2)
        assert (keys == 1).all(), "keys and values lie apart"
    assert layout.pages(11, 256) == 6


def test_a_prompt_that_runs_or_is_about_to_can_be_cancelled():
    """By another thread: those that wait for their turn in a step neither wait nor run."""
    server, told = server_of(max_batch=4, tokens=4096), []
    long = [5 + i % 300 for i in range(1100)]
    numbers = [server.submit([i, *long], max_new=5) for i in range(5, 8)]  # more than a pass takes
    run = server.batch._prompts
    server.batch._prompts = lambda group: (told or told.extend(map(server.cancel, numbers)), run(group))
    done = {completion.number: completion for completion in server.run()}
    assert told == [True] * 3 and [str(done[n].error) for n in numbers] == [
        f"request {n} was cancelled" for n in numbers
    ]
    assert not any(map(server.cancel, numbers)) and is_clean(server)
