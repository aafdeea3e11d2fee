"""A batch that requests join and leave between steps, each with its own adapter (S-LoRA, arXiv:2311.03285).

A step admits waiting requests, runs their prompts, and then generates one token for each running request. One base
product serves all rows, with dense or 4-bit weights; :func:`peftops.multi_lora_linear` adds each row's own term.

Keys and values are in pages of the adapters' pool, and prompts of one adapter with the same beginning share them
(:mod:`.pages`). If the model or the pool does not allow that, they are in rows (:mod:`.rows`), and a warning gives the
reason.

*Admission* is first come, first served, and a request starts only if all can be finished. The bound is S-LoRA's:
suppose that no running request stops early. Then the largest number of tokens that they will hold together must fit
``max_tokens`` and the pool, beside the adapters of these requests, which are pinned. *Eviction* is the pool's: first
the least recently used adapter without a running request, then known beginnings of prompts. *Prefetch*: while a step
computes, a thread loads the adapters of the next requests in the queue.
"""

from __future__ import annotations

import inspect
import itertools
import operator
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import nn

from ..attaching import state_of
from ..attaching.config import check_range
from ..nn.prompt import cache_name
from .adapter_pool import AdapterPool, PoolFull
from .batch import Batch, Logprob, PooledLinear, Request, Rows
from .paged import PagedBatch
from .paged_attention import PagedModel
from .pages import Blocks, Unfit
from .rows import RowBatch
from .sampling import Sampling


@dataclass
class Completion:
    """The end of a request: its answer or its error.

    Attributes:
        number: of the request, as :meth:`Server.submit` returned it.
        ids: the tokens that were generated, with the one that stopped it.
        error: the exception that ended this request before its answer was complete; None if the answer is complete. For
            a cancelled request it is a :class:`Cancelled`.
        logprobs: of each token, if they were asked for.

    Examples:
        >>> from peftops.serving import Completion
        >>> Completion(number=1, ids=[5, 6]).error is None
        True
    """

    number: int
    ids: list[int]
    error: Exception | None = None
    logprobs: list[Logprob] = field(default_factory=list)


class Cancelled(Exception):
    """The error of a request that :meth:`Server.cancel` ended."""


