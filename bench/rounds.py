"""A whole run: all candidates at once, one of them awake, scenario by scenario, round by round."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attrs

from bench.candidate import Candidate
from bench.machine import description
from bench.measurement import Measurement, Pace
from bench.programs import Generator, Upstream, compiled
from bench.runner import DidNotStart, Runner, free_port
from bench.scenarios import Scenario

FORMAT = 1
CHECKOUT = Path(__file__).parents[1]


def cores() -> tuple[int, int]:
    """Return the core of the gateways and that of the load; raises `RuntimeError` if there is but one."""
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        raise RuntimeError("two cores are needed, one for the gateway and one for the load")
    return allowed[0], allowed[1]


@attrs.frozen(kw_only=True)
class Plan:
    """What is to be run; `place` is where candidates are installed, each in a folder of its name."""

    candidates: Sequence[Candidate]
    scenarios: Sequence[Scenario]
    dialects: Sequence[str]
    rounds: int
    pace: Pace
    place: Path
    quick: bool = False


class Run:
    """
    The running of a plan; `results` grow meanwhile and are what is written as JSON.

    A candidate that does not start, or ends, is noted under `faults` and left out of what follows.
    """

    def __init__(self, plan: Plan, command: str, say: Callable[[str], None]) -> None:
        self.plan = plan
        self.say = say
        self.results: dict[str, Any] = {
            "format": FORMAT,
            "command": command,
            "quick": plan.quick,
            "began": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": description(),
            "rounds": plan.rounds,
            "seconds": plan.pace.seconds,
            "scenarios": {s.name: attrs.asdict(s, recurse=True) for s in plan.scenarios},
            "candidates": {},
            "missing": {},
            "faults": [],
            "starts": [],
            "measurements": [],
        }
        self._runners: list[Runner] = []
        self._gateway_core, self._load_core = cores()

    def run(self) -> None:
        """Run it; what was measured stays in `results` whatever happens."""
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="crabtwist-bench-")))
            programs = compiled(directory)
            upstream = Upstream(programs["upstream"], free_port(), self._load_core, directory)
            stack.callback(upstream.tree.stop)
            stack.callback(self._stop_all)
            generator = Generator(programs["load"], self._load_core)
            present = list(self._present())
            for number in range(self.plan.rounds):
                self._begin_round(number, present, upstream, directory / f"round-{number}")
                self._round(number, upstream, generator, directory)
                self._stop_all()
        self.results["ended"] = datetime.now(UTC).isoformat(timespec="seconds")

    def _present(self) -> Iterator[Candidate]:
        for candidate in self.plan.candidates:
            version = candidate.version(self.plan.place / candidate.folder)
            if version is None:
                self.say(f"{candidate.title}: missing (python -m bench install {candidate.name})")
                self.results["missing"][candidate.name] = candidate.package
            else:
                about = {"title": candidate.title, "package": candidate.package, "note": candidate.note}
                self.results["candidates"][candidate.name] = {"version": version, **about}
                yield candidate

    def _begin_round(
        self, number: int, present: list[Candidate], upstream: Upstream, directory: Path
    ) -> None:
        for candidate in present:
            place = self.plan.place / candidate.folder
            runner = Runner(candidate, place, directory, upstream, self._gateway_core)
            if self._start(number, runner):
                self._runners.append(runner)
                runner.freeze()

    def _start(self, number: int, runner: Runner) -> bool:
        name = runner.candidate.name
        try:
            seconds = runner.start()
        except (DidNotStart, OSError) as error:
            self._fault(number, runner, str(error))
            return False
        start = {"round": number, "candidate": name, "seconds": seconds}
        self.results["starts"].append({**start, "resident_bytes": runner.resident_bytes()})
        about = self.results["candidates"][name]
        about.setdefault("files", runner.candidate.files(runner.site))
        about.setdefault(
            "command", [_placeless(word, runner) for word in runner.candidate.command(runner.site)]
        )
        environ = runner.candidate.environ(runner.site)
        about.setdefault("environ", {key: _placeless(value, runner) for key, value in environ.items()})
        about.setdefault("headers", {d: runner.candidate.headers(d, runner.site) for d in self.plan.dialects})
        return True

    def _fault(self, number: int, runner: Runner, what: str) -> None:
        self.say(f"{runner.candidate.title}: {what}")
        self.results["faults"].append(
            {"round": number, "candidate": runner.candidate.name, "what": what.splitlines()[0]}
        )

    def _round(self, number: int, upstream: Upstream, generator: Generator, directory: Path) -> None:
        for index, scenario in enumerate(self.plan.scenarios):
            if scenario.once and number:
                continue
            for dialect in self.plan.dialects:
                # Each time another one first: whoever is first finds the machine as the last one left it.
                shift = (index + number) % max(len(self._runners), 1)
                for runner in self._runners[shift:] + self._runners[:shift]:
                    measurement = Measurement(runner, upstream, generator, directory)
                    self._measure(number, measurement, scenario, dialect)

    def _measure(self, number: int, measurement: Measurement, scenario: Scenario, dialect: str) -> None:
        runner = measurement.runner
        if scenario.fresh and not self.plan.quick:
            runner.stop()
            if not self._start(number, runner):
                self._runners.remove(runner)
                return
        runner.thaw()
        try:
            figures = measurement.take(scenario, dialect, self.plan.pace)
        except (OSError, RuntimeError) as error:
            self._fault(number, runner, f"{scenario.name}, {dialect}: {error}")
            return
        finally:
            runner.freeze()
        about = {"round": number, "scenario": scenario.name, "dialect": dialect}
        self.results["measurements"].append({**about, "candidate": runner.candidate.name, **figures})
        shown = [f"{name} {figures[name]:.4g}" for name in scenario.shows if name in figures]
        self.say(f"{number + 1} {scenario.name} {dialect} {runner.candidate.name}: {', '.join(shown)}")

    def _stop_all(self) -> None:
        for runner in self._runners:
            runner.stop()
        self._runners.clear()


def _placeless(word: str, runner: Runner) -> str:
    """Return a word of a command without the folders of this machine."""
    folders = {str(runner.site.directory): ".", str(runner.site.place): "PLACE", str(CHECKOUT): "CHECKOUT"}
    for folder, name in {sys.executable: "python", **folders}.items():
        word = word.replace(folder, name)
    return word
