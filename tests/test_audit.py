"""The audit: its lines, its file, what it leaves out, and what it does while it cannot write."""

from __future__ import annotations

import contextlib
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.application.service import IService
from twisted.internet.task import Clock
from twisted.logger import capturedLogs
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from crabtwist.errors import AnswerBroken, ConfigurationError, ConnectionBroken, Refused
from crabtwist.extensions import audit as room
from crabtwist.extensions import audit_trail
from crabtwist.extensions.audit import AuditSettings, BodiesExtension, audit
from crabtwist.extensions.redaction import BUDGET_SECONDS, LOOK_AHEAD_BYTES, REDACTED, Redactor
from crabtwist.extensions.rotating_file import RotatingFile
from crabtwist.hooks import Hooks
from crabtwist.interfaces import IExtension
from crabtwist.settings import read
from crabtwist.sse import Event
from crabtwist.testing import FakeServices, make_context
from crabtwist.values import AdminAction, Answer, Context, Outcome, Usage

USAGE = Usage(input_tokens=10, cache_read_tokens=5, output_tokens=7, raw=b"raw")
CONTEXT = make_context(started_at=1_700_000_000.25, provider="vendor", model_asked="fast", model="claude")
TOKENS = ("input", "cache_read", "cache_write", "cache_write_1h", "output", "reasoning")
KEY = "sk-ant-0123456789abcdefghij"


def outcome(**changes: Any) -> Outcome:
    """Return how some request ended; give the fields that matter."""
    fields: dict[str, Any] = {
        "status": 200,
        "ended_by": "upstream",
        "reason": "complete",
        "message": None,
        "usage": USAGE,
        "attempts": (),
        "model_answered": "claude-5",
        "first_byte_seconds": 0.25,
        "duration_seconds": 1.5,
        "bytes_in": 100,
        "bytes_out": 200,
        "cost": 12_500_000,
    }
    return Outcome(**{**fields, **changes})


def event(data: bytes) -> Event:
    """Return an event of a stream."""
    return Event("message", data, "", None, 0, 0)


@contextlib.contextmanager
def full_disk_at(path: Path, size_bytes: int) -> Any:
    """Let no file grow beyond a size, which has to be so large that it hits none but the one at `path`."""
    assert path.stat().st_size <= size_bytes
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class AuditTestCase(SynchronousTestCase):
    """An audit with a file of its own."""

    def setUp(self) -> None:
        self.directory = Path(self.mktemp())
        self.directory.mkdir()
        self.path = self.directory / "crabtwist-audit.jsonl"
        self.clock = Clock()

    def audit(self, **changes: Any) -> Any:
        """Return an audit that has been started."""
        made = audit(AuditSettings(**changes), FakeServices(self.clock, self.directory))
        made.startService()
        self.addCleanup(made.stopService)
        return made

    def lines(self, name: str = "crabtwist-audit.jsonl") -> list[Any]:
        """Return what is in a file; lines that are torn, or empty, are left out."""
        found = []
        for line in (self.directory / name).read_bytes().replace(b"\0", b"").splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found

    def ids(self, name: str = "crabtwist-audit.jsonl") -> list[str]:
        """Return whose lines are in a file."""
        return [line["request_id"] for line in self.lines(name)]

    def end(self, made: Any, *names: str) -> None:
        """Let requests end."""
        for name in names:
            made.on_end(make_context(request_id=name), outcome())


