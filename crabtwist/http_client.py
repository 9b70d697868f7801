"""
One HTTP/1.1 connection to an upstream: one request at a time, each answer an `IResponse`.

Nothing is followed, decoded or timed here.  What a request is made of, `BytesBody` and `OrderedHeaders`
among it, can be had from here too.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, Final

import attrs
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IHandshakeListener, ISSLTransport
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from twisted.web.http import PotentialDataLoss
from zope.interface import implementer

from crabtwist.direct_writes import send_now
from crabtwist.errors import ConnectionBroken
from crabtwist.http_request import BytesBody, HTTP1Request, OrderedHeaders, Sending, Upload
from crabtwist.http_response import MAX_HEAD_BYTES, MAX_HEADERS, HTTP1Response, ResponseBody, ResponseParser

__all__ = ["BytesBody", "HTTP1ClientProtocol", "HTTP1Request", "HTTP1Response", "OrderedHeaders"]

#: The most that one read takes from a socket, and so the most that an answer nobody reads holds.
READ_BYTES: Final = 16 * 1024


@attrs.define(eq=False)
class _Exchange:
    """A request under way: `head` is whoever waits for the answer's head, None once it is here."""

    request: HTTP1Request
    parser: ResponseParser
    body: ResponseBody
    head: Deferred[HTTP1Response] | None
    upload: Upload | Sending | None = None


