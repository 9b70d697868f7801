"""Answers that are made in this process, for providers that have no upstream of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from twisted.internet.interfaces import IDelayedCall, IPushProducer, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone
from twisted.web.http_headers import Headers as HeaderMap
from twisted.web.iweb import IResponse
from zope.interface import implementer

from crabtwist.values import Headers

_log = Logger()


@implementer(IResponse, IPushProducer)
class LocalResponse:
    """
    A response whose body is made chunk by chunk, as it is read.

    `delay_seconds` passes before each chunk.  A reader that pauses stops the making, one that stops
    ends it.  What making a chunk raises breaks the body off.
    """

    version = (b"HTTP", 1, 1)
    phrase = b""
    request = None
    previousResponse = None

    def __init__(
        self,
        code: int,
        fields: Headers,
        chunks: Iterable[bytes],
        clock: IReactorTime,
        *,
        length: int | None = None,
        delay_seconds: float = 0.0,
    ) -> None:
        self.code = code
        self.raw_headers = fields
        self.headers = HeaderMap()
        for name, value in fields:
            self.headers.addRawHeader(name, value)
        self.length: Any = length
        self._chunks = iter(chunks)
        self._clock = clock
        self._delay_seconds = delay_seconds
        self._protocol: Any = None
        self._next: IDelayedCall | None = None

    def setPreviousResponse(self, response: IResponse) -> None:
        """There never is one."""

    def deliverBody(self, protocol: Any) -> None:
        """Give the body to `protocol`, from the next turn of the reactor on."""
        self._protocol = protocol
        protocol.makeConnection(self)
        self.resumeProducing()

    def pauseProducing(self) -> None:
        """Make no more chunks for now."""
        if self._next is not None:
            self._next.cancel()
            self._next = None

    def resumeProducing(self) -> None:
        """Go on making chunks."""
        if self._next is None and self._protocol is not None:
            self._next = self._clock.callLater(self._delay_seconds, self._produce)

    def stopProducing(self) -> None:
        """Make no more chunks, ever."""
        self.pauseProducing()
        self._protocol = None

    def loseConnection(self) -> None:
        """Do as `stopProducing`: there is no connection."""
        self.stopProducing()

    abortConnection = loseConnection

    def _produce(self) -> None:
        self._next = None
        try:
            chunk = next(self._chunks)
        except StopIteration:
            self._end(Failure(ResponseDone()))
            return
        except Exception:
            # Only an end that is told can be passed on; a reader would wait for an idle timeout.
            _log.failure("making a response's body failed")
            self._end(Failure())
            return
        # Armed before the chunk is handed over, so that its reader may pause.
        self.resumeProducing()
        self._protocol.dataReceived(chunk)

    def _end(self, reason: Failure) -> None:
        protocol, self._protocol = self._protocol, None
        protocol.connectionLost(reason)
