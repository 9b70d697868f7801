"""Bodies on their way down: plain answers and streams, whole, broken, silent and abandoned."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.interfaces import IPushProducer
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from crabtwist.dialects.anthropic import ANTHROPIC
from crabtwist.dialects.openai import OPENAI
from crabtwist.plain_relay import HOLD_BYTES, PlainRelay
from crabtwist.relay import RelayLimits
from crabtwist.sse import Event
from crabtwist.stream_relay import StreamRelay
from crabtwist.testing import EVENT_STREAM, FakeResponse, FakeSink

START = (
    b'event: message_start\ndata: {"type":"message_start","message":{"model":"m",'
    b'"usage":{"input_tokens":3,"output_tokens":1}}}\n\n'
)
DELTA = b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"text":"hi"}}\n\n'
COUNT = b'event: message_delta\ndata: {"type":"message_delta","usage":{"output_tokens":7}}\n\n'
STOP = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
PING = b'event: ping\ndata: {"type":"ping"}\n\n'
ERROR = b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"busy"}}\n\n'
WHOLE = START + PING + DELTA + COUNT + STOP

LIMITS = RelayLimits(idle_timeout_seconds=100, client_stall_seconds=50, ping_seconds=15)


class StreamTests(SynchronousTestCase):
    """Streams."""

    def begin(self, *, flow: bool = True, max_event_bytes: int = 10_000) -> None:
        """Open a stream, pouring into a sink unless told otherwise."""
        self.clock = Clock()
        self.response = FakeResponse(200, EVENT_STREAM)
        self.sink = FakeSink()
        self.reader = ANTHROPIC.reader(hide_usage=False)
        self.seen: list[Event] = []
        self.relay = StreamRelay(
            self.response,
            self.clock,
            LIMITS,
            dialect=ANTHROPIC,
            reader=self.reader,
            request_id="req_1",
            on_event=self.seen.append,
            max_event_bytes=max_event_bytes,
        )
        self.relay.open()
        if flow:
            self.relay.flow(self.sink)

    def test_producer(self) -> None:
        """A relay is what a client's connection can pause, resume and stop."""
        self.begin()
        verifyObject(IPushProducer, self.relay)
        self.assertIs(self.relay, self.sink.producer)

    @given(st.lists(st.integers(0, len(WHOLE)), max_size=8))
    def test_any_cutting_is_verbatim(self, cuts: list[int]) -> None:
        """However a stream is cut, the client gets its very bytes, and a clean end."""
        self.begin()
        edges = [0, *sorted(cuts), len(WHOLE)]
        for start, end in pairwise(edges):
            self.response.receive(WHOLE[start:end])
        self.response.end()
        self.assertEqual(WHOLE, self.sink.data)
        self.assertTrue(self.sink.finished)
        self.assertEqual("complete", self.successResultOf(self.relay.done).reason)
        usage = self.reader.usage
        assert usage is not None
        self.assertEqual((3, 7, True), (usage.prompt_tokens, usage.completion_tokens, usage.complete))

    def test_events_wait_for_their_end(self) -> None:
        """Half an event stays here until the other half has come."""
        self.begin()
        self.response.receive(START + DELTA[:20])
        self.assertEqual(START, self.sink.data)
        self.response.receive(DELTA[20:])
        self.assertEqual(START + DELTA, self.sink.data)

    def test_holds_until_it_flows(self) -> None:
        """The first event makes it ready, and pauses the upstream until somebody wants the rest."""
        self.begin(flow=False)
        self.response.receive(PING)
        self.assertNoResult(self.relay.ready)
        self.response.receive(START)
        self.successResultOf(self.relay.ready)
        self.assertTrue(self.response.paused)
        self.relay.flow(self.sink)
        self.assertFalse(self.response.paused)
        self.assertEqual(PING + START, self.sink.data)

    def test_whole_stream_before_it_flows(self) -> None:
        """A stream that came at once is poured at once, and ends."""
        self.begin(flow=False)
        self.response.receive(WHOLE)
        self.response.end()
        self.relay.flow(self.sink)
        self.assertEqual((WHOLE, True), (self.sink.data, self.sink.finished))

    def broken(self, reason: str, sent: bytes, *, told: bool = True) -> None:
        """Assert that the client has exactly `sent` and then one error event."""
        end = self.successResultOf(self.relay.done)
        self.assertEqual(reason, end.reason)
        rest = self.sink.data.removeprefix(sent)
        self.assertEqual(sent + rest, self.sink.data)
        self.assertEqual(1 if told else 0, rest.count(b"event: error"))
        if told:
            self.assertTrue(rest.startswith(b'event: error\ndata: {"type":"error"'))
            self.assertTrue(rest.endswith(b"\n\n"))
            self.assertIn(b"req_1", rest)

    def test_truncated(self) -> None:
        """A clean end without the last event is no end: the half event is dropped, and the client told."""
        self.begin()
        self.response.receive(START + DELTA + COUNT[:-1])
        self.response.end()
        self.broken("truncated", START + DELTA)
        assert self.reader.usage is not None
        self.assertFalse(self.reader.usage.complete)

    def test_reset(self) -> None:
        """A reset in the middle is told between two events."""
        self.begin()
        self.response.receive(START + DELTA[:5])
        self.response.break_off()
        self.broken("connection_broken", START)

    def test_reset_after_the_end(self) -> None:
        """A reset after the last event is a success."""
        self.begin()
        self.response.receive(WHOLE)
        self.response.break_off()
        self.assertEqual("complete", self.successResultOf(self.relay.done).reason)
        self.assertEqual((WHOLE, True), (self.sink.data, self.sink.finished))

    def test_upstream_error_event(self) -> None:
        """The upstream's own error passes; the gateway adds none of its own."""
        self.begin()
        self.response.receive(START + ERROR)
        self.response.end()
        self.broken("upstream_error_event", START + ERROR, told=False)
        self.assertTrue(self.sink.finished)

    def test_idle(self) -> None:
        """A silent upstream is given up after the idle timeout, and its connection closed."""
        self.begin()
        self.response.receive(START)
        self.clock.pump([10] * 11)
        self.assertEqual("idle_timeout", self.successResultOf(self.relay.done).reason)
        self.assertTrue(self.response.stopped)
        self.assertEqual(1, self.sink.data.count(b"event: error"))

    def test_pings(self) -> None:
        """After silence the gateway keeps the stream alive, between events, in the dialect's own form."""
        self.begin()
        self.response.receive(START + DELTA[:10])
        self.clock.advance(14)
        self.assertEqual(START, self.sink.data)
        self.clock.advance(1)
        self.assertEqual(START + ANTHROPIC.keep_alive, self.sink.data)
        self.response.receive(DELTA[10:])
        self.clock.advance(14)
        self.assertEqual(START + ANTHROPIC.keep_alive + DELTA, self.sink.data)

    def test_pings_before_the_first_event(self) -> None:
        """Once the head has gone, silence is filled before anything else has come."""
        self.begin()
        self.clock.advance(15)
        self.assertEqual(ANTHROPIC.keep_alive, self.sink.data)

    def test_no_ping_inside_an_event(self) -> None:
        """While an event too large to hold is passed on in parts, nothing is said, and a break is a cut."""
        self.begin(max_event_bytes=100)
        self.response.receive(START + b"data: " + b"x" * 200)
        self.clock.advance(20)
        self.assertEqual(START + b"data: " + b"x" * 200, self.sink.data)
        self.response.break_off()
        self.assertTrue(self.sink.aborted)

    def test_brakes(self) -> None:
        """A client that does not read pauses the upstream; its silence is then no fault."""
        self.begin()
        self.response.receive(START)
        self.relay.pauseProducing()
        self.assertTrue(self.response.paused)
        self.clock.advance(40)
        self.relay.resumeProducing()
        self.assertFalse(self.response.paused)
        self.clock.pump([10] * 9)
        self.assertNoResult(self.relay.done)

    def test_stalled_client(self) -> None:
        """A client that never reads again is cut, and the upstream closed."""
        self.begin()
        self.response.receive(START)
        self.relay.pauseProducing()
        self.clock.pump([10] * 11)
        self.assertEqual("client_stalled", self.successResultOf(self.relay.done).reason)
        self.assertTrue(self.sink.aborted)
        self.assertTrue(self.response.stopped)

    def test_client_left(self) -> None:
        """A client that leaves closes the upstream at once, and nothing more is written."""
        self.begin()
        self.response.receive(START)
        self.relay.stopProducing()
        self.assertTrue(self.response.stopped)
        self.assertEqual("client_left", self.successResultOf(self.relay.done).reason)
        self.assertEqual(START, self.sink.data)

    def test_open_after_the_last_event(self) -> None:
        """An upstream that does not end after its last event is not waited for."""
        self.begin()
        self.response.receive(WHOLE)
        self.assertFalse(self.sink.finished)
        self.clock.advance(1)
        self.assertEqual("complete", self.successResultOf(self.relay.done).reason)
        self.assertTrue(self.response.stopped)
        self.assertTrue(self.sink.finished)

    def test_trickle_after_the_last_event(self) -> None:
        """Nor is what it goes on saying."""
        self.begin()
        self.response.receive(WHOLE)
        for _ in range(4):
            self.response.receive(b": still here\n\n")
            self.clock.advance(0.25)
        self.assertEqual("complete", self.successResultOf(self.relay.done).reason)
        self.assertTrue(self.response.stopped)

    def test_open_after_an_error(self) -> None:
        """Nor one that reported an error and then says nothing."""
        self.begin()
        self.response.receive(START + ERROR)
        self.clock.advance(1)
        self.broken("upstream_error_event", START + ERROR, told=False)
        self.assertTrue(self.sink.finished)

    def test_error_and_last_event(self) -> None:
        """A stream that reported an error has failed, though it ends like a whole one."""
        self.begin()
        self.response.receive(START + ERROR + STOP)
        self.response.end()
        self.broken("upstream_error_event", START + ERROR + STOP, told=False)

    def test_cannot_be_stopped(self) -> None:
        """A response that fails to stop keeps nobody from hearing of the end."""
        self.begin()
        self.patch(self.response, "stopProducing", lambda: 1 / 0)
        self.clock.pump([10] * 11)
        self.assertEqual("idle_timeout", self.successResultOf(self.relay.done).reason)
        self.assertEqual(1, len(self.flushLoggedErrors(ZeroDivisionError)))

    def test_every_event_is_shown(self) -> None:
        """Those who listen see each event once, in order."""
        self.begin()
        self.response.receive(WHOLE)
        names = ["message_start", "ping", "content_block_delta", "message_delta", "message_stop"]
        self.assertEqual(names, [event.name for event in self.seen])

    def test_no_timer_is_left(self) -> None:
        """Whatever the end, no timer stays behind."""
        self.begin()
        self.response.receive(WHOLE)
        self.response.end()
        self.assertEqual([], self.clock.getDelayedCalls())


