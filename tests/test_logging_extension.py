"""The `logging` extension: what one request leaves in the log."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import attrs
from twisted.application.service import IService
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel, capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from crabtwist import settings
from crabtwist.errors import ConfigurationError, HeadTimedOut
from crabtwist.extensions import audit_trail, logging_file
from crabtwist.extensions.logging import LoggingExtension, LoggingSettings
from crabtwist.extensions.logging_file import AttemptLine, RequestLine
from crabtwist.hooks import Hooks
from crabtwist.interfaces import IExtension
from crabtwist.testing import FakeServices, make_context
from crabtwist.values import Attempt, Context, Outcome, Usage

CONTEXT = make_context(
    model_asked="fast", model="claude", provider="vendor", upstream_model="claude-5", stream=True
)


def outcome(**changes: Any) -> Outcome:
    """Return how some request ended; give what matters."""
    fields: dict[str, Any] = {
        "status": 200,
        "ended_by": "upstream",
        "reason": "complete",
        "message": None,
        "usage": Usage(input_tokens=10, cache_read_tokens=5, output_tokens=7, raw=b'{"secret": 1}'),
        "attempts": (Attempt("vendor", "claude-5", 200, None, 0.0, 1.0),),
        "model_answered": "claude-5",
        "first_byte_seconds": 0.25,
        "duration_seconds": 1.5,
        "bytes_in": 100,
        "bytes_out": 200,
    }
    return Outcome(**{**fields, **changes})


class LoggingTests(SynchronousTestCase):
    """One line for each request."""

    def logged(self, end: Outcome, context: Context = CONTEXT) -> LogEvent:
        """Return the one event that an end leaves."""
        with capturedLogs() as events:
            LoggingExtension(LoggingSettings(), FakeServices()).on_end(context, end)
        (event,) = events
        return event

    def test_contract(self) -> None:
        """It is an extension, by the name that the configuration gives it."""
        extension = LoggingExtension(LoggingSettings(), FakeServices())
        verifyObject(IExtension, extension)
        verifyObject(IService, extension)
        self.assertEqual("logging", extension.name)

    def test_no_file(self) -> None:
        """Without a path there is no file, no gauge and no timer, started or stopped."""
        services = FakeServices()
        extension = LoggingExtension(LoggingSettings(), services)
        extension.startService()
        with capturedLogs() as events:
            extension.on_end(CONTEXT, outcome())
        extension.stopService()
        self.assertEqual((1, {}, []), (len(events), services.shown, services.clock.getDelayedCalls()))

    def test_fields(self) -> None:
        """All that is worth asking a log for is a field of its own."""
        event = self.logged(outcome())
        expected = {
            "request_id": "req_test",
            "operation": "messages",
            "model": "fast",
            "model_resolved": "claude",
            "provider": "vendor",
            "upstream_model": "claude-5",
            "principal": "default",
            "stream": True,
            "status": 200,
            "ended_by": "upstream",
            "reason": "complete",
            "attempts": 1,
            "duration_ms": 1500,
            "first_byte_ms": 250,
            "prompt_tokens": 15,
            "completion_tokens": 7,
            "bytes_in": 100,
            "bytes_out": 200,
        }
        self.assertEqual(expected, {name: event[name] for name in expected})

    def test_line(self) -> None:
        """The line reads by itself."""
        expected = "req_test messages 'fast' by vendor for default: 200 complete in 1500 ms, 15 + 7 tokens"
        self.assertEqual(expected, formatEvent(self.logged(outcome())))

    def test_level(self) -> None:
        """A whole answer is information, anything else a warning."""
        self.assertIs(LogLevel.info, self.logged(outcome())["log_level"])
        event = self.logged(outcome(reason="truncated", status=0, message="cut"))
        self.assertEqual((LogLevel.warn, "cut"), (event["log_level"], event["detail"]))

    def test_nothing_known(self) -> None:
        """A request that got nowhere is logged without inventing anything."""
        context = make_context(principal=None, model_asked="", model="")
        event = self.logged(outcome(usage=None, first_byte_seconds=None, attempts=()), context)
        self.assertEqual(
            ("nobody", "anybody", None), (event["provider"], event["principal"], event["first_byte_ms"])
        )
        self.assertEqual((0, 0), (event["prompt_tokens"], event["completion_tokens"]))

    def test_client_text(self) -> None:
        """What a client wrote stays within its line, and is never taken for a format."""
        event = self.logged(outcome(), make_context(model_asked="{request_id}\nforged line"))
        line = formatEvent(event)
        self.assertIn(repr("{request_id}\nforged line"), line)
        self.assertNotIn("\n", line)

    def test_no_contents(self) -> None:
        """Neither the vendor's raw numbers nor any body is part of it."""
        self.assertNotIn("secret", repr(self.logged(outcome())))


