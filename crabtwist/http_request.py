"""
A request as it goes out over HTTP/1.1: names, order and spelling of its fields, byte by byte as given.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Sequence
from typing import Any, AnyStr, Final

import attrs
from twisted.internet.defer import Deferred, maybeDeferred, succeed
from twisted.internet.interfaces import IConsumer, IPushProducer
from twisted.web.http_headers import Headers as HeaderMap
from twisted.web.iweb import UNKNOWN_LENGTH, IBodyProducer, IClientRequest
from zope.interface import implementer

from crabtwist.headers import header_map
from crabtwist.values import Headers

#: What a method, or a field's name, is made of (RFC 9110, 5.6.2).
_TOKEN: Final = b"!#$%&'*+-.^_`|~" + string.digits.encode() + string.ascii_letters.encode()
_CONTROLS: Final = bytes([*range(9), *range(10, 32), 127])
_FRAMING = frozenset({b"content-length", b"transfer-encoding"})
_EMPTY_BODY_MEANS_SOMETHING = frozenset({b"POST", b"PUT", b"PATCH"})


@implementer(IBodyProducer)
class BytesBody:
    """A request's body that is in hand, whole: it can be sent in one write, and once more."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.length = len(data)

    def startProducing(self, consumer: IConsumer) -> Deferred[None]:
        """Write it all; the Deferred has fired."""
        consumer.write(self.data)
        return succeed(None)

    def pauseProducing(self) -> None:
        """Do nothing: there is nothing to come."""

    def resumeProducing(self) -> None:
        """Do nothing: there is nothing to come."""

    def stopProducing(self) -> None:
        """Do nothing: there is nothing to come."""


class OrderedHeaders(HeaderMap):
    """
    Header fields that go out exactly as given: order, repetition and spelling.

    `fields` are what is sent.  A name that is no token (RFC 9110, 5.1) raises ValueError when it is looked
    up, or sent.
    """

    def __init__(self, fields: Iterable[tuple[bytes, bytes]] = ()) -> None:
        self.fields: Headers = tuple(fields)

    @property
    def _rawHeaders(self) -> dict[bytes, Sequence[bytes]]:  # type: ignore[override] # there it is written, too
        # Where `Headers` looks fields up.  That is rare, so each look pays for itself.
        return dict(header_map(self.fields).getAllRawHeaders())

    def copy(self) -> OrderedHeaders:
        """Return another with the same fields."""
        return OrderedHeaders(self.fields)

    def addRawHeader(self, name: str | bytes, value: str | bytes) -> None:
        """Add a field at the end."""
        self.fields += ((_encoded(name), value.encode() if isinstance(value, str) else value),)

    def setRawHeaders(self, name: str | bytes, values: Sequence[str | bytes]) -> None:
        """Replace every field of that name; the new ones stand at the end."""
        self.removeHeader(_encoded(name))
        for value in values:
            self.addRawHeader(name, value)

    def removeHeader(self, name: AnyStr) -> None:
        """Remove every field of that name."""
        unwanted = _encoded(name).lower()
        self.fields = tuple(field for field in self.fields if field[0].lower() != unwanted)


def _encoded(name: str | bytes) -> bytes:
    return name.encode("iso-8859-1") if isinstance(name, str) else name


def _fields(headers: HeaderMap | None) -> Iterable[tuple[bytes, bytes]]:
    if headers is None:
        return ()
    if isinstance(headers, OrderedHeaders):
        return headers.fields
    return [(name, value) for name, values in headers.getAllRawHeaders() for value in values]


def _framing(method: bytes, body: IBodyProducer | None) -> list[bytes]:
    if body is None:
        return [b"Content-Length: 0"] if method in _EMPTY_BODY_MEANS_SOMETHING else []
    if body.length == UNKNOWN_LENGTH:
        return [b"Transfer-Encoding: chunked"]
    return [b"Content-Length: %d" % body.length]


def render_head(
    method: bytes, target: bytes, host: bytes, headers: HeaderMap | None, body: IBodyProducer | None
) -> bytes:
    """
    Return a request's head as it goes out.

    `target` is the path and query as they stand.  `Host` is added, first, if `headers` has none; the
    fields that frame the body are always our own.  Raises ValueError, which never holds a value, for a
    method or name that is no token and for control characters in a value.
    """
    fields = _fields(headers)
    names = [name.lower() for name, _ in fields]
    lines = [b"%b %b HTTP/1.1" % (method, target)]
    if b"host" not in names:
        lines.append(b"Host: " + host)
    lines += [b": ".join(field) for field, name in zip(fields, names, strict=True) if name not in _FRAMING]
    lines += _framing(method, body)
    head = b"\r\n".join([*lines, b"", b""])
    # All at once, as nearly all pass: nothing but the lines' own ends may end one.
    own_bytes = len(b"\r\n") * (len(lines) + 1)
    if (
        b"" in (method, *names)
        or b"".join((method, *names)).translate(None, _TOKEN)
        or len(head.translate(None, _CONTROLS)) + own_bytes != len(head)
    ):
        raise ValueError(_complaint(method, fields))
    return head


