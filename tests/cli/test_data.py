"""What data files are read as, and what of a conversation is learnt and where answers stop."""

import contextlib
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import models
import peftops
from peftops.cli import main
from peftops.cli import model as cli
from peftops.cli.data import DataError, Row, encode, read_rows
from peftops.nn import IGNORED
from peftops.prompts import chat
from peftops.prompts.chat import prompt_ids, stop_ids
from peftops.prompts.time_limit import TookTooLong, time_limit

ROW = {"instruction": "say", "response": "ok"}
GEMMA = (
    "{% for m in messages %}<start>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)
CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "x"},
    {"role": "assistant", "content": "yy"},
]


def write(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\u0085", "\x0b", "\x1c"])
def test_only_a_line_feed_ends_a_line(tmp_path, character):
    row = json.dumps({**ROW, "instruction": f"a{character}b"}, ensure_ascii=character < " ")
    (one, two) = read_rows(write(tmp_path, "a.jsonl", f"{row}\r\n{row}\n"))
    assert one == two and one.messages[0]["content"] == f"a{character}b"


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.json", "a.Json"])
@pytest.mark.parametrize("form", ["lines", "array", "bom", "indented array"])
def test_json_by_its_suffix(tmp_path, name, form):
    lines = "".join(json.dumps(ROW) + "\n" for _ in range(2))
    text = {
        "lines": lines,
        "bom": "\ufeff" + lines,
        "array": json.dumps([ROW, ROW]),
        "indented array": json.dumps([ROW, ROW], indent=4),
    }[form]
    rows = read_rows(write(tmp_path, name, text))
    assert len(rows) == 2 and all(row.messages[1] == {"role": "assistant", "content": "ok"} for row in rows)


def test_tables_have_a_header(tmp_path):
    text = 'instruction,response\nsay,ok\n"two\nlines, quoted",yes\n'
    rows = read_rows(write(tmp_path, "a.CSV", text))
    assert [row.messages[0]["content"] for row in rows] == ["say", "two\nlines, quoted"]
    assert read_rows(write(tmp_path, "a.tsv", "prompt\tcompletion\na\tb\n"))[0].messages[1]["content"] == "b"


@pytest.mark.parametrize(
    "name, data, sentence",
    [
        ("a.parquet", "PAR1", "the suffix tells the kind of a data file, and .parquet is not of .jsonl"),
        ("a", "text", "and none is not of .jsonl"),
        ("a.jsonl.txt", json.dumps(ROW) + "\n", "is named as plain text, but holds JSON; give it the suffix .jsonl"),
        ("a.json", '[{"instruction": "a", "response": "b"},\n{"a"]', "begins as an array, but is not JSON"),
        ("a.json", "[]", "has no rows"),
        ("a.json", '[{"instruction": "a", "response": "b"}, 3]', "row 2: expected an object"),
        ("a.jsonl", '{"a":' * 100_000, "nested too deeply"),
        ("a.jsonl", '{"prompt": "\\ud83d", "completion": "b"}', "line 1: a string has half of a surrogate pair"),
        ("a.jsonl", '{"messages": [{"role": 1, "content": "a"}]}', "line 1: each of messages must have a role"),
        ("a.csv", "prompt,completion\na,b\nc\n", "line 3 has 1 fields, the header 2"),
        ("a.csv", "prompt,prompt\na,b\n", "line 1: a table needs a header of different names"),
        ("a.csv", 'prompt,completion\n"a,b\n', "cannot be read as a table"),
        ("a.csv", "question,answer\na,b\n", "line 2: expected instruction and response"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, name, data, sentence):
    with pytest.raises(DataError) as caught:
        read_rows(write(tmp_path, name, data))
    assert sentence in str(caught.value) and name in str(caught.value)


def learnt(tokenizer, example):
    return tokenizer.decode([label for label in example.labels if label != IGNORED])


@pytest.mark.parametrize(
    "template, end", [(None, "</s>"), (GEMMA, "<end_of_turn>\n"), (GEMMA.replace("<end_of_turn>\n", "\n"), "\n</s>")]
)
def test_an_answer_ends_as_the_template_ends_a_turn(template, end):
    """What is learnt is what the template makes; only where it ends a turn with nothing to see, the end of the text
    is added."""
    tokenizer = models.tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    (example,) = encode([Row(messages=CHAT)], tokenizer, 200)
    made = tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    assert learnt(tokenizer, example) == f"yy{end}"
    assert example.ids == made + ([2] if end == "\n</s>" else [])
    (whole,) = encode([Row(messages=CHAT)], tokenizer, 200, turns="all")
    first = end.removesuffix("</s>") if end == "\n</s>" else end
    assert whole.ids == example.ids and learnt(tokenizer, whole) == f"hello{first}yy{end}"
    assert whole.targets > example.targets and whole.tail > whole.targets


def test_templates_that_fail_or_rewrite_earlier_turns_are_told():
    tokenizer = models.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(ValueError, match="chat template cannot render these messages: no system"):
        encode([Row(messages=CHAT)], tokenizer, 200)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content if loop.last else '-' }};{% endfor %}"
    with pytest.raises(ValueError, match="renders earlier turns differently"):
        encode([Row(messages=CHAT)], tokenizer, 200, turns="all")
    # an answer that begins with what is there only while it is asked for
    tokenizer.chat_template = GEMMA.replace("<start>assistant\n{% endif %}", "<start>assistant\n<think>{% endif %}")
    (example,) = encode([Row(messages=CHAT)], tokenizer, 200)
    assert learnt(tokenizer, example) == "yy<end_of_turn>\n" and "<think>yy" in tokenizer.decode(example.ids)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for a in messages[0].content * 9999 %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    ],
)
@pytest.mark.parametrize("in_thread", [False, True])
def test_a_template_that_does_not_end_is_told(template, in_thread, monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 0.2)
    tokenizer = models.tokenizer()
    tokenizer.chat_template = template

    def encoded():
        with pytest.raises(ValueError, match="chat template takes more than 0.2 s for one conversation"):
            encode([Row(messages=CHAT)], tokenizer, 200)
        return True

    started = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(encoded).result() if in_thread else encoded()
    assert time.monotonic() - started < 60


