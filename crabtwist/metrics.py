"""
Prometheus metrics.

Names and labels are those of crabllm, which this gateway re-implements, with `crabtwist_` for its
prefix, so that dashboards move over.  Label values are bounded: a model that is not served is "other", and
the provider is "none" where none was asked.

Counting is plain addition: prometheus_client takes locks for threads that there are none of here, and looks
its labels up slowly.  It reads the numbers when somebody asks for them, and writes them out.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from math import inf

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.utils import floatToGoString

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


#: Whether to show since when each is counted: PROMETHEUS_DISABLE_CREATED_SERIES in the environment tells
#: prometheus_client not to, which says so only by what it shows.
_SINCE = len(next(iter(Counter("some", "Some.", registry=None).collect())).samples) > 1

#: Values of labels, in the order of their names.
_Values = tuple[str, ...]


class _Count:
    """A number that only grows; `since` is Unix time."""

    __slots__ = ("since", "value")

    def __init__(self) -> None:
        self.value: float = 0
        self.since = time.time()

    def add_one(self) -> None:
        self.value += 1

    def samples(self) -> Iterable[tuple[str, dict[str, str], float]]:
        """Yield suffix, more labels and value of what there is to show."""
        yield "_total", {}, self.value


class _Spread:
    """How many values lie between which bounds, and their sum."""

    __slots__ = ("bounds", "numbers", "since", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.numbers = [0] * (len(bounds) + 1)
        self.sum = 0.0
        self.since = time.time()

    def add(self, value: float) -> None:
        self.numbers[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def samples(self) -> Iterable[tuple[str, dict[str, str], float]]:
        """Yield suffix, more labels and value of what there is to show."""
        for bound, number in zip((*self.bounds, inf), accumulate(self.numbers), strict=True):
            yield "_bucket", {"le": floatToGoString(bound)}, number
        yield "_count", {}, sum(self.numbers)
        yield "_sum", {}, self.sum


class _Family:
    """All that is counted under one name, as prometheus_client asks for it."""

    def __init__(
        self,
        kind: str,
        name: str,
        what: str,
        labels: Sequence[str],
        members: Mapping[_Values, _Count | _Spread],
    ) -> None:
        self._about = (f"crabtwist_{name}", what, kind)
        self._labels = labels
        self._members = members

    def describe(self) -> Iterable[Metric]:
        return [Metric(*self._about)]

    def collect(self) -> Iterable[Metric]:
        metric = Metric(*self._about)
        for values, member in self._members.items():
            labels = dict(zip(self._labels, values, strict=True))
            for suffix, more, value in member.samples():
                metric.add_sample(metric.name + suffix, {**labels, **more}, value)
            if _SINCE:
                metric.add_sample(f"{metric.name}_created", labels, member.since)
        return [metric]


class Level:
    """A number that goes up and down."""

    def __init__(self) -> None:
        self.value = 0

    def inc(self) -> None:
        """Count one more."""
        self.value += 1

    def dec(self) -> None:
        """Count one less."""
        self.value -= 1


class Metrics:
    """All that is counted, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.active = self._level("active_connections", "Requests being answered.")
        self.open_streams = self._level("open_streams", "Streams being relayed.")
        self._duration = self._spread(
            "request_duration_seconds",
            "Time from the request's arrival to the end of its answer.",
            *("provider", "model", "status", "stream"),
            bounds=DURATION_BUCKETS,
        )
        self._first_byte = self._spread(
            "time_to_first_byte_seconds",
            "Time from the request's arrival to the first byte of its answer's body.",
            *("provider", "model", "stream"),
            bounds=FIRST_BYTE_BUCKETS,
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

    def _level(self, name: str, what: str) -> Level:
        level = Level()
        self.show(name, what, lambda: level.value)
        return level

    # Whoever asks these for labels that are not there yet makes them, at 0.

    def _counter(self, name: str, what: str, *labels: str) -> defaultdict[_Values, _Count]:
        members: defaultdict[_Values, _Count] = defaultdict(_Count)
        self.registry.register(_Family("counter", name, what, labels, members))
        return members

    def _spread(
        self, name: str, what: str, *labels: str, bounds: Sequence[float]
    ) -> defaultdict[_Values, _Spread]:
        members: defaultdict[_Values, _Spread] = defaultdict(partial(_Spread, bounds))
        self.registry.register(_Family("histogram", name, what, labels, members))
        return members

    def show(self, name: str, what: str, read: Callable[[], float]) -> None:
        """Add a gauge `crabtwist_NAME` that `read` is asked for whenever somebody looks."""
        Gauge(f"crabtwist_{name}", what, registry=self.registry).set_function(read)

    def exposition(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def retried(self, provider: str, error: str) -> None:
        """Count an attempt repeated at the same deployment."""
        self._retries[provider, error].add_one()

    def fell_back(self, provider: str, error: str) -> None:
        """Count a move from `provider` to another deployment."""
        self._fallbacks[provider, error].add_one()

    def refused(self, slug: str) -> None:
        """Count a refusal of the gateway's own."""
        self._refusals[slug,].add_one()

    def stale_counter(self, provider: str) -> Callable[[], None]:
        """Return what counts a dead kept connection of `provider`."""
        return self._stale[provider,].add_one

    def settled(self, context: Context, outcome: Outcome, *, known_model: bool) -> None:
        """Count a request's end, exactly once for each."""
        provider = context.provider or "none"
        model = context.model if known_model else "other"
        stream = "true" if context.stream else "false"
        usage, first_byte = outcome.usage, outcome.first_byte_seconds
        self._ends[outcome.ended_by, outcome.reason].value += 1
        self._duration[provider, model, status_class(outcome.status), stream].add(outcome.duration_seconds)
        if first_byte is not None:
            self._first_byte[provider, model, stream].add(first_byte)
        if outcome.cost:
            self._cost[provider, model].value += outcome.cost / DOLLAR
        if outcome.cache_hit:
            self._cache_hits[model,].value += 1
        elif usage is not None:
            self._tokens[provider, model, "prompt"].value += usage.prompt_tokens
            self._tokens[provider, model, "completion"].value += usage.completion_tokens