class LineTests(AuditTestCase):
    """What a line says."""

    def test_contract(self) -> None:
        """It is an extension and a service, with bodies or without."""
        for bodies in (False, True):
            made = self.audit(bodies=bodies)
            verifyObject(IExtension, made)
            verifyObject(IService, made)
            self.assertEqual((bodies, "audit"), (isinstance(made, BodiesExtension), made.name))

    def test_request(self) -> None:
        """Who asked whom for what, when, how it ended, and what it cost."""
        self.audit().on_end(CONTEXT, outcome())
        expected = {
            "event": "request",
            "time": "2023-11-14T22:13:20.250Z",
            "request_id": "req_test",
            "principal": "default",
            "operation": "messages",
            "dialect": "anthropic",
            "model_asked": "fast",
            "model": "claude",
            "model_answered": "claude-5",
            "provider": "vendor",
            "stream": False,
            "status": 200,
            "ended_by": "upstream",
            "reason": "complete",
            "duration_ms": 1500,
            "tokens": dict(zip(TOKENS, (10, 5, 0, 0, 7, 0), strict=True)),
            "cost_usd": "0.0000125",
            "cache_hit": False,
        }
        self.assertEqual(list(expected.items()), list(self.lines()[0].items()))

    def test_refused(self) -> None:
        """A refusal has its line, in which nothing is invented."""
        context = make_context(principal=None, model_asked="", model="")
        nothing = {"usage": None, "cost": None, "model_answered": None}
        self.audit().on_end(
            context, outcome(status=429, ended_by="gateway", reason="rate_limited", **nothing)
        )
        (line,) = self.lines()
        self.assertEqual((429, "gateway", "rate_limited"), (line["status"], line["ended_by"], line["reason"]))
        unknown = ("principal", "model_answered", "provider", "tokens", "cost_usd")
        self.assertEqual([None] * 5, [line[name] for name in unknown])

    def test_client_text(self) -> None:
        """What a client calls a model forges no line, breaks none, and fills no disk."""
        made = self.audit()
        for name in ('x"}\n{"event": "request"}', "\ud800", "x" * 10**6):
            made.on_end(make_context(model_asked=name), outcome())
        shown = [line["model_asked"] for line in self.lines()]
        self.assertEqual(['x"}\n{"event": "request"}', "?", "x" * 1000], shown)

    def test_admin_action(self) -> None:
        """What is done to the gateway has a line of its own, told through the hooks."""
        hooks = Hooks([self.audit()], self.clock)
        hooks.administered(AdminAction(1.5, "ops", "keys.create", "visitor", "done", "by hand"))
        (line,) = self.lines()
        told = ["ops", "keys.create", "visitor", "done", "by hand"]
        self.assertEqual(["admin", "1970-01-01T00:00:01.500Z", *told], list(line.values()))
        self.assertEqual(["actor", "action", "target", "outcome", "detail"], list(line)[2:])

    def test_secret_for_a_name(self) -> None:
        """Whoever sends a secret where a name should be does not find it there again."""
        for secret in (f"sk-ct-{'0f' * 32}", f"ct-admin-{'0f' * 32}"):
            audit = self.audit()
            words = f"there is no key {secret!r}"
            audit.on_admin_action(AdminAction(1.5, "admin", "keys.delete", secret, "refused", words))
            line = self.lines()[-1]
            self.assertEqual((REDACTED, f"there is no key '{REDACTED}'"), (line["target"], line["detail"]))

    def test_hooks(self) -> None:
        """Only with bodies is an event parsed or an answer kept for it."""
        for bodies in (False, True):
            hooks = Hooks([self.audit(bodies=bodies)], self.clock)
            self.assertEqual((bodies, bodies), (hooks.want_events, hooks.want_answers))


