"""``peftops serve --port``: the options of the server over HTTP, and its process."""

from __future__ import annotations

import argparse
import logging
import os
import socket
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from ..integrations.peft_files import CONFIG, read_adapter
from ..prompts.chat import stop_ids
from ..serving import AdapterPool, Server
from .model import positions

_NEEDS = ("fastapi", "uvicorn", "prometheus_client")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arg = parser.add_argument_group("over HTTP", "OpenAI's API; clients send PEFTOPS_API_KEY if it is set").add_argument
    arg("--port", type=int, help="answer requests on this port; 0 for any that is free")
    arg("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1, this machine alone)")
    arg("--name", help="the model's name for clients (default: that of its directory)")
    arg(
        "--watch",
        type=Path,
        metavar="DIR",
        help="a directory whose adapters are loaded when they appear and unloaded when they are removed",
    )
    arg("--loadable", type=Path, metavar="DIR", help="a directory from which clients may load adapters")
    arg(
        "--max-rank",
        type=int,
        default=16,
        help="rank of the adapters for which --resident makes room (default: the largest of --adapters, at least 16)",
    )
    arg("--max-adapters", type=int, default=10_000, help="adapters that may be loaded (default 10000)")
    arg(
        "--max-prompt",
        type=int,
        help="largest number of tokens of a prompt (default: any that leaves room for an answer)",
    )
    arg("--max-choices", type=int, default=16, help="answers to one request (default 16)")
    arg("--max-queue", type=int, default=256, help="answers that wait (default 256)")
    arg("--max-body", type=int, default=4 << 20, help="bytes of a request (default 4194304)")
    arg("--timeout", type=float, default=600.0, help="seconds for an answer (default 600)")
    arg("--grace", type=float, default=30.0, help="seconds for running answers after a signal (default 30)")


def prepare(args: argparse.Namespace) -> socket.socket:
    """Check all options that can be checked before a model is read."""
    missing = [name for name in _NEEDS if find_spec(name) is None]
    if missing:
        raise ImportError(f"serve --port needs {', '.join(missing)}: pip install 'peftops[serve]'")
    from ..serving.http import listen

    if not 0 <= args.port < 1 << 16:
        raise ValueError(f"--port must be from 0 to 65535, not {args.port}")
    if args.max_rank < 1:
        raise ValueError(f"--max-rank must be at least 1, not {args.max_rank}")
    if not args.grace >= 0:
        raise ValueError(f"--grace must be a number of seconds from 0, not {args.grace}")
    for name in ("watch", "loadable"):
        folder = getattr(args, name)
        if folder is not None and not folder.is_dir():
            raise ValueError(f"--{name} must be a directory, and {folder} is not")
    if os.environ.get("PEFTOPS_API_KEY") == "":
        raise ValueError("PEFTOPS_API_KEY is set and empty; unset it for a server without a key")
    _limits(args, 2)
    return listen(args.host, args.port)


def _limits(args: argparse.Namespace, context: int) -> Any:
    from ..serving.http import Limits

    return Limits(
        context=context,
        prompt=args.max_prompt,
        answer=args.max_tokens,
        choices=args.max_choices,
        queue=args.max_queue,
        body=args.max_body,
        seconds=args.timeout,
        adapters=args.max_adapters,
    )


def readable(folder: Path | None) -> dict[str, Path]:
    """The adapters that are already in a watched directory and can be read."""
    found = {}
    for path in [] if folder is None else sorted(folder.glob(f"*/{CONFIG}")):
        try:
            read_adapter(path.parent)
        except (OSError, TypeError, ValueError):
            continue  # the watch logs it
        found[path.parent.name] = path.parent
    return found


def run(
    args: argparse.Namespace,
    sock: socket.socket,
    tokenizer: Any,
    model: nn.Module,
    pool: AdapterPool,
    folders: dict[str, Path],
    check: Callable[[Path], None] | None,
) -> int:
    from ..serving.http import Adapters, App, serve
    from ..serving.http.errors import ApiError

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("peftops.serve").setLevel(logging.INFO)
    stop = stop_ids(tokenizer, model.generation_config)
    with Server(model, pool, max_batch=args.max_batch, max_tokens=args.max_cache, stop=stop) as server:
        limits = _limits(args, int(min(server.longest, positions(model))))
        adapters = Adapters(pool, args.name or args.model.resolve().name, most=limits.adapters, check=check)
        for name, folder in folders.items():
            try:
                adapters.load(name, folder)
            except ApiError as error:
                raise ValueError(error.message) from None
        app = App(
            server,
            tokenizer,
            adapters,
            limits,
            key=os.environ.get("PEFTOPS_API_KEY"),
            loadable=args.loadable,
            watched=args.watch,
        )
        host, port = sock.getsockname()[:2]
        print(f"serving {adapters.base} and {len(folders)} adapters on http://{host}:{port}/v1", flush=True)
        serve(app, sock, grace=args.grace)
    return 0
