"""Bad requests, recorded and our own: what is refused, however it is cut, and what comes of it."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import attrs
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.server import NOT_DONE_YET

from crabtwist.errors import Refusal
from crabtwist.gateway_request import GatewayRequest
from crabtwist.http_reader import HTTPLimits
from crabtwist.listener import GatewayFactory
from crabtwist.values import Headers
from tests.test_channel import CHUNKED, GET, POST, ChannelTestCase, Desk


@attrs.frozen
class Case:
    """One recorded request."""

    name: str
    verdict: str
    request: bytes


CASES = [
    Case(case["name"], case["verdict"], base64.b64decode(case["request_base64"]))
    for case in json.loads((Path(__file__).parent / "data" / "http1_cases.json").read_bytes())["cases"]
]

#: Cases that were made for a parser, and what a server has to answer instead.
EXCEPTIONS = {
    # OPTIONS in RTSP: llhttp reads three protocols, we serve one.
    "llhttp-method-13": "reject",
    # Neither has a Host, which ends the waiting before it begins.
    "llhttp-transfer-encoding-01": "reject",
    "llhttp-transfer-encoding-10": "reject",
}

LINGERING = 3


@attrs.frozen
class Seen:
    """What came of a request: statuses, requests handled, and whether the connection was let go."""

    statuses: list[int]
    handled: int
    closed: bool


def send(pieces: Iterable[bytes], wait_seconds: int = 0) -> Seen:
    """Send pieces to a new connection, and perhaps wait."""
    clock, resource, transport = Clock(), Desk(), StringTransport()
    channel = GatewayFactory(resource, reactor=clock).buildProtocol(None)
    channel.makeConnection(transport)
    for piece in pieces:
        channel.dataReceived(piece)
    clock.pump([1] * wait_seconds)
    statuses = [int(status) for status in re.findall(rb"HTTP/1\.[01] ([0-9]{3}) ", transport.value())]
    return Seen(statuses, len(resource.requests), transport.disconnecting)


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    """Cut bytes at places, taken modulo their length."""
    ends = sorted({place % (len(data) + 1) for place in places} | {len(data)})
    return [data[start:end] for start, end in pairwise([0, *ends])]


class HTTP1CasesTests(SynchronousTestCase):
    """Each recorded case, whole and byte by byte."""

    def check(self, verdict: str) -> None:
        cases = [case for case in CASES if EXCEPTIONS.get(case.name, case.verdict) == verdict]
        self.assertTrue(cases)
        for case in cases:
            for places in (range(0), range(len(case.request))):
                try:
                    getattr(self, f"check_{verdict}")(case.request, places)
                except self.failureException as failure:
                    self.fail(f"{case.name}, cut at {places}: {failure}")

    def check_reject(self, request: bytes, places: Iterable[int]) -> None:
        seen = send([*cut(request, places), GET], LINGERING)
        self.assertEqual(seen, Seen(seen.statuses[:1], 0, closed=True))
        self.assertGreaterEqual(seen.statuses[0], 400)

    def check_accept(self, request: bytes, places: Iterable[int]) -> None:
        seen = send(cut(request, places))
        self.assertEqual((seen.statuses[:1], seen.handled), ([200], 1))

    def check_wait(self, request: bytes, places: Iterable[int]) -> None:
        self.assertEqual(send(cut(request, places), 14), Seen([], 0, closed=False))
        self.assertEqual(send(cut(request, places), 120 + LINGERING), Seen([408], 0, closed=True))

    def check_either(self, request: bytes, places: Iterable[int]) -> None:
        seen = send(cut(request, places))
        self.assertEqual(seen.statuses[0] == 200, seen.handled > 0)
        self.assertTrue(seen.statuses[0] == 200 or seen.statuses[0] >= 400)

    def test_reject(self) -> None:
        """A bad request gets one error, and nothing of its connection reaches anybody."""
        self.check("reject")

    def test_accept(self) -> None:
        """A good request is handled once and answered."""
        self.check("accept")

    def test_wait(self) -> None:
        """Half a request is waited for until its time is up."""
        self.check("wait")

    def test_either(self) -> None:
        """What the standard leaves open is handled or refused."""
        self.check("either")

    @given(st.sampled_from(CASES), st.lists(st.integers(0, 10_000), max_size=8))
    @settings(deadline=None)
    def test_cuts(self, case: Case, places: list[int]) -> None:
        """How a request is cut into packets does not change what comes of it."""
        self.assertEqual(send(cut(case.request, places)), send([case.request]))


class StrictnessTests(ChannelTestCase):
    """Bad requests."""

    def refuse_all(self, status: int, *requests: bytes) -> None:
        for request in requests:
            self.connect()
            self.send(request)
            self.assertEqual((self.answers(), self.wire.half_closed), ([status], True), request)
            self.send(GET)
            self.assertEqual((self.answers(), self.desk.requests), ([status], []), request)

    def test_host(self) -> None:
        """There is one Host with a name or an address in it; HTTP/1.0 may do without."""
        hosts = [b"", b"a b", b"a/b", b"u@a", b"a,b", b"a..b", b"a:x", b"\xe9", b"[::1", b"a" * 64]
        self.refuse_all(400, *(b"GET / HTTP/1.1\r\nHost: " + host + b"\r\n\r\n" for host in hosts))
        self.refuse_all(400, b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n")
        self.connect()
        self.send(b"GET / HTTP/1.0\r\n\r\n")
        self.assertEqual(self.answers(), [200])

    def test_transfer_encoding(self) -> None:
        """Only one `chunked` in HTTP/1.1, without a length, says where a body ends."""
        end = b"\r\n\r\n0\r\n\r\n"
        codings = [
            b"identity",
            b"gzip",
            b"gzip, chunked",
            b"chunked, chunked",
            b"chunked, identity",
            b"",
            b"x",
        ]
        self.refuse_all(400, *(POST + b"Transfer-Encoding: " + coding + end for coding in codings))
        chunked = b"Transfer-Encoding: chunked"
        self.refuse_all(400, POST + chunked + b"\r\n" + chunked + end)
        self.refuse_all(400, POST + chunked + b"\r\nTransfer-Encoding: identity" + end)
        self.refuse_all(400, POST + chunked + b"\r\nContent-Length: 5" + end)
        self.refuse_all(400, b"POST / HTTP/1.0\r\nHost: a\r\n" + chunked + end)

    def test_content_length(self) -> None:
        """A length is one plain number."""
        lengths = [b"", b"+1", b"-1", b"0x1", b"1_0", b"1, 1", b"1 1", b"1" * 19, b"\xd9\xa1"]
        self.refuse_all(400, *(POST + b"Content-Length: " + length + b"\r\n\r\na" for length in lengths))
        self.refuse_all(400, POST + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\na")

    def test_lines(self) -> None:
        """Folded lines, half line ends and control characters are refused."""
        fields = [
            b"X: a\r\n b",
            b"X: a\r\n\tb",
            b"X: a\x07b",
            b"X: \x00",
            b"X: a\x7f",
            b"X: a\rb",
            b"X: a\nY: b",
        ]
        self.refuse_all(
            400, *(POST + field + b"\r\n\r\n" for field in [*fields, b"X : a", b"X", b": a", b"\xe9: a"])
        )

    def test_request_line(self) -> None:
        """A target is a path, without anything that could be read in two ways."""
        targets = [b"http://b/", b"*", b"a", b"//\x07", b"/\x80", b"/#f", b"/a b", b"/\t", b"?a"]
        self.refuse_all(400, *(b"OPTIONS " + target + b" HTTP/1.1\r\nHost: a\r\n\r\n" for target in targets))
        self.refuse_all(
            400, b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n", b"GET /\r\n\r\n", b"\n" + GET, b"\x16\x03\x01"
        )

    def test_methods(self) -> None:
        """Unknown methods are not implemented; those of proxies are not allowed, and told what is."""
        rest = b" / HTTP/1.1\r\nHost: a\r\n\r\n"
        self.refuse_all(501, b"FETCH" + rest, b"PURGE" + rest, b"PROPFIND" + rest)
        self.refuse_all(405, b"TRACE" + rest)
        self.assertIn(b"Allow: GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS\r\n", self.wire.value())
        self.refuse_all(405, b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n")

    def test_versions(self) -> None:
        """There are two versions."""
        versions = [b"0.9", b"1.2", b"2.0", b"3.0"]
        self.refuse_all(505, *(b"GET / HTTP/" + version + b"\r\nHost: a\r\n\r\n" for version in versions))
        self.refuse_all(400, b"GET / RTSP/1.0\r\nHost: a\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")

    def test_head_bounds(self) -> None:
        """A head is bounded in bytes, whole or not, and in fields."""
        self.refuse_all(431, POST + b"X: " + b"x" * 32768, POST + b"X: y\r\n" * 200 + b"\r\n")
        self.refuse_all(414, b"GET /" + b"x" * 32768)
        self.connect()
        self.send(POST + b"X: y\r\n" * 199 + b"\r\n")
        self.assertEqual(self.answers(), [200])

    def test_head_bound_is_exact(self) -> None:
        """The bound is the last size that is taken."""
        for excess, expected in ((0, [200]), (1, [431])):
            self.connect(limits=HTTPLimits(max_head_bytes=len(GET) - excess))
            self.send(GET + b"\r\n")
            self.assertEqual(self.answers(), expected)

    def test_chunks(self) -> None:
        """Chunks are refused that two readers could end differently."""
        bodies = [b"1\r\nab", b"0x1\r\na", b"+1\r\na", b"1 \r\na", b"1\n", b"1;\r\na", b'1;a="\r\n', b"\r\n"]
        bodies += [b"f" * 17, b"1;a\rb\r\n", b"0\r\nX: a\r\n b\r\n", b"0\r\nX\r\n"]
        self.refuse_all(400, *(CHUNKED + body for body in bodies))

    def test_chunk_extensions_are_bounded(self) -> None:
        """What chunks carry beside the body is bounded: in one line, in many, and in trailers."""
        self.refuse_all(
            400, CHUNKED + b"1;" + b"e" * 4200, CHUNKED + b"1;eeeeeeeeeeeeeeeeeeee\r\na\r\n" * 1000
        )
        self.refuse_all(400, CHUNKED + b"0\r\n" + b"T: v\r\n" * 1000, CHUNKED + b"0" * 4200)

    def test_expectations(self) -> None:
        """Nothing but 100-continue can be expected."""
        self.refuse_all(417, POST + b"Expect: 200-ok\r\n\r\n", POST + b"Expect: 100-continue, x\r\n\r\n")


class RefusalTests(ChannelTestCase):
    """How a refusal is said, and what happens after it."""

    def test_words(self) -> None:
        """A refusal is a small JSON document, and says that the connection ends."""
        self.send(b"GET / HTTP/1.1\r\n\r\n")
        head, _, body = self.answered().partition(b"\r\n\r\n")
        self.assertIn(b"\r\nConnection: close", head)
        self.assertIn(b"\r\nDate: ", head)
        self.assertIn(b"\r\nContent-Type: application/json", head)
        self.assertIn(b"\r\nX-Crabtwist-Error: bad_http", head)
        self.assertIn(b"\r\nContent-Length: %d" % len(body), head)
        self.assertEqual(json.loads(body)["error"]["type"], "invalid_request_error")

    def test_own_words(self) -> None:
        """Whoever assembles the gateway words refusals by status and path, as far as that is known."""
        asked = []

        def refuse(status: int, slug: str, message: str, path: bytes) -> tuple[Headers, bytes]:
            asked.append((status, slug, path))
            return ((b"x-mine", b"1"),), b"no"

        for request in (b"POST /v1/x?y HTTP/1.1\r\n\r\n", b"\x00", b"GET /" + b"x" * 40000):
            self.connect(refuse=refuse)
            self.send(request)
            self.assertTrue(self.wire.value().endswith(b"\r\n\r\nno"))
        self.assertEqual([path for _, _, path in asked], [b"/v1/x", b"", b"/" + b"x" * 40000])

    def test_head_method(self) -> None:
        """A refused HEAD has no body."""
        self.send(b"HEAD / HTTP/1.1\r\n\r\n")
        self.assertTrue(self.answered().endswith(b"\r\n\r\n"))

    def test_broken_words(self) -> None:
        """If a refusal cannot be worded, the connection ends all the same."""
        for how in (
            {"refuse": None},
            {"render_refusal": None},
            {"render_refusal": lambda _request, _refusal: None},
        ):
            self.connect(admit=lambda _: Refusal(401, "no", "No."), **how)
            self.send(POST + (b"Host: b\r\n\r\n" if "refuse" in how else b"\r\n"))
            self.assertTrue(self.wire.disconnected)
        self.assertEqual(len(self.flushLoggedErrors(TypeError)), 2)

    def test_lingering(self) -> None:
        """After a refusal the gateway hears the client out for a while, and then cuts it off."""
        self.send(b"POST / HTTP/1.1\r\n\r\n", b"x" * 100_000)
        self.assertTrue(self.wire.half_closed)
        self.assertEqual(self.channel._input, [])
        self.clock.advance(1.9)
        self.send(GET)
        self.assertFalse(self.wire.disconnected)
        self.clock.advance(0.1)
        self.assertTrue(self.wire.disconnected)
        self.assertEqual(self.answers(), [400])

    def test_lingering_ends_with_the_client(self) -> None:
        """When the client leaves, nothing is left to do."""
        self.send(b"POST / HTTP/1.1\r\n\r\n")
        self.hang_up()
        self.assertEqual((self.clock.getDelayedCalls(), self.factory.open_connections), ([], 0))

    def test_bytes_after_the_last(self) -> None:
        """What comes after the last request is never read as one, and takes no answer away."""
        self.desk.holds = True
        self.send(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" + GET * 1000)
        self.assertEqual(self.wire.producerState, "paused")
        self.desk.requests[0].finish()
        self.assertEqual((self.answers(), self.wire.half_closed), ([200], True))
        self.assertEqual((self.wire.producerState, self.channel._input), ("producing", []))

    def test_waits_its_turn(self) -> None:
        """A refusal does not get into the answer before it."""
        self.desk.holds = True
        self.send(GET + b"bad\r\n\r\n")
        self.desk.requests[0].write(b"first")
        self.assertEqual(self.answers(), [200])
        self.desk.requests[0].finish()
        self.assertEqual(self.answers(), [200, 400])
        self.assertIn(b"first\r\n0\r\n\r\nHTTP/1.1 400", self.wire.value())

    def test_bad_chunk_reaches_nobody(self) -> None:
        """A body that goes bad is refused in the caller's words, and its request is not handled."""
        refused: list[Refusal] = []

        def render_refusal(request: GatewayRequest, refusal: Refusal) -> None:
            refused.append(refusal)
            request.finish()

        self.connect(render_refusal=render_refusal)
        self.send(CHUNKED, b"5\r\nhello\r\n", b"x")
        self.assertEqual([(refusal.status, refusal.slug) for refusal in refused], [(400, "bad_http")])
        self.assertEqual(self.desk.requests, [])


