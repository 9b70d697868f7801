"""What goes out on the wire."""

from __future__ import annotations

from io import BytesIO
from typing import Any

from twisted.internet.defer import Deferred, fail
from twisted.internet.task import Clock, Cooperator
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.client import FileBodyProducer
from twisted.web.http_headers import Headers
from twisted.web.iweb import UNKNOWN_LENGTH, IBodyProducer, IClientRequest
from zope.interface import implementer
from zope.interface.verify import verifyObject

from crabtwist.http_client import BytesBody, HTTP1Request, OrderedHeaders
from crabtwist.http_request import Upload, render_head
from tests.network import Wire


def head(*fields: tuple[bytes, bytes], method: bytes = b"GET", body: Any = None) -> list[bytes]:
    """Return a request's head, line by line."""
    rendered = render_head(method, b"/v1?x=1", b"up.test", OrderedHeaders(fields), body)
    assert rendered.endswith(b"\r\n\r\n")
    return rendered[:-4].split(b"\r\n")


class HeadTests(SynchronousTestCase):
    """The request line and the fields."""

    def test_as_given(self) -> None:
        """Fields go out in their order, spelling and repetition."""
        fields = (b"x-b", b"1"), (b"HOST", b"other"), (b"X-a", b""), (b"X-B", b"caf\xc3\xa9")
        lines = [b"GET /v1?x=1 HTTP/1.1", b"x-b: 1", b"HOST: other", b"X-a: ", b"X-B: caf\xc3\xa9"]
        self.assertEqual(lines, head(*fields))

    def test_host_first(self) -> None:
        """A host is named, before the rest, if the fields name none; nothing else is added."""
        self.assertEqual([b"GET /v1?x=1 HTTP/1.1", b"Host: up.test", b"a: b"], head((b"a", b"b")))

    def test_framing_is_ours(self) -> None:
        """Whatever the fields say of the body's length, the body itself is believed."""
        given = (b"content-length", b"9"), (b"Transfer-Encoding", b"gzip"), (b"host", b"h")
        self.assertEqual([b"host: h", b"Content-Length: 2"], head(*given, body=BytesBody(b"hi"))[1:])

    def test_no_body(self) -> None:
        """A POST without a body says so; a GET does not."""
        self.assertEqual(b"Content-Length: 0", head(method=b"POST")[-1])
        self.assertEqual(b"Host: up.test", head()[-1])

    def test_plain_headers(self) -> None:
        """Twisted's own `Headers` will do."""
        rendered = render_head(b"GET", b"/", b"h", Headers({b"x-a": [b"1", b"2"]}), None)
        self.assertEqual(b"GET / HTTP/1.1\r\nHost: h\r\nX-A: 1\r\nX-A: 2\r\n\r\n", rendered)

    def test_control_characters(self) -> None:
        """A value that could end its line, or a parser's string, is refused and not repeated."""
        for evil in (b"a\r\nb: c", b"a\nb", b"a\rb", b"secret\0", b"\x7f", b"\x0b"):
            error = self.assertRaises(ValueError, head, (b"Authorization", evil))
            self.assertEqual("a control character in the value of the header field Authorization", str(error))

    def test_not_tokens(self) -> None:
        """Names and methods that are no tokens are refused."""
        for evil in (b"", b"a b", b"a:", b"a\r\n", b"\xc3\xa4"):
            self.assertRaises(ValueError, head, (evil, b"x"))
            self.assertRaises(ValueError, head, method=evil)

    def test_request(self) -> None:
        """A request shows neither its URI's query nor its fields when printed."""
        request = HTTP1Request(b"GET", b"http://h/?key=secret", Headers({b"a": [b"secret"]}), b"secret")
        verifyObject(IClientRequest, request)
        self.assertNotIn("secret", repr(request))


