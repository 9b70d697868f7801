"""What crabtwist, everything on, has to reach, and what it does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import attrs

from bench.summary import Summary

OURS = "everything"
KIB, MIB = 1024, 1024 * 1024


@attrs.frozen
class Target:
    """
    One bound: `what` is measured by `measure` for an endpoint.

    `at_least`: the bound is a lower one.  `unit` is appended to numbers.
    `of_process`: it is the same for all endpoints.
    """

    what: str
    bound: float
    measure: Callable[[Summary, str], float]
    at_least: bool = False
    unit: str = ""
    of_process: bool = False

    def reached(self, value: float) -> bool | None:
        """Say whether a value is within the bound; None where nothing was measured."""
        if math.isnan(value):
            return None
        return value >= self.bound if self.at_least else value <= self.bound


def _ratio(scenario: str, figure: str, to: str) -> Callable[[Summary, str], float]:
    return lambda summary, dialect: summary.ratio(scenario, dialect, OURS, figure, to)


def _added(scenario: str, figure: str) -> Callable[[Summary, str], float]:
    return lambda summary, dialect: summary.added(scenario, dialect, OURS, figure)


_RATE, _PER_REQUEST, _PER_EVENT = "requests_per_cpu_second", "cpu_us_per_request", "cpu_us_per_event"

TARGETS = (
    Target(
        "plain small requests, rate on a core, x LiteLLM's",
        60,
        _ratio("plain-small", _RATE, "litellm"),
        at_least=True,
    ),
    Target(
        "plain small requests, rate on a core, x Portkey's",
        6,
        _ratio("plain-small", _RATE, "portkey"),
        at_least=True,
    ),
    Target(
        "plain small requests, rate on a core, x nginx's",
        0.2,
        _ratio("plain-small", _RATE, "nginx"),
        at_least=True,
    ),
    Target(
        "plain small requests, rate with all extensions, x without any",
        0.75,
        lambda summary, dialect: summary.ratio("plain-small", dialect, "extended", _RATE, "unextended"),
        at_least=True,
    ),
    Target("streams back to back, CPU per event, x nginx's", 1.5, _ratio("streams", _PER_EVENT, "nginx")),
    Target("64 paced streams, CPU per event, x nginx's", 3, _ratio("paced-64", _PER_EVENT, "nginx")),
    Target("1 MB request bodies, CPU, x nginx's", 3, _ratio("plain-1m", _PER_REQUEST, "nginx")),
    Target(
        "64 paced streams, added to the first byte, p50",
        1,
        _added("paced-64", "first_byte_p50_ms"),
        unit=" ms",
    ),
    Target(
        "64 paced streams, added to the first byte, p99",
        5,
        _added("paced-64", "first_byte_p99_ms"),
        unit=" ms",
    ),
    Target(
        "64 paced streams, added to an event, p99", 2, _added("paced-64", "event_delay_p99_ms"), unit=" ms"
    ),
    Target(
        "an idle open stream",
        24,
        lambda summary, dialect: summary.value("idle", dialect, OURS, "bytes_each") / KIB,
        unit=" KiB",
    ),
    Target(
        "resident memory under load",
        120,
        lambda summary, _: summary.most_resident_bytes(OURS) / MIB,
        unit=" MiB",
        of_process=True,
    ),
    Target(
        "from start to serving", 1, lambda summary, _: summary.start_seconds(OURS), unit=" s", of_process=True
    ),
)


def checked(summary: Summary) -> Iterator[tuple[Target, str, float]]:
    """Yield each target with each endpoint ("all" if it is the process's) and what was measured."""
    for target in TARGETS:
        for dialect in ["all"] if target.of_process else summary.dialects:
            yield target, dialect, target.measure(summary, dialect)
