"""What a client is told of an adapter that cannot be loaded names no place on the server's machine."""

import asyncio
import json
import math
import shutil
from dataclasses import fields

import pytest

import models
import peftops
from peftops.serving import pool_for

pytest.importorskip("fastapi")
from peftops.serving.http import Adapters, Limits
from peftops.serving.http.app import _after
from peftops.serving.http.errors import ApiError
from peftops.serving.http.guard import Guard

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def change(**fields):
    def apply(folder):
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | fields))

    return apply


def dora(folder):
    shutil.rmtree(folder)
    peftops.save(peftops.attach(models.llama(), peftops.DoRAConfig(r=2)), folder)


def other_model(folder):
    shutil.rmtree(folder)
    peftops.save(peftops.attach(models.gpt2(), peftops.LoRAConfig(r=2)), folder)


FAULTS = {
    "nothing is there": shutil.rmtree,
    "no config": lambda folder: (folder / CONFIG).unlink(),
    "a config that is no JSON": lambda folder: (folder / CONFIG).write_text("{"),
    "a config that is a directory": lambda folder: ((folder / CONFIG).unlink(), (folder / CONFIG).mkdir()),
    "no tensors": lambda folder: (folder / TENSORS).unlink(),
    "tensors that are cut": lambda folder: (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-9]),
    "tensors that are a directory": lambda folder: ((folder / TENSORS).unlink(), (folder / TENSORS).mkdir()),
    "an unknown method": change(peft_type="MAGIC"),
    "a rank that is none": change(r=-1),
    "another method": dora,
    "another model": other_model,
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_no_place_is_named(fault, tmp_path):
    folder = tmp_path / "secret" / "mine"
    peftops.save(peftops.attach(models.llama(), peftops.LoRAConfig(r=2)), folder)
    fault(folder)
    pool = pool_for(models.llama(), adapters=1, rank=2, tokens=0)
    with pytest.raises(ApiError) as told:
        Adapters(pool, "base").load("x", folder)
    assert told.value.status == 400 and told.value.message.startswith("cannot load 'x': ")
    assert "secret" not in told.value.message and str(tmp_path) not in told.value.message, told.value.message


@pytest.mark.parametrize("name", [field.name for field in fields(Limits)])
def test_every_limit_is_a_number_in_its_range(name):
    for value in (-1, math.nan, "4", True, *(() if name.endswith("seconds") else (2.5,))):
        with pytest.raises(ValueError, match=f"Limits: {name}"):
            Limits(**{"context": 8, name: value})


def test_an_answer_that_is_over_waits_no_longer_for_its_client_to_leave():
    async def pieces():
        yield "a piece"

    async def ask():
        leaving, over = asyncio.ensure_future(asyncio.Event().wait()), []
        assert [piece async for piece in _after(pieces(), leaving, lambda: over.append(True))] == ["a piece"]
        await asyncio.wait([leaving], timeout=5)
        return leaving.cancelled(), over

    assert asyncio.run(ask()) == (True, [True])


def test_a_message_that_does_not_say_that_more_follows_is_the_last():
    """ASGI lets a server leave that out."""

    async def receive():
        return messages.pop(0)

    messages = [{"type": "http.request", "body": b"ab", "more_body": True}, {"type": "http.request", "body": b"c"}]
    guard = Guard(None, limits=Limits(context=8), metrics=None, key=None, ready=lambda: True)
    assert asyncio.run(guard._read(receive)) == b"abc" and not messages
