"""Answers, byte by byte."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.protocol import Protocol
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.client import ResponseDone
from twisted.web.iweb import UNKNOWN_LENGTH

from crabtwist.errors import ConnectionBroken
from crabtwist.http_response import ResponseBody, ResponseParser
from tests.network import Reader

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: Chunked\r\n\r\n"
CHUNKED += b"5\r\nhello\r\n1;why=not\r\n \r\n5\r\nworld\r\n0\r\nX-Trailer: t\r\n\r\n"
SIZED = OK + b"x-B: 1\r\nContent-Length: 11\r\nX-b:  2 \r\nEmpty:\r\n\r\nhello world"
AFTER_HINTS = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + SIZED
WHOLE = {CHUNKED: b"hello world", SIZED: b"hello world", AFTER_HINTS: b"hello world"}


def parse(*pieces: bytes, **options: Any) -> tuple[ResponseParser, bytes]:
    """Feed an answer, piece by piece until its end; return the parser and the body."""
    parser = ResponseParser("up:80", **options)
    body = b""
    for piece in pieces:
        if not parser.complete and parser.fault is None:
            body += parser.feed(piece)
    return parser, body


def fault(*pieces: bytes, **options: Any) -> str:
    """Feed something that is no answer; return why."""
    parser, _ = parse(*pieces, **options)
    assert isinstance(parser.fault, ConnectionBroken), "accepted"
    assert not parser.complete
    return parser.fault.message


def sliced(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    """Cut bytes at the given places."""
    places = [0, *sorted(cuts), len(data)]
    return [data[start:end] for start, end in pairwise(places)]


class AcceptedTests(SynchronousTestCase):
    """Answers that are fine."""

    def test_head(self) -> None:
        """Fields keep their order, repetition and spelling; space around a value is not part of it."""
        parser, _ = parse(SIZED)
        self.assertEqual(
            (200, b"OK", (b"HTTP", 1, 1), 11), (parser.code, parser.phrase, parser.version, parser.length)
        )
        fields = (b"x-B", b"1"), (b"Content-Length", b"11"), (b"X-b", b"2"), (b"Empty", b"")
        self.assertEqual(fields, parser.raw_headers)
        after, _ = parse(AFTER_HINTS)
        self.assertEqual((b"OK", fields), (after.phrase, after.raw_headers))

    def test_every_cut(self) -> None:
        """Wherever an answer is cut in two, it reads the same."""
        for answer, body in WHOLE.items():
            for place in range(len(answer) + 1):
                parser, read = parse(answer[:place], answer[place:])
                self.assertEqual((body, True, True), (read, parser.complete, parser.reusable))
                self.assertEqual(parse(answer)[0].raw_headers, parser.raw_headers)

    @settings(deadline=None)
    @given(
        st.sampled_from(sorted(WHOLE)).flatmap(
            lambda a: st.tuples(st.just(a), st.sets(st.integers(0, len(a))))
        )
    )
    def test_many_cuts(self, case: tuple[bytes, set[int]]) -> None:
        """However an answer is cut, it reads the same."""
        answer, cuts = case
        parser, read = parse(*sliced(answer, cuts))
        self.assertEqual((WHOLE[answer], True, None), (read, parser.complete, parser.fault))

    def test_prefixes_are_not_whole(self) -> None:
        """No beginning of an answer is taken for a whole one."""
        for answer in WHOLE:
            for place in range(len(answer)):
                self.assertFalse(parse(answer[:place])[0].complete)

    def test_lengths(self) -> None:
        """The length is known from the head, or is not known."""
        self.assertEqual(UNKNOWN_LENGTH, parse(CHUNKED)[0].length)
        for none in (
            b"HTTP/1.1 204 No Content\r\n\r\n",
            b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n",
        ):
            parser, _ = parse(none)
            self.assertEqual((0, True, True), (parser.length, parser.complete, parser.reusable))

    def test_until_close(self) -> None:
        """An answer that says nothing of its length ends with its connection."""
        parser, body = parse(OK + b"\r\nsome", b" more")
        self.assertEqual((b"some more", True, False), (body, parser.until_close, parser.complete))

    def test_head_request(self) -> None:
        """The answer to HEAD has no body, whatever it says; nothing may follow it."""
        for extra in (b"", b"hello"):
            parser, body = parse(OK + b"Content-Length: 5\r\n\r\n" + extra, bodiless=True)
            self.assertEqual((0, True, False), (parser.length, parser.complete, parser.reusable))
            self.assertEqual((b"", None), (body, parser.fault))

    def test_reusable(self) -> None:
        """Another answer may follow if both sides keep the connection, and nothing stands behind this one."""
        sized = b"Content-Length: 2\r\n\r\nhi"
        for answer, reusable in {
            OK + sized: True,
            OK + b"Connection: Close\r\n" + sized: False,
            OK + sized + b"HTTP/1.1": False,
            b"HTTP/1.0 200 OK\r\n" + sized: False,
            b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n" + sized: True,
        }.items():
            parser, body = parse(answer)
            self.assertEqual((b"hi", True, reusable), (body, parser.complete, parser.reusable))

    def test_coded_bodies(self) -> None:
        """A content coding is the reader's business."""
        self.assertEqual(b"\x1f\x8b\0\xff", parse(OK + b"Content-Encoding: gzip\r\n\r\n\x1f\x8b\0\xff")[1])