class AttemptTests(SynchronousTestCase):
    """One line for each failed attempt."""

    def logged(self, settings: LoggingSettings) -> list[LogEvent]:
        """Return what a failed attempt leaves."""
        with capturedLogs() as events:
            LoggingExtension(settings, FakeServices()).on_error(CONTEXT, HeadTimedOut("no head\nin time"))
        return list(events)

    def test_attempt(self) -> None:
        """It says who failed, and how, on one line."""
        (event,) = self.logged(LoggingSettings())
        self.assertIs(LogLevel.warn, event["log_level"])
        self.assertEqual(("head_timeout", "no head\nin time"), (event["error"], event["detail"]))
        self.assertEqual(
            r"req_test vendor/claude-5 failed: head_timeout 'no head\nin time'", formatEvent(event)
        )

    def test_not_wanted(self) -> None:
        """Unless the configuration says otherwise."""
        self.assertEqual([], self.logged(LoggingSettings(attempts=False)))


class FileTestCase(SynchronousTestCase):
    """A log with a file of its own."""

    def setUp(self) -> None:
        self.directory = Path(self.mktemp())
        self.directory.mkdir()
        self.path = self.directory / "requests.jsonl"
        self.clock = Clock()
        self.services = FakeServices(self.clock, self.directory)

    def made(self, **changes: Any) -> LoggingExtension:
        """Return an extension that writes to the file, and has been started."""
        made = LoggingExtension(LoggingSettings(**{"path": "requests.jsonl", **changes}), self.services)
        made.startService()
        self.addCleanup(made.stopService)
        return made

    def lines(self, name: str = "requests.jsonl") -> list[Any]:
        """Return what is in a file; lines that are torn are left out."""
        found = []
        for line in (self.directory / name).read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found

    def ids(self, name: str = "requests.jsonl") -> list[str]:
        """Return whose lines are in a file."""
        return [line["request_id"] for line in self.lines(name)]

    def end(self, made: LoggingExtension, *names: str) -> None:
        """Let requests end."""
        for name in names:
            made.on_end(make_context(request_id=name), outcome())

    def pass_time(self) -> None:
        """Let what waits be written."""
        self.clock.advance(logging_file.FLUSH_SECONDS)


class FileLineTests(FileTestCase):
    """What a line of the file says."""

    def test_request(self) -> None:
        """It has what the event has, under the same names, and when it ended."""
        made = self.made()
        with capturedLogs() as events:
            LoggingExtension(LoggingSettings(), FakeServices()).on_end(CONTEXT, outcome(cost=12_500_000))
        (event,) = events
        names = list(event)
        own = {name: event[name] for name in names[names.index("line") + 1 : names.index("bytes_out") + 1]}
        self.clock.rightNow = 1_700_000_000.25
        made.on_end(CONTEXT, outcome(cost=12_500_000))
        self.pass_time()
        first = {"event": "request", "time": "2023-11-14T22:13:20.250Z", "level": "info"}
        self.assertEqual([*first.items(), *own.items()], list(self.lines()[0].items()))

    def test_attempt(self) -> None:
        """So has that of an attempt that failed."""
        self.made().on_error(CONTEXT, HeadTimedOut("no head\nin time"))
        self.pass_time()
        expected = {
            "event": "attempt_failed",
            "time": "1970-01-01T00:00:00.000Z",
            "level": "warn",
            "request_id": "req_test",
            "provider": "vendor",
            "upstream_model": "claude-5",
            "error": "head_timeout",
            "detail": "no head\nin time",
        }
        self.assertEqual([list(expected.items())], [list(line.items()) for line in self.lines()])

    def test_attempt_not_wanted(self) -> None:
        """Unless the configuration says otherwise."""
        self.made(attempts=False).on_error(CONTEXT, HeadTimedOut("no head"))
        self.pass_time()
        self.assertEqual([], self.lines())

    def test_time(self) -> None:
        """Each line has the time of its own end, within a second and beyond."""
        made = self.made()
        for now in (0.0, 0.999, 1.0, 0.5):
            self.clock.rightNow = now
            self.end(made, "a")
        self.pass_time()
        times = [line["time"].removeprefix("1970-01-01T00:00:0") for line in self.lines()]
        self.assertEqual(["0.000Z", "0.999Z", "1.000Z", "0.500Z"], times)

    def test_nothing_known(self) -> None:
        """A request that got nowhere is a warning, in which nothing is invented."""
        nothing = {"usage": None, "first_byte_seconds": None, "attempts": ()}
        context = make_context(principal=None, model_asked="", model="")
        self.made().on_end(context, outcome(reason="rate_limited", message="slow down", **nothing))
        self.pass_time()
        (line,) = self.lines()
        names = ("level", "provider", "principal", "detail", "first_byte_ms", "cost", "prompt_tokens")
        expected = ["warn", "nobody", "anybody", "slow down", None, None, 0]
        self.assertEqual(expected, [line[name] for name in names])

    def test_client_text(self) -> None:
        """What a client calls a model forges no line, breaks none, and fills no disk."""
        made = self.made()
        for name in ('x"}\n{"event": "request"}', "\ud800", "x" * 10**6):
            made.on_end(make_context(model_asked=name), outcome())
        made.on_error(CONTEXT, HeadTimedOut("\udc80" * 10**6))
        self.pass_time()
        *shown, failed = self.lines()
        asked = ['x"}\n{"event": "request"}', "?", "x" * 1000]
        self.assertEqual((asked, "?" * 1000), ([line["model"] for line in shown], failed["detail"]))

    def test_nowhere_else(self) -> None:
        """Nothing of it goes through twisted.logger."""
        made = self.made()
        with capturedLogs() as events:
            self.end(made, "a")
            made.on_error(CONTEXT, HeadTimedOut("no head"))
            self.pass_time()
        self.assertEqual(([], 2), (events, len(self.lines())))

    def test_hooks(self) -> None:
        """No event is parsed and no answer kept for it."""
        hooks = Hooks([self.made()], self.clock)
        self.assertEqual((False, False), (hooks.want_events, hooks.want_answers))


class CollectingTests(FileTestCase):
    """When lines are written."""

    def writes(self) -> list[int]:
        """Return how many lines each write from now on has."""
        found: list[int] = []
        write = os.write

        def counted(file: int, data: bytes) -> int:
            found.append(data.count(b"\n"))
            return write(file, data)

        self.patch(os, "write", counted)
        return found

    def test_one_write(self) -> None:
        """Lines wait a moment from the first one on, and are one write."""
        made, writes = self.made(), self.writes()
        self.end(made, "a")
        self.clock.advance(0.06)
        self.end(made, "b")
        self.assertEqual([], self.ids())
        self.clock.advance(0.04)
        self.assertEqual((["a", "b"], [2], []), (self.ids(), writes, self.clock.getDelayedCalls()))

    def test_again(self) -> None:
        """The next line begins a moment of its own."""
        made = self.made()
        for name in "ab":
            self.end(made, name)
            self.pass_time()
        self.assertEqual(["a", "b"], self.ids())

    def test_bound(self) -> None:
        """So much that it is worth a write is written at once, and leaves no timer."""
        made, writes = self.made(), self.writes()
        while not writes:
            self.end(made, "a")
        self.assertEqual([], self.clock.getDelayedCalls())
        size_bytes = self.path.stat().st_size
        self.assertTrue(
            logging_file.MOST_COLLECTED_BYTES <= size_bytes < logging_file.MOST_COLLECTED_BYTES + 1000
        )

    def test_stop(self) -> None:
        """A stop writes what waits; what comes later is lost, and counted."""
        made = self.made()
        self.end(made, "a", "b")
        made.stopService()
        self.end(made, "c", "d")
        self.assertEqual((["a", "b"], 2), (self.ids(), self.services.shown["logging_lost"]()))
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_rotation(self) -> None:
        """A full file is put aside, and the oldest goes."""
        made = self.made(max_bytes=1, keep_files=1)
        for name in "abc":
            self.end(made, name)
            self.pass_time()
        self.assertEqual(["requests.jsonl", "requests.jsonl.1"], sorted(os.listdir(self.directory)))
        self.assertEqual((["c"], ["b"]), (self.ids(), self.ids("requests.jsonl.1")))


class FileFailureTests(FileTestCase):
    """A file that cannot be had."""

    def broken(self) -> LoggingExtension:
        """Return an extension whose folder has gone, and that has noticed."""
        made = self.made()
        self.directory.rename(self.directory.with_name("away"))
        self.clock.advance(1)
        self.end(made, "a")
        self.pass_time()
        return made

    def mend(self) -> None:
        """Bring the folder back, and let a second pass."""
        self.directory.with_name("away").rename(self.directory)
        self.clock.advance(1)

    def shown(self) -> tuple[float, float]:
        """Return the gauges: failures, and lines lost."""
        return self.services.shown["logging_failures"](), self.services.shown["logging_lost"]()

    def tearDown(self) -> None:
        if not self.directory.exists():
            self.mend()

    def test_cannot_be_opened(self) -> None:
        """A path that leads nowhere stops the start and is named."""
        made = LoggingExtension(LoggingSettings(path="no/such/file"), self.services)
        error = self.assertRaises(ConfigurationError, made.startService)
        self.assertIn(f"extensions.logging.path: {self.directory / 'no/such/file'} cannot be", str(error))

    def test_recovers(self) -> None:
        """It is said once, and once that it is over; what came meanwhile is written then, in order."""
        with capturedLogs() as events:
            made = self.broken()
            self.end(made, "b", "c")
            self.pass_time()
            self.mend()
            self.end(made, "d", "e")
            self.pass_time()
        self.assertEqual((list("abcde"), (1, 0)), (self.ids(), self.shown()))
        words = [formatEvent(event).partition(" is ")[0].partition(" cannot ")[0] for event in events]
        self.assertEqual(["the log of requests"] * 2, words)

    def test_bound(self) -> None:
        """Of what comes meanwhile as much is kept as there is room for; each other line is counted."""
        self.patch(audit_trail, "MOST_WAITING_BYTES", 2000)
        made = self.broken()
        self.end(made, *"bcdefghij")
        self.pass_time()
        _, lost = self.shown()
        self.mend()
        self.end(made, "k")
        self.pass_time()
        self.assertGreater(lost, 0)
        self.assertEqual([*"abcdefghij"[: 10 - int(lost)], "k"], self.ids())


class SettingsTests(SynchronousTestCase):
    """The table in the configuration, and what is said of it."""

    page = (Path(__file__).parents[1] / "docs" / "configuration.md").read_text()

    def complaints(self, table: dict[str, object]) -> list[str]:
        """Return what is wrong with a table."""
        found: list[str] = []
        settings.read(LoggingSettings, table, "extensions.logging", found)
        return found

    def test_bounds_without_a_file(self) -> None:
        """A file's bounds without a file are a mistake, and are said to be."""
        for key in ("max_bytes", "keep_files"):
            (words,) = self.complaints({key: 5})
            self.assertIn("extensions.logging: `max_bytes` and `keep_files` need `path`", words)
            self.assertEqual([], self.complaints({key: 5, "path": "requests.jsonl"}))

    def test_unusable(self) -> None:
        """A blank path and bounds below what can be are refused by name."""
        for key, value in (("path", " "), ("max_bytes", 0), ("keep_files", -1)):
            (words,) = self.complaints({"path": "requests.jsonl", key: value})
            self.assertIn(f"extensions.logging.{key}", words)

    def test_keys_are_documented(self) -> None:
        """The page names each key with its default."""
        for field in attrs.fields(LoggingSettings):
            default = "none" if field.default is None else f"`{json.dumps(field.default)}`"
            self.assertIn(f"`{field.name}` ({default})", self.page)

    def test_members_are_documented(self) -> None:
        """The page names each member of a line."""
        for line in (RequestLine, AttemptLine):
            for name in line.__struct_fields__:
                self.assertIn(f"`{name}`", self.page)
