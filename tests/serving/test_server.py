"""What a batch of many adapters generates is what each of its requests generates alone."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import models
import peftops
from peftops.serving import Server, add_adapter, pool_for
from peftops.serving.batch import Request
from peftops.serving.cache import RowCache
from peftops.serving.rows import alike

ADAPTERS = {"a": 4, "b": 2, "c": 7, "d": 1}


def write_adapters(build, folder):
    """A file per adapter, of different ranks, strong enough to change what is said."""
    for i, (name, r) in enumerate(ADAPTERS.items()):
        model = peftops.attach(build(), peftops.LoRAConfig(r=r, rslora=name == "c"))
        torch.manual_seed(i + 1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
        peftops.save(model, folder / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    write_adapters(models.llama, folder)
    return folder


def requests(count, seed=0):
    draw = random.Random(seed)
    return [
        (
            [draw.randrange(3, 320) for _ in range(draw.randint(1, 12))],
            draw.choice([None, *ADAPTERS]),
            draw.randint(1, 9),
        )
        for _ in range(count)
    ]


def alone(build, folder, asked, prepare=lambda model: model):
    """What transformers generates for each request by itself, with HF PEFT's way of one adapter at a time."""
    answers = []
    for prompt, adapter, max_new in asked:
        model = prepare(build())
        if adapter:
            peftops.load(model, folder / adapter)
        ids = torch.tensor([prompt], device=model.device)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new, do_sample=False)
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def pool_of(model, folder, **options):
    pool = pool_for(model, **options)
    for name in ADAPTERS:
        add_adapter(pool, name, folder / name)
    return pool


def serve(model, pool, asked, arrivals=None, **options):
    """All answers, by request; request i arrives before step arrivals[i]."""
    answers, numbers, step = {}, {}, 0
    with Server(model, pool, **options) as server:
        todo = list(enumerate(asked))
        while todo or not server.idle:
            while todo and (arrivals is None or arrivals[todo[0][0]] <= step):
                i, (prompt, adapter, max_new) = todo.pop(0)
                numbers[server.submit(prompt, adapter=adapter, max_new=max_new)] = i
            for completion in server.step():
                answers[numbers[completion.number]] = completion.ids
            step += 1
    return [answers[i] for i in range(len(asked))]


def test_answers_are_those_of_each_request_alone(folder):
    """Arrivals in between, a batch smaller than the queue, and a pool that holds two of four adapters."""
    asked = requests(14)
    model = models.llama()
    pool = pool_of(model, folder, adapters=2, rank=7)
    arrivals = sorted(random.Random(1).randrange(12) for _ in asked)
    got = serve(model, pool, asked, arrivals, max_batch=4)
    assert got == alone(models.llama, folder, asked)
    assert not any(type(m).__name__ == "PooledLinear" for m in model.modules())
    assert len({tuple(ids) for ids in got}) > 8  # the adapters do say different things
    assert not any(pool._pins.values()) and not any(pool._uses.values()), "every pin was given back"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_answers_on_a_gpu(folder):
    asked, there = requests(14), lambda: models.llama().cuda()
    model = there()
    pool = pool_of(model, folder, adapters=2, rank=7)
    assert pool.storage.is_cuda
    assert serve(model, pool, asked, max_batch=4) == alone(there, folder, asked)


def test_a_pool_elsewhere_is_an_error(folder):
    model = models.llama()
    with torch.device("meta"):
        pool = pool_for(models.llama())
    assert pool.storage.is_meta
    with pytest.raises(ValueError, match="the pool is on meta, model.layers.0.self_attn.q_proj on cpu"):
        Server(model, pool)
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear


def test_on_four_bits(folder):
    quantized = lambda model: peftops.detach(peftops.attach(model, peftops.QLoRAConfig(r=1)))
    asked, model = requests(6, seed=3), quantized(models.llama())
    pool = pool_of(model, folder)
    assert serve(model, pool, asked, max_batch=6) == alone(models.llama, folder, asked, quantized)


def test_rows_answer_as_well(folder):
    """The way of models that pages do not fit."""
    asked, model = requests(10, seed=2), models.llama()
    got = serve(model, pool_of(model, folder), asked, [0, 0, 0, 1, 1, 2, 4, 5, 5, 9], max_batch=4, paged=False)
    assert got == alone(models.llama, folder, asked)


@pytest.mark.parametrize("build", [models.qwen2, models.gpt2, models.mistral], ids=lambda build: build.__name__)
def test_on_other_architectures(build, tmp_path):
    """Biases in q, k and v; Conv1D and learnt positions."""
    write_adapters(build, tmp_path)
    asked, model = requests(6, seed=4), build()
    got = serve(model, pool_of(model, tmp_path), asked, [0, 0, 1, 1, 2, 5], max_batch=3)
    assert got == alone(build, tmp_path, asked)


