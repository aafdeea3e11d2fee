"""The server over HTTP, as OpenAI's own client and broken ones see it: a real process."""

import asyncio
import json
import shutil
import socket
import time

import httpx
import pytest
import torch
from http_process import copy_adapter, make_adapter, make_model, serving
from soak import soak

import models
import peftops

openai = pytest.importorskip("openai")
KEY, SECRET = "key of the test", "the treasure lies"
WRONG = "model not there"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("http")
    make_model(folder)
    for seed, (name, r) in enumerate({"a": 4, "b": 2}.items(), 1):
        make_adapter(folder / "adapters" / name, seed, r)
    make_adapter(folder / "store" / "c", 3)
    copy_adapter(folder / "store" / "c", folder / "store" / "nan", lambda name, t: t * float("nan"))
    one_layer = lambda name, t: torch.full_like(t, 1e38) if "layers.0.self_attn.v_proj" in name else t * 0
    copy_adapter(folder / "store" / "c", folder / "store" / "overflow", one_layer)
    (folder / "watched").mkdir()
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with serving(
        "--model",
        folder / "model",
        "--adapters",
        folder / "adapters",
        "--loadable",
        folder / "store",
        "--watch",
        folder / "watched",
        "--max-body",
        20_000,
        "--max-queue",
        40,
        "--max-batch",
        8,
        key=KEY,
    ) as server:
        yield server
        assert SECRET not in server.stop()
        assert server.process.returncode == 0


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def alone(folder):
    """What `generate` answers, by adapter and prompt."""
    tokenizer, known = models.tokenizer(), {}

    def generated(adapter, text, new):
        if adapter not in known:
            model = models.llama(tied=False)
            places = [folder / of / adapter for of in ("adapters", "store") if (folder / of / adapter).exists()]
            known[adapter] = peftops.load(model, places[0]) if places else model
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        out = known[adapter].generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    return generated


def completed(client, model, prompt, **options):
    return client.completions.create(model=model, prompt=prompt, **{"temperature": 0, "max_tokens": 12, **options})


def figures(server):
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def is_empty(server):
    now = figures(server)
    return now["peftops_batch"] == now["peftops_queue"] == 0


def test_answers_are_those_of_generate_alone(client, alone):
    assert [model.id for model in client.models.list()] == ["model", "a", "b"]
    assert client.models.retrieve("a").id == "a"
    for model in ("model", "a", "b"):
        answer = completed(client, model, "abc")
        assert answer.choices[0].text == alone(model, "abc", 12)
        assert answer.model == model and answer.usage.prompt_tokens == 3 and answer.usage.completion_tokens <= 12
        reason = "length" if answer.usage.completion_tokens == 12 else "stop"
        assert answer.choices[0].finish_reason == reason
    several = completed(client, "a", ["abc", "xy"], n=2).choices
    assert [c.index for c in several] == [0, 1, 2, 3]
    assert [c.text for c in several] == [alone("a", text, 12) for text in ("abc", "abc", "xy", "xy")]
    ids = models.tokenizer()("abc")["input_ids"]
    assert completed(client, "b", ids).choices[0].text == alone("b", "abc", 12)


def test_a_chat_goes_through_the_template(client, alone):
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": [{"type": "text", "text": "abc"}]}]
    asked = dict(model="a", messages=messages, temperature=0, max_tokens=9)
    want = alone("a", "<s>s:be</s><s>u:abc</s><s>a:", 9)
    answer = client.chat.completions.create(**asked)
    assert answer.choices[0].message.content == want and answer.choices[0].message.role == "assistant"
    parts = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(part.choices[0].delta.content or "" for part in parts[:-1]) == want
    assert parts[-1].choices == [] and parts[-1].usage == answer.usage and parts[0].usage is None
    assert parts[-2].choices[0].finish_reason == answer.choices[0].finish_reason
    assert len({part.id for part in parts}) == 1


def test_streams_are_the_same_text(client, alone):
    for model, text in (("a", "abc"), ("b", "äöü ẞ"), ("model", "q")):
        parts = list(completed(client, model, text, max_tokens=40, stream=True))
        assert "".join(part.choices[0].text for part in parts) == alone(model, text, 40)


