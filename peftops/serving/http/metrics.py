"""The figures that Prometheus reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from ..server import Server
    from .adapters import Adapters

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_NEXT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)


class Metrics:
    """Events are counted when they happen; queue, batch, pages and adapters are looked up on each request for the
    figures."""

    def __init__(self, server: Server, adapters: Adapters):
        self._server, self._adapters = server, adapters
        self.registry = CollectorRegistry()
        counter = lambda name, what, labels=(): Counter(f"peftops_{name}", what, labels, registry=self.registry)
        seconds = lambda name, what, bounds: Histogram(
            f"peftops_{name}_seconds", what, buckets=bounds, registry=self.registry
        )
        self.requests = counter("http_requests", "Requests over HTTP, by route and status", ("route", "status"))
        self.answers = counter("answers", "Answers, by the reason of their end", ("reason",))
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self.tokens = counter("generated_tokens", "Tokens that were generated")
        self.first = seconds("time_to_first_token", "From a request's arrival to its first token", _FIRST)
        self.next = seconds("time_per_token", "Between two tokens of an answer", _NEXT)
        self.whole = seconds("answer", "From a request's arrival to the end of its answer", _FIRST)
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        server, pool = self._server, self._server.pool
        gauge = lambda name, what, value: GaugeMetricFamily(f"peftops_{name}", what, value)
        yield gauge("queue", "Answers that wait", server.waiting)
        yield gauge("batch", "Answers that run", len(server.batch.running))
        yield gauge("pool_pages", "Pages of the pool", len(pool.storage))
        yield gauge("pool_pages_free", "Pages of it that neither adapters nor keys and values have", pool.free_pages)
        yield gauge("adapters", "Adapters that can be asked for", len(self._adapters.names()))
        yield gauge("adapters_resident", "Adapters in the working set", len(pool.resident))
        count = lambda name, what, value: CounterMetricFamily(f"peftops_{name}", what, value=value)
        yield count("adapter_hits", "Answers whose adapter was in the working set already", server.hits)
        yield count("reused_tokens", "Tokens of prompts whose keys and values were there", server.batch.reused_tokens)
        yield count("adapter_misses", "Answers whose adapter had to be loaded", server.misses)

    def text(self) -> bytes:
        return generate_latest(self.registry)
