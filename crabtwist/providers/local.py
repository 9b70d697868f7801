"""Answers that are made in this process, for providers that have no upstream of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from twisted.internet.interfaces import IDelayedCall, IPushProducer, IReactorTime
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone
from twisted.web.http_headers import Headers as WebHeaders
from twisted.web.iweb import IResponse
from zope.interface import implementer

from crabtwist.values import Headers


@implementer(IResponse, IPushProducer)
class LocalResponse:
    """
    A response whose body is made chunk by chunk, as it is read.

    `delay_seconds` passes before each chunk.  A reader that pauses stops the making, one that stops
    ends it.
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
        self.headers = WebHeaders()
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
        chunk = next(self._chunks, None)
        if chunk is None:
            protocol, self._protocol = self._protocol, None
            protocol.connectionLost(Failure(ResponseDone()))
            return
        # Armed before the chunk is handed over, so that its reader may pause.
        self.resumeProducing()
        self._protocol.dataReceived(chunk)
