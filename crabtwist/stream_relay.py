"""
A stream of events on its way down: verbatim, whole events at a time.

While the bytes pass, the dialect's reader is shown the few events that it asks for.  Since a client
cannot use half an event, bytes wait for the end of theirs, and the gateway always stands between two
events when it has to speak itself.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.interfaces import IReactorTime
from twisted.python.failure import Failure
from twisted.web.iweb import IResponse

from crabtwist.dialects.base import AnswerReader, Dialect
from crabtwist.errors import ErrorEvent, Truncated, UpstreamError
from crabtwist.relay import CLIENT_LEFT, CLIENT_STALLED, COMPLETE, End, Relay, RelayLimits, broken
from crabtwist.sse import MAX_EVENT_BYTES, Event, EventStream


class StreamRelay(EventStream, Relay):
    """
    One stream.

    `on_event`, if given, is called with every event, in order.  Events that the reader claims for the
    gateway are left out of what the client gets.  `request_id` goes into the error event that a broken
    stream ends with.
    """

    def __init__(
        self,
        response: IResponse,
        clock: IReactorTime,
        limits: RelayLimits,
        *,
        dialect: Dialect,
        reader: AnswerReader,
        request_id: str,
        on_event: Callable[[Event], None] | None = None,
        max_event_bytes: int = MAX_EVENT_BYTES,
    ) -> None:
        EventStream.__init__(self, max_event_bytes)
        Relay.__init__(self, response, clock, limits)
        self._dialect = dialect
        self._reader = reader
        self._request_id = request_id
        self._on_event = on_event
        self._waiting: list[bytes] = []
        self._said_at = clock.seconds()
        self._withheld: list[Event] = []
        self._ends_at: float | None = None

    # From the upstream.

    def dataReceived(self, data: bytes) -> None:
        """Take some of the stream."""
        if self.end is None:
            self._heard_at = self._clock.seconds()
            EventStream.dataReceived(self, data)

    def eventsReceived(self, region: bytes) -> None:
        """Relay whole events; read them only if there may be something to learn."""
        if self._on_event is not None or self._reader.wants(region):
            self.parse(region)
            if self._withheld:
                region = self._without_withheld(region)
        self._pour(region)
        if self._reader.began and not self.is_ready:
            self._decided()
        if self._sink is not None:
            self._expect_end()

    def eventReceived(self, event: Event) -> None:
        """Learn from one event."""
        if self._reader.event(event):
            self._withheld.append(event)
        if self._on_event is not None:
            self._on_event(event)

    def partReceived(self, part: bytes) -> None:
        """Relay a piece of an event that is too large to wait for."""
        self._pour(part)
        if not self.is_ready:
            self._decided()

    def _without_withheld(self, region: bytes) -> bytes:
        kept, position = [], 0
        for event in self._withheld:
            kept.append(region[position : event.start])
            position = event.end
        self._withheld.clear()
        return b"".join([*kept, region[position:]])

    def _pour(self, data: bytes) -> None:
        if self._sink is None:
            self._waiting.append(data)
        elif data:
            self._said_at = self._heard_at
            self._sink.write(data)

    def _pour_held(self) -> None:
        self._said_at = self._clock.seconds()
        waiting, self._waiting = self._waiting, []
        for data in waiting:
            self._pour(data)
        self._expect_end()

    def _decided(self) -> None:
        if self._sink is None:
            # What follows the first event can wait until the gateway knows what to do with it.
            self._hold("relay")
        self._be_ready()

    # The end.

    def _expect_end(self) -> None:
        """After the last event, or an error, an upstream may be slow to say that it was the last."""
        if self.end is not None or not (self._reader.finished or self._reader.error is not None):
            return
        # What trickles in after the last event does not put the end off.
        if self._ends_at is None or not self._reader.finished:
            self._ends_at = self._clock.seconds() + self._limits.terminal_grace_seconds
        self._watch_anew()

    def _stop_waiting(self) -> None:
        self._timer = None
        self._ended(self._judge(None))

    def _judge(self, failure: Failure | None) -> End:
        # OpenAI's kind ends a stream that failed like any other, with `[DONE]`.
        if self._reader.error is not None:
            said = self._reader.error
            error: UpstreamError = ErrorEvent(f"the upstream reported {said.type}: {said.message}")
            return End("upstream", error.slug, error)
        if self._reader.finished:
            return COMPLETE
        if failure is not None:
            return broken(failure)
        error = Truncated("the upstream's stream ended without its last event")
        return End("upstream", error.slug, error)

    def _finish(self, end: End) -> None:
        assert self._sink is not None
        self._sink.release()
        if end is CLIENT_LEFT:
            return
        if end is COMPLETE:
            self._sink.write(self.rest())
            self._sink.finish()
        elif end is CLIENT_STALLED or not self.between_events:
            self._sink.abort(end.error)
        else:
            self._say_why(end.error)
            self._sink.finish(end.error)

    def _say_why(self, error: UpstreamError | None) -> None:
        """Tell the client that no more will come, unless the upstream has told it already."""
        if self._reader.error is None and error is not None and self._sink is not None:
            message = f"{error.message} [{error.slug}]"
            self._sink.remark(self._dialect.error_event(error.status, error.slug, message, self._request_id))

    # Silence.

    def _watch(self) -> None:
        if self._ends_at is None:
            super()._watch()
        elif self.end is None and self._timer is None:
            seconds = max(0.0, self._ends_at - self._clock.seconds())
            self._timer = self._clock.callLater(seconds, self._stop_waiting)

    def _due(self, now: float) -> float:
        if self._sink is None:
            return super()._due(now)
        ping = self._limits.ping_seconds
        next_ping = self._said_at + ping
        return min(super()._due(now), next_ping if next_ping > now else now + ping)

    def _still_silent(self, now: float) -> None:
        due = now >= self._said_at + self._limits.ping_seconds
        if self._sink is not None and due and self.between_events and "client" not in self._paused_by:
            self._said_at = now
            self._sink.remark(self._dialect.keep_alive)
