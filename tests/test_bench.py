"""The benchmark's own reckoning: percentiles, figures, ratios, what is asked for, pages; and its words."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import attrs
from twisted.trial.unittest import SkipTest, SynchronousTestCase

from bench.__main__ import command_of, options, plan_of
from bench.candidate import Candidate, Site
from bench.candidates.direct import Direct
from bench.figures import FIGURES, from_cpu, from_load, in_milliseconds, percentile
from bench.processes import Tree
from bench.programs import compiled
from bench.question import NUMBER, body_of, request_of
from bench.roster import CANDIDATES, QUICK
from bench.scenarios import CHAT, DIALECTS, MESSAGES, SCENARIOS
from bench.summary import Summary
from bench.tables import page, shown
from bench.targets import TARGETS, checked
from crabtwist.config import load
from crabtwist.discovery import discover

MS = 1_000_000

#: What the load generator says of a second in which four requests were answered, one of them badly.
COUNTED: dict[str, Any] = {
    "nanoseconds": 1_000 * MS,
    "latency": [[1 * MS, 2], [4 * MS, 2]],
    "first_byte": [[1 * MS, 4]],
    "event_delay": [],
    "statuses": {"200": 3, "500": 1},
    "events": 20,
    "bytes": 4000,
    "all_bytes": 5000,
    "broken": 0,
    "short": 1,
    "unfinished": 0,
    "open": 0,
}


def site(candidate: Candidate, directory: Path) -> Site:
    """Return a place for a candidate that is not going to run."""
    return Site(4000, 4001, directory / candidate.name, directory)


def results(**figures: dict[str, list[float]]) -> dict[str, Any]:
    """Return results of `plain-small` at one endpoint: per candidate, per figure, a value for each round."""
    [scenario] = [attrs.asdict(s) for s in SCENARIOS if s.name == "plain-small"]
    measured = [
        {"round": number, "scenario": "plain-small", "dialect": MESSAGES, "candidate": name, "rate": value}
        for name, values in figures.items()
        for number, value in enumerate(values["rate"])
    ]
    about = {
        "version": "1",
        "package": "p",
        "note": "n",
        "files": {"a.conf": "b"},
        "headers": {MESSAGES: {"x": "y"}},
    }
    return {
        "command": "python -m bench run",
        "quick": True,
        "began": "2026-01-01T00:00:00+00:00",
        "rounds": 3,
        "machine": {"cores": "2"},
        "scenarios": {"plain-small": scenario},
        "candidates": {
            name: {**about, "title": name, "command": ["x"], "environ": {"A": "1"}} for name in figures
        },
        "missing": {"bifrost": "npm"},
        "faults": [],
        "starts": [
            {"round": 0, "candidate": name, "seconds": 0.5, "resident_bytes": 2**20} for name in figures
        ],
        "measurements": measured,
    }


class FigureTests(SynchronousTestCase):
    """Figures."""

    def test_percentile(self) -> None:
        """It is the first value that the fraction is not above."""
        histogram = [[10, 50], [20, 49], [30, 1]]
        found = [percentile(histogram, fraction) for fraction in (0.01, 0.5, 0.51, 0.99, 0.995, 1.0)]
        self.assertEqual([10, 10, 20, 20, 30, 30], found)

    def test_percentile_of_nothing(self) -> None:
        """There is none, and no figure is made of it."""
        self.assertTrue(math.isnan(percentile([], 0.5)))
        self.assertEqual({}, in_milliseconds("latency", []))

    def test_from_load(self) -> None:
        """Rates are per second; short streams and other answers did not succeed."""
        figures = from_load(COUNTED)
        self.assertEqual((3, 20), (figures["requests_per_second"], figures["events_per_second"]))
        self.assertEqual(0.5, figures["succeeded"])
        self.assertEqual((1, 4, 4), tuple(figures[f"latency_{n}_ms"] for n in ("p50", "p99", "max")))
        self.assertNotIn("event_delay_p50_ms", figures)

    def test_from_cpu(self) -> None:
        """A share of a core, divided by what was done; nothing where nothing was."""
        costs = from_cpu({"requests_per_second": 1000, "events_per_second": 0}, 0.5)
        self.assertEqual((0.5, 500, 2000), tuple(costs.values()))
        self.assertNotIn("cpu_us_per_event", costs)

    def test_every_column_has_a_heading(self) -> None:
        """Scenarios show figures that have names for readers."""
        self.assertEqual(set(), {figure for s in SCENARIOS for figure in s.shows} - FIGURES.keys())


class SummaryTests(SynchronousTestCase):
    """What rounds say together."""

    def setUp(self) -> None:
        self.results = results(
            direct={"rate": [100, 200, 90]}, nginx={"rate": [50, 50, 30]}, everything={"rate": [25, 10, 15]}
        )
        self.summary = Summary(self.results)
        self.where = ("plain-small", MESSAGES, "everything", "rate")

    def test_median(self) -> None:
        """A figure is the median over its rounds; NaN where it was not measured."""
        self.assertEqual(15, self.summary.value(*self.where))
        self.assertTrue(math.isnan(self.summary.value("idle", MESSAGES, "everything", "rate")))

    def test_pairs(self) -> None:
        """Ratios and differences are taken within a round, then their median."""
        self.assertEqual(0.5, self.summary.ratio(*self.where, to="nginx"))
        self.assertEqual(-75, self.summary.added(*self.where))
        self.assertTrue(math.isnan(self.summary.ratio(*self.where, to="litellm")))

    def test_targets(self) -> None:
        """What was not measured is neither reached nor missed; a bound itself is reached."""
        values = {target.what: target.reached(value) for target, _, value in checked(self.summary)}
        self.assertIs(True, values.pop("from start to serving"))
        self.assertEqual({None}, set(values.values()))
        for target in TARGETS:
            beyond = target.bound * (0.99 if target.at_least else 1.01)
            self.assertEqual([True, False], [target.reached(target.bound), target.reached(beyond)])

    def test_page(self) -> None:
        """The page has a row for each candidate, its configuration, and says what it is worth."""
        text = page(self.results, [("streams.svg", "Streams")])
        for part in (
            "worth nothing",
            "| nginx |",
            "![Streams](streams.svg)",
            "`a.conf`",
            "A=1 x",
            "bifrost (npm)",
        ):
            self.assertIn(part, text)

    def test_pictures(self) -> None:
        """The same results make the same files."""
        try:
            from bench.pages import write_pages
        except ImportError:
            raise SkipTest("no matplotlib") from None
        for taken in self.results["measurements"]:
            taken["requests_per_cpu_second"] = taken.pop("rate")
        first, second = (Path(self.mktemp()) for _ in range(2))
        names = [path.name for path in write_pages(self.results, first)]
        self.assertEqual(["results.md", "results.json", "plain-small.svg"], names)
        for name, path in zip(names, write_pages(self.results, second), strict=True):
            self.assertEqual((first / name).read_bytes(), path.read_bytes(), name)

    def test_numbers(self) -> None:
        """Numbers are short, large ones whole, and none is NaN."""
        numbers = [shown(n) for n in (0.1234, 12.34, 1234.5, 7, math.nan)]
        self.assertEqual(["0.12", "12.3", "1,234", "7", "-"], numbers)


class QuestionTests(SynchronousTestCase):
    """Requests."""

    def test_sizes(self) -> None:
        """Bodies are about as large as asked for, JSON, and have the number."""
        for size in (200, 100_000, 1_000_000):
            for dialect in DIALECTS:
                body = body_of(dialect, "m", size, stream=True)
                self.assertLess(abs(len(body) - size) / size, 0.05)
                self.assertEqual(1, body.count(NUMBER.encode()))
                self.assertTrue(json.loads(body)["stream"])

    def test_request(self) -> None:
        """It is a whole HTTP/1.1 request."""
        head, _, body = request_of("/v1/messages", {"x-api-key": "k"}, b"{}").partition(b"\r\n\r\n")
        self.assertTrue(head.startswith(b"POST /v1/messages HTTP/1.1\r\n"))
        self.assertIn(b"\r\nx-api-key: k\r\ncontent-length: 2", head)
        self.assertEqual(b"{}", body)


class CandidateTests(SynchronousTestCase):
    """Candidates, without running them."""

    def test_names(self) -> None:
        """Names are one word each, and there is one of each."""
        names = [candidate.name for candidate in CANDIDATES]
        self.assertEqual(len(names), len(set(names)))
        self.assertEqual(set(), {*QUICK} - {*names})
        self.assertTrue(all(name.isalpha() for name in names))

    def test_configurations(self) -> None:
        """Every other candidate knows where the upstream is, and where to listen."""
        for candidate in CANDIDATES:
            if isinstance(candidate, Direct):
                continue
            here = site(candidate, Path(self.mktemp()))
            told = [*candidate.files(here).values(), *candidate.command(here)]
            told += [value for d in DIALECTS for value in candidate.headers(d, here).values()]
            self.assertIn("4001", " ".join(told), candidate.name)
            self.assertIn("4000", " ".join(told), candidate.name)

    def test_missing(self) -> None:
        """What is not installed in its folder has no version."""
        for candidate in CANDIDATES:
            if candidate.name in {"crabllm", "crabllmsqlite", "bifrost", "portkey", "litellm"}:
                self.assertIsNone(candidate.version(Path(self.mktemp()).absolute()), candidate.name)

    def test_ours(self) -> None:
        """crabtwist's configurations are read without complaint."""
        for candidate in CANDIDATES:
            if candidate.package == "this checkout":
                [(name, text)] = candidate.files(site(candidate, Path())).items()
                path = Path(self.mktemp())
                path.mkdir()
                (path / name).write_text(text)
                self.assertTrue(tomllib.loads(text)["providers"])
                load(path / name, {}, discover())


