"""
The server's side of HTTP/1.1: strict in what it takes, bounded in what it keeps.

Twisted's channel keeps requests and producers; the reading is ours, and so is the writing of answers whose
head is said with `say_head`.  llhttp judges each head and each chunk byte by byte, and is never fed past the
end of one, so what belongs to which request is decided here and only once.  Whatever two servers could read
differently is refused (RFC 9112, section 11.2), and after a refusal nothing more of that connection is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Protocol

from twisted.internet.abstract import FileDescriptor
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.python.failure import Failure
from twisted.web import server
from twisted.web.http import HTTPChannel, datetimeToString
from twisted.web.http_headers import Headers as HeaderMap

from crabtwist.direct_writes import DirectWriter
from crabtwist.errors import Refusal, internal_error
from crabtwist.gateway_request import REASONS, GatewayRequest
from crabtwist.headers import written
from crabtwist.http_reader import BodyReader, ChunkReader, Head, HeadReader, HTTPLimits, tokens, too_large
from crabtwist.values import Headers

#: Unsent bytes of an answer that make Twisted pause its producer; also the most that one read brings.
RESPONSE_BUFFER_BYTES = 8 * 1024
#: What a client may send ahead while its request is handled, before its connection is read no further.
MAX_PIPELINED_BYTES = 16 * 1024


class ChannelOwner(Protocol):
    """
    What a channel asks of the factory that made it.

    `admit` is called once for each good head, before its body is taken; what it returns, or a 500 if it
    raises, is answered at once and ends the connection.  `render_refusal` answers and finishes such a
    request before it returns.  `refuse` words a refusal where there is no request: status, slug, message
    and the path (b"" if unknown) to header fields and body.  `shortcuts` serve methods and paths that need no
    looking for; whoever they are has to finish the request.  While `draining`, every answer is its
    connection's last.
    """

    limits: HTTPLimits
    reactor: IReactorTime
    draining: bool
    admit: Callable[[GatewayRequest], Refusal | None]
    render_refusal: Callable[[GatewayRequest, Refusal], None]
    refuse: Callable[[int, str, str, bytes], tuple[Headers, bytes]]
    shortcuts: Mapping[tuple[bytes, bytes], Callable[[GatewayRequest], object]]

    def channel_opened(self, channel: GatewayChannel) -> None:
        """Count a channel."""

    def channel_closed(self, channel: GatewayChannel) -> None:
        """Count it no more."""


class GatewayChannel(HTTPChannel):
    """
    One client's connection.

    Requests are handled one at a time, in order; what a client sends ahead waits unparsed.  `is_aborted`
    says that nothing more can reach the client.  The factory sets `owner`.
    """

    owner: ChannelOwner
    requestFactory = GatewayRequest  # type: ignore[assignment]  # it is made of nothing but its channel
    is_aborted = False

    def __init__(self) -> None:
        super().__init__()
        self._head: HeadReader | None = None
        self._body: BodyReader | ChunkReader | None = None
        self._input: list[bytes] = []
        self._input_bytes = 0
        self._is_advancing = self._is_ending = self._has_answered = self._is_held_back = False
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

    @property
    def is_fresh(self) -> bool:
        """Whether its first request may still be on the way."""
        return self.is_idle and not self._has_answered

    # The connection.

    def connectionMade(self) -> None:
        """Begin to wait for the first head."""
        super().connectionMade()
        self._writer = DirectWriter(self._wire, self.owner.reactor)
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
            self._is_held_back = True
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
        if self.owner.draining or b"close" in tokens(headers.getRawHeaders(b"connection", ())):
            self.persistent = False
        if not self.persistent:
            headers.setRawHeaders(b"connection", [b"close"])
        if headers.getRawHeaders(b"server") == [server.version]:
            # Which version of what listens here is nobody's business; an upstream's own word passes.
            headers.removeHeader(b"server")
        if not headers.hasHeader(b"date"):
            headers.setRawHeaders(b"date", [datetimeToString()])
        super().writeHeaders(version, code, reason, headers)

    def say_head(self, version: bytes, status: int, reason: bytes, fields: Headers) -> None:
        """
        Say a head as it is given, whether the connection ends with this answer, and the date.

        It leaves with what follows it: some of the body, its end, or its producer.
        """
        if self.owner.draining:
            self.persistent = False
        if not self.persistent:
            fields = (*fields, (b"connection", b"close"))
        for name, _ in fields:
            if len(name) == 4 and name.lower() == b"date":
                break
        else:
            fields = (*fields, (b"date", _date(int(self.owner.reactor.seconds()))))
        self._writer.hold(b"%b %d %b\r\n%b\r\n\r\n" % (version, status, reason, written(fields)))

    def write(self, data: bytes) -> None:
        """Write some of an answer, which goes on."""
        self._writer.write(data)

    def write_last(self, data: bytes) -> None:
        """Write the end of an answer, or all of it."""
        self._writer.write_now(data)

    def flush(self) -> None:
        """Have a head that was said leave, though nothing follows it yet."""
        self._writer.write_now(b"")

    def requestDone(self, request: GatewayRequest) -> None:
        """Go on to what the client has sent ahead, or end."""
        self.flush()
        self.requests.remove(request)
        self._has_answered = True
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
        if self._is_held_back and not self._waitingForTransport:
            self._is_held_back = False
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
        for name, value in (*fields, *refusal.fields, (b"content-length", b"%d" % len(body))):
            headers.addRawHeader(name, value)
        reason = REASONS.get(refusal.status, b"Refused")
        self.writeHeaders(b"HTTP/1.1", b"%d" % refusal.status, reason, headers)
        if method != b"HEAD":
            self._wire.write(body)
        self._linger()


@lru_cache(maxsize=2)
def _date(seconds: int) -> bytes:
    # Every answer of a second has the same.
    return bytes(datetimeToString(seconds))
