"""What is measured, each for both endpoints."""

from __future__ import annotations

import attrs

from bench.behavior import Behavior, Load

MESSAGES, CHAT = "messages", "chat.completions"
DIALECTS = (MESSAGES, CHAT)

#: A paced stream: two seconds of fifty events each.
PACE_US = 20_000
PACED_EVENTS = 100
#: Between two beginnings on one connection: a tenth more than a stream takes, so that it has ended in time.
PACED_PERIOD_US = 2_200_000
#: An idle stream's next event: never, as far as anybody here is concerned.
IDLE_US = 600_000_000


@attrs.frozen(kw_only=True)
class Scenario:
    """
    One measurement.

    `prompt_bytes` is the size of a request's body.  `longer` multiplies the time that it is measured for;
    `warm_up_seconds` is at least so long.  `fresh`: with a process that has served nothing else.  `once`: in
    the first round alone.  `quick`: part of a quick run.  `shows` names the figures of its table, see
    figures.py.
    """

    name: str
    title: str
    behavior: Behavior
    load: Load
    shows: tuple[str, ...]
    prompt_bytes: int = 200
    longer: float = 1.0
    warm_up_seconds: float = 0.0
    fresh: bool = False
    once: bool = False
    quick: bool = True

    def shortened(self) -> Scenario:
        """Return it as a quick run has it: a tenth of the idle streams, nothing for longer."""
        load = self.load
        if load.connections >= 1000:
            load = attrs.evolve(load, connections=load.connections // 10, spread_us=load.spread_us // 5)
        # Paced streams are begun one after the other within a period.
        warm_up_seconds = 0.0 if load.period_us else self.warm_up_seconds / 5
        return attrs.evolve(self, longer=1.0, load=load, warm_up_seconds=warm_up_seconds)


_CAPACITY = (
    "requests_per_second",
    "requests_per_cpu_second",
    "cpu_us_per_request",
    "core_share",
    "load_core_share",
    "succeeded",
)
_LATENCY = ("latency_p50_ms", "latency_p99_ms", "cpu_us_per_request", "succeeded")
_STREAMED = ("cpu_us_per_event", "events_per_second", "core_share", "load_core_share", "succeeded")
_PACED = (
    "first_byte_p50_ms",
    "first_byte_p99_ms",
    "event_delay_p50_ms",
    "event_delay_p99_ms",
    "cpu_us_per_event",
    "core_share",
    "events_per_second",
)


def _plain(name: str, title: str, prompt_bytes: int, connections: int, *, quick: bool = True) -> Scenario:
    load = Load(connections=connections)
    return Scenario(
        name=name,
        title=title,
        behavior=Behavior(),
        load=load,
        shows=_CAPACITY,
        prompt_bytes=prompt_bytes,
        quick=quick,
    )


def _at_a_rate(per_second: int, *, longer: float, quick: bool) -> Scenario:
    connections = 64
    period_us = connections * 1_000_000 // per_second
    return Scenario(
        name=f"plain-small-{per_second}",
        title=f"Plain, 0.2 kB, {per_second} requests/s",
        behavior=Behavior(),
        load=Load(connections=connections, period_us=period_us, spread_us=period_us),
        shows=_LATENCY,
        longer=longer,
        warm_up_seconds=period_us / 1e6,
        quick=quick,
    )


def _paced(at_once: int, *, quick: bool) -> Scenario:
    slots = round(at_once * PACED_PERIOD_US / (PACED_EVENTS * PACE_US))
    return Scenario(
        name=f"paced-{at_once}",
        title=f"Streams of 50 events/s, {at_once} at once",
        behavior=Behavior(stream=True, events=PACED_EVENTS, interval_us=PACE_US),
        load=Load(connections=slots, period_us=PACED_PERIOD_US, spread_us=PACED_PERIOD_US),
        shows=_PACED,
        longer=3.0,
        warm_up_seconds=PACED_PERIOD_US / 1e6 + 0.4,
        quick=quick,
    )


SCENARIOS = (
    _plain("plain-small", "Plain, 0.2 kB, as many as it takes", 200, 64),
    _at_a_rate(50, longer=2.0, quick=False),
    _at_a_rate(1000, longer=1.0, quick=True),
    _plain("plain-100k", "Plain, request bodies of 100 kB", 100_000, 16, quick=False),
    _plain("plain-1m", "Plain, request bodies of 1 MB", 1_000_000, 8),
    Scenario(
        name="streams",
        title="Streams back to back: 16 at once, 1000 events each",
        behavior=Behavior(stream=True, events=1000),
        load=Load(connections=16),
        shows=_STREAMED,
    ),
    Scenario(
        name="streams-brisk",
        title="Streams of 2,000 events/s, 16 at once: too fast for a timer, too slow to be read in heaps",
        behavior=Behavior(stream=True, events=1000, interval_us=500),
        load=Load(connections=16, spread_us=500_000),
        shows=_STREAMED,
        warm_up_seconds=0.6,
    ),
    _paced(1, quick=False),
    _paced(64, quick=True),
    _paced(512, quick=False),
    Scenario(
        name="retries",
        title="Half of all upstream calls fail (500), every request succeeds at the second",
        behavior=Behavior(fail_status=500),
        load=Load(connections=64),
        warm_up_seconds=2.0,
        shows=("succeeded", "upstream_calls_per_request", "cpu_us_per_request", "latency_p50_ms"),
        longer=2.0,
    ),
    Scenario(
        name="slow-readers",
        title="16 readers of 80 kB/s each, of streams without an end",
        behavior=Behavior(stream=True, events=100_000_000, text_bytes=1000),
        load=Load(connections=16, read_bytes=4096, read_every_us=50_000, receive_buffer=16_384),
        shows=("bytes_each", "ahead_bytes_each", "open"),
        fresh=True,
        once=True,
        longer=2.0,
    ),
    Scenario(
        name="idle",
        title="2,000 open streams in which nothing happens",
        behavior=Behavior(stream=True, events=2, interval_us=IDLE_US),
        load=Load(connections=2000, spread_us=5_000_000),
        shows=("bytes_each", "open", "core_share"),
        fresh=True,
        once=True,
        warm_up_seconds=10.0,
    ),
)