class FileTests(AuditTestCase):
    """The file."""

    def test_private(self) -> None:
        """Nobody else may read it, nor those that were put aside."""
        self.end(self.audit(max_bytes=1), "a", "b")
        modes = {path.stat().st_mode & 0o777 for path in self.directory.iterdir()}
        self.assertEqual(({0o600}, 2), (modes, len(list(self.directory.iterdir()))))

    def test_at_once(self) -> None:
        """A line is in the file when the hook returns, and is not lost with the process."""
        self.end(self.audit(), "a")
        self.assertEqual(["a"], self.ids())

    def test_appends(self) -> None:
        """What an earlier process wrote stays; a line that it could not end has its own."""
        self.path.write_bytes(b'{"request_id": "old"}\n{"request_id": "to')
        self.end(self.audit(), "a", "b")
        self.assertEqual(["old", "a", "b"], self.ids())

    def test_rotation(self) -> None:
        """A full file is put aside, the newest as 1; the oldest goes."""
        made = self.audit(max_bytes=1, keep_files=2)
        self.end(made, "a", "b", "c", "d")
        names = ["crabtwist-audit.jsonl", "crabtwist-audit.jsonl.1", "crabtwist-audit.jsonl.2"]
        self.assertEqual(names, sorted(os.listdir(self.directory)))
        self.assertEqual([["d"], ["c"], ["b"]], [self.ids(name) for name in names])

    def test_nothing_kept(self) -> None:
        """Without older files there is only the one."""
        self.end(self.audit(max_bytes=1, keep_files=0), "a", "b")
        self.assertEqual((["b"], ["crabtwist-audit.jsonl"]), (self.ids(), os.listdir(self.directory)))

    def test_size_at_start(self) -> None:
        """What is there already counts."""
        self.path.write_text('{"request_id": "old"}\n')
        self.end(self.audit(max_bytes=100), "a")
        self.assertEqual((["a"], ["old"]), (self.ids(), self.ids("crabtwist-audit.jsonl.1")))

    def test_bound(self) -> None:
        """No file is larger than it may be."""
        made = self.audit(max_bytes=1000, keep_files=99)
        self.end(made, *map(str, range(20)))
        sizes = [path.stat().st_size for path in self.directory.iterdir()]
        self.assertLessEqual(max(sizes), 1000)
        self.assertEqual(20, sum(len(self.ids(path.name)) for path in self.directory.iterdir()))

    def test_put_aside_by_others(self) -> None:
        """A file that somebody else has moved is left within a second, not within each request."""
        made = self.audit()
        self.end(made, "a")
        self.path.rename(self.directory / "moved")
        self.end(made, "b")
        self.clock.advance(1)
        self.end(made, "c")
        self.assertEqual((["a", "b"], ["c"]), (self.ids("moved"), self.ids()))

    def test_replaced_by_others(self) -> None:
        """So is one that somebody has put another in the place of."""
        made = self.audit()
        self.path.unlink()
        self.path.write_text('{"request_id": "new"}\n')
        self.clock.advance(1)
        self.end(made, "a")
        self.assertEqual(["new", "a"], self.ids())

    def test_clock_set_back(self) -> None:
        """A clock that is set back does not put the look off."""
        self.clock.advance(10_000)
        made = self.audit()
        self.end(made, "a")
        self.path.unlink()
        self.clock.rightNow = 5000.0
        self.end(made, "b")
        self.assertEqual(["b"], self.ids())

    def test_cannot_be_put_aside(self) -> None:
        """What cannot be put aside grows, which is said once, and is tried again."""
        made = self.audit(max_bytes=1, keep_files=2)
        (self.directory / "crabtwist-audit.jsonl.1" / "in-the-way").mkdir(parents=True)
        (self.directory / "crabtwist-audit.jsonl.2").write_text("")
        with capturedLogs() as events:
            self.end(made, "a", "b", "c")
            self.clock.advance(1)
            self.end(made, "d")
        self.assertEqual((["a", "b", "c", "d"], 1), (self.ids(), len(events)))
        (self.directory / "crabtwist-audit.jsonl.2").unlink()
        self.clock.advance(1)
        self.end(made, "e")
        self.assertEqual(["e"], self.ids())

    def test_cannot_be_opened(self) -> None:
        """A path that leads nowhere, or to no file, stops the start and is named."""
        os.mkfifo(self.directory / "pipe")
        for path in ("no/such/folder.jsonl", ".", "pipe", "/dev/null"):
            made = audit(AuditSettings(path=path), FakeServices(self.clock, self.directory))
            error = self.assertRaises(ConfigurationError, made.startService)
            self.assertIn("extensions.audit.path", str(error))
            self.assertIn(str(self.directory / path), str(error))