def test_eager_attention(folder):
    def build():
        model = models.llama()
        model.set_attn_implementation("eager")
        return model

    asked, model = requests(5, seed=5), build()
    assert serve(model, pool_of(model, folder), asked) == alone(build, folder, asked)


def test_layers_may_have_scalings_of_their_own(tmp_path):
    config = peftops.LoRAConfig(r=2, alpha_pattern={"q_proj": 9.0, "mlp.down_proj": 1.0})
    adapted = peftops.attach(models.llama(), config)
    torch.manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    peftops.save(adapted, tmp_path / "a")
    asked, model = [([5, 6, 7], "a", 9), ([8], "a", 9)], models.llama()
    pool = pool_for(model)
    add_adapter(pool, "a", tmp_path / "a")
    assert serve(model, pool, asked) == alone(models.llama, tmp_path, asked)


def test_the_order_of_requests_does_not_matter(folder):
    asked, model = requests(8, seed=6), models.llama()
    pool = pool_of(model, folder)
    turned = serve(model, pool, asked[::-1], max_batch=5)[::-1]
    assert serve(model, pool, asked, max_batch=5) == turned


def test_a_stop_token_ends_an_answer(folder):
    (prompt, adapter, _), model = requests(1, seed=7)[0], models.llama()
    pool = pool_of(model, folder)
    (whole,) = serve(model, pool, [(prompt, adapter, 8)], stop=[])
    (cut,) = serve(model, pool, [(prompt, adapter, 8)], stop=[whole[2]])
    assert cut == whole[: whole.index(whole[2]) + 1]


def test_memory_stays_within_the_budget(folder):
    asked, model = requests(12, seed=8), models.llama()
    pool, most = pool_of(model, folder), 0
    with Server(model, pool, max_batch=8, max_tokens=50, paged=False) as server:
        for prompt, adapter, max_new in asked:
            server.submit(prompt, adapter=adapter, max_new=max_new)
        rows = []
        while not server.idle:
            server.step()
            rows.append(len(server.batch.running))
            assert server.batch.cache.rows * server.batch.cache.capacity <= 50
            most = max(most, server.batch.cache.rows)
    assert 1 < most < 8 and max(rows) > 1


def test_waiting_adapters_are_loaded_while_others_run(folder):
    model = models.llama()
    pool = pool_of(model, folder, adapters=4, rank=7)
    with Server(model, pool, max_batch=1, prefetch=2) as server:
        for name in "abcd":
            server.submit([5, 6], adapter=name, max_new=3)
        server.step()
        server._loading.result()
        assert pool.resident == ["a", "c", "b"]  # the nearest is the most recently used; "d" is not yet in sight
        assert len(list(server.run())) == 4


def test_prefetching_never_takes_what_runs(folder):
    model = models.llama()
    pool = pool_of(model, folder, adapters=1, rank=7)
    pool.evict("c")
    with Server(model, pool, prefetch=4, paged=False) as server:
        pool.alloc(len(pool.storage) - pool.pages_of("c"))  # the pages of keys and values
        for name in "cab":  # c fills the pool
            server.submit([5, 6], adapter=name, max_new=3)
        server.step()
        server._loading.result()
        assert pool.resident == ["c"] and len(server.batch.running) == 1
        assert [c.number for c in server.run()] == [1, 2, 3]


def test_a_closed_server_lets_go(folder):
    model, before = models.llama().train(), models.llama()
    pool = pool_of(model, folder)
    server = Server(model, pool)
    server.submit([5, 6, 7], adapter="a")
    server.step()
    assert not model.training and pool._pins["a"] == 1
    server.close()
    assert model.training and not pool._pins["a"]
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    pool.remove("a")


def test_an_adapter_that_is_removed_fails_its_request_alone(folder):
    model = models.llama()
    pool = pool_of(model, folder)
    with Server(model, pool, prefetch=0) as server:
        server.submit([5, 6], adapter="b", max_new=1)
        server.submit([5, 6], adapter="a", max_new=1)
        server.submit([5, 6], max_new=1)
        pool.remove("a")
        failed, *done = server.step()
        assert failed.number == 2 and isinstance(failed.error, KeyError)
        assert "there is no adapter named 'a'" in str(failed.error)
        assert [(c.number, c.error) for c in done] == [(1, None), (3, None)] and server.idle