CHUNK = b'data: {"id":"1","model":"m","choices":[{"delta":{"content":"hi"}}],"usage":null}\n\n'
USAGE = b'data: {"id":"1","choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2}}\n\n'
DONE = b"data: [DONE]\n\n"


class HiddenUsageTests(SynchronousTestCase):
    """The chunk that the gateway asked for in a client's place."""

    @given(st.lists(st.integers(0, len(CHUNK + USAGE + DONE)), max_size=5), st.booleans())
    def test_hidden_from_those_who_did_not_ask(self, cuts: list[int], hide: bool) -> None:
        """It is read, and left out of what the client gets, however the stream is cut."""
        response, sink = FakeResponse(200, EVENT_STREAM), FakeSink()
        reader = OPENAI.reader(hide_usage=hide)
        relay = StreamRelay(response, Clock(), LIMITS, dialect=OPENAI, reader=reader, request_id="r")
        relay.open()
        relay.flow(sink)
        stream = CHUNK + USAGE + DONE
        edges = [0, *sorted(cuts), len(stream)]
        for start, end in pairwise(edges):
            response.receive(stream[start:end])
        response.end()
        self.assertEqual(CHUNK + DONE if hide else stream, sink.data)
        assert reader.usage is not None
        self.assertEqual((5, 2), (reader.usage.prompt_tokens, reader.usage.completion_tokens))


