"""One connection, request by request."""

from __future__ import annotations

import random
import socket
import weakref
from typing import Any, cast

import treq
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IHandshakeListener, ISSLTransport
from twisted.internet.task import Clock
from twisted.internet.tcp import Connection
from twisted.internet.testing import MemoryReactorClock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.client import ResponseDone
from twisted.web.http import PotentialDataLoss
from twisted.web.http_headers import Headers
from twisted.web.iweb import UNKNOWN_LENGTH, IBodyProducer, IResponse
from zope.interface import directlyProvides
from zope.interface.verify import verifyObject

from crabtwist.errors import ConnectionBroken
from crabtwist.http_client import READ_BYTES, BytesBody, HTTP1ClientProtocol, HTTP1Request, HTTP1Response
from tests.network import Reader, Wire
from tests.test_http_request import Tap

OK = b"HTTP/1.1 200 OK\r\n"
HELLO = OK + b"Content-Length: 5\r\n\r\nhello"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
UNTIL_CLOSE = OK + b"\r\nhello"

#: Answers, and ends of the connection that cannot be their own.
CUTS = [(answer, why) for answer in (HELLO, CHUNKED) for why in (ConnectionDone(), ConnectionLost())]
CUTS.append((UNTIL_CLOSE, ConnectionLost()))


def request(body: IBodyProducer | None = None, method: bytes = b"GET") -> HTTP1Request:
    """Return a request."""
    return HTTP1Request(method, b"http://up/", Headers(), b"HEAD\r\n\r\n", body)


class ConnectionTestCase(SynchronousTestCase):
    """A connection, its wire, and what it said of itself in `events`."""

    def setUp(self) -> None:
        """Connect."""
        self.clock = Clock()
        self.events: list[str] = []
        self.connection = HTTP1ClientProtocol(
            "up:80", lambda _: self.events.append("idle"), lambda _: self.events.append("gone")
        )
        self.wire = Wire(self.connection, self.clock)
        self.connection.makeConnection(self.wire)

    def send(self, body: Any = None, method: bytes = b"GET") -> Deferred[HTTP1Response]:
        """Send a request."""
        return self.connection.request(request(body, method))

    def answered(self, *pieces: bytes, method: bytes = b"GET") -> HTTP1Response:
        """Send a request and have it answered; return the response."""
        head = self.send(method=method)
        for piece in pieces:
            self.wire.say(piece)
        response: HTTP1Response = self.successResultOf(head)
        return response

    def read(self, *pieces: bytes, reader: Reader | None = None) -> Reader:
        """Send a request and have it answered; return who read the body."""
        reader = reader or Reader()
        head = self.send()
        head.addCallback(lambda response: response.deliverBody(reader))
        for piece in pieces:
            self.wire.say(piece)
        return reader


