"""
An upstream's body on its way to a client: what plain answers and streams have in common.

Bytes go down by plain method calls; *pause*, *resume* and *stop* go up.  The client's connection is
told of the relay as its producer, so a client that does not read pauses the upstream, and one that
leaves stops it.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol, cast

import attrs
import treq
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IPushProducer, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.iweb import IResponse
from zope.interface import implementer

from crabtwist.errors import AnswerBroken, IdleTimedOut, UpstreamError
from crabtwist.values import EndedBy

_log = Logger()


class Sink(Protocol):
    """Where a relay pours: a client's answer whose head is on its way."""

    def write(self, data: bytes) -> None:
        """Send some of the body."""

    def remark(self, data: bytes) -> None:
        """Send the gateway's own words: they are no part of the upstream's answer."""

    def finish(self, error: UpstreamError | None = None) -> None:
        """End the answer as a whole one, or, with an error, as one that has said itself that it is not."""

    def abort(self, error: UpstreamError | None = None) -> None:
        """End the connection so that the answer cannot be taken for a whole one; `error` says why."""

    def brake(self, producer: object) -> None:
        """Let the client's connection pause, resume and stop `producer` (an `IPushProducer`)."""

    def release(self) -> None:
        """Let the producer go."""


@attrs.frozen
class RelayLimits:
    """
    How long silence may last, in seconds.

    `idle_timeout_seconds`: the upstream's.  `client_stall_seconds`: a client's that reads nothing while
    bytes wait for it.  `ping_seconds`: a stream's, before the gateway says something itself.
    `terminal_grace_seconds`: how long a stream may stay open after its last event.
    """

    idle_timeout_seconds: float = 300.0
    client_stall_seconds: float = 300.0
    ping_seconds: float = 15.0
    terminal_grace_seconds: float = 1.0


@attrs.frozen
class End:
    """How a relay ended; `error` is None for a whole answer."""

    ended_by: EndedBy
    reason: str
    error: UpstreamError | None = None


COMPLETE = End("upstream", "complete")
CLIENT_LEFT = End("client", "client_left")
CLIENT_STALLED = End("gateway", "client_stalled")


class _Body:
    """
    A response of which only the body is wanted, by `treq.collect`.

    Remembers who listens, since the transport that can be paused is only told to the listener.
    """

    def __init__(self, response: IResponse) -> None:
        self._response = response
        self.length = response.length  # treq asks
        self.listener: Any = None

    def deliverBody(self, protocol: Any) -> None:
        self.listener = protocol
        self._response.deliverBody(protocol)