@implementer(IHandshakeListener)
class HTTP1ClientProtocol(Protocol):
    """
    One connection to `peer` (its name in messages), for one request after the other.

    `on_idle` is called when it may be given another request, `on_gone` once, when it never may be again:
    the socket is closed, or is being closed, and costs nothing more.  `answered` says whether a byte has
    come since the last request was sent.
    """

    def __init__(
        self,
        peer: str,
        on_idle: Callable[[HTTP1ClientProtocol], object],
        on_gone: Callable[[HTTP1ClientProtocol], object],
        *,
        max_head_bytes: int = MAX_HEAD_BYTES,
        max_headers: int = MAX_HEADERS,
    ) -> None:
        self.answered = False
        self.gone = False
        self._peer = peer
        self._on_idle = on_idle
        self._on_gone = on_gone
        self._max_head_bytes = max_head_bytes
        self._max_headers = max_headers
        self._exchange: _Exchange | None = None
        self._established: Deferred[None] | None = None
        self._when_lost: list[Deferred[None]] = []
        self._ready = self._lost = self._paused = False
        # zope.interface has no one name for what can be written to, paused and aborted.
        self._wire: Any = None
        self._tcp: Any = None

    # Its life.

    def connectionMade(self) -> None:
        """Set the socket up; see `established`."""
        self._wire = self._tcp = self.transport
        if ISSLTransport.providedBy(self.transport):
            self._tcp = self._wire.transport
        else:
            self._ready = True
        self._tcp.bufferSize = READ_BYTES
        if hasattr(self._tcp, "setTcpNoDelay"):
            self._tcp.setTcpNoDelay(True)

    def established(self) -> Deferred[None]:
        """
        Return a Deferred that fires when a request may be sent: with TLS, after the handshake.

        Fails with what ended the connection before; cancelling it aborts.
        """
        if self._ready or self.gone:
            return succeed(None) if self._ready else fail(ConnectionDone())
        self._established = Deferred(self._forsake)
        return self._established

    def handshakeCompleted(self) -> None:
        """Learn that the peer is who it should be."""
        if self.gone or self._wire.disconnecting:
            return
        self._ready = True
        self._tell_established(None)

    def _tell_established(self, result: Failure | None) -> None:
        waiting, self._established = self._established, None
        if waiting is not None:
            waiting.callback(result)

    def _forsake(self, _: object) -> None:
        self._established = None
        self.abort()

    @property
    def quiet(self) -> bool:
        """
        Whether a request may be sent: open, none under way, and nothing said since the last answer.

        Looks into the kernel too.  A peer that closed right after its answer has often done so before
        the reactor reads of it, and a POST sent then is lost (RFC 9112, 9.3.1).
        """
        if self.gone or self._exchange is not None:
            return False
        tcp_socket = getattr(self._tcp, "socket", None)
        if tcp_socket is None:
            return True
        try:
            tcp_socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def close(self) -> None:
        """Close it with a proper goodbye; for a connection on which nothing is under way."""
        if not self.gone:
            self._leave()
            self._wire.loseConnection()
            # Over TLS the goodbye has been written; a dead peer's reply is not waited for.
            self._tcp.loseConnection()

    def abort(self) -> None:
        """Close it now, whatever is under way; that is told when the socket is gone."""
        if not self.gone:
            self._leave()
            self._wire.abortConnection()

    def when_lost(self) -> Deferred[None]:
        """Return a Deferred that fires when the socket is closed."""
        if self._lost:
            return succeed(None)
        self._when_lost.append(Deferred())
        return self._when_lost[-1]

    def _leave(self) -> None:
        if not self.gone:
            self.gone = True
            if self._exchange is not None and self._exchange.upload is not None:
                self._exchange.upload.stopProducing()
            self._on_gone(self)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Tell everyone, the request under way first: it may want another connection in this one's place."""
        self._lost = True
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            self._end(exchange, self._why(exchange, reason.value))
        self._tell_established(reason)
        self._leave()
        for waiting in self._when_lost:
            waiting.callback(None)

    # Its requests.

    def request(self, request: HTTP1Request) -> Deferred[HTTP1Response]:
        """
        Send a request; only for a connection that is `quiet`.

        The Deferred fires when the answer's head has come, or fails with `ConnectionBroken` or with what
        the body's producer failed with.  Cancelling it aborts the connection.
        """
        if self.gone or self._exchange is not None:
            return fail(ConnectionBroken(f"the connection to {self._peer} cannot take a request"))
        self.answered = False
        head: Deferred[HTTP1Response] = Deferred(self._cancelled)
        parser = ResponseParser(
            self._peer,
            bodiless=request.method == b"HEAD",
            max_head_bytes=self._max_head_bytes,
            max_headers=self._max_headers,
        )
        self._exchange = _Exchange(request, parser, ResponseBody(self), head)
        self._send(self._exchange)
        return head

    def _send(self, exchange: _Exchange) -> None:
        request = exchange.request
        whole = request.whole_body
        if whole is not None:
            # Nothing follows a request that it could go along with.
            unsent = send_now(self._wire, [request.head, whole])
            if sum(map(len, unsent)) >= READ_BYTES:
                exchange.upload = sending = Sending(self._wire)
                sending.send(unsent)
            elif unsent:
                self._wire.writeSequence(unsent)
        elif request.body is not None:
            self._wire.write(request.head)
            exchange.upload = Upload(self._wire, request.body, self._break)
            exchange.upload.start()

    def _cancelled(self, _: object) -> None:
        if self._exchange is not None:
            self._exchange.head = None
        self.abort()

    def dataReceived(self, data: bytes) -> None:
        """Read an answer; what comes while nothing was asked ends the connection."""
        exchange = self._exchange
        if self.gone or exchange is None:
            self.abort()
            return
        self.answered = True
        parser, body = exchange.parser, exchange.body
        data = parser.feed(data)
        if parser.complete:
            # First of all, so that whoever hears of the end finds the connection free for the next request.
            self._release(exchange)
        # Before the head is announced, so that whoever reads a small answer has all of it at once.
        if data:
            body.receive(data)
        if parser.complete:
            body.finish()
        if parser.head_complete and exchange.head is not None:
            self._announce(exchange)
        if parser.complete:
            return
        if parser.fault is not None:
            self._break(parser.fault)
        elif parser.head_complete and body.reader is None:
            self.pause()

    def _release(self, exchange: _Exchange) -> None:
        self._exchange = None
        exchange.body.detach()
        if exchange.upload is not None and not exchange.upload.finished:
            exchange.upload.stopProducing()
            self.abort()
        elif exchange.parser.reusable:
            if self._paused:
                self.resume()
            self._on_idle(self)
        else:
            self.close()

    def _announce(self, exchange: _Exchange) -> None:
        head, exchange.head = exchange.head, None
        parser = exchange.parser
        assert head is not None
        if exchange.upload is None or exchange.upload.finished:
            # An answer may go on for hours, and nobody needs what was asked any more.
            exchange.request = exchange.request.without_body()
        head.callback(
            HTTP1Response(
                version=parser.version,
                code=parser.code,
                phrase=parser.phrase,
                raw_headers=parser.raw_headers,
                length=parser.length,
                request=exchange.request,
                body=exchange.body,
            )
        )

    def _break(self, error: Exception) -> None:
        exchange, self._exchange = self._exchange, None
        self.abort()
        if exchange is not None:
            self._end(exchange, error)

    def _end(self, exchange: _Exchange, error: Exception) -> None:
        if exchange.upload is not None:
            exchange.upload.stopProducing()
        head, exchange.head = exchange.head, None
        if head is not None:
            head.errback(error)
        else:
            exchange.body.finish(Failure(error))

    def _why(self, exchange: _Exchange, reason: BaseException | None) -> Exception:
        if self.gone:
            return ConnectionBroken(f"the request to {self._peer} was given up")
        if not exchange.parser.head_complete:
            return ConnectionBroken(f"{self._peer} closed the connection before it answered")
        if exchange.parser.until_close and isinstance(reason, ConnectionDone):
            return PotentialDataLoss()
        return ConnectionBroken(f"{self._peer} closed the connection inside its answer")

    # Its answer's brakes.

    def pause(self) -> None:
        """Read nothing more from the socket."""
        if not self.gone and not self._paused:
            self._paused = True
            self._wire.pauseProducing()

    def resume(self) -> None:
        """Read again."""
        if not self.gone and self._paused:
            self._paused = False
            self._wire.resumeProducing()
