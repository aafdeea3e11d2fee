"""A response of server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

from fastapi.responses import Response


class EventStream(Response):
    """Sends events as they come.

    Args:
        events: closed at the end, also after an error.
        seconds: the time in which the client must take each event; otherwise the connection is closed.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], *, seconds: float):
        super().__init__(None, 200, {"cache-control": "no-store"}, "text/event-stream")
        del self.headers["content-length"]
        self._events, self._seconds = events, seconds

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for event in self._events:
                part = {"type": "http.response.body", "body": event, "more_body": True}
                await asyncio.wait_for(send(part), self._seconds)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._events.aclose()