def test_a_time_limit_leaves_nothing_behind():
    """Neither what comes to an end in time, nor what does at the very moment, is stopped afterwards."""
    for seconds in (0.001 + i * 1e-5 for i in range(100)):
        with contextlib.suppress(TookTooLong):
            with time_limit(seconds):
                until = time.monotonic() + 0.0015
                while time.monotonic() < until:
                    pass
    until = time.monotonic() + 0.05
    while time.monotonic() < until:
        pass


def test_a_template_of_a_hard_prompt_ends_alike():
    tokenizer = models.tokenizer()
    tokenizer.chat_template = GEMMA
    prompt = peftops.HardPrompt("{q}|||{a}", chat=True)
    made = prompt.encode(tokenizer, {"q": "x", "a": "yy"})
    assert tokenizer.decode(made.ids[-made.targets :]) == "yy<end_of_turn>\n"


def test_every_token_that_ends_a_turn_ends_an_answer(tmp_path, capsys):
    """Those of the model's own list, the tokenizer's, and the template's."""
    tokenizer, model = models.tokenizer(), models.llama(tied=False)
    asked = [{"role": "user", "content": "hi"}]
    ids = torch.tensor([prompt_ids(tokenizer, asked)])
    likeliest = model(ids).logits[0, -1].argmax().item()
    model.generation_config.eos_token_id = [2, likeliest]
    assert stop_ids(tokenizer, model.generation_config) == sorted({2, likeliest})
    special = models.tokenizer()
    special.add_special_tokens({"additional_special_tokens": ["<end_of_turn>"]})
    special.chat_template = GEMMA
    assert stop_ids(special) == [2, special.convert_tokens_to_ids("<end_of_turn>")]

    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    made = []
    loaded = peftops.load_model(tmp_path / "model", quantize=False)
    generate = loaded.generate
    loaded.generate = lambda **options: made.append(generate(**options)) or made[-1]
    cli.answer(loaded, tokenizer, asked, 10)
    assert made[0].shape[1] == ids.shape[1] + 1
    (tmp_path / "requests.jsonl").write_text('{"prompt": "hi"}\n')
    requests, out = tmp_path / "requests.jsonl", tmp_path / "out"
    assert main([*map(str, ["serve", "--model", tmp_path / "model", "--requests", requests, "--out", out])]) == 0
    assert json.loads((tmp_path / "out").read_text())["tokens"] == 1
