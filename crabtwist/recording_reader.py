"""Who follows a recording: a response to whoever reads it, and the transport that it comes by."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Protocol

from twisted.internet.interfaces import IPushProducer
from twisted.python.failure import Failure
from twisted.web.http_headers import Headers as HeaderMap
from twisted.web.iweb import IResponse
from zope.interface import implementer

from crabtwist.headers import header_map
from crabtwist.values import Headers


class Recorded(Protocol):
    """A recording, as one of its readers sees it."""

    status: int
    headers: Headers
    length: int | None

    @property
    def ended(self) -> Failure | None:
        """How it ended, None if it has not."""

    def at(self, position: int) -> bytes | None:
        """Return the slice of the body at a position, None if it has not come yet."""

    def drop(self, reader: Reader) -> None:
        """Forget a reader that has left, or has all."""

    def look_again(self) -> None:
        """See who wants more: a reader has come, gone or paused."""


@implementer(IResponse, IPushProducer)
class Reader:
    """
    One who follows: a response whose body is the recording's, and the transport that it comes by.

    Whoever has one reads its body, or says `stopProducing`: others may wait for it.
    """

    version = (b"HTTP", 1, 1)
    phrase = b""
    request = None
    previousResponse = None

    def __init__(self, recording: Recorded) -> None:
        self.code, self.raw_headers = recording.status, recording.headers
        # Of a response of length 0 nobody would read the body, and so its end.
        self.length: Any = recording.length or None
        self.position = 0
        self.paused = False
        self._recording = recording
        self._protocol: Any = None
        self._reading = False

    @cached_property
    def headers(self) -> HeaderMap:
        """The fields, for who does not read `raw_headers`."""
        return header_map(self.raw_headers)

    def setPreviousResponse(self, response: IResponse) -> None:
        """There never is one."""

    def deliverBody(self, protocol: Any) -> None:
        """Give it to `protocol`, from its beginning."""
        self._protocol = protocol
        protocol.makeConnection(self)
        self.read()
        self._recording.look_again()

    def read(self) -> None:
        """Give on what there is, as long as it is wanted."""
        if self._reading:
            return
        self._reading = True
        try:
            while self._protocol is not None and not self.paused:
                data = self._recording.at(self.position)
                if data is None:
                    self._read_end()
                    break
                self.position += 1
                self._protocol.dataReceived(data)
        finally:
            self._reading = False

    def _read_end(self) -> None:
        if self._recording.ended is not None:
            protocol, self._protocol = self._protocol, None
            self._recording.drop(self)
            protocol.connectionLost(self._recording.ended)

    def pauseProducing(self) -> None:
        """Give no more for now."""
        self.paused = True
        self._recording.look_again()

    def resumeProducing(self) -> None:
        """Go on."""
        self.paused = False
        self.read()
        self._recording.look_again()

    def stopProducing(self) -> None:
        """Leave; harmless afterwards."""
        self._protocol = None
        self._recording.drop(self)

    loseConnection = abortConnection = stopProducing
