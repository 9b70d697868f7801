"""The live tail: every request as it ends, told to those who follow, as an event stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import attrs
import msgspec
from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IPushProducer
from twisted.internet.task import LoopingCall
from zope.interface import implementer

from crabtwist.errors import Refusal
from crabtwist.gateway import Gateway
from crabtwist.records import Record, record_of
from crabtwist.values import Context, Outcome
from crabtwist.web.admin.shown import request_shown

#: What waits for a reader that is slower than the requests; one that is behind further is cut off.
MOST_WAITING_BYTES = 2**18
MOST_READERS = 64

Wanted = Callable[[Record], bool]

_FIELDS = {
    "content-type": "text/event-stream",
    "cache-control": "no-store",
    # nginx would keep events back until it has enough of them.
    "x-accel-buffering": "no",
}


class Tail:
    """Tells readers of the requests that end here; while there are no readers, it costs nothing."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._readers: dict[Reader, Wanted] = {}

    def follow(self, request: Any, wanted: Wanted) -> Deferred[None]:
        """
        Answer a request with the events of those records that are wanted.

        Fires when the reader was told the end, or has left.  Raises `Refusal` (429) when there are too many
        readers.
        """
        if len(self._readers) >= MOST_READERS:
            raise Refusal(429, "too_many_readers", f"{MOST_READERS} follow already; let one of them go first")
        _say_head(request)
        if request.method == b"HEAD":
            return succeed(None)
        reader = Reader(request, self._gateway, self._left)
        if not self._readers:
            self._gateway.watchers.append(self._tell)
        self._readers[reader] = wanted
        reader.begin()
        return reader.done

    def end(self) -> None:
        """Tell all readers that the gateway is being stopped, and let them go."""
        for reader in tuple(self._readers):
            reader.end("stopping", "the gateway is being stopped; follow again when it is back")

    def _left(self, reader: Reader) -> None:
        del self._readers[reader]
        if not self._readers:
            self._gateway.watchers.remove(self._tell)

    def _tell(self, context: Context, outcome: Outcome) -> None:
        record = record_of(context, outcome)
        readers = [reader for reader, wanted in self._readers.items() if wanted(record)]
        if readers:
            event = _event("request", request_shown(record))
            for reader in readers:
                reader.tell(event)


@implementer(IPushProducer)
@attrs.define(eq=False)
class Reader:
    """One reader, and what waits until its connection takes more."""

    _request: Any
    _gateway: Gateway
    _left: Callable[[Reader], None]
    done: Deferred[None] = attrs.field(init=False)
    _ticking: LoopingCall = attrs.field(init=False)
    _waiting: deque[bytes] = attrs.field(init=False, factory=deque)
    _waiting_bytes: int = attrs.field(init=False, default=0)
    _paused_at: float | None = attrs.field(init=False, default=None)
    _is_gone: bool = attrs.field(init=False, default=False)

    def begin(self) -> None:
        """Say something at once, so that the reader knows that it is told from now on."""
        self.done = Deferred(lambda _: self.stopProducing())
        self._ticking = LoopingCall(self._tick)
        self._ticking.clock = self._gateway.clock
        self._request.notifyFinish().addErrback(lambda _: self.stopProducing())
        self._request.registerProducer(self, streaming=True)
        self._request.write(b": following\n\n")
        self._ticking.start(self._gateway.patience.ping_seconds, now=False)

    def tell(self, event: bytes) -> None:
        """Send an event, now or when the connection takes it."""
        if self._paused_at is None:
            self._request.write(event)
        elif self._waiting_bytes + len(event) > MOST_WAITING_BYTES:
            missed = len(self._waiting) + 1
            self.end("too_slow", f"cut off: this reader was too slow, and missed {missed} requests")
        else:
            self._waiting.append(event)
            self._waiting_bytes += len(event)

    def end(self, reason: str, message: str) -> None:
        """Say why it ends, and end."""
        if not self._is_gone:
            self._request.write(_event("end", {"reason": reason, "message": message}))
            self._leave()
            self._request.unregisterProducer()
            self._request.finish()
            self.done.callback(None)

    def pauseProducing(self) -> None:
        """Wait: the connection takes no more."""
        if self._paused_at is None:
            self._paused_at = self._gateway.clock.seconds()

    def resumeProducing(self) -> None:
        """Go on with what has waited."""
        self._paused_at = None
        while self._waiting and self._paused_at is None:
            event = self._waiting.popleft()
            self._waiting_bytes -= len(event)
            self._request.write(event)

    def stopProducing(self) -> None:
        """Nobody reads any more."""
        if not self._is_gone:
            self._leave()
            if not self.done.called:
                self.done.callback(None)

    def _leave(self) -> None:
        self._is_gone = True
        self._ticking.stop()
        self._waiting.clear()
        self._left(self)

    def _tick(self) -> None:
        """Keep the connection alive, and do not wait for ever for a reader that reads nothing."""
        if self._paused_at is None:
            self._request.write(b": still here\n\n")
        elif self._gateway.clock.seconds() - self._paused_at >= self._gateway.patience.client_stall_seconds:
            self._request.abort()


def _say_head(request: Any) -> None:
    request.setResponseCode(200)
    for name, value in _FIELDS.items():
        request.responseHeaders.setRawHeaders(name, [value])


def _event(name: str, data: object) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), msgspec.json.encode(data, enc_hook=dict))
