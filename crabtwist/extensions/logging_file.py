"""The lines of the `logging` extension in a file of their own, as JSON, many of them in one write."""

from __future__ import annotations

from typing import Any

import msgspec
from twisted.internet.interfaces import IDelayedCall

from crabtwist.errors import UpstreamError
from crabtwist.extensions.audit_trail import Trail, time_of, whole_text
from crabtwist.money import in_dollars
from crabtwist.records import LONGEST_TEXT
from crabtwist.values import Context, Outcome, Usage

#: How long a line for the file waits at most for others to be written with.
FLUSH_SECONDS = 0.1

#: What waits is written sooner when there is so much of it.
MOST_COLLECTED_BYTES = 65536

_NO_USAGE = Usage()


class RequestLine(msgspec.Struct, gc=False, tag_field="event", tag="request"):
    """How a request ended; see `crabtwist.values.Outcome`.  `time` is that of its end."""

    time: str
    level: str
    request_id: str
    operation: str
    model: str
    model_resolved: str
    provider: str
    upstream_model: str
    principal: str
    stream: bool
    status: int
    ended_by: str
    reason: str
    detail: str | None
    attempts: int
    duration_ms: int
    first_byte_ms: int | None
    prompt_tokens: int
    completion_tokens: int
    cost: str | None
    bytes_in: int
    bytes_out: int


class AttemptLine(msgspec.Struct, gc=False, tag_field="event", tag="attempt_failed"):
    """One attempt that failed: at whom, by which word of an error, and what it says to people."""

    time: str
    level: str
    request_id: str
    provider: str
    upstream_model: str
    error: str
    detail: str


_encode = msgspec.json.Encoder().encode


def _line(record: RequestLine | AttemptLine) -> bytes:
    try:
        return _encode(record)
    except UnicodeEncodeError:
        # Peers choose some of the texts, and half a surrogate pair is no UTF-8.
        return _encode(type(record)(*map(_whole, msgspec.structs.astuple(record))))


def _whole(value: Any) -> Any:
    return whole_text(value) if isinstance(value, str) else value


def request_line(context: Context, outcome: Outcome, now: float) -> bytes:
    """Return the line of a request that ended `now`, in Unix time, without its end."""
    # Positions and not names, for this is made for every request.
    usage, detail, cost = outcome.usage or _NO_USAGE, outcome.message, outcome.cost
    reason, first_byte_seconds = outcome.reason, outcome.first_byte_seconds
    return _line(
        RequestLine(
            time_of(now),
            "info" if reason == "complete" else "warn",
            context.request_id,
            context.operation,
            context.model_asked[:LONGEST_TEXT],
            context.model[:LONGEST_TEXT],
            context.provider or "nobody",
            context.upstream_model,
            context.principal or "anybody",
            context.stream,
            outcome.status,
            outcome.ended_by,
            reason,
            None if detail is None else detail[:LONGEST_TEXT],
            len(outcome.attempts),
            round(outcome.duration_seconds * 1000),
            None if first_byte_seconds is None else round(first_byte_seconds * 1000),
            usage.prompt_tokens,
            usage.completion_tokens,
            None if cost is None else in_dollars(cost),
            outcome.bytes_in,
            outcome.bytes_out,
        )
    )


def attempt_line(context: Context, error: UpstreamError, now: float) -> bytes:
    """Return the line of an attempt that failed `now`, in Unix time, without its end."""
    detail = error.message[:LONGEST_TEXT]
    names = (context.request_id, context.provider, context.upstream_model)
    return _line(AttemptLine(time_of(now), "warn", *names, error.slug, detail))


class CollectedLines:
    """
    Lines that wait for each other, and go into a file in one write.

    None waits longer than `FLUSH_SECONDS`, nor beside more than `MOST_COLLECTED_BYTES`.  Those that wait
    die with the process.
    """

    def __init__(self, trail: Trail, clock: Any) -> None:
        self._trail = trail
        self._clock = clock
        self._lines: list[bytes] = []
        self._size_bytes = 0
        # While there is no file nothing waits: the trail counts what is lost.
        self._room_bytes = 0
        self._call: IDelayedCall | None = None

    def open(self) -> None:
        """Open the file.  Raises OSError."""
        self._trail.open()
        self._room_bytes = MOST_COLLECTED_BYTES

    def close(self) -> None:
        """Write what waits, and close the file."""
        self.flush()
        self._room_bytes = 0
        self._trail.close()

    def add(self, line: bytes) -> None:
        """Take a line, without its end."""
        if not self._lines:
            self._call = self._clock.callLater(FLUSH_SECONDS, self.flush)
        self._lines.append(line)
        self._size_bytes += len(line)
        if self._size_bytes >= self._room_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        lines, self._lines, self._size_bytes = self._lines, [], 0
        call, self._call = self._call, None
        if call is not None and call.active():
            call.cancel()
        if lines and self._trail.works():
            self._trail.write(b"\n".join([*lines, b""]))
            return
        # One by one, so that as many as there is room for are kept, and the others are counted.
        for line in lines:
            self._trail.write(line + b"\n")