@implementer(IPushProducer)
class Relay:
    """
    One answer's body.

    Life: `open` begins to listen, and holds what comes; it `is_ready` when enough has come to decide what
    to do with the answer, or the answer ended before (then `end` is set); `flow` pours into a sink; `end`
    says how it ended.  `stop` may be called at any time.
    """

    def __init__(self, response: IResponse, clock: IReactorTime, limits: RelayLimits) -> None:
        self.end: End | None = None
        self.is_ready = False
        self._clock = clock
        self._limits = limits
        self._announced_bytes = response.length
        self._body: _Body | None = _Body(response)
        self._sink: Sink | None = None
        self._timer: IDelayedCall | None = None
        self._paused_by: set[Literal["client", "relay"]] = set()
        self._heard_at = clock.seconds()
        self._upstream_open = True
        # Most plain answers are here at once, and nobody waits for them.
        self._ready: Deferred[None] | None = None
        self._done: Deferred[End] | None = None

    @property
    def ready(self) -> Deferred[None]:
        """Fires when it `is_ready`."""
        if self._ready is None:
            self._ready = Deferred()
            if self.is_ready:
                self._ready.callback(None)
        return self._ready

    @property
    def done(self) -> Deferred[End]:
        """Fires with the `end`."""
        if self._done is None:
            self._done = Deferred()
            if self.end is not None:
                self._done.callback(self.end)
        return self._done

    def _be_ready(self) -> None:
        if not self.is_ready:
            self.is_ready = True
            if self._ready is not None:
                self._ready.callback(None)

    def open(self) -> None:
        """Begin to listen."""
        treq.collect(cast(IResponse, self._body), self.dataReceived).addBoth(self._upstream_ended)
        self._watch()

    def flow(self, sink: Sink) -> None:
        """Pour what is held, and all that comes, into the sink."""
        self._sink = sink
        if self.end is None:
            sink.brake(self)
        self._pour_held()
        if self.end is not None:
            self._finish(self.end)
        else:
            self._let_go("relay")
            self._watch_anew()

    def stop(self, end: End = CLIENT_LEFT) -> None:
        """End it now, without another word to the client; the upstream's connection is closed at once."""
        if self.end is None:
            self._ended(end)

    def interrupt(self, error: UpstreamError) -> None:
        """End it now, telling the client why it is not whole."""
        if self.end is None:
            self._ended(End("gateway", error.slug, error))

    # What comes from the upstream.

    def dataReceived(self, data: bytes) -> None:
        """Take some of the body."""
        raise NotImplementedError

    def _upstream_ended(self, failure: Failure | None) -> None:
        self._upstream_open = False
        if self.end is None:
            self._ended(self._judge(failure))

    def _judge(self, failure: Failure | None) -> End:
        """Say what the end of the upstream's bytes means."""
        if failure is None:
            return COMPLETE
        return broken(failure)

    # What the subclass does with what is held, and at the end.

    def _pour_held(self) -> None:
        raise NotImplementedError

    def _finish(self, end: End) -> None:
        """End the sink's answer as `end` demands."""
        raise NotImplementedError

    # The one place where it ends.

    def _ended(self, end: End) -> None:
        self.end = end
        self._stop_watching()
        if self._sink is not None:
            self._finish(end)
        self._hang_up()
        # The two refer to each other, and would be there until Python looks for such garbage.
        self._body = None
        self._be_ready()
        if self._done is not None:
            self._done.callback(end)

    def _hang_up(self) -> None:
        if self._upstream_open:
            self._upstream_open = False
            try:
                self._transport.stopProducing()
            except Exception:
                # A provider's own response, perhaps; its client is told of the end all the same.
                _log.failure("an upstream's answer could not be stopped")

    # Brakes: IPushProducer, as seen from the client's connection.

    def pauseProducing(self) -> None:
        """Stop reading from the upstream until the client has read."""
        self._hold("client")

    def resumeProducing(self) -> None:
        """Go on reading."""
        self._let_go("client")

    def stopProducing(self) -> None:
        """The client is gone."""
        self.stop()

    @property
    def _transport(self) -> Any:
        assert self._body is not None, "nothing is asked of an upstream that has ended"
        return self._body.listener.transport

    def _hold(self, who: Literal["client", "relay"]) -> None:
        if not self._paused_by and self._upstream_open:
            self._transport.pauseProducing()
        self._paused_by.add(who)
        self._heard_at = self._clock.seconds()

    def _let_go(self, who: Literal["client", "relay"]) -> None:
        if who not in self._paused_by:
            return
        self._paused_by.discard(who)
        # Silence that was asked for is nobody's fault.
        self._heard_at = self._clock.seconds()
        if not self._paused_by and self._upstream_open:
            self._transport.resumeProducing()

    # Silence.  One timer, looked at when the next of its reasons may be due: no timer moves per chunk.

    def _watch(self) -> None:
        if self.end is None and self._timer is None:
            now = self._clock.seconds()
            self._timer = self._clock.callLater(max(0.0, self._due(now) - now), self._on_silence)

    def _watch_anew(self) -> None:
        self._stop_watching()
        self._watch()

    def _stop_watching(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _due(self, now: float) -> float:
        """Return when to look again."""
        soonest = now + min(self._limits.idle_timeout_seconds, self._limits.client_stall_seconds)
        return soonest if self._held_back else min(soonest, self._heard_at + self._patience_seconds)

    def _on_silence(self) -> None:
        self._timer = None
        now = self._clock.seconds()
        if not self._held_back and now >= self._heard_at + self._patience_seconds:
            self._ended(self._silent_end())
        else:
            self._still_silent(now)
            self._watch()

    def _still_silent(self, now: float) -> None:
        """Do what silence demands before it is too long."""

    @property
    def _held_back(self) -> bool:
        """Whether the upstream is silent because the gateway itself has not decided yet."""
        return "relay" in self._paused_by

    @property
    def _patience_seconds(self) -> float:
        if "client" in self._paused_by:
            return self._limits.client_stall_seconds
        return self._limits.idle_timeout_seconds

    def _silent_end(self) -> End:
        if "client" in self._paused_by:
            return CLIENT_STALLED
        error = IdleTimedOut(f"the upstream sent nothing for {self._limits.idle_timeout_seconds:g} seconds")
        return End("gateway", error.slug, error)


def broken(failure: Failure) -> End:
    """Return the end of an answer whose connection broke; what is shared breaks for all as for the first."""
    if isinstance(failure.value, AnswerBroken):
        said = failure.value
        return End("gateway" if isinstance(said, IdleTimedOut) else "upstream", said.slug, said)
    error = AnswerBroken(
        f"the upstream's answer broke off: {failure.getErrorMessage() or type(failure.value).__name__}"
    )
    return End("upstream", error.slug, error)
