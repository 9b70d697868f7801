"""
The server's side of HTTP/1.1: strict in what it takes, bounded in what it keeps.

Twisted's channel writes; the reading is ours.  llhttp judges each head and each chunk byte by byte, and
is never fed past the end of one, so what belongs to which request is decided here and only once.
Whatever two servers could read differently is refused (RFC 9112, section 11.2), and after a refusal
nothing more of that connection is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from io import BytesIO
from typing import Any, Protocol

import attrs
from httptools import HttpParserError, HttpParserInvalidMethodError, HttpParserUpgrade, HttpRequestParser
from twisted.internet.abstract import FileDescriptor
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.python.failure import Failure
from twisted.web import http, server
from twisted.web.http_headers import Headers as HeaderMap

from crabtwist.errors import Refusal
from crabtwist.values import Headers

#: Unsent bytes of an answer that make Twisted pause its producer; also the most that one read brings.
RESPONSE_BUFFER_BYTES = 16 * 1024
#: What a client may send ahead while its request is handled, before its connection is read no further.
MAX_PIPELINED_BYTES = 16 * 1024

METHODS = (b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS")

_REQUEST_LINE = re.compile(rb"([^ ]+) ([^ ]+) HTTP/([0-9]\.[0-9])\r\n")
_METHOD_AND_PATH = re.compile(rb"([A-Z-]+)(?: (/[^ ?\r\n]*)?|\Z)")
_TARGET = re.compile(rb"/[!\"$-~]*")
#: Control characters, half line ends, and lines that go on in the next one (obs-fold).
_FORBIDDEN = re.compile(rb"[^\t\r\n -~\x80-\xff]|\r(?!\n)|(?<!\r)\n|\n[ \t]")
_HOST = re.compile(
    rb"(?:[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*\.?|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?"
)
_CONTENT_LENGTH = re.compile(rb"[0-9]{1,18}")
#: The longest line that says a chunk's size and nothing else: llhttp takes no larger number.
_SIZE_LINE_BYTES = 18
_CHUNKED_HEAD = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


@attrs.frozen
class HTTPLimits:
    """
    What one client connection may cost.

    `max_head_bytes` counts the request line and all header fields.  Times are seconds and absolute: no
    byte prolongs them.  `head_timeout_seconds` runs from a head's first byte (from connecting, for the
    first), `body_timeout_seconds` from the head's end, `keep_alive_timeout_seconds` between requests.
    `linger_seconds` is how long a refused client may go on sending into the void before it is cut off;
    `flush_timeout_seconds` how long a closing connection may take to fetch the end of its last answer.
    `max_chunk_extension_bytes` counts, over a whole body, what chunks carry besides size and data.
    """

    max_body_bytes: int = 32 * 1024 * 1024
    max_head_bytes: int = 32 * 1024
    max_headers: int = 200
    max_chunk_extension_bytes: int = 4096
    head_timeout_seconds: float = 15.0
    body_timeout_seconds: float = 120.0
    keep_alive_timeout_seconds: float = 75.0
    linger_seconds: float = 2.0
    flush_timeout_seconds: float = 60.0


def _bad(message: str, status: int = 400, **headers: str) -> Refusal:
    return Refusal(status, "bad_http", f"This is not HTTP as it is spoken here: {message}.", headers=headers)


def too_large(limits: HTTPLimits) -> Refusal:
    """Return the refusal of a body that is larger than the limit."""
    return Refusal(413, "body_too_large", f"The body is larger than {limits.max_body_bytes} bytes.")


@attrs.frozen
class Head:
    """A good head; `length` is its body's in bytes, None if that comes in chunks."""

    method: bytes
    target: bytes
    version: bytes
    fields: Headers
    headers: HeaderMap
    length: int | None
    keep_alive: bool
    awaits_continue: bool


def judge(raw: bytes, fields: Headers, limits: HTTPLimits) -> Head:
    """Say what a whole head asks for, or refuse it."""
    line = _REQUEST_LINE.match(raw)
    if line is None or _FORBIDDEN.search(raw):
        raise _bad("the head is malformed")
    method, target, version = line.groups()
    _check_request_line(method, target, version)
    if len(fields) > limits.max_headers:
        raise _bad(f"there are more than {limits.max_headers} header fields", 431)
    headers = HeaderMap()
    for name, value in fields:
        headers.addRawHeader(name, value)
    is_1_1 = version == b"1.1"
    _check_host(headers.getRawHeaders(b"host", []), is_required=is_1_1)
    return Head(
        method,
        target,
        b"HTTP/" + version,
        fields,
        headers,
        _body_length(headers, may_be_chunked=is_1_1),
        is_1_1 and b"close" not in tokens(headers, b"connection"),
        is_1_1 and _awaits_continue(headers),
    )


