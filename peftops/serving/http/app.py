"""The routes."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from ...prompts.chat import prompt_ids
from ..sampling import Sampling
from ..server import Server
from . import schema
from .adapters import Adapters, Watched
from .answers import Shape
from .engine import Ask, Engine, Job, Piece
from .errors import ApiError, bad, no_model
from .guard import Guard
from .limits import Limits
from .metrics import Metrics
from .stream import EventStream

log = logging.getLogger("peftops.serve")


class App:
    """A server over HTTP, as an application of ASGI: ``app.asgi``.

    Args:
        server: no other code may step it.
        tokenizer: of transformers.
        adapters: that clients may name.
        key: that clients must send; None for none.
        loadable: the directory from which clients may load adapters; None if they may not load any.
        watched: the directory whose adapters are loaded when they appear.
        look: seconds between two looks into it.
    """

    def __init__(
        self,
        server: Server,
        tokenizer: Any,
        adapters: Adapters,
        limits: Limits,
        *,
        key: str | None = None,
        loadable: Path | None = None,
        watched: Path | None = None,
        look: float = 2.0,
    ):
        self._server, self._tokenizer, self._adapters, self._limits = server, tokenizer, adapters, limits
        self._loadable, self._look = loadable, look
        self._watched = None if watched is None else Watched(adapters, watched)
        self._started, self.draining = int(time.time()), False
        self._metrics = Metrics(server, adapters)
        self.engine = Engine(server, copy.deepcopy(tokenizer), adapters, self._metrics, queue=limits.queue)
        self._encoder = ThreadPoolExecutor(1, "peftops-tokenizer")
        self._speller = copy.deepcopy(tokenizer)  # one for each thread: transformers' fast ones cannot be shared
        routes = FastAPI(title="peftops", openapi_url=None, docs_url=None, redoc_url=None, lifespan=self._life)
        get, post = routes.get, routes.post
        get("/health")(self._health)
        get("/ready")(self._ready)
        get("/metrics")(self._figures)
        get("/v1/models")(self._models)
        get("/v1/models/{name:path}")(self._model)
        post("/v1/chat/completions")(self._chat)
        post("/v1/completions")(self._text)
        post("/v1/load_lora_adapter")(self._load)
        post("/v1/unload_lora_adapter")(self._unload)
        routes.exception_handler(ApiError)(lambda _, error: error.response())
        routes.exception_handler(404)(lambda *_: ApiError(404, "there is no such route", "unknown_route").response())
        routes.exception_handler(405)(lambda *_: ApiError(405, "the route has another method", "bad_method").response())
        takes = lambda: not self.draining
        self.asgi = Guard(routes, limits=limits, metrics=self._metrics, key=key, ready=takes)

    @contextlib.asynccontextmanager
    async def _life(self, _: FastAPI) -> AsyncIterator[None]:
        watching = None
        if self._watched is not None:
            await asyncio.to_thread(self._watched.look, settled=True)
            watching = asyncio.create_task(self._watch(self._watched))
        yield
        if watching is not None:
            watching.cancel()
        await asyncio.to_thread(self.engine.close)
        self._encoder.shutdown()

    async def _watch(self, watched: Watched) -> None:
        while True:
            await asyncio.sleep(self._look)
            try:
                await asyncio.to_thread(watched.look)
            except Exception as error:
                log.error("a look into the watched directory failed with %s", type(error).__name__)

    # Routes for operators.

    async def _health(self) -> Response:
        alive = self.engine.alive
        return PlainTextResponse("ok\n" if alive else "the engine has failed\n", 200 if alive else 503)

    async def _ready(self) -> Response:
        ready = self.engine.alive and not self.draining
        return PlainTextResponse("ready\n" if ready else "not ready\n", 200 if ready else 503)

    async def _figures(self) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    # Models.

    async def _models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._card(name) for name in (self._adapters.base, *self._adapters.names())]}

    async def _model(self, name: str) -> dict[str, Any]:
        if name not in (self._adapters.base, *self._adapters.names()):
            raise no_model()
        return self._card(name)

    def _card(self, name: str) -> dict[str, Any]:
        base = self._adapters.base
        return {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "peftops",
            "root": base,
            "parent": None if name == base else base,
            "max_model_len": self._limits.context,
        }

    async def _load(self, request: Request) -> Response:
        asked = schema.read(schema.Load, await request.body())
        if self._loadable is None:
            raise ApiError(403, "this server loads no adapters for clients; --loadable DIR lets it", "not_allowed")
        root = self._loadable.resolve()
        try:
            path = (root / asked.lora_path).resolve()
        except (OSError, ValueError, RuntimeError):  # a NUL; links in a circle
            raise bad("lora_path is not a path", param="lora_path") from None
        if root not in path.parents:
            raise ApiError(403, "lora_path is not in the directory of --loadable", "not_allowed", "lora_path")
        await asyncio.to_thread(self._adapters.load, asked.lora_name, path, replace=asked.load_inplace)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")

    async def _unload(self, request: Request) -> Response:
        asked = schema.read(schema.Unload, await request.body())
        if self._loadable is None:
            raise ApiError(403, "this server unloads no adapters for clients; --loadable DIR lets it", "not_allowed")
        await asyncio.to_thread(self._adapters.unload, asked.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")

    # Answers.

    async def _chat(self, request: Request) -> Response:
        asked = schema.read(schema.Chat, await request.body())
        messages = [message.plain() for message in asked.messages]
        try:
            ids = await self._in_encoder(prompt_ids, messages)
        except ValueError:
            raise bad("the model's chat template cannot render these messages", param="messages") from None
        return await self._answer(request, asked, [ids])

    async def _text(self, request: Request) -> Response:
        asked = schema.read(schema.Text, await request.body())
        prompts = []
        for prompt in asked.prompts:
            encode = lambda tokenizer, text: list(tokenizer(text)["input_ids"])
            prompts.append(await self._in_encoder(encode, prompt) if isinstance(prompt, str) else prompt)
        return await self._answer(request, asked, prompts)

    async def _in_encoder(self, function: Any, value: Any) -> list[int]:
        return await asyncio.get_running_loop().run_in_executor(self._encoder, function, self._tokenizer, value)

    async def _answer(self, request: Request, asked: schema.Chat | schema.Text, prompts: list[list[int]]) -> Response:
        chat, stream, about = isinstance(asked, schema.Chat), bool(asked.stream), request.scope["peftops"]
        asks = self._asks(asked, prompts)
        if asked.stream_options is not None and not stream:
            raise bad("stream_options is for streams", param="stream_options")
        used = sum(map(len, prompts))
        job = self.engine.submit(asked.model, asks, self._limits.seconds)
        about |= {"model": asked.model, "prompt_tokens": used}  # it is our own sentence, without words of the client
        leaving = asyncio.create_task(_leaving(request, job))
        spell = lambda token: self._speller.decode([token])
        shape = Shape(chat=chat, model=asked.model, prompt_tokens=used, decode=spell)
        pieces = _after(job.pieces(), leaving, lambda: about.update(generated=job.generated))
        if not stream:
            return JSONResponse(await shape.whole(pieces, len(asks)))
        usage = bool(asked.stream_options and asked.stream_options.include_usage)
        first = await anext(pieces)  # an answer that fails before its first token can still have a status of its own
        events = shape.events(_with(first, pieces), len(asks), usage=usage)
        return EventStream(events, seconds=self._limits.seconds)

    def _asks(self, asked: schema.Chat | schema.Text, prompts: list[list[int]]) -> list[Ask]:
        limits, copies = self._limits, asked.n or 1
        if copies * len(prompts) > limits.choices:
            raise bad(f"a request may have {limits.choices} answers, not {copies * len(prompts)}", param="n")
        vocabulary, field = self._server.vocabulary, "messages" if isinstance(asked, schema.Chat) else "prompt"
        asks = []
        for ids in prompts:
            if not ids:
                raise bad("the prompt is empty", param=field)
            if not all(0 <= i < vocabulary for i in ids):
                raise bad(f"the ids of a prompt are from 0 to {vocabulary - 1}", param=field)
            most = min(limits.prompt or limits.context, limits.context - 1)
            if len(ids) > most:
                raise bad(f"the prompt has {len(ids)} tokens; {most} are the most", "context_length_exceeded", field)
            room = limits.context - len(ids)
            if asked.answer is not None and asked.answer > room:
                raise bad(
                    f"a prompt of {len(ids)} tokens leaves room for {room}, not for {asked.answer}",
                    "context_length_exceeded",
                    "max_tokens",
                )
            asks += [
                Ask(
                    ids,
                    asked.answer or min(limits.answer, room),
                    _sampling(asked, len(asks) + i),
                    asked.stops,
                    asked.told,
                )
                for i in range(copies)
            ]
        return asks


def _sampling(asked: schema.Generation, choice: int) -> Sampling | None:
    """With a seed, each of several answers gets a different seed."""
    if asked.temperature == 0:
        return None
    top_k = asked.top_k if asked.top_k and asked.top_k > 0 else None
    seed = None if asked.seed is None else (asked.seed + choice) % 2**63
    return Sampling(
        temperature=1.0 if asked.temperature is None else asked.temperature, top_p=asked.top_p, top_k=top_k, seed=seed
    )


async def _leaving(request: Request, job: Job) -> None:
    """Tell the job when its client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.put(None)


async def _after(pieces: AsyncGenerator[Piece, None], leaving: asyncio.Task, done: Any) -> AsyncGenerator[Piece, None]:
    try:
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                yield piece
    finally:
        leaving.cancel()
        done()


async def _with(first: Piece, rest: AsyncGenerator[Piece, None]) -> AsyncGenerator[Piece, None]:
    async with contextlib.aclosing(rest):
        yield first
        async for piece in rest:
            yield piece
