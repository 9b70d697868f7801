"""The event-stream protocol: recorded cases, every cutting, bounds, and what the fast path promises."""

from __future__ import annotations

import base64
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from crabtwist.sse import MAX_EVENT_BYTES, Event, EventStream

CASES_FILE = Path(__file__).parent / "data" / "sse_cases.json"
CASES: list[dict[str, Any]] = json.loads(CASES_FILE.read_bytes())["cases"]

EVERY_CUTTING = settings(deadline=None, max_examples=300)

WORDS = [
    b"data:",
    b"data",
    b"x",
    b"\n",
    b"\r",
    b"\r\n",
    b"\n\n",
    b" ",
    b":",
    b"id:",
    b"event:",
    b"retry:",
    b"7",
]
ODDITIES = [b"\0", b"\xef\xbb\xbf", b"\xef", b"\xff", b"\xe2\x80\xa8", b"\x0b", b"\x0c", b"\x1c", b"\x85"]
streams = st.lists(st.sampled_from(WORDS + ODDITIES), max_size=30).map(b"".join)
cuts = st.lists(st.integers(0, 60), max_size=20)

#: name, data, last event id, retry: what the standard knows of an event.
Meaning = tuple[str, bytes, str, int | None]


class Recorder(EventStream):
    """Keeps all that it is called with."""

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        super().__init__(max_event_bytes)
        self.regions: list[bytes] = []
        self.lines: list[bytes] = []
        self.events: list[Event] = []
        self.parts: list[bytes] = []
        self.handed_out: list[bytes] = []

    def eventsReceived(self, region: bytes) -> None:
        self.regions.append(region)
        self.handed_out.append(region)
        super().eventsReceived(region)

    def lineReceived(self, line: bytes) -> None:
        self.lines.append(line)
        super().lineReceived(line)

    def eventReceived(self, event: Event) -> None:
        self.events.append(event)

    def partReceived(self, part: bytes) -> None:
        self.parts.append(part)
        self.handed_out.append(part)

    @property
    def meanings(self) -> list[Meaning]:
        return [(e.name, e.data, e.last_event_id, e.retry_milliseconds) for e in self.events]


class Unparsed(Recorder):
    """Looks at no event unless told to."""

    def eventsReceived(self, region: bytes) -> None:
        self.regions.append(region)