def test_stop_strings_end_an_answer_and_are_no_part_of_it(client, alone):
    text = alone("a", "abc", 40)
    for length in (1, 2, 3):
        stop = text[7 : 7 + length]
        want = text[: text.index(stop)]
        for stream in (False, True):
            got = completed(client, "a", "abc", max_tokens=40, stop=["not there", stop], stream=stream)
            parts = list(got) if stream else [got]
            assert "".join(part.choices[0].text for part in parts) == want
            assert parts[-1].choices[0].finish_reason == "stop"


def test_seeds_and_options_of_sampling(client):
    hot = dict(temperature=3.0, max_tokens=20)
    texts = [completed(client, "a", "abc", seed=seed, **hot).choices[0].text for seed in (1, 2, 1)]
    assert texts[0] == texts[2] != texts[1]
    assert [c.text for c in completed(client, "a", "abc", seed=1, n=2, **hot).choices] == texts[:2]
    greedy = completed(client, "a", "abc", max_tokens=20).choices[0].text
    for options in ({"extra_body": {"top_k": 1}}, {"top_p": 1e-9}):
        assert completed(client, "a", "abc", max_tokens=20, temperature=2.0, **options).choices[0].text == greedy
    fresh = {completed(client, "a", "abc", **hot).choices[0].text for _ in range(3)}
    assert len(fresh) == 3


def test_logprobs_are_those_of_the_model(client, folder):
    model = peftops.load(models.llama(tied=False), folder / "adapters" / "a")
    ids = models.tokenizer()("abc")["input_ids"]
    every = model(torch.tensor([ids])).logits[0, -1].detach().log_softmax(-1)
    chat = client.chat.completions.create(
        model="a",
        messages=[{"role": "user", "content": "abc"}],
        max_tokens=3,
        temperature=0,
        logprobs=True,
        top_logprobs=4,
    )
    first = chat.choices[0].logprobs.content[0]
    assert len(first.top_logprobs) == 4 and first.logprob == first.top_logprobs[0].logprob
    assert first.token.encode() == bytes(first.bytes)
    told = completed(client, "a", "abc", max_tokens=3, logprobs=2).choices[0].logprobs
    assert abs(told.token_logprobs[0] - float(every.max())) < 1e-4 and len(told.tokens) == 3
    assert told.token_logprobs[0] == max(told.top_logprobs[0].values())
    drawn = completed(client, "a", "abc", max_tokens=3, logprobs=0, temperature=9.0, seed=4).choices[0].logprobs
    assert all(value < 0 for value in drawn.token_logprobs)
    parts = list(completed(client, "a", "abc", max_tokens=3, logprobs=2, stream=True))
    streamed = [value for part in parts for value in getattr(part.choices[0].logprobs, "token_logprobs", [])]
    assert streamed == told.token_logprobs


@pytest.mark.parametrize(
    "asked, status, code, param",
    [
        ({"model": WRONG}, 404, "model_not_found", "model"),
        ({"prompt": SECRET * 40}, 400, "context_length_exceeded", "prompt"),
        ({"max_tokens": 510}, 400, "context_length_exceeded", "max_tokens"),
        ({"prompt": ""}, 400, "invalid_value", "prompt"),
        ({"prompt": []}, 400, "invalid_value", "prompt"),
        ({"prompt": [320]}, 400, "invalid_value", "prompt"),
        ({"prompt": [-1]}, 400, "invalid_value", "prompt"),
        ({"prompt": {"text": SECRET}}, 400, "invalid_value", "prompt"),
        ({"prompt": "\ud800"}, 400, "invalid_json", None),
        ({"n": 17}, 400, "invalid_value", "n"),
        ({"n": 0}, 400, "invalid_value", "n"),
        ({"temperature": -1}, 400, "invalid_value", "temperature"),
        ({"temperature": "1"}, 400, "invalid_value", "temperature"),
        ({"top_p": 1.5}, 400, "invalid_value", "top_p"),
        ({"max_tokens": 1.5}, 400, "invalid_value", "max_tokens"),
        ({"max_tokens": 10**400}, 400, "invalid_value", "max_tokens"),
        ({"stop": [""]}, 400, "invalid_value", "stop"),
        ({"logprobs": 21}, 400, "invalid_value", "logprobs"),
        ({"presence_penalty": 0.5}, 400, "invalid_value", "presence_penalty"),
        ({"echo": True}, 400, "invalid_value", "echo"),
        ({"stream_options": {"include_usage": True}}, 400, "invalid_value", "stream_options"),
        ({"temprature": 1}, 400, "unknown_parameter", "temprature"),
        ({SECRET: 1}, 400, "unknown_parameter", "one of its fields"),
        ({"prompt": "x" * 30_000}, 413, "body_too_large", None),
    ],
)
def test_a_wrong_request_is_refused_in_openais_shape(server, asked, status, code, param):
    body = json.dumps({"model": "a", "prompt": "abc", **asked})
    answer = httpx.post(f"{server.url}/v1/completions", content=body, headers={"authorization": f"Bearer {KEY}"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param), error
    assert error["type"] and SECRET not in error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"[" * 15_000, b"\xff\xfe", b'{"model": "a"}'])