class PlainTests(SynchronousTestCase):
    """Plain answers."""

    def begin(self, *, length: int | None = None) -> None:
        """Open a plain answer."""
        self.clock = Clock()
        self.response = FakeResponse(200, length=length)
        self.sink = FakeSink()
        self.reader = ANTHROPIC.reader(hide_usage=False)
        self.relay = PlainRelay(self.response, self.clock, LIMITS, reader=self.reader)
        self.relay.open()

    def test_small(self) -> None:
        """A small answer is held until it is whole, read, and then known by its length."""
        self.begin()
        body = b'{"model":"m","usage":{"input_tokens":1,"output_tokens":2}}'
        self.response.receive(body[:9])
        self.assertNoResult(self.relay.ready)
        self.response.receive(body[9:])
        self.response.end()
        self.successResultOf(self.relay.ready)
        self.assertEqual(len(body), self.relay.length)
        self.relay.flow(self.sink)
        self.assertEqual((body, True), (self.sink.data, self.sink.finished))
        assert self.reader.usage is not None
        self.assertEqual(3, self.reader.usage.prompt_tokens + self.reader.usage.completion_tokens)

    def test_large(self) -> None:
        """A large answer flows before it is whole; its usage is found at its end, its copy is not kept."""
        self.begin()
        self.response.receive(b'{"data":"' + b"x" * HOLD_BYTES)
        self.successResultOf(self.relay.ready)
        self.assertTrue(self.response.paused)
        self.relay.flow(self.sink)
        self.assertFalse(self.response.paused)
        self.response.receive(b'y","usage":{"input_tokens":4,"x":{"y":1},"output_tokens":2}}')
        self.response.end()
        self.assertTrue(self.sink.finished)
        self.assertIsNone(self.relay.copy)
        assert self.reader.usage is not None
        self.assertEqual(4, self.reader.usage.prompt_tokens)

    def test_broken_before_it_flows(self) -> None:
        """A small answer that breaks was never begun here, and can be told as an error of its own."""
        self.begin()
        self.response.receive(b"{")
        self.response.break_off()
        self.successResultOf(self.relay.ready)
        assert self.relay.end is not None
        self.assertEqual("connection_broken", self.relay.end.reason)

    def test_broken_while_it_flows(self) -> None:
        """In the middle of a document only a cut is honest."""
        self.begin()
        self.response.receive(b"x" * (HOLD_BYTES + 1))
        self.relay.flow(self.sink)
        self.response.break_off()
        self.assertTrue(self.sink.aborted)
        self.assertFalse(self.sink.finished)

    def test_idle(self) -> None:
        """A plain answer may not stand still for ever either."""
        self.begin()
        self.response.receive(b"{")
        self.clock.advance(100)
        assert self.relay.end is not None
        self.assertEqual("idle_timeout", self.relay.end.reason)
        self.assertTrue(self.response.stopped)