class AnswerTests(ConnectionTestCase):
    """Answers as `IResponse`s."""

    def test_response(self) -> None:
        """A response has all that `IResponse` promises, and its fields as they were written."""
        response = self.answered(OK + b"x-A: 1\r\nX-a: 2\r\nContent-Length: 0\r\n\r\n")
        verifyObject(IResponse, response)
        self.assertEqual(
            ((b"HTTP", 1, 1), 200, b"OK", 0),
            (response.version, response.code, response.phrase, response.length),
        )
        self.assertEqual([b"1", b"2"], response.headers.getRawHeaders(b"X-A"))
        self.assertEqual(((b"x-A", b"1"), (b"X-a", b"2"), (b"Content-Length", b"0")), response.raw_headers)
        self.assertEqual(b"http://up/", response.request.absoluteURI)
        response.setPreviousResponse(response)
        self.assertIs(response, response.previousResponse)

    def test_treq(self) -> None:
        """treq reads it: at once, and when the answer comes in pieces."""
        for pieces in ((HELLO,), (CHUNKED,), (HELLO[:30], HELLO[30:]), (CHUNKED[:-4], CHUNKED[-4:])):
            self.setUp()
            response = self.send().addCallback(treq.content)
            for piece in pieces:
                self.wire.say(piece)
            self.assertEqual(b"hello", self.successResultOf(response))

    def test_body_goes_with_the_head(self) -> None:
        """What was asked is kept no longer than until the answer begins, which may go on for hours."""
        body = BytesBody(b"question")
        kept = weakref.ref(body)
        head = self.send(body, b"POST")
        del body
        self.assertIsNotNone(kept())
        self.wire.say(OK + b"\r\n")
        self.assertIsNone(cast(HTTP1Request, self.successResultOf(head).request).body)
        self.assertIsNone(kept())

    def test_all_at_once(self) -> None:
        """Of an answer that came in one piece, whoever is told of its head can read all in that moment."""
        whole: list[bool] = []
        self.send().addCallback(lambda response: whole.append(treq.content(response).called))
        self.wire.say(HELLO)
        self.assertEqual([True], whole)

    def test_read_later(self) -> None:
        """An answer that came before anybody listened is not lost, and holds up no other request."""
        response = self.answered(HELLO)
        self.assertEqual((["idle"], "producing"), (self.events, self.wire.producerState))
        parts: list[bytes] = []
        self.successResultOf(treq.collect(response, parts.append))
        self.assertEqual([b"hello"], parts)

    @settings(deadline=None)
    @given(
        st.sampled_from(CUTS).flatmap(lambda cut: st.tuples(st.just(cut), st.integers(0, len(cut[0]) - 1)))
    )
    def test_cut_off(self, case: tuple[tuple[bytes, Exception], int]) -> None:
        """Wherever the connection ends, a part of an answer is never taken for a whole one."""
        (answer, why), place = case
        self.setUp()
        body = self.send().addCallback(treq.content)
        self.wire.say(answer[:place])
        self.wire.end(why)
        self.failureResultOf(body, ConnectionBroken)
        self.assertEqual((["gone"], place > 0), (self.events, self.connection.answered))

    def test_interim(self) -> None:
        """Interim answers are skipped."""
        self.assertEqual(200, self.answered(b"HTTP/1.1 100 Continue\r\n\r\n", HELLO).code)

    def test_until_close(self) -> None:
        """A body that ends with its connection may be whole; after a reset, or TLS cut short, it is not."""
        reader = self.read(UNTIL_CLOSE)
        self.wire.end()
        self.assertEqual(b"hello", reader.data)
        self.assertIsInstance(reader.reason, PotentialDataLoss)
        self.setUp()
        reader = self.read(UNTIL_CLOSE)
        self.wire.end(ConnectionLost())
        self.assertIsInstance(reader.reason, ConnectionBroken)

    def test_whole(self) -> None:
        """A whole body ends with `ResponseDone`, after its last byte."""
        reader = self.read(CHUNKED[:-2], CHUNKED[-2:])
        self.assertEqual(b"hello", reader.data)
        self.assertIsInstance(reader.reason, ResponseDone)

    def test_garbage(self) -> None:
        """What is no answer fails the request at once and aborts the connection."""
        head = self.send()
        self.wire.say(b"GARBAGE\r\n\r\n")
        self.assertIn("up:80", str(self.failureResultOf(head, ConnectionBroken).value))
        self.assertEqual((["gone"], True), (self.events, self.wire.disconnected))

    def test_garbage_in_a_body(self) -> None:
        """A fault inside a body comes after the bytes before it."""
        reader = self.read(OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\nxyz")
        self.assertEqual((b"hi", ["gone"]), (reader.data, self.events))
        self.assertIsInstance(reader.reason, ConnectionBroken)


class ReuseTests(ConnectionTestCase):
    """Which connections may be used again."""

    def test_second_request(self) -> None:
        """A connection whose answer was read whole serves the next request."""
        for _ in range(3):
            self.assertTrue(self.connection.quiet)
            self.assertIsInstance(self.read(CHUNKED).reason, ResponseDone)
        self.assertEqual(["idle"] * 3, self.events)

    def test_next_request_from_the_end(self) -> None:
        """Whoever hears of a body's end can send the next request on the same connection."""
        response = self.send().addCallback(treq.content).addCallback(lambda _: self.send())
        self.wire.say(HELLO)
        self.wire.say(HELLO)
        self.assertEqual(200, self.successResultOf(response).code)

    def test_closed_after(self) -> None:
        """Not after `Connection: close`, nor if anything follows the answer, nor after HEAD."""
        for answer in (
            OK + b"Connection: close\r\nContent-Length: 0\r\n\r\n",
            HELLO + b"HTTP/1.1 200 OK\r\n",
        ):
            self.setUp()
            self.answered(answer)
            self.assertEqual((["gone"], False), (self.events, self.connection.quiet))
        self.setUp()
        self.answered(OK + b"Content-Length: 5\r\n\r\n", method=b"HEAD")
        self.assertEqual(["gone"], self.events)

    def test_unasked_bytes(self) -> None:
        """Bytes that nobody asked for close the connection."""
        self.answered(HELLO)
        self.wire.say(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
        self.assertEqual((["idle", "gone"], True), (self.events, self.wire.disconnected))

    def test_end_while_idle(self) -> None:
        """A FIN on an idle connection is noticed."""
        self.answered(HELLO)
        self.wire.end()
        self.assertEqual((["idle", "gone"], False), (self.events, self.connection.quiet))

    def test_not_while_busy(self) -> None:
        """One request at a time."""
        self.send()
        self.assertFalse(self.connection.quiet)
        self.failureResultOf(self.send(), ConnectionBroken)

    def test_close(self) -> None:
        """A closed connection is gone at once; when its socket is closed is told."""
        self.connection.close()
        lost = self.connection.when_lost()
        self.assertEqual((["gone"], False), (self.events, self.wire.disconnected))
        self.assertNoResult(lost)
        self.clock.advance(0)
        self.successResultOf(lost)
        self.successResultOf(self.connection.when_lost())


class BrakeTests(ConnectionTestCase):
    """Pause, resume, stop and cancel."""

    def test_nobody_listens(self) -> None:
        """A body that nobody listens to yet is not read from the socket."""
        response = self.answered(HELLO[:-3])
        self.assertEqual("paused", self.wire.producerState)
        reader = Reader()
        response.deliverBody(reader)
        self.assertEqual(("producing", b"he"), (self.wire.producerState, reader.data))

    def test_pause_and_resume(self) -> None:
        """A reader's pause and resume reach the socket."""
        reader = self.read(HELLO[:-3], reader=Reader(thirst=1))
        self.assertEqual("paused", self.wire.producerState)
        reader.producer.resumeProducing()
        self.assertEqual("producing", self.wire.producerState)

    def test_resumed_for_the_next(self) -> None:
        """A reader that never resumes after the last byte leaves the connection usable."""
        reader = self.read(HELLO[:-3], HELLO[-3:], reader=Reader(thirst=1))
        self.assertEqual(("producing", ["idle"]), (self.wire.producerState, self.events))
        reader.producer.stopProducing()
        self.assertFalse(self.wire.disconnected)

    def test_stop(self) -> None:
        """Stopping aborts the connection at once; the end of the body follows."""
        reader = self.read(HELLO[:-3])
        reader.producer.pauseProducing()
        reader.producer.stopProducing()
        self.assertEqual((["gone"], True, None), (self.events, self.wire.disconnected, reader.reason))
        reader.producer.pauseProducing()
        reader.producer.resumeProducing()
        self.wire.say(b"llo")
        self.clock.advance(0)
        self.assertEqual((b"he", "the request to up:80 was given up"), (reader.data, str(reader.reason)))

    def test_cancel(self) -> None:
        """Cancelling a request before its answer aborts the connection at once."""
        head = self.send()
        head.cancel()
        self.failureResultOf(head, CancelledError)
        self.assertEqual((["gone"], True), (self.events, self.wire.disconnected))
        self.clock.advance(0)
        self.assertEqual(["gone"], self.events)

    def test_collector_fails(self) -> None:
        """A collector's exception ends the connection, and treq passes it on."""

        def collector(_: bytes) -> None:
            raise ZeroDivisionError

        done = self.send().addCallback(treq.collect, collector)
        self.wire.say(HELLO[:-3])
        self.failureResultOf(done, ZeroDivisionError)
        self.assertTrue(self.wire.disconnected)


class SendingTests(ConnectionTestCase):
    """Requests on the wire."""

    def test_in_one_piece(self) -> None:
        """Head and body go out together."""
        writes: list[bytes] = []
        self.wire.write = writes.append  # type: ignore[method-assign]
        self.wire.writeSequence = lambda pieces: writes.append(b"".join(pieces))  # type: ignore[method-assign]
        self.send(BytesBody(b"body"))
        self.assertEqual([b"HEAD\r\n\r\nbody"], writes)

    def test_other_bodies(self) -> None:
        """Any other body follows the head as it is produced."""
        tap = Tap(UNKNOWN_LENGTH)
        self.send(tap)
        tap.consumer.write(b"hi")
        self.assertEqual(b"HEAD\r\n\r\n2\r\nhi\r\n", self.wire.heard())

    def test_body_fails(self) -> None:
        """A body that cannot be produced fails the request with what it failed with."""
        head = self.send(tap := Tap(5))
        tap.done.errback(ZeroDivisionError())
        self.failureResultOf(head, ZeroDivisionError)
        self.assertTrue(self.wire.disconnected)

    def test_early_answer(self) -> None:
        """An answer that does not wait for the body is delivered; the connection is not used again."""
        head = self.send(tap := Tap(5)).addCallback(treq.content)
        self.wire.say(HELLO)
        self.assertEqual(b"hello", self.successResultOf(head))
        self.assertEqual((["stop"], ["gone"]), (tap.calls, self.events))

    def test_early_answer_to_a_large_body(self) -> None:
        """The same for a body in hand of which some is still here: the next request would wait behind it."""
        for leaves, events in ((True, ["idle"]), (False, ["gone"])):
            self.setUp()
            wire: Any = self.wire
            self.patch(wire, "writeSequence", lambda _, wire=wire: wire.producer.pauseProducing())
            head = self.send(BytesBody(bytes(READ_BYTES))).addCallback(treq.content)
            if leaves:
                wire.producer.resumeProducing()
            wire.say(HELLO)
            self.assertEqual(b"hello", self.successResultOf(head))
            self.assertEqual((events, None), (self.events, wire.producer))

    def test_cancelled_body(self) -> None:
        """A request that is given up produces no more of its body."""
        head = self.send(tap := Tap(5))
        head.cancel()
        self.failureResultOf(head, CancelledError)
        self.assertEqual(["stop"], tap.calls)

    def test_broken_off(self) -> None:
        """Nor does one whose connection ends, or whose answer is none."""
        for words in (b"", b"GARBAGE"):
            self.setUp()
            head = self.send(tap := Tap(5))
            self.wire.say(words)
            self.wire.end()
            self.failureResultOf(head, ConnectionBroken)
            self.assertEqual(["stop"], tap.calls)

    def test_small_reads(self) -> None:
        """A paused answer holds little, because little is read at once."""
        self.assertEqual(READ_BYTES, self.wire.bufferSize)  # type: ignore[attr-defined]

    def test_established(self) -> None:
        """Without TLS a connection can be used as soon as it is there."""
        verifyObject(IHandshakeListener, self.connection)
        self.successResultOf(self.connection.established())

    def test_handshake(self) -> None:
        """With TLS, only once the peer has proved who it is, and is not being dropped for it."""
        for dropped in (False, True):
            connection = HTTP1ClientProtocol("up:443", id, id)
            wire: Any = Wire(connection, self.clock)
            wire.transport = wire
            directlyProvides(wire, ISSLTransport)
            connection.makeConnection(wire)
            established = connection.established()
            self.assertNoResult(established)
            wire.disconnecting = dropped
            connection.handshakeCompleted()
            self.assertEqual(not dropped, established.called)


class SocketTests(SynchronousTestCase):
    """Requests into a socket, which is asked before the reactor is."""

    def setUp(self) -> None:
        """Connect to a peer who reads by hand."""
        ours, self.peer = socket.socketpair()
        self.peer.setblocking(False)
        self.reactor = MemoryReactorClock()
        self.connection = HTTP1ClientProtocol("up:80", id, id)
        self.wire: Any = Connection(ours, self.connection, self.reactor)
        self.wire.connected = True
        self.patch(self.wire, "setTcpNoDelay", id)
        self.connection.makeConnection(self.wire)
        self.addCleanup(ours.close)
        self.addCleanup(self.peer.close)

    def heard(self) -> bytes:
        """Return all that the peer is sent, the reactor's turns included."""
        heard = bytearray()
        while True:
            try:
                heard += self.peer.recv(1 << 20)
            except BlockingIOError:
                if not self.reactor.writers:
                    return bytes(heard)
                self.wire.doWrite()

    def test_at_once(self) -> None:
        """A request leaves before the reactor's next turn."""
        self.connection.request(request(BytesBody(b"body"), b"POST"))
        self.assertEqual((b"HEAD\r\n\r\nbody", set()), (self.peer.recv(100), self.reactor.writers))

    def test_more_than_fits(self) -> None:
        """What the socket does not take follows, byte by byte as it was, wherever it was cut."""
        ours = self.wire.socket
        body = random.Random(1).randbytes(4 << 20)
        for taken in (0, 3, len(b"HEAD\r\n\r\n"), 100, None):
            self.connection._exchange = None

            class Filling:
                def __getattr__(self, name: str) -> Any:
                    return getattr(ours, name)

                def sendmsg(self, pieces: list[bytes], taken: int | None = taken) -> int:
                    return int(ours.send(b"".join(pieces)[:taken]))

            self.wire.socket = Filling()
            self.connection.request(request(BytesBody(body), b"POST"))
            self.assertTrue(self.reactor.writers)
            self.assertTrue(self.heard() == b"HEAD\r\n\r\n" + body, f"after {taken}")

    def test_in_order(self) -> None:
        """What was written before leaves before."""
        self.wire.write(b"before")
        self.connection.request(request(BytesBody(b"body"), b"POST"))
        self.assertEqual(b"beforeHEAD\r\n\r\nbody", self.heard())

    def test_dead(self) -> None:
        """A socket that is dead is left to the transport to find."""
        self.peer.close()
        head = self.connection.request(request(BytesBody(b"body"), b"POST"))
        self.assertNoResult(head)
        self.wire.connectionLost(Failure(self.wire.doWrite()))
        self.failureResultOf(head, ConnectionBroken)