def _check_request_line(method: bytes, target: bytes, version: bytes) -> None:
    if version not in (b"1.0", b"1.1"):
        raise _bad("only versions 1.0 and 1.1 are", 505)
    if method not in METHODS:
        known = method in (b"CONNECT", b"TRACE")
        raise _bad("the method is not served", 405 if known else 501, allow=b", ".join(METHODS).decode())
    if _TARGET.fullmatch(target) is None:
        raise _bad("the target is not a path, with or without a query")


def _check_host(values: Sequence[bytes], *, is_required: bool) -> None:
    # RFC 9112, section 3.2; RFC 9110, section 4.2.1: an http URI has a host.
    if len(values) > 1 or (is_required and not values) or not all(map(_HOST.fullmatch, values)):
        raise _bad("there must be one Host field, with a name or an address in it")


def _body_length(headers: HeaderMap, *, may_be_chunked: bool) -> int | None:
    """Return the body's length in bytes, None for chunks (RFC 9112, section 6)."""
    codings = headers.getRawHeaders(b"transfer-encoding", [])
    lengths = headers.getRawHeaders(b"content-length", [])
    if codings:
        if not may_be_chunked or lengths or [coding.lower() for coding in codings] != [b"chunked"]:
            raise _bad("the only Transfer-Encoding is one chunked, in HTTP/1.1, without a Content-Length")
        return None
    if len(lengths) > 1 or not all(map(_CONTENT_LENGTH.fullmatch, lengths)):
        raise _bad("Content-Length must be one number")
    return int(lengths[0]) if lengths else 0


def tokens(headers: HeaderMap, name: bytes) -> set[bytes]:
    """Return the members of a field that is a list of words, in lower case."""
    values = headers.getRawHeaders(name, [])
    return {token.strip(b" \t").lower() for value in values for token in value.split(b",")}


def _awaits_continue(headers: HeaderMap) -> bool:
    expected = tokens(headers, b"expect")
    if expected - {b"100-continue"}:
        raise _bad("nothing but 100-continue can be expected", 417)
    return bool(expected)