class MisbehaviourTests(ChannelTestCase):
    """Code that does not answer as it should."""

    def test_crash(self) -> None:
        """Code that crashes before it answered is a plain 500; the client is shown nothing of it."""
        self.patch(self.desk, "render", None)
        self.send(GET + GET)
        self.assertEqual((self.answers(), self.wire.half_closed), ([500], True))
        self.assertNotIn(b"TypeError", self.wire.value())
        self.assertEqual(len(self.flushLoggedErrors(TypeError)), 1)

    def test_crash_in_mid_answer(self) -> None:
        """Code that crashes in mid-answer leaves an answer that does not look whole."""
        self.desk.holds = True
        self.send(GET)
        self.desk.requests[0].write(b"part")
        self.desk.requests[0].processingFailed(Failure(KeyError()))
        self.assertEqual((self.wire.disconnected, self.wire.value()[-4:]), (True, b"rt\r\n"))
        self.assertEqual(len(self.flushLoggedErrors(KeyError)), 1)

    def test_abort_at_once(self) -> None:
        """An answer can be aborted before it has begun."""
        self.patch(self.desk, "render", lambda request: request.abort() or NOT_DONE_YET)
        self.send(GET * 1000)
        self.assertEqual((self.answers(), self.wire.disconnected), ([], True))

    def test_closed_before_the_end(self) -> None:
        """Code that closes the connection before its answer's end may still end it."""
        self.desk.holds = True
        self.send(GET)
        self.desk.requests[0].loseConnection()
        self.desk.requests[0].finish()
        self.send(GET)
        self.assertEqual((self.wire.disconnecting, len(self.desk.requests)), (True, 1))
