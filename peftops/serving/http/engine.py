"""The thread that steps the server, and the answers that it sends to the event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import traceback
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from ..batch import Logprob
from ..sampling import Sampling
from ..server import Completion, Server
from .adapters import Adapters, Entry
from .errors import ApiError, bad, of_request
from .metrics import Metrics
from .text import TextStream

log = logging.getLogger("peftops.serve")


@dataclass
class Piece:
    """A token of one of a request's answers, and the text that is final with it. The last piece has a reason or an
    error."""

    choice: int
    text: str
    token: int | None = None
    logprob: Logprob | None = None
    reason: str | None = None
    error: ApiError | None = None


@dataclass
class Ask:
    """One requested answer."""

    prompt: list[int]
    max_new: int
    sampling: Sampling | None
    stops: list[str]
    logprobs: int | None


class Job:
    """The answers to one request over HTTP. Methods are for the event loop, unless their docstring says otherwise."""

    def __init__(self, engine: Engine, count: int, seconds: float):
        self.engine, self.start, self.generated = engine, time.monotonic(), 0
        self._numbers: list[int] = []
        self._left, self._deadline = count, self.start + seconds
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue[Piece | None]()

    def put(self, piece: Piece | None) -> None:
        """May be called from any thread. None means that the client has left."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, piece)
        except RuntimeError:
            pass  # the loop is closed, and with it the connection

    async def pieces(self) -> AsyncIterator[Piece]:
        """All of them as they come, until every answer has ended.

        Raises:
            ApiError: an answer failed, or the time is up; the others are given up.
            ClientLeft: the client has closed its connection.
        """
        try:
            while self._left:
                try:
                    piece = await asyncio.wait_for(self._queue.get(), max(0.0, self._deadline - time.monotonic()))
                except asyncio.TimeoutError:
                    raise ApiError(503, "the time for an answer is up", "timeout") from None
                if piece is None:
                    raise ClientLeft
                if piece.error is not None:
                    raise piece.error
                self.generated += piece.token is not None
                self._left -= piece.reason is not None
                yield piece
        finally:
            if self._left:
                self.engine.give_up(self._numbers)


class ClientLeft(Exception):
    """The client has closed its connection."""


class _Answer:
    """One answer as the engine's thread makes it."""

    def __init__(self, job: Job, choice: int, ask: Ask, adapter: Entry | None, engine: Engine):
        self.job, self.choice, self.adapter, self._metrics = job, choice, adapter, engine.metrics
        self._text, self._last = TextStream(engine.tokenizer, ask.stops), job.start

    def token(self, token: int, logprob: Logprob | None) -> bool:
        now = time.monotonic()
        (self._metrics.first if self._last == self.job.start else self._metrics.next).observe(now - self._last)
        self._metrics.tokens.inc()
        self._last = now
        self.job.put(Piece(self.choice, self._text.add(token), token, logprob))
        return self._text.stopped

    def end(self, completion: Completion, stop: set[int]) -> None:
        error = None if completion.error is None else of_request(completion.error)
        ended = self._text.stopped or bool(completion.ids and completion.ids[-1] in stop)
        reason = error.code if error else "stop" if ended else "length"
        text = "" if error else self._text.end()
        if self._text.stopped and not error:
            reason = "stop"  # in the text that was held back
        self._metrics.answers.labels(reason).inc()
        self._metrics.whole.observe(time.monotonic() - self.job.start)
        self.job.put(Piece(self.choice, text, reason=reason, error=error))


class Engine:
    """A thread that steps the server while there is work.

    Args:
        server: no other code may step it.
        tokenizer: no other thread may use it, because threads cannot share transformers' fast tokenizers.
        queue: how many answers may wait.
    """

    def __init__(self, server: Server, tokenizer: Any, adapters: Adapters, metrics: Metrics, *, queue: int):
        self.server, self.tokenizer, self.adapters, self.metrics = server, tokenizer, adapters, metrics
        self.failed = False
        self._most = server.max_batch + queue
        self._answers: dict[int, _Answer] = {}
        self._given_up: set[int] = set()
        self._change = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="peftops-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self.failed

    @property
    def count(self) -> int:
        """Answers that wait or run."""
        return len(self._answers)

    def submit(self, model: str, asks: list[Ask], seconds: float) -> Job:
        """Queue all answers to one request, or none of them.

        Raises:
            ApiError: 400, they do not fit into memory; 404, no such model; 503, the queue is full or the engine has
                failed.
        """
        if not self.alive:
            raise ApiError(503, "the engine has failed; the log says why", "engine_failed")
        with self._change:
            if len(self._answers) + len(asks) > self._most:
                raise ApiError(503, "the queue is full; try again in a moment", "queue_full")
            adapter = self.adapters.borrow(model, len(asks))
            job = Job(self, len(asks), seconds)
            for choice, ask in enumerate(asks):
                answer = _Answer(job, choice, ask, adapter, self)
                try:
                    number = self.server.submit(
                        ask.prompt,
                        adapter=adapter and adapter.key,
                        max_new=ask.max_new,
                        sampling=ask.sampling,
                        logprobs=ask.logprobs,
                        watch=answer.token,
                    )
                except ValueError:  # an adapter so large that the pool has no room for this many tokens beside it
                    self.give_up(job._numbers)
                    for _ in asks[choice:]:
                        self.adapters.give_back(adapter)
                    raise bad(
                        "prompt and answer do not fit into memory beside this adapter; ask for fewer tokens",
                        "context_length_exceeded",
                        "max_tokens",
                    ) from None
                self._answers[number] = answer
                job._numbers.append(number)
            self.metrics.prompt_tokens.inc(sum(len(ask.prompt) for ask in asks))
            self._change.notify()
        return job

    def give_up(self, numbers: list[int]) -> None:
        """Remove these from the batch before its next step. May be called from any thread."""
        with self._change:
            self._given_up.update(numbers)
            self._change.notify()

    def give_all_up(self) -> None:
        with self._change:
            self.give_up(list(self._answers))

    def close(self) -> None:
        """End the thread after its step. Answers that are not whole end with an error."""
        with self._change:
            self._closing = True
            self._change.notify()
        self._thread.join()
        self._end_all()

    def _run(self) -> None:
        try:
            while True:
                with self._change:
                    while self.server.idle and not self._closing:
                        self._given_up.clear()
                        self._change.wait()
                    if self._closing:
                        return
                    given_up, self._given_up = self._given_up, set()
                for number in given_up:
                    self.server.cancel(number)
                for completion in self.server.step():
                    self._end(completion)
        except BaseException as error:
            self.failed = True
            # The sentence of an error may repeat a prompt, so only the places where it was raised are logged.
            places = "".join(traceback.format_tb(error.__traceback__))
            log.critical("the engine has failed with %s:\n%s", type(error).__name__, places)
            self._end_all()

    def _end(self, completion: Completion) -> None:
        with self._change:
            answer = self._answers.pop(completion.number)
        answer.end(completion, self.server.stop)
        self.adapters.give_back(answer.adapter)

    def _end_all(self) -> None:
        why = ApiError(503, "the server has stopped", "stopped")
        with self._change:
            answers, self._answers = self._answers, {}
        for number, answer in answers.items():
            answer.end(Completion(number, [], why), set())