class FailureTests(AuditTestCase):
    """A file that takes nothing."""

    def broken(self, **changes: Any) -> Any:
        """Return an audit whose folder has gone, and that has noticed."""
        made = self.audit(**changes)
        self.directory.rename(self.directory.with_name("away"))
        self.clock.advance(1)
        self.end(made, "a")
        return made

    def mend(self) -> None:
        """Bring the folder back, and let a second pass."""
        self.directory.with_name("away").rename(self.directory)
        self.clock.advance(1)

    def tearDown(self) -> None:
        if not self.directory.exists():
            self.mend()

    def test_recovers(self) -> None:
        """It is said once, and once that it is over; what came meanwhile is written then, in order."""
        with capturedLogs() as events:
            made = self.broken()
            self.end(made, "b")
            self.clock.advance(1)
            self.end(made, "c")
            self.mend()
            self.end(made, "d")
        self.assertEqual(["a", "b", "c", "d"], self.ids())
        self.assertEqual(["critical", "info"], [each["log_level"].name for each in events])
        self.assertEqual((2, 0), (made.trail.failures, made.trail.lost))

    def test_let_through(self) -> None:
        """By default nobody is refused for it."""
        self.broken().on_request(CONTEXT)

    def test_refuses(self) -> None:
        """If it is asked for, nothing happens unrecorded: a 503 that says when to come back."""
        made = self.broken(on_failure="refuse")
        refusal = self.assertRaises(Refused, made.on_request, CONTEXT)
        self.assertEqual((503, "audit_unavailable"), (refusal.status, refusal.slug))
        self.assertEqual({"retry-after": "5"}, refusal.headers)
        self.mend()
        made.on_request(CONTEXT)
        self.assertEqual(["a"], self.ids())

    def test_bound(self) -> None:
        """What waits is bounded; what finds no room is counted."""
        self.patch(audit_trail, "MOST_WAITING_BYTES", 1000)
        made = self.broken()
        self.end(made, *"bcdefghij")
        lost = made.trail.lost
        self.mend()
        self.end(made, "k")
        self.assertGreater(lost, 0)
        self.assertEqual([*"abcdefghij"[: 10 - lost], "k"], self.ids())

    def test_disk_full(self) -> None:
        """A line that fits in part only is written again, whole, when there is room."""
        made = self.audit(max_bytes=2**40)
        os.truncate(self.path, 2**33)
        self.clock.advance(1)
        with full_disk_at(self.path, 2**33 + 50):
            self.end(made, "a")
            self.end(made, "b")
        self.clock.advance(1)
        os.truncate(self.path, 2**33 + 50)
        self.end(made, "c")
        with self.path.open("rb") as file:
            file.seek(2**33)
            torn, *whole = file.read().splitlines()
        self.assertEqual((50, "abc"), (len(torn), "".join(json.loads(line)["request_id"] for line in whole)))

    def test_disk_full_within_several(self) -> None:
        """Of several lines that were one write, those that found room are not written again."""
        for space, torn in ((3, b""), (4, b"b"), (5, b"bb"), (6, b"")):
            path = self.directory / f"lines-{space}"
            trail = audit_trail.Trail(RotatingFile(path, 2**40, 0), self.clock)
            trail.open()
            os.truncate(path, 2**33)
            self.clock.advance(1)
            with full_disk_at(path, 2**33 + space):
                trail.write(b"aa\nbb\ncc\n")
            self.clock.advance(1)
            self.assertTrue(trail.works())
            trail.close()
            with path.open("rb") as file:
                file.seek(2**33)
                lines = file.read().splitlines()
            whole = [b"aa", *([torn] if torn else []), b"bb", b"cc"]
            self.assertEqual((whole, 0), (lines, trail.lost), space)

    def test_stop(self) -> None:
        """A stop tries once more, and says how much is lost; what comes later is lost too."""
        made = self.broken()
        with capturedLogs() as events:
            made.stopService()
            self.end(made, "b")
        self.assertEqual((2, 1), (made.trail.lost, events[-1]["lost"]))

    def test_stop_recovers(self) -> None:
        """What waits at a stop is written if it can be."""
        made = self.broken()
        self.directory.with_name("away").rename(self.directory)
        made.stopService()
        self.assertEqual((["a"], 0), (self.ids(), made.trail.lost))