def test_requests_come_from_any_thread(folder):
    model = models.llama()
    with Server(model, pool_of(model, folder), max_batch=8) as server, ThreadPoolExecutor(4) as threads:
        ask = lambda i: (server.submit([5, 6 + i], adapter="abcd"[i % 4], max_new=2), i)
        asked = threads.map(ask, range(24))
        done = {}
        while len(done) < 24:
            done |= {completion.number: completion.ids for completion in server.step()}
        asked = dict(asked)
    assert sorted(asked) == sorted(done) == list(range(1, 25))
    want = alone(models.llama, folder, [([5, 6 + asked[n]], "abcd"[asked[n] % 4], 2) for n in (1, 2, 24)])
    assert [done[n] for n in (1, 2, 24)] == want


def test_prompts_of_one_pass_differ_by_two_at_most():
    lengths = [9, 1, 2, 40, 5, 18, 3]
    requests = [Request(i, [0] * n, None, 1) for i, n in enumerate(lengths)]
    assert [[len(r.prompt) for r in group] for group in alike(requests)] == [[1, 2], [3, 5], [9, 18], [40]]
    assert list(alike([])) == []


def test_rows_that_move_keep_what_they_hold():
    cache = RowCache(1)
    cache.reserve(2, 4, 0)
    fill = lambda *values: torch.tensor(values, dtype=torch.float32)[:, None, None, None].expand(-1, 2, 3, 5)
    cache.begin(0, torch.tensor([0, 0]), 3)
    cache.update(fill(1, 2), fill(3, 4), 0)
    cache.reserve(4, 8, 2)
    cache.move(1, 0)
    cache.begin(0, torch.tensor([3]), 1)
    keys, values = cache.update(fill(9)[:, :, :1], fill(9)[:, :, :1], 0)
    assert keys.shape == (1, 2, 4, 5) and keys[0, 0, :, 0].tolist() == [2, 2, 2, 9] and values[0, 1, 2, 3] == 4


def test_bad_input(folder, tmp_path):
    model = models.llama()
    with pytest.raises(ValueError, match="at least 1 adapter of rank 1, not 0 of rank 16"):
        pool_for(model, adapters=0)
    with pytest.raises(ValueError, match="matches no layer"):
        pool_for(model, target=["nothing"])
    pool = pool_of(model, folder)
    with pytest.raises(ValueError, match="an adapter named 'a' already"):
        add_adapter(pool, "a", folder / "a")
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json"):
        add_adapter(pool, "x", tmp_path)
    peftops.save(peftops.attach(models.llama(), peftops.DoRAConfig(r=2)), tmp_path / "dora")
    with pytest.raises(TypeError, match="an adapter of DoRA; a pool holds only A and B"):
        add_adapter(pool, "x", tmp_path / "dora")
    peftops.save(peftops.attach(models.llama(), peftops.LoRAConfig(r=2, target=["embed_tokens"])), tmp_path / "words")
    with pytest.raises(ValueError, match=r"embed_tokens\.lora_embedding_A; a pool holds A and B of linear layers"):
        add_adapter(pool, "x", tmp_path / "words")
    peftops.save(peftops.attach(models.gpt2(), peftops.LoRAConfig(r=2)), tmp_path / "gpt2")
    with pytest.raises(ValueError, match="which the pool does not know"):
        add_adapter(pool, "x", tmp_path / "gpt2")
    for name, value in (("max_batch", 0), ("max_tokens", 1), ("prefetch", -1)):
        with pytest.raises(ValueError, match=f"Server: {name} must be a whole number from .*, not {value}"):
            Server(model, pool, **{name: value})
    with pytest.raises(ValueError, match="the pool has a layer 'strange', and LlamaForCausalLM has none"):
        Server(model, peftops.AdapterPool({"strange": (64, 64)}, pages=1))
    with pytest.raises(ValueError, match="has an adapter attached"):
        Server(peftops.attach(models.llama(), peftops.LoRAConfig(r=1)), pool)
    with pytest.raises(TypeError, match="BertForSequenceClassification takes no logits_to_keep, past_key_values"):
        Server(models.bert(), pool)
    with Server(model, pool, max_tokens=20) as server:
        with pytest.raises(ValueError, match="ids from 0 to 319, at least one, not "):
            server.submit([])
        with pytest.raises(ValueError, match=r"ids from 0 to 319, at least one, not \[320\]"):
            server.submit([320])
        with pytest.raises(ValueError, match="max_new must be a whole number from 1, not 0"):
            server.submit([3], max_new=0)
        with pytest.raises(ValueError, match=r"2 \+ 19 tokens are more than max_tokens, 20"):
            server.submit([3, 4], max_new=19)
        with pytest.raises(KeyError, match="no adapter named 'x'"):
            server.submit([3], adapter="x", max_new=2)
        assert server.idle
    sliding = models.mistral()
    with Server(sliding, pool_for(sliding), paged=False) as server:
        with pytest.raises(ValueError, match="attention slides, 64"):
            server.submit([3] * 60, max_new=5)
