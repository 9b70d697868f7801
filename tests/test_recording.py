"""An answer that several read, each at its own pace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IPushProducer
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.client import ResponseDone
from twisted.web.iweb import IResponse
from zope.interface.verify import verifyObject

from crabtwist.errors import ConnectFailed, Truncated
from crabtwist.recording import SLICE_BYTES, Recording
from crabtwist.testing import JSON
from crabtwist.values import Answer

MAX_BYTES = 100


class Reader:
    """A body's protocol that remembers; `on_data` is called with it for each piece."""

    def __init__(self, on_data: Callable[[Reader], object] = lambda _: None) -> None:
        self.data = b""
        self.pieces = 0
        self.end: Failure | None = None
        self.left = False
        self.paused = False
        self.on_data = on_data
        self.transport: Any = None

    def makeConnection(self, transport: Any) -> None:
        """As a protocol's."""
        self.transport = transport

    def dataReceived(self, data: bytes) -> None:
        """As a protocol's."""
        assert not (self.left or self.paused or self.end), "given what it did not want"
        self.data += data
        self.pieces += 1
        self.on_data(self)

    def connectionLost(self, reason: Failure) -> None:
        """As a protocol's."""
        assert not (self.left or self.paused or self.end), "ended when it was not to be"
        self.end = reason

    def pause(self) -> None:
        """Want no more for now."""
        self.paused = True
        self.transport.pauseProducing()

    def resume(self) -> None:
        """Go on."""
        self.paused = False
        self.transport.resumeProducing()

    def waver(self) -> None:
        """Have enough, and want more after all."""
        self.pause()
        self.resume()

    def leave(self) -> None:
        """Want nothing, ever."""
        self.left = True
        self.transport.stopProducing()


class Upstream:
    """A producer that must not be paused twice, nor resumed without having been."""

    def __init__(self) -> None:
        self.paused = False
        self.pauses = 0

    def pauseProducing(self) -> None:
        """As a relay's."""
        assert not self.paused
        self.paused = True
        self.pauses += 1

    def resumeProducing(self) -> None:
        """As a relay's."""
        assert self.paused
        self.paused = False


class RecordingTestCase(SynchronousTestCase):
    """A recording, its upstream, and who reads it."""

    def setUp(self) -> None:
        """Start from nothing."""
        self.upstream = Upstream()
        self.desertions = 0
        self.settlements: list[bool] = []
        self.counted_bytes = 0
        self.recording = Recording(MAX_BYTES, self)

    def grown(self, more: int) -> None:
        """As a cache does."""
        self.counted_bytes += more

    def settled(self, *, whole: bool) -> None:
        """As a cache does."""
        self.settlements.append(whole)

    def desert(self) -> None:
        """As who leads does."""
        self.desertions += 1

    def read(self, on_data: Callable[[Reader], object] = lambda _: None) -> Reader:
        """Follow an answer that has begun."""
        reader = Reader(on_data)
        response: Any = self.successResultOf(self.recording.follow())
        response.deliverBody(reader)
        return reader

    def begin(self, length: int | None = None) -> Reader:
        """Begin it, with one who reads."""
        following: Deferred[Any] = self.recording.follow()
        self.recording.lead(self.desert)
        self.recording.begin(200, JSON, length, streamed=False)
        self.recording.brake(self.upstream)
        reader, response = Reader(), self.successResultOf(following)
        response.deliverBody(reader)
        return reader


class WholeTests(RecordingTestCase):
    """What comes whole."""

    def take(self, body: bytes = b"hello") -> Answer:
        """Have it answered at once."""
        answer = Answer(200, JSON, body)
        self.recording.lead(self.desert)
        self.recording.take(answer)
        return answer

    def test_given_on(self) -> None:
        """It is given to all who wait when it is settled, and to all who ask later."""
        following = [self.recording.follow() for _ in range(2)]
        answer = self.take()
        self.assertNoResult(following[0])
        self.recording.settle(complete=True)
        later = self.recording.follow()
        self.assertEqual([answer] * 3, [self.successResultOf(each) for each in (*following, later)])
        self.assertEqual(([True], 5), (self.settlements, self.counted_bytes))

    def test_who_left(self) -> None:
        """Who does not wait any more is given nothing, and nothing happens to the others."""
        gone, there = self.recording.follow(), self.recording.follow()
        gone.addErrback(lambda _: gone.cancel())
        answer = self.take()
        gone.cancel()
        self.recording.settle(complete=True)
        self.assertEqual((answer, 0), (self.successResultOf(there), self.desertions))

    def test_too_large(self) -> None:
        """One that is too large to keep is still given to all who wait, and is not open to others."""
        following = self.recording.follow()
        answer = self.take(bytes(MAX_BYTES + 1))
        self.recording.settle(complete=True)
        self.assertIs(answer, self.successResultOf(following))
        self.assertEqual(([False], False), (self.settlements, self.recording.open))


