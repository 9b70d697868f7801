"""Figures: what is made of counts, and what their names mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

#: Name of a figure -> what it is called in a table, and whether less is better (None: neither).
FIGURES: dict[str, tuple[str, bool | None]] = {
    "requests_per_second": ("requests/s", False),
    "events_per_second": ("events/s", False),
    "requests_per_cpu_second": ("requests/s of CPU", False),
    "cpu_us_per_request": ("CPU µs/request", True),
    "cpu_us_per_event": ("CPU µs/event", True),
    "core_share": ("of its core", None),
    "load_core_share": ("of the other core", None),
    "succeeded": ("succeeded", None),
    "latency_p50_ms": ("latency p50 ms", True),
    "latency_p99_ms": ("latency p99 ms", True),
    "first_byte_p50_ms": ("first byte p50 ms", True),
    "first_byte_p99_ms": ("first byte p99 ms", True),
    "event_delay_p50_ms": ("event delay p50 ms", True),
    "event_delay_p99_ms": ("event delay p99 ms", True),
    "upstream_calls_per_request": ("upstream calls/request", None),
    "bytes_each": ("resident bytes each", True),
    "ahead_bytes_each": ("upstream ahead, bytes each", True),
    "open": ("open", None),
    "resident_bytes": ("resident bytes, at most", True),
}

#: What a gateway adds, if the direct baseline of the same round is taken away.
ADDED = ("latency", "first_byte", "event_delay")

_PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}


def percentile(histogram: Sequence[Sequence[int]], fraction: float) -> float:
    """
    Return the value that `fraction` of all are not above; NaN of none.

    `histogram` is a list of [value, count], by rising values.
    """
    wanted = fraction * sum(count for _, count in histogram)
    seen = 0
    for value, count in histogram:
        seen += count
        if seen >= wanted:
            return float(value)
    return math.nan


def in_milliseconds(name: str, histogram: Sequence[Sequence[int]]) -> dict[str, float]:
    """Return the percentiles of nanoseconds as figures; none of an empty histogram."""
    if not histogram:
        return {}
    figures = {
        f"{name}_{label}_ms": percentile(histogram, fraction) / 1e6
        for label, fraction in _PERCENTILES.items()
    }
    figures[f"{name}_max_ms"] = histogram[-1][0] / 1e6
    figures[f"{name}_count"] = sum(count for _, count in histogram)
    return figures


def from_load(result: dict[str, Any]) -> dict[str, float]:
    """Return the figures of what the load generator counted."""
    seconds = result["nanoseconds"] / 1e9
    answers = sum(result["statuses"].values())
    good = result["statuses"].get("200", 0)
    figures: dict[str, float] = {
        "requests_per_second": good / seconds,
        "events_per_second": result["events"] / seconds,
        "bytes_per_second": result["bytes"] / seconds,
        "broken": result["broken"],
        "unfinished": result["unfinished"],
        "open": result["open"],
    }
    if answers + result["broken"]:
        figures["succeeded"] = (good - result["short"]) / (answers + result["broken"])
    for name in ADDED:
        figures |= in_milliseconds(name, result[name])
    return figures


def from_cpu(figures: dict[str, float], cpu_share: float) -> dict[str, float]:
    """Return what each request and event cost, in microseconds of a core of which `cpu_share` was used."""
    costs = {"core_share": cpu_share}
    for unit in ("request", "event"):
        per_second = figures[f"{unit}s_per_second"]
        if per_second:
            costs[f"cpu_us_per_{unit}"] = cpu_share * 1e6 / per_second
    if cpu_share:
        # What a core of its own, wholly used, would serve: also where something else had part of it.
        costs["requests_per_cpu_second"] = figures["requests_per_second"] / cpu_share
    return costs


def middle(values: Sequence[float]) -> float:
    """Return the median; NaN of nothing."""
    return median(values) if values else math.nan
