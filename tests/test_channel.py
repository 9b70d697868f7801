"""The server's side of HTTP/1.1: what is taken, what is refused, in which order, and for how long."""

from __future__ import annotations

import re
import tempfile
from functools import partial
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from klein import Klein
from twisted.internet.address import UNIXAddress
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET

from crabtwist.channel import MAX_PIPELINED_BYTES
from crabtwist.errors import Refusal
from crabtwist.gateway_request import GatewayRequest
from crabtwist.http_reader import BodyReader, HTTPLimits
from crabtwist.listener import GatewayFactory

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
POST = b"POST /v1/messages HTTP/1.1\r\nHost: a\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Wire(StringTransport):
    """A transport that can be half-closed."""

    half_closed = False

    def loseWriteConnection(self) -> None:
        self.half_closed = True


class Desk(Resource):
    """Takes requests; answers each with its target unless told to hold them."""

    isLeaf = True
    holds = False

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[GatewayRequest] = []
        self.came: Deferred[GatewayRequest] = Deferred()

    def render(self, request: GatewayRequest) -> bytes | int:
        self.requests.append(request)
        if len(self.requests) == 1:
            self.came.callback(request)
        return NOT_DONE_YET if self.holds else b"<%s>" % request.uri


class ChannelTestCase(SynchronousTestCase):
    """One connection to a gateway, seen from the client's end."""

    def setUp(self) -> None:
        self.connect()

    def connect(self, **how: Any) -> None:
        """Open a new connection to a new factory."""
        self.clock, self.desk, self.wire = Clock(), Desk(), Wire()
        resource = how.pop("resource", self.desk)
        self.factory = GatewayFactory(resource, reactor=self.clock, **how)
        self.channel = self.factory.buildProtocol(None)
        self.channel.makeConnection(self.wire)

    def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.channel.dataReceived(piece)

    def hang_up(self) -> None:
        self.channel.connectionLost(Failure(ConnectionDone()))

    def answers(self) -> list[int]:
        """The statuses of all answers so far."""
        return [int(status) for status in re.findall(rb"HTTP/1\.[01] ([0-9]{3}) ", self.wire.value())]

    def answered(self) -> bytes:
        """What came since the last time."""
        answer: bytes = self.wire.value()
        self.wire.clear()
        return answer


