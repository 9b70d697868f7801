"""
Prometheus metrics.

Names and labels are those of crabllm, which this gateway re-implements, with `crabtwist_` for its
prefix, so that dashboards move over.  Label values are bounded: a model that is not served is "other", and
the provider is "none" where none was asked.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from crabtwist.money import DOLLAR
from crabtwist.values import Context, Outcome

#: Upper bounds in seconds: from a cached answer to an hour of agentic work.
DURATION_BUCKETS = (
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
    5,
    10,
    30,
    60,
    120,
    300,
    600,
    1800,
    3600,
)
FIRST_BYTE_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


def status_class(status: int) -> str:
    """Return the label of a status: "2xx", "4xx", "429" or "5xx"; a broken answer (0) is "5xx"."""
    if status == 429:
        return "429"
    if 200 <= status < 400:
        return "2xx"
    return "4xx" if 400 <= status < 500 else "5xx"


class Metrics:
    """All that is counted, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.active = Gauge("crabtwist_active_connections", "Requests being answered.", registry=registry)
        self.open_streams = Gauge("crabtwist_open_streams", "Streams being relayed.", registry=registry)
        self._duration = Histogram(
            "crabtwist_request_duration_seconds",
            "Time from the request's arrival to the end of its answer.",
            ["provider", "model", "status", "stream"],
            registry=registry,
            buckets=DURATION_BUCKETS,
        )
        self._first_byte = Histogram(
            "crabtwist_time_to_first_byte_seconds",
            "Time from the request's arrival to the first byte of its answer's body.",
            ["provider", "model", "stream"],
            registry=registry,
            buckets=FIRST_BYTE_BUCKETS,
        )
        count = self._counter
        self._tokens = count("tokens", "Tokens: prompt or completion.", "provider", "model", "direction")
        what = "What requests cost, as far as prices are known; the ledger has it exactly."
        self._cost = count("cost_dollars", what, "provider", "model")
        self._ends = count("requests", "Ended requests, by who ended them and why.", "ended_by", "reason")
        what = "Attempts repeated at the same deployment, by what had gone wrong."
        self._retries = count("retries", what, "provider", "error")
        what = "Attempts that went on to another deployment, by what had gone wrong."
        self._fallbacks = count("fallbacks", what, "provider", "error")
        self._refusals = count("refusals", "Requests that the gateway itself refused.", "reason")
        self._cache_hits = count("cache_hits", "Requests that were given another's answer.", "model")
        what = "Kept upstream connections that turned out to be dead; the request went out on a fresh one."
        self._stale = count("stale_connections", what, "provider")

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"crabtwist_{name}", what, labels, registry=self.registry)

    def show(self, name: str, what: str, read: Callable[[], float]) -> None:
        """Add a gauge `crabtwist_NAME` that `read` is asked for whenever somebody looks."""
        Gauge(f"crabtwist_{name}", what, registry=self.registry).set_function(read)

    def exposition(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def retried(self, provider: str, error: str) -> None:
        """Count an attempt repeated at the same deployment."""
        self._retries.labels(provider, error).inc()

    def fell_back(self, provider: str, error: str) -> None:
        """Count a move from `provider` to another deployment."""
        self._fallbacks.labels(provider, error).inc()

    def refused(self, slug: str) -> None:
        """Count a refusal of the gateway's own."""
        self._refusals.labels(slug).inc()

    def stale_counter(self, provider: str) -> Callable[[], None]:
        """Return what counts a dead kept connection of `provider`."""
        return self._stale.labels(provider).inc

    def settled(self, context: Context, outcome: Outcome, *, known_model: bool) -> None:
        """Count a request's end, exactly once for each."""
        provider = context.provider or "none"
        model = context.model if known_model else "other"
        stream = "true" if context.stream else "false"
        self._ends.labels(outcome.ended_by, outcome.reason).inc()
        self._duration.labels(provider, model, status_class(outcome.status), stream).observe(
            outcome.duration_seconds
        )
        if outcome.cache_hit:
            self._cache_hits.labels(model).inc()
        if outcome.first_byte_seconds is not None:
            self._first_byte.labels(provider, model, stream).observe(outcome.first_byte_seconds)
        if outcome.cost:
            self._cost.labels(provider, model).inc(outcome.cost / DOLLAR)
        if outcome.usage is not None and not outcome.cache_hit:
            self._tokens.labels(provider, model, "prompt").inc(outcome.usage.prompt_tokens)
            self._tokens.labels(provider, model, "completion").inc(outcome.usage.completion_tokens)