def test_a_body_that_is_no_request(server, body):
    for route in ("chat/completions", "completions", "load_lora_adapter"):
        answer = httpx.post(f"{server.url}/v1/{route}", content=body, headers={"authorization": f"Bearer {KEY}"})
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


def test_keys_routes_and_states(server, client):
    for headers in ({}, {"authorization": "Bearer no"}, {"authorization": KEY}):
        answer = httpx.get(f"{server.url}/v1/models", headers=headers)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{server.url}/health").text == "ok\n" and httpx.get(f"{server.url}/ready").text == "ready\n"
    assert httpx.get(f"{server.url}/nowhere").json()["error"]["code"] == "unknown_route"
    headers = {"authorization": f"Bearer {KEY}"}
    assert httpx.get(f"{server.url}/v1/completions", headers=headers).json()["error"]["code"] == "bad_method"
    with pytest.raises(openai.NotFoundError, match="no model of this name"):
        client.models.retrieve("x")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="other").models.list()


def change(server, route, **fields):
    return httpx.post(f"{server.url}/v1/{route}_lora_adapter", json=fields, headers={"authorization": f"Bearer {KEY}"})


def test_adapters_come_and_go(server, client, folder, alone):
    assert change(server, "load", lora_name="c", lora_path="c").status_code == 200
    assert completed(client, "c", "abc").choices[0].text == alone("c", "abc", 12)
    assert change(server, "load", lora_name="c", lora_path="c").json()["error"]["code"] == "name_taken"
    assert change(server, "load", lora_name="model", lora_path="c").json()["error"]["code"] == "name_taken"
    with completed(client, "c", "abc", max_tokens=300, stream=True) as stream:
        parts = iter(stream)
        text = next(parts).choices[0].text
        assert change(server, "load", lora_name="c", lora_path=str(folder / "store/c"), load_inplace=True).is_success
        assert change(server, "unload", lora_name="c").status_code == 200
        with pytest.raises(openai.NotFoundError):
            completed(client, "c", "abc")
        text += "".join(part.choices[0].text for part in parts)
    assert text == alone("c", "abc", 300)  # whoever had it keeps it
    assert change(server, "unload", lora_name="c").status_code == 404


@pytest.mark.parametrize(
    "path, status, sentence",
    [
        ("nan", 400, "holds NaN or infinity"),
        ("nothing", 400, "no adapter_config.json"),
        ("../adapters/a", 403, "--loadable"),
        ("/etc", 403, "--loadable"),
        ("", 403, "--loadable"),
        ("c\0", 400, "not a path"),
    ],
)
def test_files_that_are_no_adapter_are_refused(server, path, status, sentence):
    answer = change(server, "load", lora_name="d", lora_path=path)
    assert answer.status_code == status and sentence in answer.json()["error"]["message"]
    assert change(server, "unload", lora_name="d").status_code == 404


def test_numbers_that_overflow_end_their_own_request(server, client, alone):
    assert change(server, "load", lora_name="hot", lora_path="overflow").is_success
    for stream in (False, True):  # an error before the first token has a status in a stream, too
        with pytest.raises(openai.UnprocessableEntityError, match="not finite"):
            list(completed(client, "hot", "abc", stream=stream))
    assert completed(client, "a", "abc").choices[0].text == alone("a", "abc", 12)
    assert change(server, "unload", lora_name="hot").is_success