class FollowingTests(RecordingTestCase):
    """What is given to whom."""

    def test_contract(self) -> None:
        """What a follower gets is a response, and its transport a producer."""
        self.begin()
        response: Any = self.successResultOf(self.recording.follow())
        verifyObject(IResponse, response)
        verifyObject(IPushProducer, response)
        self.assertEqual([b"application/json"], response.headers.getRawHeaders(b"content-type"))
        response.setPreviousResponse(response)

    def test_live(self) -> None:
        """Who comes late gets at once what has come, and then follows; all get the same end."""
        first = self.begin()
        self.recording.write(b"one ")
        late = self.read()
        self.assertEqual(b"one ", late.data)
        self.recording.write(b"two")
        self.recording.finish()
        later = self.read()
        for reader in (first, late, later):
            self.assertEqual(b"one two", reader.data)
            assert reader.end is not None
            self.assertTrue(reader.end.check(ResponseDone))

    def test_waiting_for_the_head(self) -> None:
        """Before the head all wait; those who leave are not given it."""
        stays, leaves = self.recording.follow(), self.recording.follow()
        leaves.cancel()
        self.failureResultOf(leaves, CancelledError)
        self.recording.begin(201, JSON, None, streamed=False)
        response: Any = self.successResultOf(stays)
        self.assertEqual(201, response.code)

    def test_leaving_at_the_head(self) -> None:
        """Who makes another one leave, when both are given the head, does no harm to a third."""
        following: list[Deferred[Any]] = [self.recording.follow() for _ in range(3)]
        self.recording.lead(self.desert)
        following[0].addCallback(lambda _: following[1].cancel())
        self.recording.begin(200, JSON, None, streamed=False)
        self.failureResultOf(following[1], CancelledError)
        reader = Reader()
        self.successResultOf(following[2]).deliverBody(reader)
        self.recording.write(b"x")
        self.assertEqual(b"x", reader.data)

    def test_nobody_answers(self) -> None:
        """When there is no answer all are told, also those who come later."""
        waiting = self.recording.follow()
        error = ConnectFailed("no")
        self.recording.fail(error)
        self.assertIs(error, self.failureResultOf(waiting).value)
        self.assertIs(error, self.failureResultOf(self.recording.follow()).value)
        self.assertEqual([False], self.settlements)
        self.assertFalse(self.recording.open)

    def test_failing_in_the_middle(self) -> None:
        """A fault after the head ends what was begun, for all."""
        reader = self.begin()
        self.recording.fail(ZeroDivisionError())
        assert reader.end is not None
        self.assertTrue(reader.end.check(ZeroDivisionError))
        self.assertEqual([False], self.settlements)

    def test_slices(self) -> None:
        """A large piece is given in slices, so that a reader can say that it has enough."""
        self.recording = Recording(4 * SLICE_BYTES, self)
        self.begin().pause()
        self.recording.write(bytes(3 * SLICE_BYTES))
        reader = self.read(Reader.pause)
        self.assertEqual((1, SLICE_BYTES), (reader.pieces, len(reader.data)))
        reader.on_data = lambda _: None
        reader.resume()
        self.assertEqual(3 * SLICE_BYTES, len(reader.data))

    def test_remarks(self) -> None:
        """What the leader's relay says in its own words is for nobody: each reader's says it itself."""
        reader = self.begin()
        self.recording.remark(b"ping")
        self.assertEqual(b"", reader.data)

    def test_empty(self) -> None:
        """The readers of an empty answer are told of its end too: a length of 0 would make them not look."""
        self.begin(length=0)
        self.recording.finish()
        response: Any = self.successResultOf(self.recording.follow())
        self.assertNotEqual(0, response.length)
        reader = Reader()
        response.deliverBody(reader)
        self.assertIsNotNone(reader.end)

    def test_paused_end(self) -> None:
        """Who has paused is told of the end when it goes on."""
        reader = self.begin()
        reader.pause()
        self.recording.finish()
        self.assertIsNone(reader.end)
        reader.resume()
        self.assertIsNotNone(reader.end)


