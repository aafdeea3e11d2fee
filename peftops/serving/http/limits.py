"""How much a client may ask for."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ...attaching.config import check_range


@dataclass(frozen=True)
class Limits:
    """The bounds of a server; each of them has its own error.

    Args:
        context: tokens of a prompt and its answer together (400).
        prompt: tokens of a prompt; None for as many as fit (400).
        answer: tokens of an answer if the request sets no number; fewer if there is less room.
        choices: answers to one prompt, and prompts in one request (400).
        queue: answers that may wait (503).
        body: bytes of a request (413).
        seconds: from the arrival of a request to the end of its answer (503).
        body_seconds: until a request's body is there (408).
        adapters: number of adapters that may be loaded (400).

    Raises:
        ValueError: one is out of its range.
    """

    context: int
    prompt: int | None = None
    answer: int = 128
    choices: int = 16
    queue: int = 256
    body: int = 4 << 20
    seconds: float = 600.0
    body_seconds: float = 30.0
    adapters: int = 10_000

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("seconds"):
                check_range(f"Limits: {field.name}", value, 0)
            elif value is not None:
                check_range(f"Limits: {field.name}", value, field.name != "queue", whole=True)