class ReadingTests(ChannelTestCase):
    """Good requests."""

    def test_length(self) -> None:
        """A body of a known length is the request's, and what follows it is not."""
        self.send(POST + b"Content-Length: 5\r\n\r\nhel", b"lo" + GET)
        self.assertEqual([request.body for request in self.desk.requests], [b"hello", b""])
        self.assertEqual(self.answers(), [200, 200])

    def test_chunks(self) -> None:
        """Chunks are put together, however many; extensions and trailers are left out."""
        self.send(CHUNKED + b'3;a="b;c"\r\nhel\r\n02\r\nlo\r\n0\r\nX-Late: 1\r\n\r\n' + GET)
        self.send(CHUNKED + b"1\r\na\r\n" * 5000 + b"0\r\n\r\n")
        self.assertEqual([request.body for request in self.desk.requests], [b"hello", b"", b"a" * 5000])
        self.assertIsNone(self.desk.requests[0].getHeader("x-late"))

    def test_body_in_pieces(self) -> None:
        """A body is put together from pieces of any size, and what follows it is not its."""
        body = bytes(range(256)) * 100
        for sizes in ((1,) * 20, (5000, 1, 1, 5000, 4096, 4095, 2), (len(body) + 4,), (1, 9000, 9000)):
            reader, rest, position = BodyReader(len(body)), None, 0
            for size in (*sizes, len(body)):
                piece = (body + b"next")[position : position + size]
                position += size
                rest = reader.take(piece) if rest is None else rest
            self.assertEqual((body, True), (reader.body, b"next".startswith(rest or b"n")))

    @given(st.lists(st.binary(min_size=1, max_size=40)), st.lists(st.integers(0, 500)))
    @settings(deadline=None)
    def test_chunks_cut_anywhere(self, chunks: list[bytes], places: list[int]) -> None:
        """Neither the size of chunks nor that of packets changes the body."""
        self.connect()
        body = b"".join(b"%x;e\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
        stream = CHUNKED + body + b"0\r\n\r\n" + GET
        ends = sorted({place % len(stream) for place in places})
        self.send(*(stream[start:end] for start, end in zip([0, *ends], [*ends, None], strict=True)))
        self.assertEqual([request.body for request in self.desk.requests], [b"".join(chunks), b""])

    def test_body_stays_in_memory(self) -> None:
        """However large a body is, no file is made for it."""
        self.patch(tempfile, "TemporaryFile", None)
        self.send(CHUNKED, b"200000\r\n" + bytes(0x200000), b"\r\n0\r\n\r\n")
        self.assertEqual((self.desk.requests[0].body, self.answers()), (bytes(0x200000), [200]))

    def test_content(self) -> None:
        """Code that knows Twisted's requests finds the body in `content` while it answers."""
        self.desk.holds = True
        self.send(POST + b"Content-Length: 2\r\n\r\nhi")
        content: Any = self.desk.requests[0].content
        self.assertEqual(content.read(), b"hi")

    def test_fields(self) -> None:
        """A request knows its header fields as they were written and by name, and when they came."""
        self.clock.advance(7)
        self.send(b"GET / HTTP/1.1\r\nhost: a\r\nx-ONE:  1 \r\nX-Two:\t\xff\r\nx-one: 2\r\n\r\n")
        request = self.desk.requests[0]
        expected = ((b"host", b"a"), (b"x-ONE", b"1"), (b"X-Two", b"\xff"), (b"x-one", b"2"))
        self.assertEqual(request.fields, expected)
        self.assertEqual(request.requestHeaders.getRawHeaders(b"X-One"), [b"1", b"2"])
        self.assertEqual(request.head_received_at, 7)

    def test_target(self) -> None:
        """The query is kept as it was sent; its names and values are decoded for who asks."""
        self.send(b"GET /a%20b?x=1&y&x=%ff&=2?z HTTP/1.1\r\nHost: a\r\n\r\n")
        request = self.desk.requests[0]
        self.assertEqual((request.path, request.query), (b"/a%20b", b"x=1&y&x=%ff&=2?z"))
        self.assertEqual(request.args, {b"x": [b"1", b"\xff"], b"": [b"2?z"]})

    def test_forms_and_cookies(self) -> None:
        """Forms and cookies are left to those who want them."""
        form = b"Cookie: a=b\r\nContent-Type: application/x-www-form-urlencoded\r\nContent-Length: 3\r\n\r\n"
        self.send(POST + form + b"a=b")
        self.assertEqual((self.desk.requests[0].args, self.desk.requests[0].received_cookies), ({}, {}))

    def test_empty_lines(self) -> None:
        """Empty lines before a request are skipped, and start no clock."""
        self.send(GET, b"\r", b"\n\r\n")
        self.clock.advance(20)
        self.send(b"\r\n" + GET)
        self.assertEqual(self.answers(), [200, 200])

    def test_upgrade(self) -> None:
        """Who asks for another protocol gets an ordinary answer, with or without a body."""
        upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        self.send(b"GET / HTTP/1.1\r\nHost: a\r\n" + upgrade + b"\r\n")
        self.send(POST + upgrade + b"Content-Length: 2\r\n\r\nhi")
        self.send(POST + upgrade + b"Transfer-Encoding: chunked\r\n\r\n2\r\nho\r\n0\r\n\r\n")
        self.assertEqual([request.body for request in self.desk.requests], [b"", b"hi", b"ho"])

    def test_klein(self) -> None:
        """A Klein resource answers, wherever the gateway listens, and with no Host in HTTP/1.0."""
        app = Klein()

        @app.route("/models/<name>", methods=["POST"])
        async def model(request: GatewayRequest, name: str) -> bytes:
            return name.encode() + b":" + request.body

        self.connect(resource=app.resource())
        self.send(b"POST /models/x HTTP/1.1\r\nHost: [::1]:80\r\nContent-Length: 2\r\n\r\nhi")
        self.assertTrue(self.answered().endswith(b"\r\nx:hi\r\n0\r\n\r\n"))
        self.wire.hostAddr = UNIXAddress("/run/x.sock")
        self.send(b"POST /models/y HTTP/1.0\r\n\r\n")
        self.assertTrue(self.answered().endswith(b"\r\n\r\ny:"))


class HeadOfAnswersTests(ChannelTestCase):
    """What every answer says."""

    def test_no_version(self) -> None:
        """Nothing is told of what listens here."""
        self.send(GET)
        self.assertNotIn(b"Twisted", self.wire.value())


class SaidTests(ChannelTestCase):
    """Answers whose head is said as it is to be written."""

    def setUp(self) -> None:
        super().setUp()
        self.desk.holds = True
        self.writes: list[bytes] = []
        self.patch(self.wire, "write", self.writes.append)

    def ask(self, line: bytes = b"GET / HTTP/1.1") -> GatewayRequest:
        """Send a request, and return it."""
        self.send(line + b"\r\nHost: a\r\n\r\n")
        return self.desk.requests[-1]

    def test_one_write(self) -> None:
        """The head of an answer leaves with its body."""
        request = self.ask()
        request.say_head(200, ((b"x-one", b"1"), (b"date", b"now")), 4)
        self.assertEqual(self.writes, [])
        request.write(b"body")
        head = b"HTTP/1.1 200 OK\r\nx-one: 1\r\ndate: now\r\ncontent-length: 4\r\n\r\n"
        self.assertEqual(self.writes, [head + b"body"])
        request.finish()
        self.assertEqual(len(self.writes), 1)

    def test_chunks(self) -> None:
        """Without a length a body leaves in chunks, an empty one too."""
        for pieces, body in (((b"one", b"", b"two"), b"3\r\none\r\n3\r\ntwo\r\n"), ((), b"")):
            request = self.ask()
            request.say_head(200, (), None)
            for piece in pieces:
                request.write(piece)
            request.finish()
            said = b"".join(self.writes)
            self.assertIn(b"\r\ntransfer-encoding: chunked\r\n", said)
            self.assertTrue(said.endswith(b"\r\n\r\n" + body + b"0\r\n\r\n"))
            self.writes.clear()

    def test_no_body(self) -> None:
        """A head without a body leaves at its end: of nothing, for HEAD, and where there may be none."""
        for line, status, length in (
            (b"GET", 200, 0),
            (b"HEAD", 200, 4),
            (b"HEAD", 200, None),
            (b"GET", 204, None),
        ):
            request = self.ask(line + b" / HTTP/1.1")
            request.say_head(status, (), length)
            request.write(b"body" if length != 0 else b"")
            request.finish()
            self.assertTrue(b"".join(self.writes).endswith(b"\r\n\r\n"))
            self.writes.clear()

    def test_head_that_cannot_be_said(self) -> None:
        """Of a head with a name that is none nothing is said, and another one frames its body by itself."""
        request = self.ask()
        self.assertRaises(ValueError, request.say_head, 200, ((b"no name", b"1"),), None)
        request.say_head(500, (), 4)
        request.write(b"oops")
        request.finish()
        said = b"".join(self.writes)
        self.assertIn(b"\r\ncontent-length: 4\r\n", said)
        self.assertTrue(said.endswith(b"\r\n\r\noops"))
        self.assertNotIn(b"chunked", said)

    def test_flush(self) -> None:
        """The head of an answer that is still to come leaves alone if it has to."""
        request = self.ask()
        request.say_head(200, (), None)
        request.registerProducer(object(), True)
        self.assertEqual(self.writes, [])
        request.flush()
        self.assertTrue(b"".join(self.writes).endswith(b"\r\n\r\n"))

    def test_when_left(self) -> None:
        """Who wants to know is told when a client leaves, and before Twisted tells others."""
        told: list[str] = []
        for name in ("stays", "leaves"):
            request = self.ask()
            request.notifyFinish().addErrback(lambda _: told.append("finish"))
            request.when_left(partial(told.append, name))
            if name == "stays":
                request.say_head(200, (), 0)
                request.finish()
        self.hang_up()
        self.assertEqual(told, ["leaves", "finish"])


class AdmissionTests(ChannelTestCase):
    """Who may send a body."""

    def admit(self, request: GatewayRequest) -> Refusal | None:
        self.asked.append(request.path)
        request.admission = request.getHeader("x-api-key")
        return None if request.admission else Refusal(401, "no_key", "No key.", headers={"x-why": "key"})

    def connect(self, **how: Any) -> None:
        self.asked: list[bytes] = []
        super().connect(**{"admit": self.admit, **how})

    def test_refused(self) -> None:
        """Who is refused is told so at once; the body is neither awaited nor kept."""
        self.send(POST + b"Content-Length: 1000\r\nExpect: 100-continue\r\n\r\n")
        self.assertTrue(self.wire.value().startswith(b"HTTP/1.1 401 "))
        for line in (
            b"\r\nX-Why: key\r\n",
            b"\r\nConnection: close\r\n",
            b"\r\nX-Crabtwist-Error: no_key\r\n",
        ):
            self.assertIn(line, self.wire.value())
        self.send(b"x" * 1000 + GET)
        self.assertEqual((self.answers(), self.asked, self.desk.requests), ([401], [b"/v1/messages"], []))
        self.assertTrue(self.wire.half_closed)

    def test_refused_by_name(self) -> None:
        """A status has its name in the first line, also one that Twisted does not know."""
        self.connect(admit=lambda _: Refusal(429, "too_many", "Too many."))
        self.send(GET)
        self.assertTrue(self.wire.value().startswith(b"HTTP/1.1 429 Too Many Requests\r\n"))

    def test_refused_without_body(self) -> None:
        """Where nothing more is to come, the connection closes without lingering."""
        self.send(GET)
        self.assertTrue(self.wire.disconnecting)
        self.assertFalse(self.wire.half_closed)

    def test_admitted(self) -> None:
        """Who is admitted is asked for the body, once; what admission found stays with the request."""
        self.send(POST + b"X-Api-Key: k\r\nExpect: 100-Continue\r\nContent-Length: 2\r\n\r\n")
        self.assertEqual(self.answered(), CONTINUE)
        self.assertEqual((self.asked, self.desk.requests), ([b"/v1/messages"], []))
        self.send(b"h", b"i")
        self.assertEqual((self.answers(), self.asked), ([200], [b"/v1/messages"]))
        self.assertEqual(self.desk.requests[0].admission, "k")

    def test_no_needless_continue(self) -> None:
        """Where no body is announced, and in HTTP/1.0, none is asked for."""
        self.send(b"GET / HTTP/1.1\r\nHost: a\r\nX-Api-Key: k\r\nExpect: 100-continue\r\n\r\n")
        self.assertNotIn(CONTINUE, self.wire.value())
        self.connect()
        self.send(b"POST / HTTP/1.0\r\nX-Api-Key: k\r\nContent-Length: 1\r\nExpect: 100-continue\r\n\r\na")
        self.assertEqual(self.answers(), [200])

    def test_crash(self) -> None:
        """An admission that crashes refuses."""
        self.connect(admit=lambda _: 1 // 0)
        self.send(POST + b"Content-Length: 2\r\n\r\nhi")
        self.assertEqual((self.answers(), self.desk.requests), ([500], []))
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_length_over_the_limit(self) -> None:
        """A body that says it is too large is refused before it comes, but not before its sender."""
        self.connect(limits=HTTPLimits(max_body_bytes=10))
        self.send(POST + b"X-Api-Key: k\r\nContent-Length: 11\r\nExpect: 100-continue\r\n\r\n")
        self.assertEqual((self.answers(), self.desk.requests), ([413], []))
        self.assertIn(b"X-Crabtwist-Error: body_too_large\r\n", self.wire.value())
        self.connect(limits=HTTPLimits(max_body_bytes=10))
        self.send(POST + b"Content-Length: 11\r\n\r\n")
        self.assertEqual(self.answers(), [401])

    def test_chunks_over_the_limit(self) -> None:
        """A body in chunks is refused when a chunk says that it would be too large."""
        self.connect(limits=HTTPLimits(max_body_bytes=10))
        self.send(POST + b"X-Api-Key: k\r\nTransfer-Encoding: chunked\r\n\r\n6\r\nsixsix\r\n")
        self.assertEqual(self.answers(), [])
        self.send(b"5\r\n", b"fivef\r\n0\r\n\r\n" + GET)
        self.assertEqual((self.answers(), self.desk.requests), ([413], []))
        self.assertTrue(self.wire.half_closed)

    def test_limit_is_taken(self) -> None:
        """The limit is the last size that is taken."""
        self.connect(limits=HTTPLimits(max_body_bytes=10))
        self.send(POST + b"X-Api-Key: k\r\nTransfer-Encoding: chunked\r\n\r\na\r\n0123456789\r\n0\r\n\r\n")
        self.send(POST + b"X-Api-Key: k\r\nContent-Length: 10\r\n\r\n0123456789")
        self.assertEqual(self.answers(), [200, 200])


class TimeTests(ChannelTestCase):
    """How long a client may take."""

    def drip(self, data: bytes, seconds: int) -> None:
        """Send a byte a second."""
        for index in range(seconds):
            self.clock.advance(1)
            if not self.wire.half_closed:
                self.send(data[index : index + 1] or b"x")

    def test_first_head(self) -> None:
        """The first head's time runs from connecting; bytes do not prolong it."""
        self.clock.advance(10)
        self.drip(POST, 4)
        self.assertEqual(self.answers(), [])
        self.drip(POST, 1)
        self.assertEqual(self.answers(), [408])
        self.assertTrue(self.wire.half_closed)

    def test_later_head(self) -> None:
        """A later head's time runs from its first byte."""
        self.send(GET)
        self.clock.advance(74)
        self.send(b"G")
        self.drip(b"ET /", 14)
        self.assertEqual(self.answers(), [200])
        self.drip(b"", 1)
        self.assertEqual(self.answers(), [200, 408])

    def test_silence_before_the_first_head(self) -> None:
        """Who connects and says nothing is let go without a word."""
        self.clock.advance(15)
        self.assertEqual((self.answers(), self.wire.disconnecting), ([], True))

    def test_body(self) -> None:
        """A body's time runs from the head's end, in chunks or not; bytes do not prolong it."""
        for head in (POST + b"Content-Length: 500\r\n\r\n", CHUNKED + b"500\r\n"):
            self.connect()
            self.clock.advance(14)
            self.send(head)
            self.drip(b"", 119)
            self.assertEqual(self.answers(), [])
            self.drip(b"", 1)
            self.assertEqual((self.answers(), self.desk.requests), ([408], []))

    def test_idle(self) -> None:
        """Between requests a connection is kept for a while."""
        self.send(GET)
        self.clock.pump([1] * 74)
        self.assertFalse(self.wire.disconnecting)
        self.clock.advance(1)
        self.assertEqual((self.answers(), self.wire.disconnecting), ([200], True))

    def test_answering(self) -> None:
        """An answer may take as long as it takes."""
        self.desk.holds = True
        self.send(GET)
        self.clock.pump([10] * 1000)
        self.desk.requests[0].finish()
        self.assertEqual((self.answers(), self.wire.disconnecting), ([200], False))

    def test_closing(self) -> None:
        """A client that does not fetch the end of its last answer is cut off."""
        self.send(b"GET / HTTP/1.0\r\n\r\n")
        self.assertTrue(self.wire.disconnecting)
        self.clock.advance(59)
        self.assertFalse(self.wire.disconnected)
        self.clock.advance(1)
        self.assertTrue(self.wire.disconnected)

    def test_one_delayed_call(self) -> None:
        """A connection has one delayed call, which requests do not replace."""
        alarms = self.clock.getDelayedCalls()
        for _ in range(100):
            self.send(GET, POST + b"Content-Length: 2\r\n\r\nh", b"i")
        self.assertEqual((len(alarms), self.clock.getDelayedCalls()), (1, alarms))
        self.hang_up()
        self.assertEqual(self.clock.getDelayedCalls(), [])


class PipeliningTests(ChannelTestCase):
    """Requests that are sent ahead."""

    def test_order(self) -> None:
        """One request is handled at a time, and answered before the next."""
        self.desk.holds = True
        self.send(GET + GET.replace(b"/ ", b"/second ") + GET)
        self.assertEqual(len(self.desk.requests), 1)
        self.desk.requests[0].finish()
        self.desk.requests[1].write(b"2")
        self.assertEqual([request.path for request in self.desk.requests], [b"/", b"/second"])
        self.assertEqual(self.answers(), [200, 200])

    def test_many(self) -> None:
        """Requests that are answered at once are as many as a client likes."""
        self.send(GET * 2000)
        self.assertEqual(self.answers(), [200] * 2000)

    def test_bound(self) -> None:
        """Who sends too much ahead is read no further until the answer is out."""
        self.desk.holds = True
        self.send(GET, GET[:-2] + b"X: ", b"x" * (MAX_PIPELINED_BYTES - len(GET) - 1))
        self.assertEqual(self.wire.producerState, "producing")
        self.send(b"x")
        self.assertEqual(self.wire.producerState, "paused")
        self.desk.requests[0].finish()
        self.assertEqual((self.wire.producerState, self.answers()), ("producing", [200]))

    def test_bound_in_one_packet(self) -> None:
        """That holds also for what comes together with the request."""
        self.desk.holds = True
        self.send(GET + GET * 1000)
        self.assertEqual(self.wire.producerState, "paused")
        self.desk.requests[0].finish()
        self.assertEqual((self.wire.producerState, len(self.desk.requests)), ("paused", 2))

    def test_unread_answers(self) -> None:
        """Who does not fetch answers is given no more of them until the rest has left."""
        self.desk.holds = True
        self.send(GET * 2)
        self.channel.pauseProducing()
        self.desk.requests[0].finish()
        self.assertEqual(len(self.desk.requests), 1)
        self.channel.resumeProducing()
        self.assertEqual(len(self.desk.requests), 2)

    def test_body_ahead(self) -> None:
        """A body that is sent ahead comes through whole."""
        self.desk.holds = True
        self.send(GET + CHUNKED, b"5\r\nhe", b"llo\r\n", b"0\r\n")
        self.desk.requests[0].finish()
        self.send(b"\r\n")
        self.assertEqual(self.desk.requests[1].body, b"hello")
