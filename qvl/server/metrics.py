"""What /metrics says. Knows names and buckets; asks the backend for its numbers when it is asked itself.

Every app has a registry of its own, so that several can live in one process. Where a server has several processes
(the variable PROMETHEUS_MULTIPROC_DIR, set by their parent, names a folder), each keeps its counters and histograms in
a file there, and whichever is asked adds all files up; the backend's numbers are of one engine and are told once.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import aclosing
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from starlette.types import Scope

from qvl.server.http_setup import SHARED_FOLDER
from qvl.types import Delta, Usage

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 2.5)
# The body arrives, is read, becomes a prompt, and waits for the engine to say something.
REQUEST_STAGES = ("receive", "parse", "prepare", "first_token")
STAGE_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """Counters and histograms of one server; also the backend's `Observer`."""

    def __init__(self, gauges: Callable[[], Mapping[str, float]], stats: Callable[[], Mapping[str, float]]) -> None:
        self._registry = CollectorRegistry()
        shared = os.environ.get(SHARED_FOLDER)
        registry = None if shared else self._registry
        counter, histogram = partial(Counter, registry=registry), partial(Histogram, registry=registry)
        self._requests = counter(
            "qvl_http_requests", "HTTP requests by route and status", ["method", "route", "status"]
        )
        self._prompt = counter("qvl_prompt_tokens", "Tokens of prompts, pictures included")
        self._cached = counter("qvl_cached_prompt_tokens", "Tokens of prompts found in the cache")
        self._generated = counter("qvl_generation_tokens", "Tokens generated")
        self._finished = counter("qvl_answers", "Finished answers by how they ended", ["finish_reason"])
        self._overflowed = counter("qvl_overflowed_requests", "Conversations that were made to fit", ["strategy"])
        self._left = counter("qvl_overflowed_messages", "Messages that left such a conversation", ["as"])
        name, about = "qvl_time_to_first_token_seconds", "From a request to its first token"
        self._first = histogram(name, about, buckets=SECONDS)
        name, about = "qvl_time_per_output_token_seconds", "Time per token after the first, mean of a request"
        self._per_token = histogram(name, about, buckets=TOKEN_SECONDS)
        self._whole = histogram("qvl_request_seconds", "From a request to its last token", buckets=SECONDS)
        name, about = "qvl_media_stage_seconds", "Time that one picture or video spends in a stage of its preparation"
        self._stages = histogram(name, about, ["kind", "stage"], buckets=STAGE_SECONDS)
        name, about = "qvl_request_stage_seconds", "Time that one request spends in a stage before its first token"
        request_stages = histogram(name, about, ["stage"], buckets=STAGE_SECONDS)
        self._request_stages = {stage: request_stages.labels(stage) for stage in REQUEST_STAGES}
        name, about = "qvl_summary_seconds", "Time of a call for a summary of what left"
        self._summaries = histogram(name, about, ["outcome"], buckets=SECONDS)
        self._registry.register(_Numbers("qvl_", gauges))
        self._registry.register(_Numbers("qvl_engine_", stats))
        if shared:
            MultiProcessCollector(self._registry, shared)  # type: ignore[no-untyped-call]
        else:
            ProcessCollector(registry=self._registry)

    def render(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self._registry)

    def media_stage(self, kind: str, stage: str, seconds: float) -> None:
        self._stages.labels(kind, stage).observe(seconds)

    def request_stage(self, stage: str, seconds: float) -> None:
        self._request_stages[stage].observe(seconds)

    def overflowed(self, strategy: str, dropped: int, summarised: int) -> None:
        self._overflowed.labels(strategy).inc()
        self._left.labels("dropped").inc(dropped)
        self._left.labels("summarised").inc(summarised)

    def summary_call(self, seconds: float, usage: Usage | None) -> None:
        self._summaries.labels("failed" if usage is None else "ok").observe(seconds)
        if usage is not None:
            self._count_tokens(usage)

    def count_request(self, scope: Scope, status: int) -> None:
        """Routes are counted by their pattern: a path that matches none must not become a series of its own."""
        route = getattr(scope.get("route"), "path", "unmatched")
        self._requests.labels(_known_method(scope["method"]), route, str(status)).inc()

    async def track(self, deltas: AsyncGenerator[Delta, None], since: float) -> AsyncGenerator[Delta, None]:
        """`deltas`, measured on the way; `since` is the `time.perf_counter()` at which the request was complete."""
        first: float | None = None
        usage = Usage()
        finished: list[str] = []
        async with aclosing(deltas):
            try:
                async for delta in deltas:
                    if first is None:
                        first = time.perf_counter()
                    usage = delta.usage
                    if delta.finish_reason is not None:
                        finished.append(delta.finish_reason)
                    yield delta
            finally:
                self._count_generation(since, first, usage, finished)

    def _count_generation(self, since: float, first: float | None, usage: Usage, finished: Iterable[str]) -> None:
        now = time.perf_counter()
        self._count_tokens(usage)
        for reason in finished:
            self._finished.labels(reason).inc()
        if first is None:
            return
        self._first.observe(first - since)
        self._whole.observe(now - since)
        if usage.completion_tokens > 1:
            self._per_token.observe((now - first) / (usage.completion_tokens - 1))

    def _count_tokens(self, usage: Usage) -> None:
        self._prompt.inc(usage.prompt_tokens)
        self._cached.inc(usage.cached_tokens)
        self._generated.inc(usage.completion_tokens)


class _Numbers(Collector):
    """Numbers by name, read when they are asked for; a name that ends in `_total` is a counter."""

    def __init__(self, prefix: str, read: Callable[[], Mapping[str, float]]) -> None:
        self._prefix = prefix
        self._read = read

    def collect(self) -> Iterable[Metric]:
        for name, value in self._read().items():
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            about = name.removesuffix("_total").replace("_", " ")
            yield family(self._prefix + name, about, value=value)

    def describe(self) -> Iterable[Metric]:
        return ()


def _known_method(method: str) -> str:
    return method if method in ("GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE", "PATCH") else "other"