class BodyTests(AuditTestCase):
    """Bodies."""

    def written(self, *told: Callable[[Any, Context], None], **changes: Any) -> Any:
        """Return what is written of the bodies of a request of which this is told."""
        made = self.audit(bodies=True, **changes)
        for tell in told:
            tell(made, CONTEXT)
        made.on_end(CONTEXT, outcome())
        self.assertEqual((0, {}), (made.kept_bytes, made._seen))
        return self.lines()[-1]["bodies"]

    @staticmethod
    def asked(body: bytes) -> Callable[[Any, Context], None]:
        """Tell of a request."""
        return lambda made, context: made.on_cache_lookup(context, body)

    @staticmethod
    def answered(body: bytes) -> Callable[[Any, Context], None]:
        """Tell of a plain answer."""
        return lambda made, context: made.on_response(context, b"", Answer(200, (), body))

    @staticmethod
    def said(*events: bytes) -> Callable[[Any, Context], None]:
        """Tell of the events of a stream."""

        def tell(made: Any, context: Context) -> None:
            for data in events:
                made.on_chunk(context, event(data))

        return tell

    def test_plain(self) -> None:
        """The request's body and the answer's are there, as they came."""
        written = self.written(self.asked(b'{"a": "\xc3\xbc"}'), self.answered(b"{}"))
        expected = {"request": '{"a": "\u00fc"}', "request_cut": False, "answer": "{}", "answer_cut": False}
        self.assertEqual(expected, written)

    def test_nothing(self) -> None:
        """Of a request that was refused there are none."""
        self.assertEqual(
            {"request": None, "request_cut": False, "answer": None, "answer_cut": False}, self.written()
        )

    def test_stream(self) -> None:
        """A stream's events are one a line."""
        self.assertEqual("one\ntwo\n", self.written(self.said(b"one", b"two"))["answer"])

    def test_cut(self) -> None:
        """What is longer than it may be is cut, and says so."""
        written = self.written(self.asked(b"x" * 99), self.said(*[b"y" * 9] * 9), max_body_bytes=20)
        self.assertEqual(("x" * 20, True), (written["request"], written["request_cut"]))
        self.assertEqual((("y" * 9 + "\n") * 2, True), (written["answer"], written["answer_cut"]))
        written = self.written(self.asked(b"x" * 20), max_body_bytes=20)
        self.assertEqual(("x" * 20, False), (written["request"], written["request_cut"]))

    def test_other_attempt(self) -> None:
        """What an attempt began with that was given up is not part of the answer; what broke off is."""
        error, broken = ConnectionBroken("first"), AnswerBroken("later")
        written = self.written(
            self.said(b"one"),
            lambda made, context: made.on_error(context, error),
            self.said(b"two"),
            lambda made, context: made.on_error(context, broken),
        )
        self.assertEqual("two\n", written["answer"])

    def test_bound(self) -> None:
        """There is a bound on what all open requests have; what is beyond it is cut."""
        self.patch(room, "MOST_KEPT_BYTES", 2500)
        made = self.audit(bodies=True)
        contexts = [make_context(request_id=name) for name in "abc"]
        for context in contexts:
            made.on_cache_lookup(context, b"x" * 2000)
        self.assertEqual(2500, made.kept_bytes)
        for context in contexts:
            made.on_end(context, outcome())
        shown = [(len(line["bodies"]["request"]), line["bodies"]["request_cut"]) for line in self.lines()]
        self.assertEqual(([(2000, False), (0, True), (0, True)], 0), (shown, made.kept_bytes))

    def test_redacted(self) -> None:
        """Credentials and what the patterns find are in no line."""
        body = json.dumps({"text": f"my key is {KEY}, my name is Alice"}).encode()
        written = self.written(self.asked(body), self.answered(body), self.said(body), redact=("Al[a-z]+",))
        self.assertNotIn("Alice", json.dumps(written))
        self.assertNotIn("0123456789", self.path.read_text())
        self.assertIn("my key is [redacted], my name is [redacted]", written["request"])

    def test_no_pattern(self) -> None:
        """A pattern that is none is named at the start."""
        complaints: list[str] = []
        read(AuditSettings, {"redact": ["fine", "(unclosed"]}, "extensions.audit", complaints)
        self.assertEqual(1, len(complaints))
        self.assertTrue(complaints[0].startswith("extensions.audit.redact: [1] is no regular expression"))


def redacted(text: str, *patterns: str, max_bytes: int = 65536) -> str:
    """Return what is left of a text."""
    redactor = Redactor(patterns, max_bytes)
    return redactor(text.encode()[: redactor.wanted_bytes], len(text.encode()))[0]