class EndingTests(RecordingTestCase):
    """How it ends."""

    def reason(self, reader: Reader) -> type:
        """Return what a reader was told."""
        assert reader.end is not None and reader.end.type is not None
        return reader.end.type

    def test_complete(self) -> None:
        """A complete one is settled as that, and may be given again."""
        self.begin()
        self.recording.finish()
        self.recording.settle(complete=True)
        self.assertEqual(([True], True), (self.settlements, self.recording.open))

    def test_not_complete(self) -> None:
        """One that is not all of the answer is settled as that, however well it ended."""
        self.begin()
        self.recording.finish()
        self.recording.settle(complete=False)
        self.assertEqual([False], self.settlements)

    def test_broken(self) -> None:
        """Everybody is told the error that it broke for; nobody new may follow, and it is not kept."""
        for end in ("finish", "abort"):
            self.setUp()
            reader = self.begin()
            getattr(self.recording, end)(Truncated("too short"))
            self.assertIs(Truncated, self.reason(reader))
            self.assertFalse(self.recording.open)
            self.recording.settle(complete=True)
            self.assertEqual([False], self.settlements)

    def test_never_ended(self) -> None:
        """Settling ends what nobody ended: no reader waits for ever."""
        reader = self.begin()
        self.recording.settle(complete=True)
        self.assertIn("broke off", str(reader.end))
        self.assertEqual([False], self.settlements)

    def test_ends_once(self) -> None:
        """What is said after the end changes nothing."""
        reader = self.begin()
        self.recording.finish()
        self.recording.abort()
        self.assertIs(ResponseDone, self.reason(reader))
        self.assertTrue(self.recording.open)


class LeavingTests(RecordingTestCase):
    """Who leaves, and when."""

    def test_first_leaves(self) -> None:
        """The first one's leaving does not end the others."""
        first = self.begin()
        second = self.read()
        first.leave()
        self.recording.write(b"x")
        self.assertEqual((b"x", 0), (second.data, self.desertions))

    def test_last_leaves(self) -> None:
        """The last one's does, once; then nobody may follow."""
        first = self.begin()
        second = self.read()
        second.leave()
        first.leave()
        first.transport.stopProducing()
        self.assertEqual((1, True, False), (self.desertions, self.recording.deserted, self.recording.open))

    def test_last_leaves_before_the_head(self) -> None:
        """Also before there is a head."""
        following = [self.recording.follow() for _ in range(2)]
        self.recording.lead(self.desert)
        for each in following:
            self.assertEqual(0, self.desertions)
            each.cancel()
            self.failureResultOf(each, CancelledError)
        self.assertEqual(1, self.desertions)

    def test_leaving_after_the_end(self) -> None:
        """Leaving an answer that has ended deserts nobody."""
        reader = self.begin()
        reader.pause()
        self.recording.write(b"x")
        self.recording.finish()
        reader.leave()
        self.assertEqual((0, True), (self.desertions, self.recording.open))

    def test_leaving_while_reading(self) -> None:
        """Who leaves in the middle of being given something is given no more, and the others all of it."""
        first = self.begin()
        first.on_data = Reader.leave
        second = self.read()
        self.recording.write(bytes(2 * SLICE_BYTES))
        self.assertEqual((SLICE_BYTES, 2 * SLICE_BYTES), (len(first.data), len(second.data)))
        second.on_data = Reader.leave
        self.recording.write(b"x")
        self.assertEqual(1, self.desertions)
        self.assertEqual(0, self.recording.size_bytes)

    def test_one_makes_another_leave(self) -> None:
        """Who is made to leave while somebody else is given something is given nothing."""
        first = self.begin()
        second = self.read()
        first.on_data = lambda _: second.leave()
        self.recording.write(b"x")
        self.assertEqual((b"x", b""), (first.data, second.data))


class BrakeTests(RecordingTestCase):
    """When the upstream waits."""

    def test_all_pause(self) -> None:
        """It waits when nobody wants more, and goes on when one does."""
        first = self.begin()
        second = self.read()
        first.pause()
        self.assertFalse(self.upstream.paused)
        second.pause()
        self.assertTrue(self.upstream.paused)
        first.resume()
        self.assertFalse(self.upstream.paused)

    def test_late_one_wants_more(self) -> None:
        """A late one makes an upstream go on that waits for the others."""
        self.begin().pause()
        self.assertTrue(self.upstream.paused)
        self.read()
        self.assertFalse(self.upstream.paused)

    def test_late_one_has_enough(self) -> None:
        """Unless it has enough at once."""
        self.begin().pause()
        self.recording.write(b"x")
        self.read(Reader.pause)
        self.assertTrue(self.upstream.paused)

    def test_who_wanted_more_leaves(self) -> None:
        """When the only one that wanted more leaves, it waits for the others."""
        first = self.begin()
        second = self.read()
        first.pause()
        second.leave()
        self.assertTrue(self.upstream.paused)
        first.leave()
        self.assertEqual(1, self.desertions)

    def test_laggard(self) -> None:
        """One that lags holds nobody up while all can be kept, and everybody when it cannot."""
        first = self.begin()
        second = self.read()
        second.pause()
        self.recording.write(bytes(MAX_BYTES))
        self.assertEqual((False, MAX_BYTES), (self.upstream.paused, len(first.data)))
        self.recording.write(b"x")
        self.assertEqual((True, MAX_BYTES + 1), (self.upstream.paused, len(first.data)))
        second.resume()
        self.assertEqual((False, 0), (self.upstream.paused, self.recording.size_bytes))
        self.assertEqual(first.data, second.data)

    def test_laggard_leaves(self) -> None:
        """When it leaves the others go on."""
        self.begin()
        second = self.read()
        second.pause()
        self.recording.write(bytes(MAX_BYTES + 1))
        second.leave()
        self.assertEqual((False, 0), (self.upstream.paused, self.recording.size_bytes))

    def test_pausing_while_reading(self) -> None:
        """Who pauses in the middle of being given something gets the rest when it goes on, in order."""
        reader = self.begin()
        reader.on_data = lambda each: each.pause() if each.pieces == 1 else None
        data = bytes(SLICE_BYTES) + b"end"
        self.recording.write(data)
        self.assertEqual((1, True), (reader.pieces, self.upstream.paused))
        reader.resume()
        self.assertEqual((data, False), (reader.data, self.upstream.paused))

    def test_resuming_while_reading(self) -> None:
        """Pausing and going on at once is as if nothing had been."""
        reader = self.begin()
        reader.on_data = Reader.waver
        data = bytes(2 * SLICE_BYTES)
        self.recording.write(data)
        self.assertEqual(data, reader.data)
        self.assertFalse(self.upstream.paused)

    def test_upstream_that_goes_on_at_once(self) -> None:
        """An upstream that gives more while it is told to go on keeps everybody's order."""
        first = self.begin()
        second = self.read()
        first.pause()
        second.pause()
        self.recording.write(b"one ")
        self.patch(self.upstream, "resumeProducing", lambda: self.recording.write(b"two"))
        first.resume()
        second.resume()
        self.assertEqual([b"one two"] * 2, [first.data, second.data])

    def test_released(self) -> None:
        """After its end the upstream is left alone."""
        reader = self.begin()
        self.recording.release()
        reader.pause()
        self.assertEqual(0, self.upstream.pauses)


class RoomTests(RecordingTestCase):
    """What is kept."""

    def test_overflow(self) -> None:
        """Where there is no room only what somebody still wants is kept; nobody new may follow."""
        first = self.begin()
        second = self.read()
        second.pause()
        self.recording.write(b"one ")
        self.recording.overflow()
        self.assertEqual((4, False), (self.recording.size_bytes, self.recording.open))
        second.resume()
        self.recording.write(b"two")
        self.assertEqual((0, 0), (self.recording.size_bytes, self.counted_bytes))
        self.assertEqual([b"one two"] * 2, [first.data, second.data])

    def test_overflow_before_the_head(self) -> None:
        """Also when that was clear before there was anything; those who wait get it all."""
        self.recording.overflow()
        reader = self.begin()
        self.recording.write(b"all")
        self.recording.finish()
        self.recording.settle(complete=True)
        self.assertEqual((b"all", 0, [False]), (reader.data, self.recording.size_bytes, self.settlements))

    def test_overflow_after_the_end(self) -> None:
        """What is complete is let go too, at once if nobody reads it."""
        reader = self.begin()
        reader.pause()
        self.recording.write(b"x" * 50)
        self.recording.finish()
        self.recording.overflow()
        self.assertEqual(50, self.recording.size_bytes)
        reader.resume()
        self.assertEqual((50, 0), (len(reader.data), self.recording.size_bytes))

    def test_overflow_without_readers(self) -> None:
        """What nobody reads is let go at once."""
        self.begin()
        self.recording.write(b"x" * 50)
        self.recording.finish()
        self.recording.overflow()
        self.assertEqual((0, 0), (self.recording.size_bytes, self.counted_bytes))

    def test_few_pieces(self) -> None:
        """A stream of many small pieces is kept as few once everybody has gone."""
        self.recording = Recording(1 << 20, self)
        reader = self.begin()
        for _ in range(100):
            self.recording.write(b"x" * 1000)
        self.recording.finish()
        self.assertEqual(100, reader.pieces)
        self.assertEqual((2, reader.data), (self.read().pieces, self.read().data))


#: What may happen: (what, to which reader, with how many bytes).
HAPPENINGS = st.tuples(
    st.sampled_from(
        [
            "write",
            "write",
            "push",
            "join",
            "pause",
            "resume",
            "leave",
            "overflow",
            "waver",
            "stop",
            "leave soon",
        ]
    ),
    st.integers(0, 4),
    st.integers(0, 60),
)


class InterleavingTests(RecordingTestCase):
    """Everything, in any order."""

    @given(st.lists(HAPPENINGS, max_size=30), st.sampled_from(["finish", "abort", "fail", "settle"]))
    @settings(deadline=None, max_examples=300)
    def test_any_order(self, happenings: list[tuple[str, int, int]], end: str) -> None:
        """Who stays gets it all and the end; the upstream waits exactly when it must; memory is bounded."""
        self.setUp()
        self.readers, self.sent, self.pushed_bytes = [self.begin()], b"", 0
        for what, which, size in happenings:
            self.happen(what, self.readers[which % len(self.readers)], size)
            self.check()
            if self.desertions:
                break
        self.end(end)

    def happen(self, what: str, reader: Reader, size: int) -> None:
        """Let one thing happen, if it can."""
        if what == "push" or (what == "write" and not self.upstream.paused):
            # What is on its way comes, though the upstream was told to wait.
            self.pushed_bytes += size if what == "push" else 0
            self.sent += (data := bytes([len(self.sent) % 251]) * size)
            self.recording.write(data)
        elif what == "overflow":
            self.recording.overflow()
        elif what == "join":
            if self.recording.open:
                self.readers.append(self.read())
        elif what != "write" and not reader.left:
            self.change(what, reader)

    def change(self, what: str, reader: Reader) -> None:
        """Let a reader do something, now or when it is given something next."""
        if what in ("waver", "stop", "leave soon"):
            reader.on_data = {"waver": Reader.waver, "stop": Reader.pause, "leave soon": Reader.leave}[what]
        elif what == "leave":
            reader.leave()
        elif what == ("resume" if reader.paused else "pause"):
            getattr(reader, what)()

    def check(self) -> None:
        """Assert what is always so."""
        present = [reader for reader in self.readers if not reader.left]
        self.assertEqual(int(not present), self.desertions)
        if not present:
            return
        for reader in present:
            self.assertEqual(self.sent[: len(reader.data)], reader.data)
            if not reader.paused:
                self.assertEqual(self.sent, reader.data)
        size, whole = self.recording.size_bytes, self.recording.whole
        self.assertEqual(size, self.counted_bytes)
        behind = len(self.sent) - min(len(reader.data) for reader in present)
        self.assertEqual(len(self.sent) if whole else behind, size)
        self.assertLessEqual(size, MAX_BYTES + 60 + self.pushed_bytes)
        enough = all(reader.paused for reader in present)
        self.assertEqual(enough or (not whole and size > MAX_BYTES), self.upstream.paused)

    def end(self, how: str) -> None:
        """End it, and assert that everybody who stayed hears of it."""
        arguments: dict[str, dict[str, Any]] = {
            "settle": {"complete": True},
            "fail": {"error": ConnectFailed("x")},
        }
        getattr(self.recording, how)(**arguments.get(how, {}))
        for reader in self.readers:
            reader.on_data = lambda _: None
            if reader.paused and not reader.left:
                reader.resume()
        for reader in self.readers:
            if not reader.left:
                self.assertEqual((self.sent, how == "finish"), (reader.data, self.ended_well(reader)))

    def ended_well(self, reader: Reader) -> bool:
        """Tell what a reader was told."""
        assert reader.end is not None, "left waiting for ever"
        return reader.end.check(ResponseDone) is not None