def test_a_watched_directory(server, client, folder, alone):
    names = lambda: [model.id for model in client.models.list()]
    shutil.copytree(folder / "store" / "c", folder / "watched" / "w")
    shutil.copytree(folder / "store" / "nan", folder / "watched" / "broken")
    until(lambda: "w" in names())
    assert completed(client, "w", "abc").choices[0].text == alone("c", "abc", 12)
    shutil.copyfile(*(folder / at / "adapter_model.safetensors" for at in ("store/overflow", "watched/w")))

    def overflows():
        try:
            return not completed(client, "w", "abc")
        except openai.UnprocessableEntityError:
            return True

    until(overflows)
    shutil.rmtree(folder / "watched" / "w")
    until(lambda: "w" not in names())
    assert "broken" not in names() and "cannot load 'broken'" in server.log


def test_a_client_that_leaves_gives_its_place_up(server, client, alone):
    cancelled = lambda: figures(server).get('peftops_answers_total{reason="cancelled"}', 0)
    before = cancelled()
    stream = completed(client, "a", "abc", max_tokens=400, stream=True)
    next(iter(stream))
    stream.close()
    body = json.dumps({"model": "a", "prompt": "abc", "max_tokens": 400}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\ncontent-length: "
    host, port = server.url.removeprefix("http://").split(":")
    head = head.encode()
    until(lambda: is_empty(server))

    def leave(data):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(data)
            time.sleep(0.05)

    def both():  # an answer may be complete before its client leaves
        leave(head + b"%d\r\n\r\n" % len(body) + body)
        return cancelled() >= before + 2

    until(both)
    for data in (head + b"90\r\n\r\n{", b"\x16\x03\x01", b"GET /", b""):
        leave(data)
    until(lambda: is_empty(server))
    assert completed(client, "a", "abc").choices[0].text == alone("a", "abc", 12)


def test_a_full_queue_is_a_503_and_nothing_is_lost(server, alone):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
            one = lambda i: client.completions.create(model="ab"[i % 2], prompt="abc", temperature=0, max_tokens=40)
            return await asyncio.gather(*(one(i) for i in range(70)), return_exceptions=True)

    answers = asyncio.run(ask())
    refused = [answer for answer in answers if isinstance(answer, Exception)]
    assert all(error.status_code == 503 and error.code == "queue_full" for error in refused) and len(refused) <= 22
    want = {"a": alone("a", "abc", 40), "b": alone("b", "abc", 40)}
    whole = [answer for answer in answers if not isinstance(answer, Exception)]
    assert len(whole) >= 48 and all(answer.choices[0].text == want[answer.model] for answer in whole)


def test_figures_and_log_tell_of_it(server, client):
    before = figures(server)
    completed(client, "a", SECRET, max_tokens=5)
    after = figures(server)
    moved = lambda name: after[name] - before[name]
    assert moved("peftops_prompt_tokens_total") == len(SECRET) and 1 <= moved("peftops_generated_tokens_total") <= 5
    assert moved("peftops_time_to_first_token_seconds_count") == moved("peftops_answer_seconds_count") == 1
    assert moved("peftops_adapter_hits_total") + moved("peftops_adapter_misses_total") == 1
    assert after["peftops_adapters"] == 2 and after["peftops_pool_pages_free"] < after["peftops_pool_pages"]
    until(lambda: "POST /v1/completions 200" in server.log)
    assert f"model=a prompt_tokens={len(SECRET)}" in server.log and WRONG not in server.log


def test_an_end_in_order_and_time_limits(folder):
    """Those under way have their grace, and are told then; whoever asks for too long is told, too."""
    with serving("--model", folder / "model", "--grace", 0.5, "--timeout", 1.0, "--max-cache", 100_000) as server:
        url = f"{server.url}/v1/completions"
        body = {"model": "model", "prompt": [5], "max_tokens": 510, "n": 16, "temperature": 5.0}
        late = httpx.post(url, json=body, timeout=30)
        assert late.status_code == 503 and late.json()["error"]["code"] == "timeout"
        until(lambda: is_empty(server))
        with httpx.stream("POST", url, json={**body, "stream": True}, timeout=30) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.process.terminate()
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] in ("cancelled", "timeout")
        assert server.process.wait(60) == 0 and "shutting down" in server.stop()


def test_many_clients_and_adapters(tmp_path):
    """A slice; `python tests/serving/soak.py` does the whole."""
    soak(tmp_path, requests=240, clients=32, count=40, checked=5, slack=24 << 20)
