"""
An upstream's HTTP/1.1 answer: bytes in, a head and a body out; no I/O.

llhttp reads them at its strictest; what it lets by and a proxy must not is refused here.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

import attrs
from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser
from twisted.internet.interfaces import IProtocol, IPushProducer
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone
from twisted.web.http_headers import Headers as HeaderMap
from twisted.web.iweb import UNKNOWN_LENGTH, IClientRequest, IResponse
from zope.interface import implementer

from crabtwist.errors import ConnectionBroken
from crabtwist.headers import header_map
from crabtwist.values import Headers

_log = Logger()

_VERSIONS: Final = {"1.0": (b"HTTP", 1, 0), "1.1": (b"HTTP", 1, 1)}

#: The most that may go by without a byte of body: a head, interim answers, trailers, chunk extensions.
MAX_HEAD_BYTES: Final = 64 * 1024
MAX_HEADERS: Final = 500

_CONTROLS: Final = bytes([*range(9), *range(10, 32), 127])

#: How a whole body ends; one for all, as twisted's `connectionDone` is.
WHOLE: Final = Failure(ResponseDone())


class _Stop(Exception):
    """Ends llhttp's walk through the bytes at hand; why is known already."""


class ResponseParser:
    """
    Reads one answer; interim ones (1xx) before it are skipped.

    After each `feed`: `head_complete`; `complete`, when the body's end was seen; `fault`, when the bytes
    are not an answer.  `length` is the body's length in bytes or `UNKNOWN_LENGTH`; `until_close` says that
    only the connection's end ends the body.  `reusable` says, once `complete`, that another answer may
    follow on the connection.  `bodiless` is for HEAD, whose answers look as if a body came (RFC 9112,
    6.3); they never leave the connection reusable.
    """

    code = 0
    phrase = b""
    version = (b"HTTP", 1, 1)
    raw_headers: Headers = ()
    length: int | str = UNKNOWN_LENGTH
    head_complete = complete = until_close = reusable = False
    fault: ConnectionBroken | None = None
    _barren_bytes = _field_bytes = 0

    def __init__(
        self,
        peer: str,
        *,
        bodiless: bool = False,
        max_head_bytes: int = MAX_HEAD_BYTES,
        max_headers: int = MAX_HEADERS,
    ) -> None:
        self._peer = peer
        self._bodiless = bodiless
        self._max_head_bytes = max_head_bytes
        self._max_headers = max_headers
        self._fields: list[tuple[bytes, bytes]] = []
        self._parts: list[bytes] = []
        self._parser: HttpResponseParser | None = HttpResponseParser(self)

    def feed(self, data: bytes) -> bytes:
        """Read what came; return the body's bytes in it, also those before a fault."""
        assert self._parser is not None, "fed after the end"
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as error:
            self.reusable = False
            if not self.complete and self.fault is None:
                self.fault = ConnectionBroken(f"{self._peer} does not speak HTTP/1.1: {error}")
        parts, self._parts = self._parts, []
        self._barren_bytes = 0 if parts else self._barren_bytes + len(data)
        if self._barren_bytes > self._max_head_bytes and not self.complete and self.fault is None:
            self.fault = ConnectionBroken(f"{self._peer} sent over {self._max_head_bytes} bytes and no body")
        if self.complete or self.fault is not None:
            self._parser = None  # it knows us, we know it: a cycle for each request
        return b"".join(parts)

    def _refuse(self, what: str) -> None:
        self.fault = ConnectionBroken(f"{self._peer} sent {what}")
        raise _Stop

    # What llhttp calls.

    def on_message_begin(self) -> None:
        """An answer begins, perhaps after an interim one."""
        if self.complete:
            raise _Stop
        self.phrase, self._fields, self._field_bytes = b"", [], 0

    def on_status(self, phrase: bytes) -> None:
        """Some of the reason phrase."""
        self.phrase += phrase

    def on_header(self, name: bytes, value: bytes) -> None:
        """One field of the head, or a trailer, which is only counted."""
        self._field_bytes += len(name) + len(value) + len(b": \r\n")
        if len(self._fields) == self._max_headers or self._field_bytes > self._max_head_bytes:
            self._refuse("too large a head")
        self._fields.append((name, value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        """A head is whole."""
        assert self._parser is not None
        self.code = self._parser.get_status_code()
        version = self._parser.get_http_version()
        if version not in _VERSIONS or self.code < 100:
            self._refuse("an answer that is not HTTP/1.1")
        if self.phrase.translate(None, _CONTROLS) != self.phrase:
            self._refuse("control characters in its head")
        if self.code == 101:
            self._refuse("a change of protocol that nobody asked for")
        if self.code < 200:
            return
        self.version = _VERSIONS[version]
        self.raw_headers = tuple(self._fields)
        self._frame()
        self.reusable = self._parser.should_keep_alive() and not self._bodiless
        self.complete = self._bodiless
        self.head_complete = True

    def _frame(self) -> None:
        length = coding = None
        for name, value in self.raw_headers:
            lower = name.lower()
            if lower == b"content-length":
                length = int(value)
            elif lower == b"transfer-encoding":
                coding = value
                if coding.lower() != b"chunked":
                    self._refuse("a body in a transfer coding that nobody asked for")
        if self._bodiless or self.code in (204, 304):
            self.length = 0
        elif coding is None and length is not None:
            self.length = length
        elif coding is None:
            self.until_close = True

    def on_body(self, data: bytes) -> None:
        """Some of the body."""
        if self.complete:
            raise _Stop
        if not self.head_complete:
            self._refuse("a body with an interim answer")
        self._parts.append(data)

    def on_message_complete(self) -> None:
        """An answer is whole."""
        self.complete = self.head_complete


class Source(Protocol):
    """The connection that an answer comes from, as far as its body needs it."""

    def pause(self) -> None:
        """Read nothing more from the socket."""

    def resume(self) -> None:
        """Read again."""

    def abort(self) -> None:
        """Close it at once; the body's end is told later, with why."""


@implementer(IPushProducer)
class ResponseBody:
    """
    One answer's body on its way to one reader, and the reader's transport.

    What comes while nobody listens, or after a pause, is kept: at most one read's worth, since the
    source is paused.  The end is told once, after the last byte.
    """

    reader: Any = None
    _end: Failure | None = None
    _attached = _paused = _stopped = _busy = False

    def __init__(self, source: Source) -> None:
        self._source: Source | None = source
        self._held: list[bytes] = []

    def attach(self, reader: Any) -> None:
        """Begin to deliver.  Raises RuntimeError if there is a reader already."""
        if self._attached:
            raise RuntimeError("the body has a reader already")
        self._attached = True
        self.reader = reader
        self._busy = True  # nothing is delivered from inside `makeConnection`
        try:
            reader.makeConnection(self)
        except Exception:
            self._fail()
        self._busy = False
        self._flow()

    def receive(self, data: bytes) -> None:
        """Take some of the body from the source."""
        if not self._stopped:
            self._held.append(data)
            if self.reader is not None:
                self._deliver()

    def detach(self) -> None:
        """Let the source go: it has seen the end."""
        self._source = None

    def finish(self, reason: Failure = WHOLE) -> None:
        """Tell the end, once everything before it is delivered."""
        self._source = None
        self._end = reason
        if self.reader is not None:
            self._deliver()

    def pauseProducing(self) -> None:
        """Deliver nothing more until `resumeProducing`."""
        self._paused = True
        if self._source is not None:
            self._source.pause()

    def resumeProducing(self) -> None:
        """Deliver again."""
        self._paused = False
        self._flow()

    def stopProducing(self) -> None:
        """Close the connection at once, whatever is under way; the end follows."""
        if self._held and self._end is not None:
            self._end = Failure(ConnectionBroken("given up before its whole body was read"))
        self._held.clear()
        self._stopped = True
        self._paused = False
        if self._source is not None:
            self._source.abort()
        self._deliver()

    def loseConnection(self) -> None:
        """The same as `stopProducing`: half an answer cannot be ended gracefully."""
        self.stopProducing()

    def abortConnection(self) -> None:
        """The same as `stopProducing`."""
        self.stopProducing()

    def _flow(self) -> None:
        self._deliver()
        if not self._paused and self._source is not None:
            self._source.resume()

    def _deliver(self) -> None:
        # A reader may pause, resume or stop from inside its own `dataReceived`.
        if self._busy or self.reader is None:
            return
        self._busy = True
        try:
            while self._held and not self._paused:
                data = b"".join(self._held)
                self._held.clear()
                self.reader.dataReceived(data)
        except Exception:
            self._fail()
        self._busy = False
        if self._end is not None and not self._paused:
            self._tell(self._end)

    def _tell(self, end: Failure) -> None:
        reader, self.reader = self.reader, None  # it knows us, we know it: a cycle for each request
        try:
            reader.connectionLost(end)
        except Exception:
            _log.failure("a body's reader failed at its end")

    def _fail(self) -> None:
        _log.failure("a body's reader failed")
        self._end = Failure(ConnectionBroken("the body's reader failed"))
        self.stopProducing()


@implementer(IResponse)
@attrs.define(eq=False)
class HTTP1Response:
    """
    An answer whose head has come.

    `raw_headers` are its fields in wire order with names as they were written; `headers` the same for
    those who look fields up.  `length` is in bytes, or `UNKNOWN_LENGTH`.
    """

    version: tuple[bytes, int, int]
    code: int
    phrase: bytes
    raw_headers: Headers = attrs.field(repr=False)
    length: int | str
    request: IClientRequest = attrs.field(repr=False)
    body: ResponseBody = attrs.field(repr=False)
    previousResponse: IResponse | None = attrs.field(repr=False, default=None)
    _headers: HeaderMap | None = attrs.field(repr=False, default=None, init=False)

    @property
    def headers(self) -> HeaderMap:
        """The fields by name; made when first asked for."""
        if self._headers is None:
            self._headers = header_map(self.raw_headers)
        return self._headers

    def deliverBody(self, protocol: IProtocol) -> None:
        """
        Give the body to `protocol`, whose transport is an `IPushProducer` that can also be aborted.

        It loses its connection for `ResponseDone` (whole), `PotentialDataLoss` (it ended with the
        connection, as announced) or `crabtwist.errors.ConnectionBroken`.  Until a body is read to its end,
        or stopped (`body.stopProducing()` will do), it keeps its connection busy.
        """
        self.body.attach(protocol)

    def setPreviousResponse(self, response: IResponse) -> None:
        """Remember the redirect that led here."""
        self.previousResponse = response