class Server:
    """Generation for requests of many adapters at once. Use it in a ``with`` block: leaving the block restores the
    model.

    Args:
        model: a causal language model of transformers, dense or in 4 bits, with no adapter attached.
        pool: with the layers of the model that adapters may adapt; see :func:`~peftops.serving.pool_for`.
        max_batch: the largest number of requests that run at once.
        max_tokens: the largest number of tokens with keys and values at once. The pool may have room for fewer; see
            ``tokens`` of :func:`~peftops.serving.pool_for`.
        stop: ids that end an answer; by default those of the model's generation config.
        prefetch: the number of waiting requests whose adapters are loaded in advance.
        paged: keep keys and values in pages of the pool (True), or in rows beside it, each as wide as the longest
            (False); by default in pages if the model and the pool support it. Pages need a model on the CPU whose
            layers all use transformers' attention functions, causally, with or without a window.
        agree: for several processes that each have a part of the model and get the same requests in the same order: a
            function that gives the tokens of one process to all. If a pass fails, it raises an error in this process
            only.

    Raises:
        TypeError: the model takes no positions, or no choice of logits.
        ValueError: a limit is too low; an adapter or another server is attached; the pool has a layer that the model
            lacks, or is on another device; ``paged`` is True, and pages are not possible.

    Warns:
        UserWarning: keys and values are in rows; the warning gives the reason.

    Examples:
        >>> from peftops.serving import Server, pool_for
        >>> model = llama()
        >>> with Server(model, pool_for(model, adapters=1, rank=2), stop=()) as server:
        ...     number = server.submit([5, 6, 7], max_new=4)
        ...     answers = list(server.run())
        >>> len(answers[0].ids)
        4
    """

    def __init__(
        self,
        model: nn.Module,
        pool: AdapterPool,
        *,
        max_batch: int = 16,
        max_tokens: int = 16384,
        stop: Iterable[int] | None = None,
        prefetch: int = 2,
        paged: bool | None = None,
        agree: Callable[[list[int]], list[int]] | None = None,
    ):
        limits = {"max_batch": (max_batch, 1), "max_tokens": (max_tokens, 2), "prefetch": (prefetch, 0)}
        for name, (value, least) in limits.items():
            check_range(f"Server: {name}", value, least, whole=True)
        if state_of(model) is not None:
            raise ValueError("Server: the model has an adapter attached; detach it, or merge and detach it")
        if any(isinstance(module, PooledLinear) for module in model.modules()):
            raise ValueError("Server: another server runs on this model; close that one first")
        needs = {"position_ids", "logits_to_keep", cache_name(model)}
        lacks = needs - set(inspect.signature(model.forward).parameters)
        if lacks:
            raise TypeError(f"Server: {type(model).__name__} takes no {', '.join(sorted(lacks))}")
        self.model, self.pool, self.max_batch, self.max_tokens = model, pool, max_batch, max_tokens
        config = model.config.get_text_config()
        self.vocabulary = config.vocab_size
        ends = model.generation_config.eos_token_id if stop is None else list(stop)
        self.stop = {ends} if isinstance(ends, int) else set(ends or ())
        rows = Rows()
        self._waiting: deque[Request] = deque()
        self._joining: list[Request] = []  # whose prompts run in this step, or will
        self._cancelled: set[int] = set()
        self._done: list[Completion] = []  # not yet told
        self._numbers, self._ahead, self._asked = itertools.count(1), prefetch, ()
        self.hits, self.misses = 0, 0  # whether a request's adapter was in the working set as it was admitted
        self._loader = ThreadPoolExecutor(1, "peftops-prefetch")
        self._loading: Future | None = None
        self._was_training, self._closed = model.training, False
        self._replaced = _put(model, pool, rows)
        model.eval()
        try:
            self.batch = self._batch(rows, paged)
            self.batch.agree = agree
        except BaseException:
            self._give_back()
            raise

    def close(self) -> None:
        """Put the model's own layers back, and release the adapters. Requests that are not finished are dropped."""
        if self._closed:
            return
        self._closed = True
        self._loader.shutdown()
        for request in self.batch.running:
            self._release(request)
        self.batch.close()
        self._waiting = deque()
        self._give_back()

    def _batch(self, rows: Rows, paged: bool | None) -> Batch:
        """A batch with pages if they are possible, and with rows otherwise."""
        if paged is not False:
            try:
                model = PagedModel(self.model)
                blocks = Blocks(self.pool, model.layout, self.max_tokens)
                return PagedBatch(model, rows, blocks, max_tokens=self.max_tokens)
            except Unfit as error:
                if paged:
                    raise ValueError(f"Server: keys and values cannot lie in pages: {error}") from error
                warnings.warn(f"Server: keys and values lie in rows, and not in pages: {error}", stacklevel=3)
        return RowBatch(self.model, rows, max_rows=self.max_batch, max_tokens=self.max_tokens)

    def _give_back(self) -> None:
        for owner, leaf, base in self._replaced:
            setattr(owner, leaf, base)
        self._replaced = []
        self.model.train(self._was_training)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(
        self,
        prompt: Sequence[int],
        *,
        adapter: str | None = None,
        max_new: int = 128,
        sampling: Sampling | None = None,
        logprobs: int | None = None,
        watch: Callable[[int, Logprob | None], bool] | None = None,
    ) -> int:
        """Queue a request; its number. May be called from any thread, at any time.

        Args:
            prompt: token ids, at least one.
            adapter: its name in the pool; None for the base model.
            max_new: the largest number of tokens to generate.
            sampling: how to draw them; None for the likeliest one each time.
            logprobs: keep a :class:`Logprob` of each token, with this number of the likeliest tokens.
            watch: the thread that steps calls it with each new token, and with the token's Logprob if there is one. If
                it returns true, the answer ends with this token; if it raises, with this error.

        Raises:
            KeyError: the pool has no such adapter.
            RuntimeError: the server is closed.
            TypeError: the prompt has an element that is not a whole number.
            ValueError: max_new is not a whole number above 0, or logprobs not one from 0; the prompt is empty or has
                ids that the model lacks; prompt and answer can never fit ``max_tokens``, or the pool beside their
                adapter, or, in rows, the window of the model's attention.
        """
        self._check_open()
        prompt = [operator.index(i) for i in prompt]
        if not prompt or not all(0 <= i < self.vocabulary for i in prompt):
            known = f"ids from 0 to {self.vocabulary - 1}, at least one"
            raise ValueError(f"Server: a prompt needs {known}, not {prompt[:9]}")
        check_range("Server: max_new", max_new, 1, whole=True)
        if logprobs is not None:
            check_range("Server: logprobs", logprobs, 0, whole=True)
        if adapter is not None:
            self.pool.pages_of(adapter)
        draw = None if sampling is None else sampling.drawer()
        request = Request(next(self._numbers), prompt, adapter, max_new, draw, logprobs, watch)
        refusal = self.batch.refuses(request)
        if refusal is not None:
            raise ValueError(f"Server: {refusal}")
        self._waiting.append(request)
        return request.number

    def cancel(self, number: int) -> bool:
        """Make the next step end a request. Its completion then has the answer so far and a :class:`Cancelled`. May be
        called from any thread.

        Returns:
            Whether the request was still waiting or running.
        """
        # In the order in which a request goes from one to the next, so that none slips by.
        known = any(r.number == number for r in [*self._waiting, *self._joining, *self.batch.running])
        if known:
            self._cancelled.add(number)
        return known

    @property
    def longest(self) -> int:
        """The largest number of tokens that a prompt and its answer may have together."""
        return self.batch.longest[0]

    @property
    def waiting(self) -> int:
        """The number of requests that do not run yet."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        return not self.batch.running and not self._waiting and not self._done

    def run(self) -> Iterator[Completion]:
        """Step until no request is left; yields each completion when it is finished."""
        while not self.idle:
            yield from self.step()

    @torch.no_grad()
    def step(self) -> list[Completion]:
        """Admit the requests that fit, run their prompts, and generate one token for each running request; returns the
        completions.

        A request that fails is finished with its error, and the others go on. After an interrupt, the next step goes on
        with all requests."""
        self._check_open()
        self._cancel()
        joined = self._admit()
        try:
            self._prefetch()
            self.batch.join(joined)
            self._joining = []
        except BaseException:
            for request in reversed([r for r in joined if r not in self.batch.running]):
                self.batch.drop([request])
                self._release(request)
                self._waiting.appendleft(request)
            self._joining = []
            raise
        self._finish()
        if self.batch.running:
            self.batch.decode()
            self._finish()
        done, self._done = self._done, []
        return done

    def _cancel(self) -> None:
        numbers = set(self._cancelled)
        self._cancelled -= numbers  # and not another set: a thread may be about to add to this one
        for request in [r for r in [*self.batch.running, *self._waiting] if r.number in numbers]:
            request.error = Cancelled(f"request {request.number} was cancelled")
        for request in [r for r in list(self._waiting) if r.error is not None]:
            self._waiting.remove(request)
            self._done.append(Completion(request.number, request.ids, request.error))
        self._finish()

    def _admit(self) -> list[Request]:
        joined = self._joining = []
        while self._waiting and len(self.batch.running) + len(joined) < self.max_batch:
            request, others = self._waiting[0], bool(self.batch.running or joined)
            try:
                if not self.batch.admits(joined, request):
                    if others:
                        break
                    raise PoolFull("Server: the AdapterPool's pages that others hold leave no room for this request")
                self._pin(request)
            except Exception as error:
                self.batch.drop([request])
                if isinstance(error, RuntimeError) and others:
                    break  # there is no room beside the adapters of those that run
                self._waiting.popleft()  # there will be none, or the adapter was removed from the pool since
                self._done.append(Completion(request.number, request.ids, error))
                continue
            joined.append(request)
            self._waiting.popleft()
        return joined

    def _pin(self, request: Request) -> None:
        if request.adapter is None:
            return
        there = request.adapter in self.pool.resident
        while True:
            try:
                request.index = self.pool.pin(request.adapter)
                break
            except PoolFull:
                if not self.batch.spare():
                    raise
        self.hits, self.misses = self.hits + there, self.misses + (not there)

    def _prefetch(self) -> None:
        """Load the adapters of the next requests while this step computes. The first request's adapter is loaded last,
        so it is evicted last."""
        asked = tuple(dict.fromkeys(r.adapter for r in list(self._waiting)[: self._ahead] if r.adapter is not None))
        if asked == self._asked or (self._loading is not None and not self._loading.done()):
            return
        self._asked = asked
        self._loading = self._loader.submit(self._load, asked)

    def _load(self, names: tuple[str, ...]) -> None:
        for name in reversed(names):
            try:
                self.pool.load(name)
            except (RuntimeError, KeyError):
                pass  # no room now, or the adapter is removed: admission will handle it

    def _finish(self) -> None:
        """Remove the requests whose answers are complete or cannot go on."""
        done = []
        for row in range(len(self.batch.running) - 1, -1, -1):
            request = self.batch.running[row]
            over = request.ended or len(request.ids) == request.max_new
            if request.error or over or request.ids[-1] in self.stop:
                done.append(Completion(request.number, request.ids, request.error, request.told))
                self._release(request)
                self.batch.leave(row)
        self._done += done[::-1]

    def _release(self, request: Request) -> None:
        if request.adapter is not None:
            self.pool.unpin(request.adapter)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("Server: it is closed; make another one")


def _put(model: nn.Module, pool: AdapterPool, rows: Rows) -> list[tuple[nn.Module, str, nn.Module]]:
    """Replace each layer of the pool by one that adds the rows' adapters; returns the place and the original of
    each."""
    known = dict(model.named_modules())
    strangers = [name for name in pool.layers if name not in known]
    if strangers:
        raise ValueError(f"Server: the pool has a layer {strangers[0]!r}, and {type(model).__name__} has none")
    for name in pool.layers:
        if known[name].weight.device != pool.storage.device:
            raise ValueError(f"Server: the pool is on {pool.storage.device}, {name} on {known[name].weight.device}")
    replaced = []
    for name in pool.layers:
        parent, _, leaf = name.rpartition(".")
        setattr(known[parent], leaf, PooledLinear(known[name], pool, name, rows))
        replaced.append((known[parent], leaf, known[name]))
    return replaced