class CommandTests(SynchronousTestCase):
    """The command line."""

    def test_full(self) -> None:
        """Without options everything is measured three times."""
        plan = plan_of(options().parse_args(["run"]))
        self.assertEqual((3, False, len(CANDIDATES)), (plan.rounds, plan.quick, len(plan.candidates)))
        self.assertEqual([*SCENARIOS], [*plan.scenarios])

    def test_quick(self) -> None:
        """A quick run has one round of what is there, and no thousands of connections."""
        plan = plan_of(options().parse_args(["run", "--quick"]))
        self.assertEqual((1, [*QUICK]), (plan.rounds, [candidate.name for candidate in plan.candidates]))
        self.assertLess(max(scenario.load.connections for scenario in plan.scenarios), 300)

    def test_choice(self) -> None:
        """Candidates and scenarios can be chosen; the direct baseline stays."""
        words = ["run", "--only", "nginx", "--scenarios", "idle,streams", "--dialects", CHAT, "--rounds", "2"]
        arguments = options().parse_args(words)
        plan = plan_of(arguments)
        self.assertEqual(["direct", "nginx"], [candidate.name for candidate in plan.candidates])
        self.assertEqual({"idle", "streams"}, {scenario.name for scenario in plan.scenarios})
        self.assertEqual(" ".join(["python -m bench", *words]), command_of(arguments))

    def test_unknown(self) -> None:
        """A name that nothing has ends the program, and says so."""
        for option in ("--only", "--scenarios", "--dialects"):
            with self.assertRaisesRegex(SystemExit, "nobody"):
                plan_of(options().parse_args(["run", option, "nobody"]))


class ProcessTests(SynchronousTestCase):
    """Processes and programs."""

    def test_tree(self) -> None:
        """A process uses memory while it runs, frozen or not, and nothing when it was ended."""
        directory = Path(self.mktemp())
        directory.mkdir()
        with (directory / "log").open("wb") as log:
            waits = [sys.executable, "-c", "import signal; signal.pause()"]
            tree = Tree(waits, min(os.sched_getaffinity(0)), directory, {}, log)
        self.addCleanup(tree.stop)
        tree.freeze()
        self.assertGreater(tree.resident_bytes(), 0)
        tree.stop()
        self.assertTrue(tree.ended)
        self.assertEqual((0, 0), (tree.cpu_ns(), tree.resident_bytes()))

    def test_programs(self) -> None:
        """The C programs compile, and say how they are used."""
        if shutil.which("cc") is None:
            raise SkipTest("no C compiler")
        directory = Path(self.mktemp())
        directory.mkdir()
        for program in compiled(directory.absolute()).values():
            said = subprocess.run([program], capture_output=True, text=True, check=False)
            self.assertEqual((2, True), (said.returncode, program.name in said.stderr))