class OrderedHeadersTests(SynchronousTestCase):
    """Fields in order that are also `Headers`."""

    def test_look_up(self) -> None:
        """They can be looked up like any other."""
        headers = OrderedHeaders([(b"X-a", b"1"), (b"b", b"2"), (b"x-A", b"3")])
        self.assertEqual([b"1", b"3"], headers.getRawHeaders(b"X-A"))

    def test_changes(self) -> None:
        """What is changed by the methods of `Headers` goes out changed."""
        headers = OrderedHeaders([(b"X-a", b"1"), (b"b", b"2")]).copy()
        headers.addRawHeader("c", "3")
        headers.setRawHeaders(b"x-A", [b"4", b"5"])
        headers.removeHeader("B")
        self.assertEqual(((b"c", b"3"), (b"x-A", b"4"), (b"x-A", b"5")), headers.fields)
        self.assertEqual({b"C": [b"3"], b"X-A": [b"4", b"5"]}, dict(headers.getAllRawHeaders()))


@implementer(IBodyProducer)
class Tap:
    """A body that is produced by hand."""

    def __init__(self, length: Any, done: Deferred[None] | None = None) -> None:
        self.length = length
        self.calls: list[str] = []
        self.done: Deferred[None] = done or Deferred()
        self.consumer: Any = None

    def startProducing(self, consumer: Any) -> Deferred[None]:
        self.consumer = consumer
        return self.done

    def pauseProducing(self) -> None:
        self.calls.append("pause")

    def resumeProducing(self) -> None:
        self.calls.append("resume")

    def stopProducing(self) -> None:
        self.calls.append("stop")


class UploadTests(SynchronousTestCase):
    """Bodies that are not in hand."""

    def upload(self, body: Any) -> Upload:
        """Start to upload a body."""
        self.errors: list[Exception] = []
        self.wire = Wire(None, Clock())
        upload = Upload(self.wire, body, self.errors.append)
        upload.start()
        return upload

    def test_bytes_body(self) -> None:
        """A body in hand keeps the contract too, for agents that do not know it."""
        verifyObject(IBodyProducer, BytesBody(b"hi"))
        self.assertTrue(self.upload(BytesBody(b"hi")).finished)
        self.assertEqual(b"hi", self.wire.heard())

    def test_file(self) -> None:
        """A file of known length goes out as it is."""
        clock = Clock()
        cooperator = Cooperator(scheduler=lambda call: clock.callLater(0, call))
        upload = self.upload(FileBodyProducer(BytesIO(b"hello"), cooperator))
        clock.pump([0.1] * 3)
        self.assertEqual((b"hello", True), (self.wire.heard(), upload.finished))

    def test_chunked(self) -> None:
        """A body of unknown length goes out in chunks."""
        tap = Tap(UNKNOWN_LENGTH)
        upload = self.upload(tap)
        tap.consumer.write(b"hello world")
        tap.consumer.write(b"")
        tap.done.callback(None)
        self.assertEqual(b"b\r\nhello world\r\n0\r\n\r\n", self.wire.heard())
        self.assertEqual((True, None), (upload.finished, self.wire.producer))

    def test_too_short(self) -> None:
        """A body that ends before its length is an error."""
        tap = Tap(5)
        self.upload(tap)
        tap.consumer.write(b"hell")
        tap.done.callback(None)
        self.assertIn("shorter", str(self.errors[0]))

    def test_too_long(self) -> None:
        """A body that goes on after its length is an error, and the rest is not sent."""
        tap = Tap(3)
        self.upload(tap)
        tap.consumer.write(b"hel")
        tap.consumer.write(b"lo")
        self.assertIn("longer", str(self.errors[0]))
        tap.done.callback(None)
        self.assertEqual((["stop"], b"hel", 1), (tap.calls, self.wire.heard(), len(self.errors)))

    def test_producer_fails(self) -> None:
        """What the producer failed with is told."""
        error = ValueError("the disk is gone")
        self.upload(Tap(3, fail(error)))
        self.assertEqual([error], self.errors)
        tap = Tap(3)
        tap.startProducing = lambda consumer: 1 // 0  # type: ignore[assignment,method-assign,return-value]
        self.upload(tap)
        self.assertIsInstance(self.errors[0], ZeroDivisionError)

    def test_brakes(self) -> None:
        """A full socket pauses the producer; a socket that is gone stops it, once."""
        tap = Tap(3)
        upload = self.upload(tap)
        producer: Any = self.wire.producer
        producer.pauseProducing()
        producer.resumeProducing()
        producer.stopProducing()
        upload.stopProducing()
        self.assertEqual((["pause", "resume", "stop"], None), (tap.calls, self.wire.producer))
