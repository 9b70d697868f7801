"""One scenario, one endpoint, one candidate, once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import attrs

from bench.behavior import Load
from bench.figures import from_cpu, from_load
from bench.programs import Generator, Upstream
from bench.question import body_of, request_of
from bench.runner import Runner
from bench.scenarios import Scenario

#: A process that is thawed has to find out what it slept through, and some go on with what nobody waits for
#: any more: until it uses less than this share of a core, but no longer than that.
_LOOK_SECONDS = 0.1
_QUIET_SHARE = 0.1
_MOST_LOOKS = 100


@attrs.frozen(kw_only=True)
class Pace:
    """How long each scenario is warmed up and measured, in seconds, before its own wishes."""

    warm_up_seconds: float
    seconds: float


@attrs.frozen
class _Look:
    """What was used up to a moment."""

    at_ns: int
    cpu_ns: int
    upstream_cpu_ns: int
    resident_bytes: int


class Measurement:
    """The taking of one; `figures` are there when `take` returned."""

    def __init__(self, runner: Runner, upstream: Upstream, generator: Generator, directory: Path) -> None:
        self.runner = runner
        self.upstream = upstream
        self.generator = generator
        self._request = directory / "request"
        self._looks: dict[str, _Look] = {}
        self._resident_bytes = 0

    def take(self, scenario: Scenario, dialect: str, pace: Pace) -> dict[str, Any]:
        """Return the figures by their names."""
        self._write_request(scenario, dialect)
        behavior = scenario.behavior
        if self.runner.tree is None:
            # Nobody would try again.
            behavior = attrs.evolve(behavior, fail_status=0)
        self.upstream.behave(behavior)
        self._until_quiet()
        if scenario.fresh:
            self._touch()
        self._on_word("before")
        counted = self.upstream.counters()
        result = self.generator.run(
            self._request,
            self.runner.port,
            attrs.evolve(scenario.load, events=behavior.events if behavior.stream else 0),
            max(pace.warm_up_seconds, scenario.warm_up_seconds),
            pace.seconds * scenario.longer,
            self._on_word,
            self._look,
        )
        done = {name: value - counted[name] for name, value in self.upstream.counters().items()}
        return self._figures(result, done, scenario)

    def _write_request(self, scenario: Scenario, dialect: str) -> None:
        path, model = self.runner.candidate.route(dialect)
        body = body_of(dialect, model, scenario.prompt_bytes, stream=scenario.behavior.stream)
        headers = self.runner.candidate.headers(dialect, self.runner.site)
        self._request.write_bytes(request_of(path, headers, body))

    def _touch(self) -> None:
        """Have a few streams, so that what a process takes once is taken already."""
        few = Load(connections=10)
        self.generator.run(self._request, self.runner.port, few, 0.0, 0.5, lambda _: None, lambda: None)
        self._until_quiet()

    def _until_quiet(self) -> None:
        for _ in range(_MOST_LOOKS):
            before = self.runner.cpu_ns()
            time.sleep(_LOOK_SECONDS)
            if self.runner.cpu_ns() - before < _QUIET_SHARE * _LOOK_SECONDS * 1e9:
                return

    def _look(self) -> None:
        self._resident_bytes = max(self._resident_bytes, self.runner.resident_bytes())

    def _on_word(self, word: str) -> None:
        cpu_ns, upstream_cpu_ns = self.runner.cpu_ns(), self.upstream.tree.cpu_ns()
        self._looks[word] = _Look(time.monotonic_ns(), cpu_ns, upstream_cpu_ns, self.runner.resident_bytes())
        self._look()

    def _figures(self, result: dict[str, Any], done: dict[str, int], scenario: Scenario) -> dict[str, Any]:
        figures = from_load(result)
        before, began, ended = (self._looks[word] for word in ("before", "measuring", "measured"))
        elapsed_ns = ended.at_ns - began.at_ns
        upstream_share = (ended.upstream_cpu_ns - began.upstream_cpu_ns) / elapsed_ns
        figures["load_core_share"] = upstream_share + result["cpu_nanoseconds"] / result["nanoseconds"]
        if self.runner.tree is not None:
            figures |= from_cpu(figures, (ended.cpu_ns - began.cpu_ns) / elapsed_ns)
            figures["resident_bytes"] = self._resident_bytes
        succeeded = done["requests"] - done["failures"]
        if scenario.behavior.fail_status and succeeded:
            figures["upstream_calls_per_request"] = done["requests"] / succeeded
        if scenario.fresh and result["open"]:
            figures |= self._figures_each(result, done, before)
        return {**figures, "statuses": result["statuses"]}

    def _figures_each(self, result: dict[str, Any], done: dict[str, int], before: _Look) -> dict[str, float]:
        """Return what one of the open streams takes, in the gateway and on the way through it."""
        ahead_bytes = done["event_bytes"] - result["all_bytes"]
        each = {"ahead_bytes_each": max(ahead_bytes, 0) / result["open"]}
        if self.runner.tree is not None:
            each["bytes_each"] = (self._resident_bytes - before.resident_bytes) / result["open"]
        return each
