"""``peftops serve``: requests, each for an adapter of its own, answered in one batch; from a file, or over HTTP."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ..integrations.files import writable_directory
from ..integrations.peft_files import CONFIG, read_adapter
from ..nn import Parts, of_first_rank
from ..prompts.chat import prompt_ids, stop_ids
from ..serving import Completion, Sampling, Server, add_adapter, pool_for
from . import serve_http
from .data import DataError, lines_of, parsed, read_text
from .model import add_arguments as add_model_arguments
from .model import add_base_arguments, base_options, load_base, load_tokenizer

_SAMPLING = tuple(field.name for field in fields(Sampling))
_KEYS = ("prompt", "messages", "adapter", "max_tokens", *_SAMPLING)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arg = parser.add_argument
    add_model_arguments(parser)
    add_base_arguments(parser)
    arg(
        "--adapters",
        type=Path,
        nargs="*",
        default=[],
        metavar="DIR",
        help="directories of LoRA adapters, or of such directories; an adapter has its directory's name",
    )
    arg(
        "--requests",
        type=Path,
        help="JSONL: prompt or messages, and optionally adapter (without it: the "
        "model itself), max_tokens, temperature, top_k, top_p, seed (without any of these four: greedy)",
    )
    arg("--out", type=Path, help="JSONL: a line per answer, in the order of completion, with its row's number")
    arg("--max-tokens", type=int, default=128, help="tokens of an answer if the request sets none (default 128)")
    arg("--max-batch", type=int, default=16, help="requests that run at once (default 16)")
    arg("--max-cache", type=int, default=16384, help="tokens whose keys and values are kept at once (default 16384)")
    arg("--resident", type=int, default=16, help="adapters for which there is room at once (default 16)")
    serve_http.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if (args.port is None) == (args.requests is None and args.out is None):
        raise ValueError("serve needs either --port, for a server over HTTP, or --requests and --out, for a file")
    if args.port is None and (args.requests is None or args.out is None):
        raise ValueError("a file of requests needs both --requests and --out")
    for name in ("max_tokens", "max_batch", "resident"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    with _ranks() as (rank, world):
        if args.port is None:
            return _run_file(args, rank, world)
        if world > 1:
            raise ValueError(f"serve --port is one process, and not {world}; several answer --requests of a file")
        return _run_http(args)


@contextlib.contextmanager
def _ranks() -> Iterator[tuple[int, int]]:
    """The number of this process and of all processes, if torchrun has started them: each then has a part of the
    model."""
    distributed, own = torch.distributed, False
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        own = True
    there = distributed.is_available() and distributed.is_initialized()
    try:
        yield (distributed.get_rank(), distributed.get_world_size()) if there else (0, 1)
    finally:
        if own:
            distributed.destroy_process_group()


def _run_http(args: argparse.Namespace) -> int:
    sock = serve_http.prepare(args)
    with sock:
        adapters = find_adapters(args.adapters)
        known = {**adapters, **serve_http.readable(args.watch)}
        base = _base(args, known)
        tokenizer = load_tokenizer(args.model, args.trust_remote_code)
        model = load_base(args, **base)
        rank = max([args.max_rank, *(_rank(folder) for folder in known.values())])
        pool = pool_for(model, adapters=args.resident, rank=rank, tokens=args.max_cache)
        check = None if args.dense or args.quantize else lambda folder: _check_base(folder, base)
        return serve_http.run(args, sock, tokenizer, model, pool, adapters, check)


def _run_file(args: argparse.Namespace, rank: int, world: int) -> int:
    adapters = find_adapters(args.adapters)
    rows = read_requests(args.requests, adapters)
    if args.out.is_dir() or args.out.resolve() == args.requests.resolve():
        raise ValueError(f"--out must be a file of its own, not {args.out}")
    writable_directory(args.out.parent)
    ranks = [_rank(folder) for folder in adapters.values()]
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    model = load_base(args, **_base(args, adapters))
    parts = Parts(model, rank, world) if world > 1 else None
    resident = min(args.resident, max(1, len(ranks)))
    pool = pool_for(model, adapters=resident, rank=max(ranks, default=1), tokens=args.max_cache)
    for name, folder in adapters.items():
        add_adapter(pool, name, folder, parts=parts)
    # Processes that share a model agree on tokens, and load adapters at the same steps.
    step = {} if parts is None else {"agree": of_first_rank, "prefetch": 0}
    stop = stop_ids(tokenizer, model.generation_config)
    numbers = {}
    with Server(model, pool, max_batch=args.max_batch, max_tokens=args.max_cache, stop=stop, **step) as server:
        for number, row in enumerate(rows, 1):
            try:
                numbers[_submit(server, tokenizer, row, args.max_tokens)] = number
            except (ValueError, TypeError) as error:
                raise DataError(f"{args.requests}, row {number}: {error}") from None
        if rank:
            return 1 if any(completion.error for completion in server.run()) else 0
        return _write_answers(args, server.run(), rows, numbers, tokenizer)


def _write_answers(
    args: argparse.Namespace,
    completions: Iterator[Completion],
    rows: list[dict[str, Any]],
    numbers: dict[int, int],
    tokenizer: Any,
) -> int:
    """Write each answer when it is done, and print a line of totals; returns the command's status."""
    from tqdm import tqdm

    generated, failed, start = 0, 0, time.perf_counter()
    with open(args.out, "w", encoding="utf-8") as out, tqdm(total=len(rows), unit="answer") as progress:
        for completion in completions:
            number = numbers[completion.number]
            text = tokenizer.decode(completion.ids, skip_special_tokens=True).strip()
            answer = {
                "row": number,
                "adapter": rows[number - 1].get("adapter"),
                "answer": text,
                "tokens": len(completion.ids),
            }
            if completion.error is not None:
                answer["error"], failed = str(completion.error), failed + 1
            out.write(json.dumps(answer, ensure_ascii=False) + "\n")
            out.flush()
            generated += len(completion.ids)
            progress.update()
    seconds = time.perf_counter() - start
    used = len({row.get("adapter") for row in rows} - {None})
    print(
        f"{len(rows)} answers of {used} adapters, {generated} tokens in {seconds:.1f} s, "
        f"{generated / max(seconds, 1e-9):.1f} tokens/s, in {args.out}"
    )
    if failed:
        print(f"{failed} of the answers are not whole; their lines say why, under error", file=sys.stderr)
    return 1 if failed else 0