class HeadReader:
    """
    One head as it comes.

    `take` and `judge` raise `Refusal`.  Reader and parser are kept from knowing each other, here and
    below, so that no cycle waits for the garbage collector.
    """

    def __init__(self, limits: HTTPLimits) -> None:
        self.has_begun = False
        self._limits = limits
        self._raw = bytearray()
        self._parsed_bytes = 0
        self._heard = _HeardHead()
        self._parser = HttpRequestParser(self._heard)

    def take(self, data: bytes) -> bytes | None:
        """Return what follows the head, or None if its end has not come."""
        self._raw += data
        # Some clients send an empty line after a body (RFC 9112, section 2.2).
        while not self.has_begun and self._raw.startswith(b"\r\n"):
            del self._raw[:2]
        if not self._raw or self._raw == b"\r":
            return None
        self.has_begun = True
        blank = self._raw.find(b"\r\n\r\n", max(0, self._parsed_bytes - 3))
        stop = len(self._raw) if blank < 0 else blank + 4
        if stop > self._limits.max_head_bytes:
            raise _bad("the head is too large", 431 if b"\r\n" in self._raw else 414)
        self._parse(bytes(self._raw[self._parsed_bytes : stop]))
        self._parsed_bytes = stop
        rest = bytes(self._raw[stop:])
        del self._raw[stop:]
        return None if blank < 0 else rest

    def _parse(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except HttpParserUpgrade:
            # llhttp stops where another protocol may begin.  None does.
            pass
        except HttpParserInvalidMethodError as error:
            raise _bad("the method is not known", 501 if self.method_and_path[0] else 400) from error
        except HttpParserError as error:
            raise _bad(str(error), 505 if "version" in str(error) else 400) from error

    @property
    def method_and_path(self) -> tuple[bytes, bytes]:
        """What can be told of them yet; b"" for what cannot."""
        match = _METHOD_AND_PATH.match(self._raw)
        return (bytes(match[1]), bytes(match[2] or b"")) if match else (b"", b"")

    def judge(self) -> Head:
        """Return the whole head, if it is good."""
        if not self._heard.is_complete:
            raise _bad("the head is malformed")
        return judge(bytes(self._raw), tuple(self._heard.fields), self._limits)


class _HeardHead:
    """What llhttp calls while it reads a head."""

    def __init__(self) -> None:
        self.fields: list[tuple[bytes, bytes]] = []
        self.is_complete = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name, value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        self.is_complete = True


class BodyReader:
    """One body of a known length."""

    def __init__(self, length: int) -> None:
        self.body = b""
        self._missing_bytes = length
        self._parts = bytearray()

    def take(self, data: bytes) -> bytes | None:
        """Return what follows the body, or None if its end has not come."""
        piece = data[: self._missing_bytes]
        self._missing_bytes -= len(piece)
        if self._missing_bytes or self._parts:
            self._parts += piece
        if self._missing_bytes:
            return None
        self.body = bytes(self._parts) or piece
        self._parts = bytearray()
        return data[len(piece) :]


class ChunkReader:
    """One body in chunks (RFC 9112, section 7.1)."""

    def __init__(self, limits: HTTPLimits) -> None:
        self.body = b""
        self._limits = limits
        self._room_bytes = limits.max_body_bytes
        self._spare_bytes = limits.max_chunk_extension_bytes + _SIZE_LINE_BYTES
        self._line = bytearray()
        self._data_bytes = 0
        self._heard = _HeardChunks()
        self._parser = HttpRequestParser(self._heard)
        # A parser of its own: the head's has stopped for good if the head spoke of an upgrade.
        self._parser.feed_data(_CHUNKED_HEAD)

    def take(self, data: bytes) -> bytes | None:
        """Return what follows the body, or None if its end has not come.  Raises `Refusal`."""
        position = 0
        while position < len(data) and not self._heard.is_complete:
            if self._data_bytes:
                stop = min(len(data), position + self._data_bytes)
                self._data_bytes -= stop - position
                self._parse(data[position:stop])
            else:
                # The body ends with a line, so llhttp is never given more than one.
                stop = data.find(b"\n", position) + 1 or len(data)
                self._take_line(data[position:stop])
            position = stop
        if not self._heard.is_complete:
            return None
        self.body = bytes(self._heard.body)
        return data[position:]

    def _take_line(self, piece: bytes) -> None:
        self._line += piece
        self._spare_bytes -= len(piece)
        if self._spare_bytes < 0:
            raise _bad("the chunks carry too much beside the body")
        self._heard.is_size = False
        self._parse(piece)
        if piece.endswith(b"\n"):
            if self._heard.is_size:
                self._expect(int(self._line.partition(b";")[0], 16))
                self._spare_bytes += min(len(self._line), _SIZE_LINE_BYTES)
            self._line.clear()

    def _expect(self, size: int) -> None:
        self._room_bytes -= size
        if self._room_bytes < 0:
            raise too_large(self._limits)
        self._data_bytes = size and size + len(b"\r\n")

    def _parse(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except HttpParserError as error:
            raise _bad(str(error)) from error


class _HeardChunks:
    """What llhttp calls while it reads chunks."""

    def __init__(self) -> None:
        self.body = bytearray()
        self.is_size = False
        self.is_complete = False

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_chunk_header(self) -> None:
        self.is_size = True

    def on_message_complete(self) -> None:
        self.is_complete = True


class GatewayRequest(server.Request):
    """
    A request with its body in memory.

    `fields` are the header fields in wire order, names as they were written, beside `requestHeaders`.
    `head_received_at` is on the factory's clock, in seconds.  `admission` is for `admit` to leave what it
    found for those who come after it; whatever type that is, it is theirs.  No cookies and no forms are
    parsed.
    """

    #: None before and after: Twisted deletes it from a finished request.
    channel: Any = None
    body: bytes = b""
    fields: Headers = ()
    head_received_at: float = 0.0
    admission: Any = None

    def take_head(self, head: Head, now: float) -> None:
        """Become the request of this head."""
        self.method, self.uri, self.clientproto = head.method, head.target, head.version
        self.path = head.target.partition(b"?")[0]
        self.requestHeaders, self.fields = head.headers, head.fields
        self.head_received_at = now

    def take_body(self, body: bytes) -> None:
        """Have this body, whole."""
        self.body = body
        self.content = BytesIO(body)

    @property
    def query(self) -> bytes:
        """What follows the target's first `?`, undecoded."""
        return self.uri.partition(b"?")[2]

    @cached_property
    def args(self) -> dict[bytes, list[bytes]]:  # type: ignore[override]  # Twisted's is a plain attribute
        """The query's names and values, decoded, those without `=` left out."""
        parsed: dict[bytes, list[bytes]] = http.parse_qs(self.query, 1)
        return parsed

    def getRequestHostname(self) -> bytes:
        """Return the host that was asked for; HTTP/1.0 need not say one, and a Unix socket has none."""
        return super().getRequestHostname() if self.getHeader(b"host") else b"localhost"

    def abort(self) -> None:
        """
        End the connection at once, so that the answer cannot be taken for a whole one.

        `notifyFinish` errbacks soon after.  Harmless when the request has ended.
        """
        if self.channel is not None:
            self.channel.abort()

    def finish(self) -> None:
        """End the answer as a whole one, unless it was aborted."""
        if self.channel is None or not self.channel.is_aborted:
            super().finish()

    def processingFailed(self, reason: Failure) -> Failure:
        """Log what the code that should have answered raised; the client is told that it failed."""
        self._log.failure("A request was not answered", failure=reason)
        if self.startedWriting:
            self.abort()
        elif self.channel is not None:
            self.channel.refuse(internal_error())
        return reason


def refuse(status: int, slug: str, message: str, path: bytes) -> tuple[Headers, bytes]:  # noqa: ARG001 - for those who word it by path
    """Return a refusal's header fields and body: OpenAI's and Anthropic's common denominator."""
    kind = "invalid_request_error" if status < 500 else "api_error"
    body = json.dumps({"error": {"type": kind, "message": message}}).encode()
    return ((b"content-type", b"application/json"), (b"x-crabtwist-error", slug.encode())), body


def render_refusal(request: GatewayRequest, refusal: Refusal) -> None:
    """Answer a request with a refusal, whole."""
    fields, body = refuse(refusal.status, refusal.slug, refusal.message, request.path)
    request.setResponseCode(refusal.status)
    for name, value in (*fields, *wire_fields(refusal), (b"content-length", b"%d" % len(body))):
        request.setHeader(name, value)
    request.write(body)
    request.finish()


def wire_fields(refusal: Refusal) -> Headers:
    """Return a refusal's own header fields as they are sent."""
    return tuple((name.encode(), value.encode()) for name, value in refusal.headers.items())


def internal_error() -> Refusal:
    """Return the refusal that stands for a fault of the gateway's own."""
    return Refusal(500, "internal_error", "The gateway failed to answer; its log says why.")


class ChannelOwner(Protocol):
    """
    What a channel asks of the factory that made it.

    `admit` is called once for each good head, before its body is taken; what it returns, or a 500 if it
    raises, is answered at once and ends the connection.  `render_refusal` answers and finishes such a
    request before it returns.  `refuse` words a refusal where there is no request: status, slug, message
    and the path (b"" if unknown) to header fields and body.  While `draining`, every answer is its
    connection's last.
    """

    limits: HTTPLimits
    reactor: IReactorTime
    draining: bool
    admit: Callable[[GatewayRequest], Refusal | None]
    render_refusal: Callable[[GatewayRequest, Refusal], None]
    refuse: Callable[[int, str, str, bytes], tuple[Headers, bytes]]

    def channel_opened(self, channel: GatewayChannel) -> None:
        """Count a channel."""

    def channel_closed(self, channel: GatewayChannel) -> None:
        """Count it no more."""


class GatewayChannel(http.HTTPChannel):
    """
    One client's connection.

    Requests are handled one at a time, in order; what a client sends ahead waits unparsed.  `is_aborted`
    says that nothing more can reach the client.  The factory sets `owner`.
    """

    owner: ChannelOwner
    requestFactory = GatewayRequest
    is_aborted = False

    def __init__(self) -> None:
        super().__init__()
        self._head: HeadReader | None = None
        self._body: BodyReader | ChunkReader | None = None
        self._input: list[bytes] = []
        self._input_bytes = 0
        self._is_advancing = self._is_ending = False
        #: Whether the client may still be sending a request that has been answered.
        self._is_unread = False
        #: The first head's time runs from connecting.
        self._is_head_timed = True
        self._deadline: float | None = None
        self._alarm: IDelayedCall | None = None

    @property
    def is_idle(self) -> bool:
        """Whether nothing of a request, and nothing of an ending, is in hand."""
        has_head = self._head is not None and self._head.has_begun
        return not (self.requests or has_head or self._input or self._is_ending)

    # The connection.

    def connectionMade(self) -> None:
        """Begin to wait for the first head."""
        super().connectionMade()
        self._set_deadline(self.owner.limits.head_timeout_seconds)
        self.owner.channel_opened(self)

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]  # as Twisted's channel has it
        """Tell whoever works on the request in hand."""
        self._is_ending = self.is_aborted = True
        self._input, self._deadline = [], None
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        try:
            super().connectionLost(reason)
        finally:
            self.owner.channel_closed(self)

    def loseConnection(self) -> None:
        """Close when all that was written has left, or after `flush_timeout_seconds`."""
        if not self._is_ending:
            self._is_ending = True
            self._set_deadline(self.owner.limits.flush_timeout_seconds)
            super().loseConnection()

    def abort(self) -> None:
        """End the connection at once: what the client has of an answer will not look whole."""
        if not self.is_aborted:
            self._is_ending = self.is_aborted = True
            self._deadline = None
            self._wire.abortConnection()

    def _linger(self) -> None:
        """
        Close when the client has, or after `linger_seconds`.

        Closing now would meet what it still sends with a reset, which can take the answer from it (RFC
        9112, section 9.6).
        """
        self._is_ending = True
        self._input = []
        self._set_deadline(self.owner.limits.linger_seconds)
        self._networkProducer.resumeProducing()
        self._wire.unregisterProducer()
        if self.isSecure():
            # TLS's own half-close: the alert goes out, and the client's is waited for.
            self._wire.loseConnection()
        elif hasattr(self._wire, "loseWriteConnection"):
            self._wire.loseWriteConnection()

    @property
    def _wire(self) -> Any:
        # zope.interface has no one name for what can be written to, half-closed and aborted.
        return self.transport

    # Time.  One delayed call, looked at when it rings: deadlines that are met in time move none.

    def _set_deadline(self, seconds: float) -> None:
        self._deadline = self.owner.reactor.seconds() + seconds
        if self._alarm is not None and self._alarm.getTime() > self._deadline:
            self._alarm.cancel()
            self._alarm = None
        if self._alarm is None:
            self._alarm = self.owner.reactor.callLater(seconds, self._ring)

    def _ring(self) -> None:
        self._alarm = None
        if self._deadline is None:
            return
        left_seconds = self._deadline - self.owner.reactor.seconds()
        if left_seconds > 0:
            self._alarm = self.owner.reactor.callLater(left_seconds, self._ring)
        else:
            self._deadline = None
            self._be_late()

    def _be_late(self) -> None:
        if self._is_ending:
            self.abort()
        elif self.requests or (self._head is not None and self._head.has_begun):
            self.refuse(Refusal(408, "request_timeout", "The request did not come in time."))
        else:
            self.loseConnection()

    # What comes.

    def dataReceived(self, data: bytes) -> None:
        """Take bytes; drop them if the connection has had its last answer."""
        if not self._is_ending:
            self._input.append(data)
            self._input_bytes += len(data)
            self._advance()

    def resumeProducing(self) -> None:
        """Go on: what was written has left."""
        super().resumeProducing()
        self._advance()

    def _advance(self) -> None:
        """Take what has come, as far as it may be taken."""
        if self._is_advancing:
            return
        self._is_advancing = True
        try:
            while self._input and self._may_take:
                data = b"".join(self._input)
                self._input = []
                self._take(data)
                self._input_bytes = sum(map(len, self._input))
        except Refusal as refusal:
            self.refuse(refusal)
        finally:
            self._is_advancing = False
        if self._input_bytes > MAX_PIPELINED_BYTES and not self._is_ending:
            self._networkProducer.pauseProducing()

    @property
    def _may_take(self) -> bool:
        # A client that does not fetch its answers is given no more of them.
        return not (self._handlingRequest or self._is_ending or self._waitingForTransport)

    def _take(self, data: bytes) -> None:
        if self._body is None:
            self._take_head(data)
            return
        rest = self._body.take(data)
        if rest is not None:
            self._give_back(rest)
            self._handle(self._body.body)

    def _take_head(self, data: bytes) -> None:
        if self._head is None:
            self._head = HeadReader(self.owner.limits)
        rest = self._head.take(data)
        if rest is not None:
            head = self._head.judge()
            self._head = None
            self._give_back(rest)
            self._begin(head)
        elif self._head.has_begun and not self._is_head_timed:
            self._is_head_timed = True
            self._set_deadline(self.owner.limits.head_timeout_seconds)

    def _give_back(self, rest: bytes) -> None:
        if rest:
            self._input.append(rest)

    def _begin(self, head: Head) -> None:
        """Admit a request, and make ready for its body."""
        limits = self.owner.limits
        request = self.requestFactory(self)
        request.take_head(head, self.owner.reactor.seconds())
        self.requests.append(request)
        self.persistent = head.keep_alive
        self._is_unread = head.length != 0
        self._admit(request)
        if head.length is not None and head.length > limits.max_body_bytes:
            raise too_large(limits)
        if head.length == 0:
            self._handle(b"")
            return
        self._body = ChunkReader(limits) if head.length is None else BodyReader(head.length)
        self._set_deadline(limits.body_timeout_seconds)
        if head.awaits_continue:
            self._send100Continue()

    def _admit(self, request: GatewayRequest) -> None:
        try:
            refusal = self.owner.admit(request)
        except Exception:
            # Who could not say no has not said yes.
            self._log.failure("Admission failed")
            refusal = internal_error()
        if refusal is not None:
            raise refusal

    def _handle(self, body: bytes) -> None:
        self._body = None
        self._is_unread = False
        self._deadline = None
        self._handlingRequest = True
        self._set_buffer(RESPONSE_BUFFER_BYTES)
        request = self.requests[0]
        request.take_body(body)
        request.process()

    def _set_buffer(self, size: int) -> None:
        # Others, such as TLS, buffer by rules of their own.
        if isinstance(self._wire, FileDescriptor):
            self._wire.bufferSize = size

    # What goes.

    def writeHeaders(self, version: bytes, code: bytes, reason: bytes, headers: HeaderMap) -> None:
        """Write a head, saying whether the connection ends with this answer."""
        if self.owner.draining or b"close" in tokens(headers, b"connection"):
            self.persistent = False
        if not self.persistent:
            headers.setRawHeaders(b"connection", [b"close"])
        if not headers.hasHeader(b"date"):
            headers.setRawHeaders(b"date", [http.datetimeToString()])
        super().writeHeaders(version, code, reason, headers)

    def requestDone(self, request: GatewayRequest) -> None:
        """Go on to what the client has sent ahead, or end."""
        self.requests.remove(request)
        self._set_buffer(FileDescriptor.bufferSize)
        if self._is_ending:
            return
        if self.persistent and not self.owner.draining:
            self._wait_for_head()
        elif self._is_unread or self._input:
            self._linger()
        else:
            self.loseConnection()

    def _wait_for_head(self) -> None:
        self._handlingRequest = False
        self._is_head_timed = False
        self._set_deadline(self.owner.limits.keep_alive_timeout_seconds)
        if not self._waitingForTransport:
            self._networkProducer.resumeProducing()
        self._advance()

    def refuse(self, refusal: Refusal) -> None:
        """Give the connection its last answer; that of a request in hand must not have begun."""
        self.persistent = False
        self._handlingRequest = True
        self._body = None
        try:
            if self.requests:
                self.owner.render_refusal(self.requests[0], refusal)
            else:
                self._write_refusal(refusal)
        except Exception:
            # Whatever goes wrong with the words, the connection ends.
            self._log.failure("A refusal was not answered")
        if not self._is_ending:
            self.abort()

    def _write_refusal(self, refusal: Refusal) -> None:
        method, path = self._head.method_and_path if self._head is not None else (b"", b"")
        fields, body = self.owner.refuse(refusal.status, refusal.slug, refusal.message, path)
        headers = HeaderMap()
        for name, value in (*fields, *wire_fields(refusal), (b"content-length", b"%d" % len(body))):
            headers.addRawHeader(name, value)
        reason = http.RESPONSES.get(refusal.status, b"Refused")
        self.writeHeaders(b"HTTP/1.1", b"%d" % refusal.status, reason, headers)
        if method != b"HEAD":
            self._wire.write(body)
        self._linger()
