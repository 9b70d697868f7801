"""
Event streams (`text/event-stream`): bytes in, whole events out; no I/O.

The rules are those of the WHATWG HTML standard, 9.2.6 "Interpreting an event stream".  A line ends with
LF, CR LF or CR; an empty line ends a block; a block that has data is an event.

This listens, it does not rebuild: what comes out are the very bytes that came in, in order, cut between
events.  Finding that cut looks at each byte a fixed number of times and never again at bytes held back,
so the time is linear whatever the chunks are.  Lines are split only for those who ask for events.
"""

from __future__ import annotations

import attrs

#: How many bytes of an unfinished event are held back, unless told otherwise.
MAX_EVENT_BYTES = 1 << 20

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LF, _CR = b"\n\r"

# A line end right after a line end is an empty line.  The fourth pair, CR LF, is one line end.
_EMPTY_LINE_PAIRS = (b"\n\n", b"\n\r", b"\r\r")

# Converting a number takes time quadratic in its digits, and Python refuses very many.
_MAX_RETRY_DIGITS = 100


@attrs.frozen
class Event:
    """
    One event.

    `name` is "message" unless the block names another.  `data` is the block's data lines joined by LF,
    undecoded.  `last_event_id` is the last id of the stream so far, "" before the first.
    `retry_milliseconds` is the last valid `retry` of this block, None when it has none; see
    `EventStream.retry_milliseconds` for its bound.  `start` and `end` are where the block, with the empty
    line that ends it, stands in the bytes given to `EventStream.parse`.
    """

    name: str
    data: bytes = attrs.field(repr=False)
    last_event_id: str
    retry_milliseconds: int | None
    start: int
    end: int

    @property
    def text(self) -> str:
        """`data` as UTF-8; what is not UTF-8 becomes U+FFFD."""
        return self.data.decode("utf-8", "replace")


