"""The process: a socket, uvicorn, and an orderly end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from types import FrameType

import uvicorn

from .app import App

log = logging.getLogger("peftops.serve")


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. So a port that is in use is an error before a model is read.

    Raises:
        ValueError: the address or port cannot be bound.
    """
    found = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except (OSError, OverflowError) as error:
        if found is not None:
            found.close()
        raise ValueError(f"cannot listen on {host}, port {port}: {getattr(error, 'strerror', None) or error}") from None
    return found


class _Uvicorn(uvicorn.Server):
    """At a signal, accepts no new requests, and ends the running ones with an error after ``grace`` seconds."""

    def __init__(self, config: uvicorn.Config, app: App, grace: float):
        super().__init__(config)
        self._app, self._grace = app, grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = self._app.draining = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        log.info("shutting down; %d answers are under way", self._app.engine.count)
        ending = asyncio.get_running_loop().call_later(self._grace, self._app.engine.give_all_up)
        await super().shutdown(sockets)
        ending.cancel()


def serve(app: App, sock: socket.socket, *, grace: float = 30.0) -> None:
    """Serve until a signal, then end in order.

    Args:
        grace: seconds for running answers after a signal.
    """
    config = uvicorn.Config(
        app.asgi,
        log_config=None,
        access_log=False,
        lifespan="on",
        server_header=False,
        timeout_graceful_shutdown=int(grace) + 5,
    )
    asyncio.run(_Uvicorn(config, app, grace).serve([sock]))