class RedactionTests(SynchronousTestCase):
    """What is taken out of a text."""

    def test_credentials(self) -> None:
        """What looks like a credential goes, and what stands around it stays."""
        jwt = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl"
        for secret in (
            *(KEY, "sk-proj-" + "a1_-" * 9, "AKIA" + "A1" * 8, "AIza" + "x" * 35, "ghp_" + "a" * 36, jwt),
            *("xoxb-1234567890-abc", "github_pat_" + "a" * 22),
            "-----BEGIN RSA PRIVATE KEY-----\\nMIIE\n\\nabc=\\n-----END RSA PRIVATE KEY-----",
        ):
            for before in ("is ", '"', "=", "\\n", "\n"):
                self.assertEqual(f"{before}[redacted]", redacted(before + secret), secret)

    def test_named(self) -> None:
        """So does what is called a key, a token or a password; the name stays."""
        for before, after in (
            *(("Authorization: Bearer ", ""), ("authorization: basic ", " and"), ("bearer ", '"')),
            *(('{"api_key": "', '"}'), ('{\\"x-api-key\\": \\"', '\\"}'), ("password=", "&b=1")),
            *(("AWS_SECRET_ACCESS_KEY=", "\n"), ("client_secret: ", ""), ("access-token: '", "'")),
        ):
            self.assertEqual(f"{before}[redacted]{after}", redacted(f"{before}Zm9vYmFyYmF6cXV4eA{after}"))

    def test_harmless(self) -> None:
        """Ordinary words stay."""
        for text in (
            *("a risk-assessment-of-the-whole-thing", "bearer of bad news", '"max_tokens": 1024'),
            *("-----BEGIN PUBLIC KEY-----", "the key: yes", "eyJ", "sk-short"),
        ):
            self.assertEqual(text, redacted(text))

    def test_unfinished_private_key(self) -> None:
        """A private key whose end is missing goes up to the text's end."""
        self.assertEqual(
            "a [redacted]", redacted("a -----BEGIN PRIVATE KEY-----\nMIIE" + "x" * 50, max_bytes=40)
        )

    @given(st.integers(0, 2 * len(KEY)), st.booleans())
    @settings(deadline=None, max_examples=60)
    def test_cut_anywhere(self, max_bytes: int, own: bool) -> None:
        """A secret across the cut is known for one, and no part of it is left."""
        text, patterns = f"a key: {KEY} and more" + "." * LOOK_AHEAD_BYTES, ("key: \\S+",) if own else ()
        shown = redacted(text, *patterns, max_bytes=max(1, max_bytes))
        self.assertNotIn("sk-", shown)
        self.assertEqual(max_bytes > (2 if own else 7), "[redacted]" in shown)

    def test_many(self) -> None:
        """What is taken out does not bring what is beyond the cut before it."""
        text = f"{KEY} " * 10
        self.assertEqual(("[redacted] " * 2)[:-1], redacted(text, max_bytes=2 * len(KEY) + 1))

    def test_own_patterns(self) -> None:
        """Own patterns go one after the other, their groups mean nothing, and an empty match is none."""
        self.assertEqual("[redacted] c", redacted("a b c", "(a) b", "x*"))

    def test_pieces(self) -> None:
        """Long texts are looked at in pieces, without missing what stands across their edges."""
        text = "x" * 4090 + "name: Alice" + "x" * 9000 + "name: Bob." + "x" * 99
        shown = redacted(text, "name: (Alice|Bob)")
        self.assertEqual(text.replace("name: Alice", "[redacted]").replace("name: Bob", "[redacted]"), shown)

    def test_slow_pattern(self) -> None:
        """A pattern that takes too long costs the rest of the text, and no more of the gateway's time."""
        ticks = iter([0.0, 0.0, BUDGET_SECONDS / 2, BUDGET_SECONDS + 0.01])
        redactor = Redactor(("secret",), 65536, lambda: next(ticks))
        body = b"secret " + b"x" * 20000
        shown, cut = redactor(body, len(body))
        self.assertEqual((len("[redacted]") + 8192 - len("secret"), True), (len(shown), cut))

    def test_no_text(self) -> None:
        """A sound is told by its size; a character that is cut is left out, and spoils nothing."""
        self.assertEqual(("[4 bytes that are no text]", True), Redactor((), 99)(b"\xff\xf3\0a", 4))
        self.assertEqual(("\u00fc", True), Redactor((), 3)("\u00fc\u00fc".encode(), 4))

    @given(st.binary(max_size=50), st.integers(1, 60))
    @settings(deadline=None, max_examples=100)
    def test_anything(self, body: bytes, max_bytes: int) -> None:
        """Whatever a body is, what is shown can be written, and is no longer than it may be."""
        shown, cut = Redactor((), max_bytes)(body, len(body))
        self.assertTrue(shown.startswith("[") or len(shown.encode()) <= 10 * max_bytes)
        self.assertTrue(cut or len(body) <= max_bytes)


class RotatingFileTests(SynchronousTestCase):
    """The file by itself."""

    def test_not_open(self) -> None:
        """A file that was closed takes nothing, and says so."""
        path = Path(self.mktemp())
        file = RotatingFile(path, 100, 1)
        file.open()
        file.append(b"a\n", 0.0)
        file.close()
        self.assertRaises(OSError, file.append, b"b\n", 0.5)
        self.assertEqual(b"a\n", path.read_bytes())

    def test_two_processes(self) -> None:
        """Two that write to one file lose nothing, also when one of them puts it aside."""
        path = Path(self.mktemp())
        one, other = (RotatingFile(path, 6, 9) for _ in range(2))
        for number, file in enumerate([one, other] * 6):
            if number < 2:
                file.open()
            file.append(b"%02d\n" % number, float(number))
        one.close()
        other.close()
        files = path.parent.glob(path.name + "*")
        found = sorted(line for each in files for line in each.read_bytes().split())
        self.assertEqual([b"%02d" % number for number in range(12)], found)
