"""A plain answer on its way down: held until it is whole if it is small, poured on if it is not."""

from __future__ import annotations

from typing import Any

from twisted.internet.interfaces import IReactorTime
from twisted.web.iweb import IResponse

from crabtwist.dialects.base import AnswerReader
from crabtwist.relay import CLIENT_LEFT, COMPLETE, End, Relay, RelayLimits

#: Answers up to this size are held until they are whole, so that one which breaks can still be told as an
#: error of its own.
HOLD_BYTES = 32 * 1024

#: How much of a large answer's end is kept, to find its usage there.
TAIL_BYTES = 16 * 1024


class PlainRelay(Relay):
    """
    One plain answer.

    `reader` is told the whole body, or its end if it is larger than `copy_bytes`; None if nobody wants to
    know.  `copy` is the whole body at the end, None if it was too large.  An answer of up to
    `hold_bytes` is held until it is whole.
    """

    def __init__(
        self,
        response: IResponse,
        clock: IReactorTime,
        limits: RelayLimits,
        *,
        reader: AnswerReader | None,
        copy_bytes: int = HOLD_BYTES,
        hold_bytes: int = HOLD_BYTES,
    ) -> None:
        super().__init__(response, clock, limits)
        self.copy: bytes | None = None
        self._reader = reader
        self._copy_bytes = max(copy_bytes, hold_bytes)
        self._hold_bytes = hold_bytes
        self._copied: list[bytes] | None = []
        self._copied_bytes = 0
        self._tail = b""
        self._held: list[bytes] = []
        self._held_bytes = 0

    def dataReceived(self, data: bytes) -> None:
        """Take some of the body."""
        if self.end is not None:
            return
        self._heard_at = self._clock.seconds()
        self._remember(data)
        if self._sink is not None:
            self._sink.write(data)
            return
        self._held.append(data)
        self._held_bytes += len(data)
        if self._held_bytes > self._hold_bytes and not self.is_ready:
            self._hold("relay")
            self._be_ready()

    def _remember(self, data: bytes) -> None:
        if self._copied is not None:
            self._copied.append(data)
            self._copied_bytes += len(data)
            if self._copied_bytes > self._copy_bytes:
                self._tail = b"".join(self._copied)[-TAIL_BYTES:]
                self._copied = None
        elif len(data) < TAIL_BYTES:
            self._tail = (self._tail + data)[-TAIL_BYTES:]
        else:
            # The object itself, since it waits for a slow client anyhow: a copy would weigh twice.
            self._tail = data

    def _judge(self, failure: Any) -> End:
        end = super()._judge(failure)
        if self._copied is not None and end.error is None:
            self.copy = b"".join(self._copied)
        if self._reader is not None:
            if self.copy is not None:
                self._reader.body(self.copy)
            else:
                self._reader.tail(self._tail[-TAIL_BYTES:])
        return end

    @property
    def length(self) -> int | None:
        """How long the body is, if that is known: as announced, or because all of it is here."""
        if self.end is not None:
            return self._held_bytes
        return self._announced_bytes if isinstance(self._announced_bytes, int) else None

    @property
    def held(self) -> bytes:
        """What came of the body before it flowed anywhere."""
        return b"".join(self._held)

    @property
    def whole(self) -> bytes | None:
        """The body, if all of it is here and none of it has flowed anywhere; else None."""
        return self.held if self.end is COMPLETE and self._sink is None else None

    def _pour_held(self) -> None:
        assert self._sink is not None
        held, self._held = self._held, []
        for data in held:
            self._sink.write(data)

    def _finish(self, end: End) -> None:
        assert self._sink is not None
        self._sink.release()
        if end.error is None and end.reason == "complete":
            self._sink.finish()
        elif end is not CLIENT_LEFT:
            # No word can be said in the middle of a JSON document; only a cut is honest.
            self._sink.abort(end.error)