def fed(*chunks: bytes, max_event_bytes: int = MAX_EVENT_BYTES) -> Recorder:
    """Return a stream that was given these chunks."""
    stream = Recorder(max_event_bytes)
    for chunk in chunks:
        stream.dataReceived(chunk)
    return stream


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """Return `data` in pieces; some may be empty."""
    edges = [0, *sorted(min(place, len(data)) for place in places), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


def read_by_the_standard(data: bytes) -> list[Meaning]:
    """Return the events of a whole stream, by WHATWG HTML 9.2.6 word for word, at any cost."""
    text = data.decode("utf-8", "replace").removeprefix("\ufeff")
    *lines, _unterminated = re.split("\r\n|\n|\r", text)
    events: list[Meaning] = []
    event_type, data_buffer, last_event_id = "", "", ""
    retry: int | None = None
    for line in lines:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if line == "":
            if data_buffer != "":
                events.append((event_type or "message", data_buffer[:-1].encode(), last_event_id, retry))
            event_type, data_buffer, retry = "", "", None
        elif name == "event":
            event_type = value
        elif name == "data":
            data_buffer += value + "\n"
        elif name == "id" and "\0" not in value:
            last_event_id = value
        elif name == "retry" and re.fullmatch("[0-9]+", value):
            retry = int(value)
    return events


def ends_between_events(data: bytes) -> bool:
    """Tell whether `data` is nothing or ends with an empty line."""
    lines = data.splitlines()
    return not data or (lines[-1] == b"" and data.endswith((b"\n", b"\r")))


class RecordedCasesTests(SynchronousTestCase):
    """Cases of other projects' test suites."""

    def check(self, case: dict[str, Any], chunks: list[bytes]) -> None:
        stream = fed(*chunks)
        found = [
            {"event": e.name, "data": e.text, "id": e.last_event_id, "retry": e.retry_milliseconds}
            for e in stream.events
        ]
        self.assertEqual(found, case["expected"], case["name"])
        self.assertEqual(stream.retry_milliseconds, case.get("retry_final"), case["name"])
        self.assertEqual(b"".join(stream.regions) + stream.rest(), b"".join(chunks), case["name"])

    def chunks(self, case: dict[str, Any]) -> list[bytes]:
        return [base64.b64decode(chunk) for chunk in case["input_base64"]]

    def test_as_recorded(self) -> None:
        """Each case gives its events in the chunks in which it was recorded."""
        self.assertGreater(len(CASES), 30)
        for case in CASES:
            self.check(case, self.chunks(case))

    def test_other_chunks(self) -> None:
        """Each case gives its events in one chunk, and one byte at a time."""
        for case in CASES:
            whole = b"".join(self.chunks(case))
            self.check(case, [whole])
            self.check(case, [whole[place : place + 1] for place in range(len(whole))])


class EveryCuttingTests(SynchronousTestCase):
    """What holds for any bytes in any chunks."""

    @EVERY_CUTTING
    @given(streams, cuts)
    def test_events(self, data: bytes, places: list[int]) -> None:
        """The events are those of the standard, each with the last byte that it needs, data undecoded."""
        meanings = fed(*cut(data, places)).meanings
        decoded = [(name, raw.decode("utf-8", "replace").encode(), *more) for name, raw, *more in meanings]
        self.assertEqual(decoded, read_by_the_standard(data))
        self.assertEqual(meanings, fed(data).meanings)

    @EVERY_CUTTING
    @given(streams, cuts)
    def test_bytes(self, data: bytes, places: list[int]) -> None:
        """Every byte comes out once and in order, and only those after the last empty line are held back."""
        stream = fed(*cut(data, places))
        whole = b"".join(stream.regions)
        self.assertEqual(len(whole), max(n for n in range(len(data) + 1) if ends_between_events(data[:n])))
        self.assertEqual(stream.pending_bytes, len(data) - len(whole))
        self.assertEqual(whole + stream.rest(), data)
        self.assertEqual((stream.parts, stream.pending_bytes), ([], 0))

    @EVERY_CUTTING
    @given(streams, cuts)
    def test_places(self, data: bytes, places: list[int]) -> None:
        """`start` and `end` are where in its region the event's block stands, and no other's."""
        for region in fed(*cut(data, places)).regions:
            parsed = Recorder()
            parsed.parse(region)
            for event in parsed.events:
                block = fed(region[event.start : event.end])
                self.assertEqual([(e.name, e.data) for e in block.events], [(event.name, event.data)])

    @EVERY_CUTTING
    @given(streams, cuts, st.integers(0, 12))
    def test_bounded(self, data: bytes, places: list[int], limit: int) -> None:
        """Every byte comes out in order too, no more than the bound is held, and `between_events` is true."""
        stream = Recorder(max_event_bytes=limit)
        for chunk in cut(data, places):
            stream.dataReceived(chunk)
            self.assertLessEqual(stream.pending_bytes, limit)
            self.assertEqual(stream.between_events, ends_between_events(b"".join(stream.handed_out)))
        self.assertEqual(b"".join(stream.handed_out) + stream.rest(), data)


class ChunkTests(SynchronousTestCase):
    """When things come out, and as which object."""

    def test_same_object(self) -> None:
        """A chunk of whole events is handed out itself, whether its lines end with LF or CR LF."""
        for chunk in (b"data: a\n\ndata: b\n\n", b"data: a\r\n\r\n"):
            [region] = fed(chunk).regions
            self.assertIs(region, chunk)

    def test_no_lines_unless_parsed(self) -> None:
        """Who overrides `eventsReceived` sees bytes, and no line is split."""
        stream = Unparsed()
        stream.dataReceived(b"data: a\n\n")
        self.assertEqual((stream.regions, stream.lines, stream.events), ([b"data: a\n\n"], [], []))

    def test_one_call_per_chunk(self) -> None:
        """All whole events of a chunk come at once, and the beginning of the next is held back."""
        stream = fed(b"data: a", b"\n\ndata: b\n\ndata: c\n\ndata: d")
        self.assertEqual(stream.regions, [b"data: a\n\ndata: b\n\ndata: c\n\n"])
        self.assertEqual(stream.pending_bytes, len(b"data: d"))

    def test_bare_cr_does_not_wait(self) -> None:
        """A CR at a chunk's end ends the block, and a LF that comes after it is handed out at once."""
        stream = fed(b"data: a\r\n\r")
        self.assertEqual([event.data for event in stream.events], [b"a"])
        stream.dataReceived(b"\n")
        self.assertEqual(stream.regions, [b"data: a\r\n\r", b"\n"])
        self.assertEqual((len(stream.events), stream.pending_bytes), (1, 0))

    def test_unterminated(self) -> None:
        """A block that the stream's end cuts short is no event; it can be taken, once."""
        stream = fed(b"data: a\n\ndata: b\n")
        self.assertEqual((stream.rest(), stream.rest()), (b"data: b\n", b""))
        self.assertEqual(len(stream.events), 1)

    def test_callback_that_raises(self) -> None:
        """What an override raises comes out, after which the stream is where it would have been."""

        class Fragile(Recorder):
            def eventReceived(self, event: Event) -> None:
                super().eventReceived(event)
                if event.data == b"a":
                    raise ZeroDivisionError

        stream = Fragile()
        self.assertRaises(
            ZeroDivisionError, stream.dataReceived, b"\xef\xbb\xbfdata: a\n\n\xef\xbb\xbfdata: b"
        )
        stream.dataReceived(b"\ndata: c\n\n")
        self.assertEqual([event.data for event in stream.events], [b"a", b"c"])


class ParseTests(SynchronousTestCase):
    """The parts of the rules that no cutting shows."""

    def test_lines(self) -> None:
        """`lineReceived` sees fields, comments and empty lines, without their ends."""
        stream = fed(b": hi\ndata: a\r\nevent\r\r")
        self.assertEqual(stream.lines, [b": hi", b"data: a", b"event", b""])

    def test_skipped_regions(self) -> None:
        """What is not parsed leaves the last event id behind, and no second byte order mark is taken off."""
        for skipped in (b"id: 1\ndata: a\n\n", b"id: 1\ndata: a\n\ndata: unfinished"):
            stream = Unparsed()
            stream.dataReceived(skipped)
            stream.parse(b"\xef\xbb\xbfdata: b\ndata: c\n\n")
            self.assertEqual(stream.meanings, [("message", b"c", "", None)])

    def test_part_of_a_block(self) -> None:
        """The unfinished end of a region that was parsed by hand does not reach the next."""
        stream = Recorder()
        stream.parse(b"data: a\n\nevent: x\nretry: 1\ndata: b\n")
        stream.parse(b"data: c\n\n")
        self.assertEqual(stream.meanings, [("message", b"a", "", None), ("message", b"c", "", None)])

    def test_place_after_mark(self) -> None:
        """A block's place leaves out the byte order mark, and blocks without an event before it."""
        [event] = fed(b"\xef\xbb\xbf: hi\n\ndata: a\r\n\r\n").events
        self.assertEqual((event.start, event.end), (9, 20))

    def test_retry_without_data(self) -> None:
        """A block without data sets the stream's retry and id, and is no event."""
        stream = fed(b"retry: 5\nid: 1\nevent: ping\n\n")
        self.assertEqual((stream.events, stream.retry_milliseconds, stream.last_event_id), ([], 5, "1"))

    def test_retry_is_ascii_digits(self) -> None:
        """Nothing but ASCII digits is a retry."""
        for value in ("+5", "-5", "5 ", "5.0", "1_0", "", "\uff15", "\u00b2"):
            self.assertIsNone(fed(f"retry: {value}\n\n".encode()).retry_milliseconds, value)

    def test_absurd_retry(self) -> None:
        """A retry with more digits than Python converts is merely large; zeros before it do not count."""
        self.assertEqual(fed(b"retry: " + b"7" * 9999 + b"\n\n").retry_milliseconds, 10**100 - 1)
        self.assertEqual(fed(b"retry: " + b"0" * 9999 + b"7\n\n").retry_milliseconds, 7)

    def test_text(self) -> None:
        """An event's text is there even if its data are not UTF-8."""
        self.assertEqual([event.text for event in fed(b"data: a\xff\n\n").events], ["a\ufffd"])


class OversizeTests(SynchronousTestCase):
    """Events that are too large to hold."""

    def test_bound(self) -> None:
        """One byte more than the bound, and all that was held goes out, then the rest of the event."""
        stream = fed(b"data: 12", max_event_bytes=8)
        self.assertEqual((stream.pending_bytes, stream.between_events), (8, True))
        stream.dataReceived(b"3")
        self.assertEqual((stream.pending_bytes, stream.between_events), (0, False))
        for chunk in (b"45", b"6\n", b"\ndata: a\n\ndata: b"):
            stream.dataReceived(chunk)
        self.assertEqual(stream.parts, [b"data: 123", b"45", b"6\n", b"\n"])
        self.assertEqual((stream.regions, stream.between_events), ([b"data: a\n\n"], True))

    def test_not_an_event(self) -> None:
        """It is counted, not dispatched, and its id, name and retry are nobody's."""
        large = b"id: 2\nevent: x\nretry: 9\ndata: b"
        stream = fed(b"id: 1\ndata: a\n\n", large, b"\n\n", b"data: c\n\n", max_event_bytes=20)
        self.assertEqual(stream.meanings, [("message", b"a", "1", None), ("message", b"c", "1", None)])
        self.assertEqual((stream.oversize_events, stream.retry_milliseconds), (1, None))

    def test_first_event(self) -> None:
        """After an oversize first event a byte order mark is no longer at the beginning."""
        stream = fed(b"data: 123", b"\n\n", b"\xef\xbb\xbfdata: a\n\n", max_event_bytes=8)
        self.assertEqual((stream.events, stream.oversize_events), ([], 1))

    def test_ends_with_bare_cr(self) -> None:
        """The CR that ends it does not wait, and the LF after it is of the next region."""
        stream = fed(b"data: 1234\r", b"\n", b"\r", b"\n", b"data: a\n\n", max_event_bytes=8)
        self.assertEqual(stream.parts, [b"data: 1234\r", b"\n", b"\r"])
        self.assertEqual(stream.regions, [b"\n", b"data: a\n\n"])

    def test_one_after_another(self) -> None:
        """The end of one and the beginning of the next may share a chunk."""
        stream = fed(b"data: 123", b"\n\ndata: a\n\ndata: 456", b"\n\n", max_event_bytes=8)
        self.assertEqual(stream.parts, [b"data: 123", b"\n\n", b"data: 456", b"\n\n"])
        self.assertEqual((stream.regions, stream.oversize_events), ([b"data: a\n\n"], 2))


class Chunk(bytes):
    """Bytes that count how many of them were searched."""

    searched = 0

    def rfind(self, *arguments: Any) -> int:
        Chunk.searched += len(self)
        return super().rfind(*arguments)

    def find(self, *arguments: Any) -> int:
        Chunk.searched += len(self)
        return super().find(*arguments)

    def __contains__(self, wanted: Any) -> bool:
        Chunk.searched += len(self)
        return super().__contains__(wanted)


class Unsearchable(bytearray):
    """Held bytes: they may grow and be taken, and looking into them fails the test."""

    def refuse(self, *_arguments: Any) -> Any:
        raise AssertionError("the bytes held back were looked into")

    find = rfind = index = rindex = count = endswith = __contains__ = __getitem__ = __iter__ = refuse


class LinearTimeTests(SynchronousTestCase):
    """The work for a chunk depends on the chunk, not on what is held back."""

    def feed_slices(self, stream: Recorder, data: bytes) -> None:
        Chunk.searched = 0
        stream._held = Unsearchable()
        for place in range(0, len(data), 4096):
            stream.dataReceived(Chunk(data[place : place + 4096]))
            if stream.pending_bytes > 4096:
                self.assertIsInstance(stream._held, Unsearchable, "the bytes held back were copied")

    def test_large_event(self) -> None:
        """Each byte of a large event is searched a few times at most, and never once it is held back."""
        one_line = b"data: " + b"x" * (1 << 20) + b"\n\n"
        many_lines = b"data: x\r\n" * 100_000 + b"\r\n"
        for data, times in ((one_line, 2), (many_lines, 4)):
            stream = Recorder(max_event_bytes=len(data))
            self.feed_slices(stream, data)
            self.assertEqual((stream.regions, len(stream.events)), ([data], 1))
            self.assertLessEqual(Chunk.searched, times * len(data))

    def test_oversize(self) -> None:
        """An event too large to hold is searched no more than the others, and nothing of it is kept."""
        data = b"data: " + b"x" * (1 << 20)
        stream = Recorder(max_event_bytes=10_000)
        self.feed_slices(stream, data)
        self.assertEqual((b"".join(stream.parts), stream.pending_bytes), (data, 0))
        self.assertLessEqual(Chunk.searched, 4 * len(data))