class EventStream:
    """
    Cuts a stream between its events and, for those who want them, parses the events.

    Feed `dataReceived` (with `treq.collect`, say); override `eventReceived` to see events, or
    `eventsReceived` to see the bytes of whole events at the cost of a search for the last empty line, and
    call `parse` there for those in which something may be.  All that was given to `eventsReceived` and
    `partReceived`, in order, and then `rest()`, is exactly what came in.  Nothing raises, whatever the
    bytes are; what an override raises comes out of `dataReceived`.

    `max_event_bytes` bounds what is held back between two chunks: 0 or more.  An event whose unfinished
    beginning is larger goes to `partReceived`, piece by piece, and is not parsed: neither it nor its id
    and retry exist for the others.  (An event that ends in the chunk that would have made it too large
    was never held, and is an event.)
    """

    #: Whether all that was handed out so far, what a callback has in its hands included, ends between two
    #: events.  False only inside an event too large to hold.
    between_events: bool = True

    #: How many events were too large to hold.
    oversize_events: int = 0

    #: The last id in the bytes parsed so far.
    last_event_id: str = ""

    #: The last valid `retry` in the bytes parsed so far.  A number of more than 100 digits counts as the
    #: largest of 100.
    retry_milliseconds: int | None = None

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self.max_event_bytes = max_event_bytes
        self._held = bytearray()  # not a list of fragments: those of a byte or two would weigh 20 times more
        self._last_byte = 0  # of an unfinished event, held or not
        self._at_start = True
        self._start = self._end = 0  # of the block being parsed, as far as its lines came
        self._retry_milliseconds: int | None = None
        self._begin_block()

    @property
    def pending_bytes(self) -> int:
        """How many bytes are held back, waiting for the end of their event."""
        return len(self._held)

    def dataReceived(self, data: bytes) -> None:
        """
        Take the next bytes, cut anywhere.

        Calls `eventsReceived` at most once, with all that is whole; the rest is held back.  A chunk that
        ends with an empty line while nothing is held back is handed out itself, not a copy.
        """
        if data.endswith((b"\n\n", b"\r\n\r\n")) and self.between_events and not self._held:
            self.eventsReceived(data)
            self._at_start = False
        elif not self.between_events:
            self._continue_oversize(data)
        elif data:
            self._hand_out_whole_events(data)

    def eventsReceived(self, region: bytes) -> None:
        """
        Override to see the bytes of one or more whole events, as they came; by default, parse them.

        A region may also hold blocks without an event, or begin with the LF of a CR LF whose CR, the end
        of the event before, did not wait for it.
        """
        self.parse(region)

    def parse(self, region: bytes) -> None:
        """
        Call `lineReceived` for each line, and so `eventReceived` for each event, of a region.

        It may be left out for some regions: `last_event_id` and `retry_milliseconds` then know nothing of
        these.  What follows the region's last empty line is no event.
        """
        if self._start < self._end:
            self._begin_block()
        self._start = self._end = _length_of_mark(region) if self._at_start else 0
        self._at_start = False
        for line in region[self._end :].splitlines(keepends=True):
            self._end += len(line)
            self.lineReceived(line.rstrip(b"\r\n"))

    def lineReceived(self, line: bytes) -> None:
        """Take a field, a comment or, when it is empty, the end of a block; the line is without its end."""
        if not line:
            self._end_block()
            return
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data_lines.append(value)
        elif name == b"event":
            self._name = value.decode("utf-8", "replace")
        elif name == b"id" and b"\0" not in value:
            self.last_event_id = value.decode("utf-8", "replace")
        elif name == b"retry" and value.isdigit():
            self._retry_milliseconds = self.retry_milliseconds = _bounded_int(value)

    def eventReceived(self, event: Event) -> None:
        """Override to see each event that was parsed."""

    def partReceived(self, part: bytes) -> None:
        """Override to see the pieces of an event that is too large to hold; see `between_events`."""

    def rest(self) -> bytes:
        """
        Take what is held back, b"" for nothing; only at the end of the stream.

        It is the beginning of an event that never ended, which is no event.
        """
        rest, self._held = bytes(self._held), bytearray()
        return rest

    def _hand_out_whole_events(self, data: bytes) -> None:
        end = _end_of_last_block(data) or self._end_at_edge(data)
        self._last_byte = data[-1]
        if end:
            region = b"".join((self._held, data[:end])) if self._held else data[:end]
            self._held = bytearray(data[end:])
            self.eventsReceived(region)
            self._at_start = False
        else:
            self._held += data
        if len(self._held) > self.max_event_bytes:
            self._begin_oversize()

    def _begin_oversize(self) -> None:
        self.between_events = self._at_start = False
        self.oversize_events += 1
        self.partReceived(self.rest())

    def _continue_oversize(self, data: bytes) -> None:
        end = self._end_at_edge(data) or _end_of_first_block(data)
        self.between_events = end > 0
        part = data[: end or len(data)]
        if part:
            self._last_byte = part[-1]
            self.partReceived(part)
        if len(part) < len(data):
            self.dataReceived(data[len(part) :])

    def _end_at_edge(self, data: bytes) -> int:
        """Where an empty line ends whose end is the first line end of `data`, at 0; 0 if there is none."""
        if not data.startswith((b"\n", b"\r")):
            return 0
        unfinished = self._held or not self.between_events
        # CR before LF is one line end, cut in two: a field's, for an empty line's CR has ended the event.
        line_ended = self._last_byte == _LF or (self._last_byte == _CR and data[0] == _CR)
        return 0 if unfinished and not line_ended else _after_line_end(data, 0)

    def _begin_block(self) -> None:
        self._start = self._end
        self._name = ""
        self._data_lines: list[bytes] = []
        self._retry_milliseconds = None

    def _end_block(self) -> None:
        name, lines, retry, start = self._name, self._data_lines, self._retry_milliseconds, self._start
        self._begin_block()
        if lines:
            data = b"\n".join(lines)
            self.eventReceived(Event(name or "message", data, self.last_event_id, retry, start, self._end))


def _end_of_last_block(data: bytes) -> int:
    """Where the last empty line within `data` ends; 0 if there is none."""
    pairs = _EMPTY_LINE_PAIRS if b"\r" in data else _EMPTY_LINE_PAIRS[:1]
    last = max([data.rfind(pair) for pair in pairs])
    return _after_line_end(data, last + 1) if last >= 0 else 0


def _end_of_first_block(data: bytes) -> int:
    """Where the first empty line within `data` ends; 0 if there is none."""
    first = min([at for pair in _EMPTY_LINE_PAIRS if (at := data.find(pair)) >= 0], default=-1)
    return _after_line_end(data, first + 1) if first >= 0 else 0


def _after_line_end(data: bytes, position: int) -> int:
    """Where the line end at `position` ends; a CR does not wait for a LF that has not come."""
    return position + (2 if data[position : position + 2] == b"\r\n" else 1)


def _length_of_mark(region: bytes) -> int:
    return len(_BYTE_ORDER_MARK) if region.startswith(_BYTE_ORDER_MARK) else 0


def _bounded_int(digits: bytes) -> int:
    significant = digits.lstrip(b"0")
    return int(significant or b"0") if len(significant) <= _MAX_RETRY_DIGITS else 10**_MAX_RETRY_DIGITS - 1