def _complaint(method: bytes, fields: Iterable[tuple[bytes, bytes]]) -> str:
    if not method or method.translate(None, _TOKEN):
        return f"not an HTTP method: {method!r}"
    for name, value in fields:
        if not name or name.translate(None, _TOKEN):
            return f"not a header field's name: {name!r}"
        if value.translate(None, _CONTROLS) != value:
            return f"a control character in the value of the header field {name.decode()}"
    return "a control character in the request's target"


@implementer(IClientRequest)
@attrs.frozen(eq=False)
class HTTP1Request:
    """A request that is ready to go: `head` is what `render_head` returned."""

    method: bytes
    absoluteURI: bytes = attrs.field(repr=False)
    headers: HeaderMap = attrs.field(repr=False)
    head: bytes = attrs.field(repr=False)
    body: IBodyProducer | None = attrs.field(repr=False, default=None)

    @property
    def whole_body(self) -> bytes | None:
        """The body, if it is all in hand (b"" if there is none), so that it can be sent again; else None."""
        if self.body is None:
            return b""
        return self.body.data if isinstance(self.body, BytesBody) else None

    def without_body(self) -> HTTP1Request:
        """Return what is left of it once its body has gone out."""
        return HTTP1Request(self.method, self.absoluteURI, self.headers, self.head)


@implementer(IPushProducer)
class Sending:
    """A body in hand on its way out: `finished` once the transport holds no more than a buffer of it."""

    def __init__(self, transport: Any) -> None:
        self.finished = True
        self._transport = transport

    def send(self, pieces: list[bytes]) -> None:
        """Write them all; only a transport that is a producer's consumer tells when they have left."""
        self._transport.registerProducer(self, streaming=True)
        self._transport.writeSequence(pieces)
        if self.finished:
            self._transport.unregisterProducer()

    def pauseProducing(self) -> None:
        """Learn that some of it waits."""
        self.finished = False

    def resumeProducing(self) -> None:
        """Learn that it has left."""
        if not self.finished:
            self.finished = True
            self._transport.unregisterProducer()

    stopProducing = resumeProducing


@implementer(IConsumer, IPushProducer)
class Upload:
    """Pours a body that is not in hand into a connection, and sees to it that it is as long as promised."""

    def __init__(
        self, transport: Any, producer: IBodyProducer, on_failure: Callable[[Exception], None]
    ) -> None:
        self.finished = False
        self._transport = transport
        self._producer = producer
        self._on_failure = on_failure
        self._stopped = False
        self._chunked = producer.length == UNKNOWN_LENGTH
        self._bytes_to_come = 0 if self._chunked else int(producer.length)

    def start(self) -> None:
        """Begin; `on_failure` is called if the producer fails or breaks its promise."""
        # Registered in its place, because a transport that is lost would stop the producer a second time.
        self._transport.registerProducer(self, streaming=True)
        producing = maybeDeferred(self._producer.startProducing, self)
        producing.addCallbacks(self._produced, lambda reason: self._fail(reason.value))

    def write(self, data: bytes) -> None:
        """Send some of the body."""
        if self._stopped or not data:
            return
        if self._chunked:
            self._transport.writeSequence([b"%x\r\n" % len(data), data, b"\r\n"])
        elif len(data) > self._bytes_to_come:
            self._fail(ValueError("the request's body is longer than it promised to be"))
        else:
            self._bytes_to_come -= len(data)
            self._transport.write(data)

    def _produced(self, _: object) -> None:
        if self._stopped:
            return
        if self._bytes_to_come:
            self._fail(ValueError("the request's body is shorter than it promised to be"))
            return
        if self._chunked:
            self._transport.write(b"0\r\n\r\n")
        self.finished = self._stopped = True
        self._transport.unregisterProducer()

    def _fail(self, error: Exception) -> None:
        if not self._stopped:
            self.stopProducing()
            self._on_failure(error)

    def registerProducer(self, producer: object, streaming: bool) -> None:  # noqa: FBT001 - IConsumer's
        """Do nothing: this is the producer's consumer already."""

    def unregisterProducer(self) -> None:
        """Do nothing: `startProducing`'s Deferred says when."""

    def pauseProducing(self) -> None:
        """Pass on that the socket is full."""
        self._producer.pauseProducing()

    def resumeProducing(self) -> None:
        """Pass on that the socket is not full any more."""
        self._producer.resumeProducing()

    def stopProducing(self) -> None:
        """Want no more."""
        if not self._stopped:
            self._stopped = True
            self._transport.unregisterProducer()
            self._producer.stopProducing()
