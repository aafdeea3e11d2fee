"""Damage: to bytes, to JSON and to the structure of safetensors. Each case follows from its random generator alone."""

from __future__ import annotations

import json
import struct
from random import Random
from typing import Any

STRANGE = [
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    2**31,
    2**63,
    -(2**63),
    10**30,
    10**400,
    1.5,
    float("nan"),
    float("inf"),
    1e-320,
    1e300,
    "",
    "x",
    "../../../etc/passwd",
    "\x00",
    "a" * 5000,
    "[",
    "nan",
    "16",
    "nf4",
    [],
    {},
    [[]],
    [None],
    [1, 2],
    [-1],
    {"a": None},
    {"(": 4},
    ["q_proj", 3],
    {"q_proj": "x"},
    [["model", "q_proj"]],
    {"x": {"y": [1]}},
]
DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "I64", "I32", "I16", "I8", "U8", "BOOL", "F4", "x"]


def damage_bytes(data: bytes, rng: Random) -> bytes:
    """Cut short, bytes changed (anywhere, or where headers are), removed or put in."""
    made = bytearray(data)
    at = rng.randrange(len(made)) if made else 0
    kind = rng.randrange(5)
    if kind == 0:
        return bytes(made[:at])
    if kind == 1 or kind == 2:
        region = len(made) if kind == 1 else min(len(made), 600)
        for _ in range(rng.choice([1, 2, 8, 64])):
            made[rng.randrange(region)] = rng.randrange(256)
    elif kind == 3:
        del made[at : at + rng.randrange(1, 40)]
    else:
        made[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 40)))
    return bytes(made)


def damage_value(value: Any, rng: Random) -> Any:
    """A value of JSON with one thing in it replaced, left out or repeated."""
    if isinstance(value, dict) and value:
        key = rng.choice(list(value))
        deeper = isinstance(value[key], dict | list) and value[key] and rng.random() < 0.6
        if deeper:
            return {**value, key: damage_value(value[key], rng)}
        if rng.random() < 0.2:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: rng.choice(STRANGE)}
    if isinstance(value, list) and value:
        i = rng.randrange(len(value))
        kind = rng.randrange(4)
        if kind == 0:
            return value[:i] + value[i + 1 :]
        if kind == 1:
            return [*value, value[i]]
        return [*value[:i], damage_value(value[i], rng) if kind == 2 else rng.choice(STRANGE), *value[i + 1 :]]
    return rng.choice(STRANGE)


def damage_json(data: bytes, rng: Random) -> bytes:
    if rng.random() < 0.3:
        return damage_bytes(data, rng)
    if rng.random() < 0.02:
        return b"[" * 100_000
    value = json.loads(data)
    for _ in range(rng.choice([1, 1, 2, 3])):
        value = damage_value(value, rng)
    return json.dumps(value).encode()


def damage_safetensors(data: bytes, rng: Random) -> bytes:
    """Bytes; or its header's names, dtypes, shapes and offsets."""
    if rng.random() < 0.4:
        return damage_bytes(data, rng)
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    for _ in range(rng.choice([1, 1, 2])):
        name = rng.choice([key for key in header if key != "__metadata__"] or [""])
        entry = header.get(name)
        kind = rng.randrange(6)
        if not isinstance(entry, dict):
            break
        if kind == 0:
            del header[name]
        elif kind == 1:
            other = rng.choice(["x", name + ".weight", name.replace("A", "B"), name.rpartition(".")[0]])
            header[other] = header.pop(name)
        elif kind == 2:
            entry["dtype"] = rng.choice(DTYPES)
        elif kind == 3 and isinstance(entry.get("shape"), list):
            shape = entry["shape"]
            entry["shape"] = rng.choice([shape[::-1], [*shape, 1], shape[1:], [1, *shape], [0, *shape[1:]]])
        elif kind == 4:
            header[name] = damage_value(entry, rng)
        else:  # other numbers, NaN among them, in a file that is sound
            begin, end = entry.get("data_offsets", [0, 0])
            noise = rng.choice([b"\xff", b"\x7f", b"\x00"]) * (end - begin)
            rest = rest[:begin] + noise + rest[end:]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest
