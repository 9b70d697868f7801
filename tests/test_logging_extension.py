"""The `logging` extension: what one request leaves in the log."""

from __future__ import annotations

from typing import Any

from twisted.logger import LogEvent, LogLevel, capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from crabtwist.errors import HeadTimedOut
from crabtwist.extensions.logging import LoggingExtension, LoggingSettings
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
        self.assertEqual("logging", extension.name)

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