class RefusedTests(SynchronousTestCase):
    """Answers that no proxy may pass on."""

    def test_smuggling(self) -> None:
        """What two parsers read differently is refused."""
        for fields in (
            b"Content-Length: 5\r\nContent-Length: 6",
            b"Content-Length: 5\r\nTransfer-Encoding: chunked",
            b"Transfer-Encoding: gzip, chunked",
            b"Transfer-Encoding: identity",
            b"Content-Length: +5",
            b"Content-Length: 99999999999999999999",
            b"A: b\r\n folded: c",
            b"A : b",
            b"A: b\nContent-Length: 0",
        ):
            self.assertIn("up:80 ", fault(OK + fields + b"\r\n\r\nhello"))

    def test_control_characters(self) -> None:
        """Nothing in a head could end a line of ours."""
        for evil in (b"\r", b"\n", b"\0", b"\x07", b"\x7f"):
            fault(OK + b"A: b" + evil + b"c\r\n\r\n")
            fault(b"HTTP/1.1 200 O" + evil + b"K\r\n\r\n")

    def test_other_protocols(self) -> None:
        """What is not HTTP/1 is refused at once."""
        for other in (
            b"GARBAGE",
            b"SSH-2.0-x\r\n",
            b"HTTP/2.0 200 OK\r\n\r\n",
            b"HTTP/0.9 200 OK\r\n\r\n",
            b"HTTP/1.1 099 X\r\n\r\n",
        ):
            fault(other)
        self.assertIn(
            "change of protocol", fault(b"HTTP/1.1 101 S\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\nxxx")
        )
        self.assertIn("interim", fault(b"HTTP/1.1 104 X\r\nContent-Length: 1\r\n\r\nx"))

    def test_body_before_fault(self) -> None:
        """What came before the fault is not lost."""
        parser, body = parse(OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\nXYZ\r\n")
        self.assertEqual((b"hi", True), (body, parser.fault is not None))

    def test_bounds(self) -> None:
        """A head that is too long, in fields or in bytes, is refused before it is whole."""
        self.assertIn("too large", fault(OK + b"a: b\r\n" * 501 + b"\r\n"))
        self.assertIn("too large", fault(OK + (b"a: " + b"b" * 8000 + b"\r\n") * 10))
        self.assertIn("no body", fault(OK + b"a: ", *[b"b" * 8192] * 9))
        self.assertIsNone(parse(OK + b"a: b\r\n" * 499 + b"Content-Length: 0\r\n\r\n")[0].fault)

    def test_endless_trifles(self) -> None:
        """Interim answers, chunk extensions and trailers without end are refused too."""
        chunked = OK + b"Transfer-Encoding: chunked\r\n\r\n"
        self.assertIn("no body", fault(*[b"HTTP/1.1 103 Early\r\n\r\n" * 100] * 40))
        self.assertIn("no body", fault(chunked + b"5;", *[b"x" * 8192] * 10))
        self.assertIn("no body", fault(chunked + b"0\r\nA: ", *[b"x" * 8192] * 10))


class Source:
    """A connection of which only the calls are kept."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def pause(self) -> None:
        self.calls.append("pause")

    def resume(self) -> None:
        self.calls.append("resume")

    def abort(self) -> None:
        self.calls.append("abort")


class BodyTests(SynchronousTestCase):
    """The way from the connection to the reader."""

    def setUp(self) -> None:
        """Make a body."""
        self.source = Source()
        self.body = ResponseBody(self.source)

    def test_early_bytes(self) -> None:
        """What came before anybody listened is delivered first, once."""
        self.body.receive(b"one ")
        reader = Reader()
        self.body.attach(reader)
        self.body.receive(b"two")
        self.body.finish()
        self.assertEqual(b"one two", reader.data)
        self.assertIsInstance(reader.reason, ResponseDone)
        self.assertRaises(RuntimeError, self.body.attach, Reader())

    def test_pause_when_made(self) -> None:
        """A reader that pauses in `connectionMade` gets nothing until it resumes, not even early bytes."""

        class Shy(Reader):
            def connectionMade(self) -> None:
                self.producer.pauseProducing()

        self.body.receive(b"early")
        reader = Shy()
        self.body.attach(reader)
        self.body.finish()
        self.assertEqual((b"", None, ["pause"]), (reader.data, reader.reason, self.source.calls))
        reader.producer.resumeProducing()
        self.assertEqual(b"early", reader.data)
        self.assertIsInstance(reader.reason, ResponseDone)

    def test_not_before_made(self) -> None:
        """Nothing is delivered before `connectionMade` has returned, whatever it does."""

        class Fickle(Reader):
            def connectionMade(self) -> None:
                self.producer.pauseProducing()
                self.producer.resumeProducing()
                self.seen_early = self.data

        self.body.receive(b"early")
        reader = Fickle()
        self.body.attach(reader)
        self.assertEqual((b"", b"early"), (reader.seen_early, reader.data))

    def test_pause_and_resume(self) -> None:
        """Both reach the connection, and nothing is delivered in between."""
        reader = Reader(thirst=1)
        self.body.attach(reader)
        for data in (b"a", b"b", b"c"):
            self.body.receive(data)
        self.assertEqual((b"a", ["resume", "pause"]), (reader.data, self.source.calls))
        reader.thirst = 10
        reader.producer.resumeProducing()
        self.assertEqual((b"abc", "resume"), (reader.data, self.source.calls[-1]))

    def test_stop(self) -> None:
        """Stopping, by any of its names, aborts the connection and ends the delivery."""
        for name in ("stopProducing", "loseConnection", "abortConnection"):
            self.setUp()
            reader = Reader()
            self.body.attach(reader)
            getattr(reader.producer, name)()
            self.body.receive(b"late")
            self.assertEqual((b"", "abort"), (reader.data, self.source.calls[-1]))
            self.assertIsNone(reader.reason)
            self.body.finish(Failure(ConnectionBroken("aborted")))
            self.assertIsInstance(reader.reason, ConnectionBroken)

    def test_stop_after_the_end(self) -> None:
        """Who stops after the whole body came, but before reading it, disturbs no connection and is told."""
        reader = Reader(thirst=0)
        self.body.attach(reader)
        self.body.receive(b"a")
        self.body.detach()
        self.body.receive(b"b")
        self.body.finish()
        self.assertIsNone(reader.reason)
        reader.producer.stopProducing()
        self.assertIsInstance(reader.reason, ConnectionBroken)
        self.assertNotIn("abort", self.source.calls)

    def test_reader_fails(self) -> None:
        """A reader's exception is logged, and ends the connection and the delivery."""

        class Broken(Reader):
            def dataReceived(self, data: bytes) -> None:
                raise ZeroDivisionError

        reader = Broken()
        self.body.attach(reader)
        self.body.receive(b"a")
        self.body.receive(b"b")
        self.body.finish()
        self.assertEqual(1, len(self.flushLoggedErrors(ZeroDivisionError)))
        self.assertIn("abort", self.source.calls)
        self.assertIsInstance(reader.reason, ConnectionBroken)

    def test_end_fails(self) -> None:
        """An exception at the end is logged."""

        class Broken(Protocol):
            def connectionLost(self, reason: Any = None) -> None:
                raise ZeroDivisionError

        self.body.attach(Broken())
        self.body.finish()
        self.assertEqual(1, len(self.flushLoggedErrors(ZeroDivisionError)))