def find_adapters(folders: list[Path]) -> dict[str, Path]:
    """The directories, among these and their children, that have an adapter's files; by their own names."""
    found: dict[str, Path] = {}
    for folder in folders:
        inside = [folder] if (folder / CONFIG).exists() else sorted(p.parent for p in folder.glob(f"*/{CONFIG}"))
        if not inside:
            raise FileNotFoundError(f"no {CONFIG} in {folder} or in a directory in it")
        for path in inside:
            if path.resolve().name in found:
                raise ValueError(f"{path} and {found[path.resolve().name]} are two adapters of one name; rename one")
            found[path.resolve().name] = path
    return found


def read_requests(path: Path, adapters: dict[str, Path]) -> list[dict[str, Any]]:
    """The rows of a file of requests, each checked as far as it can be without a model."""
    rows = []
    for number, (_, line) in enumerate(lines_of(read_text(path, "file of requests")), 1):
        value = parsed(line, f"{path}, row {number}")
        try:
            rows.append(_checked(value, adapters))
        except ValueError as error:
            raise DataError(f"{path}, row {number}: {error}") from None
    if not rows:
        raise DataError(f"{path} is empty")
    return rows


def _checked(row: Any, adapters: dict[str, Path]) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, not a {type(row).__name__}")
    strange = sorted(set(row) - set(_KEYS))
    if strange:
        raise ValueError(f"{', '.join(strange)}: not of {', '.join(_KEYS)}")
    if ("prompt" in row) == ("messages" in row):
        raise ValueError("a request has a prompt or messages, one of them")
    messages = row.get("messages", [{"role": "user", "content": row.get("prompt")}])
    whole = isinstance(messages, list) and all(isinstance(m, dict) and "role" in m for m in messages)
    if not (whole and messages and all(isinstance(m.get("content"), str) for m in messages)):
        raise ValueError("a prompt is text, and each of messages has a role and a content, which is text")
    if row.get("adapter") is not None and row["adapter"] not in adapters:
        raise ValueError(f"no adapter named {row['adapter']!r} in --adapters; there is {', '.join(adapters) or 'none'}")
    _sampling(row)
    return row


def _base(args: argparse.Namespace, adapters: dict[str, Path]) -> dict[str, Any]:
    """How to read the model for all of the adapters: in the format in which they were trained, or as the options
    say."""
    wanted = {name: base_options(read_adapter(folder)[0]) for name, folder in adapters.items()}
    if args.dense or args.quantize or not wanted:
        return {"quantize": args.quantize}
    name, first = next(iter(wanted.items()))
    other = next((other for other, options in wanted.items() if options != first), None)
    if other is not None:
        raise ValueError(
            f"the adapters {name} and {other} were trained on different bases, {_words(first)} and "
            f"{_words(wanted[other])}; choose one for all with --dense or --quantize"
        )
    return first


def _check_base(folder: Path, base: dict[str, Any]) -> None:
    other = base_options(read_adapter(folder)[0])
    if other != base:
        raise ValueError(
            f"it was trained on another base than this server's, {_words(other)} and not {_words(base)}; "
            "start the server with --dense or --quantize to have it nevertheless"
        )


def _words(base: dict[str, Any]) -> str:
    return f"in blocks of {base['block_size']} in 4 bits" if base["quantize"] else "dense"


def _sampling(row: dict[str, Any]) -> Sampling | None:
    options = {name: row[name] for name in _SAMPLING if row.get(name) is not None}
    return Sampling(**options) if options else None


def _rank(folder: Path) -> int:
    """The largest rank of an adapter's layers."""
    _, tensors = read_adapter(folder)
    return max((len(t) for key, t in tensors.items() if key.endswith("lora_A.weight")), default=1)


def _submit(server: Server, tokenizer: Any, row: dict[str, Any], most: int) -> int:
    messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
    return server.submit(
        prompt_ids(tokenizer, messages),
        adapter=row.get("adapter"),
        max_new=row.get("max_tokens", most),
        sampling=_sampling(row),
    )
