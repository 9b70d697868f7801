"""What several nodes use together: told, heard, and what is done while it cannot be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twisted.internet.defer import Deferred, fail
from twisted.internet.task import Clock
from twisted.logger import capturedLogs
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from crabtwist.errors import StorageError
from crabtwist.interfaces import IStorage
from crabtwist.leases import (
    ALIVE_SECONDS,
    HEARTBEAT_SECONDS,
    INTERVAL_SECONDS,
    MOST_NOTES,
    PATIENCE_SECONDS,
    REFRESH_SECONDS,
    RETRY_SECONDS,
    Lease,
    Leases,
)
from crabtwist.storage.memory import MemoryStorage
from crabtwist.testing import FakeServices

#: Noon of some day.
NOON = 1_700_000_000 // 86400 * 86400 + 43200.0


@implementer(IStorage)
class Line(MemoryStorage):
    """
    One node's way to a store that several have: what is posted can be held back on it, or lost.

    `is_held` keeps what is posted until `deliver`, `is_cut` fails it; `posts` are what was taken.
    """

    between_nodes = True

    def __init__(self, store: MemoryStorage) -> None:
        self.store = store
        self.is_held = self.is_cut = False
        self.posts: list[tuple[Mapping[bytes, bytes], float | None]] = []
        self.waiting: list[tuple[Deferred[Any], tuple[Any, ...]]] = []

    def post(self, *arguments: Any) -> Deferred[Any]:
        """Put up notes, now or later."""
        if self.is_cut:
            return fail(StorageError("cut"))
        self.posts.append(arguments[2:])
        if not self.is_held:
            return self.store.post(*arguments)
        waiter: Deferred[Any] = Deferred()
        self.waiting.append((waiter, arguments))
        return waiter

    def boards(self, namespace: str) -> Deferred[Any]:
        """Read everything."""
        return fail(StorageError("cut")) if self.is_cut else self.store.boards(namespace)

    def arrive(self) -> Deferred[Any]:
        """Let the store take what was held back longest; returns its reply, still to come."""
        waiter, arguments = self.waiting.pop(0)
        reply: Deferred[Any] = Deferred()
        self.store.post(*arguments).chainDeferred(reply)
        reply.pause()
        reply.chainDeferred(waiter)
        return reply

    def deliver(self) -> None:
        """Let what was held back longest go to the store and its reply come back."""
        self.arrive().unpause()

    def lose(self, *, is_taken: bool = False) -> None:
        """Fail what was held back longest, before or after the store has taken it."""
        waiter, arguments = self.waiting.pop(0)
        if is_taken:
            self.store.post(*arguments)
        waiter.errback(StorageError("lost"))


class Count:
    """A share that counts: its note is how much it has used."""

    def __init__(self, key: bytes = b"k", ttl_seconds: float | None = None) -> None:
        self.key = key
        self.ttl_seconds = ttl_seconds
        self.lease = Lease()
        self.heard: list[dict[bytes, bytes]] = []

    def note(self) -> bytes:
        """Say the count."""
        return b"%d" % self.lease.say()

    def hear(self, others: Mapping[bytes, bytes]) -> None:
        """Remember what was heard."""
        self.lease.was_heard()
        self.heard.append(dict(others))


class Deaf(Count):
    """A share that fails when it hears anything after it was told."""

    def hear(self, others: Mapping[bytes, bytes]) -> None:
        """Fail, but for the first time."""
        if self.heard:
            raise ValueError("no note")
        super().hear(others)


class Mute(Count):
    """A share that has nothing to say."""

    def note(self) -> bytes:
        """Fail."""
        raise ValueError("no word")


class NodesCase(SynchronousTestCase):
    """Nodes on one store."""

    def setUp(self) -> None:
        """Have a clock and a store."""
        self.clock = Clock()
        self.clock.advance(NOON)
        self.store = MemoryStorage(None, FakeServices(self.clock))

    def node(self, name: str) -> tuple[Leases, Line]:
        """Return a node that runs, and its way to the store."""
        line = Line(self.store)
        leases = Leases(line, "test", self.clock, name.encode())
        self.successResultOf(Deferred.fromCoroutine(leases.start()))
        return leases, line

    def use(self, leases: Leases, share: Count, amount: int = 1, *, urgent: bool = False) -> None:
        """Use something."""
        share.lease.used += amount
        leases.changed(share, urgent=urgent)

    def pass_time(self, seconds: float) -> None:
        """Let time pass, smoothly."""
        self.clock.pump([INTERVAL_SECONDS] * round(seconds / INTERVAL_SECONDS))

    def stop(self, leases: Leases) -> None:
        """Stop a node."""
        self.successResultOf(Deferred.fromCoroutine(leases.stop()))


class LeaseTests(SynchronousTestCase):
    """How far one may go ahead."""

    def test_a_block(self) -> None:
        """A tenth of the limit may be used before the others have heard, and no more."""
        lease = Lease()
        for _ in range(10):
            self.assertTrue(lease.covers(1, 100))
            lease.used += 1
        self.assertFalse(lease.covers(1, 100))
        lease.say()
        self.assertFalse(lease.covers(1, 100))
        lease.was_heard()
        self.assertTrue(lease.covers(10, 100))

    def test_one_request(self) -> None:
        """One request is always covered when nothing else is unheard."""
        lease = Lease()
        self.assertTrue(lease.covers(1000, 100))
        lease.used += 1000
        self.assertFalse(lease.covers(1, 100))

    def test_half_of_it(self) -> None:
        """It runs low when half of the block is gone; where a block is nothing, always."""
        lease = Lease(used=4)
        self.assertFalse(lease.runs_low(100))
        lease.used += 1
        self.assertTrue(lease.runs_low(100))
        self.assertTrue(Lease().runs_low(9))

    def test_less_is_believed_at_once(self) -> None:
        """Others may have heard that less is used before this node knows that they have."""
        lease = Lease(used=10)
        lease.say()
        lease.was_heard()
        lease.used = 4
        lease.say()
        lease.used = 8
        lease.say()
        self.assertEqual(4, lease.ahead)
        lease.was_heard()
        self.assertEqual(0, lease.ahead)


class TellingTests(NodesCase):
    """What is told, when."""

    def test_told_and_heard(self) -> None:
        """What one node uses the other hears when it tells something itself."""
        (a, _), (b, _) = self.node("a"), self.node("b")
        one, two = Count(), Count()
        a.join(one)
        b.join(two)
        self.use(a, one, 3)
        self.pass_time(0.2)
        self.use(b, two, 4)
        self.pass_time(0.2)
        self.assertEqual({b"a": b"3"}, two.heard[-1])
        self.assertEqual((0, 0), (one.lease.ahead, two.lease.ahead))

    def test_there_at_the_start(self) -> None:
        """A share hears at once what was on the boards when its node started."""
        a, _ = self.node("a")
        one = Count()
        a.join(one)
        self.use(a, one, 3)
        self.stop(a)
        b, _ = self.node("b")
        two = Count()
        b.join(two)
        self.assertEqual([{b"a": b"3"}], two.heard)

    def test_nobody_joins(self) -> None:
        """What was there at the start is kept until it is said that nobody will want it any more."""
        a, _ = self.node("a")
        shares = [Count(b"old"), Count(b"new")]
        for share in shares:
            a.join(share)
            self.use(a, share, 3)
        self.stop(a)
        b, _ = self.node("b")
        b.forget_found(lambda key: key != b"new")
        self.assertEqual([b"new"], b.found)
        for share in shares:
            b.join(share)
        self.assertEqual([{}, {b"a": b"3"}], [share.heard[-1] for share in shares])

    def test_start_fails_with_the_store(self) -> None:
        """A store that cannot be read stops the start."""
        line = Line(self.store)
        line.is_cut = True
        leases = Leases(line, "test", self.clock)
        self.failureResultOf(Deferred.fromCoroutine(leases.start()), StorageError)
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_nothing_new_is_not_told(self) -> None:
        """Nothing but heartbeats is posted where nothing changed."""
        a, line = self.node("a")
        a.join(Count())
        self.pass_time(0.2)
        del line.posts[:]
        self.pass_time(4 * HEARTBEAT_SECONDS)
        self.assertEqual({1}, {len(notes) for notes, _ in line.posts})
        self.assertLessEqual(len(line.posts), 4)

    def test_urgent(self) -> None:
        """What is urgent is told at once; what is not, soon."""
        a, _ = self.node("a")
        one = Count()
        a.join(one)
        self.pass_time(0.2)
        self.use(a, one)
        self.clock.advance(0)
        self.assertEqual(1, one.lease.ahead)
        self.use(a, one, urgent=True)
        self.clock.advance(0)
        self.assertEqual(0, one.lease.ahead)

    def test_urgent_while_busy(self) -> None:
        """What is urgent while an exchange goes on is told when that is over, not later."""
        a, line = self.node("a")
        one = Count()
        a.join(one)
        line.is_held = True
        self.pass_time(0.1)
        self.use(a, one, urgent=True)
        self.clock.advance(0)
        self.assertEqual(1, len(line.waiting))
        line.deliver()
        self.clock.advance(0)
        self.assertEqual(1, len(line.waiting))
        line.deliver()
        self.assertEqual(0, one.lease.ahead)

    def test_used_meanwhile(self) -> None:
        """What is used while the store thinks was not heard yet."""
        a, line = self.node("a")
        one = Count()
        a.join(one)
        line.is_held = True
        self.use(a, one, 3)
        self.pass_time(0.1)
        self.use(a, one, 2)
        line.deliver()
        self.assertEqual(2, one.lease.ahead)

    def test_many(self) -> None:
        """More shares than fit into a call are told in several, one behind the other, at once."""
        a, line = self.node("a")
        self.pass_time(0.1)
        del line.posts[:]
        shares = [Count(b"%d" % number) for number in range(2 * MOST_NOTES + 1)]
        for share in shares:
            a.join(share)
        self.clock.pump([0, 0, 0])
        self.assertEqual([MOST_NOTES, MOST_NOTES, 1], [len(notes) for notes, _ in line.posts])

    def test_times_to_live(self) -> None:
        """Each share's board is kept as long as the share says."""
        a, line = self.node("a")
        self.pass_time(0.1)
        del line.posts[:]
        a.join(Count(b"k", 7200.0))
        a.join(Count(b"l", None))
        self.clock.advance(0)
        self.assertEqual([({b"k": b"0"}, 7200.0), ({b"l": b"0"}, None)], line.posts)

    def test_left(self) -> None:
        """Of a share that left, what was untold is told, and then nothing any more."""
        a, line = self.node("a")
        one = Count()
        a.join(one)
        self.use(a, one)
        a.leave(one)
        self.pass_time(0.2)
        self.assertEqual(0, one.lease.ahead)
        del line.posts[:]
        self.pass_time(REFRESH_SECONDS + 1)
        self.assertFalse([notes for notes, _ in line.posts if b"k" in notes])

    def test_stop_tells_the_last(self) -> None:
        """What is used just before the end is told, all of it, and nothing runs on."""
        a, _ = self.node("a")
        shares = [Count(b"%d" % number) for number in range(MOST_NOTES + 1)]
        for share in shares:
            a.join(share)
            self.use(a, share, 7, urgent=True)
        self.stop(a)
        self.assertEqual({0}, {share.lease.ahead for share in shares})
        self.clock.advance(0)
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_stop_without_the_store(self) -> None:
        """A store that is gone does not keep a node from ending."""
        a, line = self.node("a")
        a.join(Count())
        line.is_cut = True
        self.stop(a)
        self.assertFalse(a.in_touch)


class BrokenShareTests(NodesCase):
    """A share that fails, by a note that it cannot read or by a fault of its own."""

    def exchange(self, broken: Count) -> tuple[Leases, Count]:
        """Tell of a share that fails and of another, which comes after it."""
        a, _ = self.node("a")
        whole = Count(b"whole")
        a.join(broken)
        a.join(whole)
        self.use(a, whole, 3)
        self.pass_time(0.2)
        return a, whole

    def test_hearing(self) -> None:
        """What one cannot hear is logged with its name; the store is not blamed, and the others are told."""
        a, whole = self.exchange(Deaf(b"deaf"))
        (failure,) = self.flushLoggedErrors(ValueError)
        self.assertIn("no note", str(failure.value))
        self.assertEqual((True, 0), (a.in_touch, whole.lease.ahead))

    def test_telling(self) -> None:
        """What one cannot tell is left out of what the others do."""
        with capturedLogs() as events:
            a, whole = self.exchange(Mute(b"mute"))
        self.assertEqual({b"mute"}, {event["key"] for event in events if "log_failure" in event})
        self.assertEqual(1, len(self.flushLoggedErrors(ValueError)))
        self.assertEqual((True, 0), (a.in_touch, whole.lease.ahead))

    def test_not_again(self) -> None:
        """It is not tried again before it changes."""
        a, _ = self.exchange(Mute(b"mute"))
        self.flushLoggedErrors(ValueError)
        self.pass_time(1)
        self.assertEqual([], self.flushLoggedErrors(ValueError))
        self.stop(a)


class StoreTests(NodesCase):
    """What the store does to those who rely on it."""

    def test_failing(self) -> None:
        """A store that fails is left alone for a while, and told all that changed when it is back."""
        a, line = self.node("a")
        one = Count()
        a.join(one)
        self.pass_time(0.2)
        line.is_cut = True
        self.use(a, one, 5)
        self.pass_time(0.2)
        self.assertFalse(a.in_touch)
        line.is_cut = False
        self.pass_time(RETRY_SECONDS)
        self.assertEqual((True, 0), (a.in_touch, one.lease.ahead))

    def test_hung(self) -> None:
        """After half a second without a reply the node goes on as if the store were gone."""
        a, line = self.node("a")
        self.pass_time(0.1)
        line.is_held = True
        a.join(Count())
        self.clock.advance(0)
        self.clock.advance(PATIENCE_SECONDS - 0.01)
        self.assertTrue(a.in_touch)
        self.clock.advance(0.02)
        self.assertFalse(a.in_touch)
        line.lose()
        self.assertFalse(a.in_touch)

    def test_one_exchange_at_a_time(self) -> None:
        """While the store hangs, nothing piles up in front of it."""
        a, line = self.node("a")
        one = Count()
        a.join(one)
        line.is_held = True
        for _ in range(100):
            self.use(a, one, urgent=True)
            self.pass_time(0.1)
        self.assertEqual(1, len(line.waiting))

    def test_slow(self) -> None:
        """A store whose replies are late is out of touch all the time, though what it says is heard."""
        (a, line), (b, _) = self.node("a"), self.node("b")
        one, two = Count(), Count()
        a.join(one)
        b.join(two)
        self.use(b, two, 3)
        self.pass_time(0.2)
        line.is_held = True
        self.use(a, one)
        for _ in range(3):
            self.pass_time(2)
            self.assertFalse(a.in_touch)
            line.deliver()
            self.assertFalse(a.in_touch)
        self.assertEqual({b"b": b"3"}, one.heard[-1])
        line.is_held = False
        self.pass_time(0.3)
        self.assertTrue(a.in_touch)

    def test_lost_everything(self) -> None:
        """A store that lost everything while it was gone is told it again when it is back."""
        a, line = self.node("a")
        one = Count()
        a.join(one)
        self.use(a, one, 5)
        self.pass_time(0.2)
        line.is_cut = True
        self.pass_time(2 * HEARTBEAT_SECONDS)
        self.store.close()
        line.is_cut = False
        self.pass_time(1)
        self.assertEqual({b"a": b"5"}, self.successResultOf(self.store.boards("test"))[b"k"])

    def test_lost_everything_unnoticed(self) -> None:
        """It is told again within half a minute also where nobody noticed."""
        a, _ = self.node("a")
        one = Count()
        a.join(one)
        self.use(a, one, 5)
        self.pass_time(0.2)
        self.store.close()
        self.pass_time(REFRESH_SECONDS + 0.2)
        self.assertEqual({b"a": b"5"}, self.successResultOf(self.store.boards("test"))[b"k"])

    def test_reply_lost(self) -> None:
        """What was taken by the store but not answered is told again, which changes nothing."""
        a, line = self.node("a")
        one = Count()
        a.join(one)
        self.pass_time(0.2)
        line.is_held = True
        self.use(a, one, 5)
        self.pass_time(0.1)
        line.lose(is_taken=True)
        self.assertEqual(5, one.lease.ahead)
        line.is_held = False
        self.pass_time(1)
        self.assertEqual(0, one.lease.ahead)
        self.assertEqual({b"a": b"5"}, self.successResultOf(self.store.boards("test"))[b"k"])

    def test_out_of_order(self) -> None:
        """Whichever of two nodes the store hears first, both know of both in the end."""
        (a, first), (b, second) = self.node("a"), self.node("b")
        one, two = Count(), Count()
        for leases, line, share in ((a, first, one), (b, second, two)):
            leases.join(share)
            self.pass_time(0.2)
            line.is_held = True
            self.use(leases, share, 2)
        self.pass_time(0.1)
        reply = first.arrive()
        second.deliver()
        reply.unpause()
        self.assertEqual(({b"b": b"0"}, {b"a": b"2"}), (one.heard[-1], two.heard[-1]))
        first.is_held = False
        self.use(a, one)
        self.pass_time(0.2)
        self.assertEqual({b"b": b"2"}, one.heard[-1])


class RosterTests(NodesCase):
    """Who is there."""

    def test_counted(self) -> None:
        """Nodes know of each other within a heartbeat."""
        nodes = [self.node(name)[0] for name in "abc"]
        self.assertEqual([1, 2, 3], [each.nodes for each in nodes])
        self.pass_time(HEARTBEAT_SECONDS + 0.2)
        self.assertEqual([3, 3, 3], [each.nodes for each in nodes])
        self.assertEqual({b"b", b"c"}, nodes[0].alive())

    def test_the_dead(self) -> None:
        """A node that says nothing new is dead after ten seconds, and not before it has missed some beats."""
        (a, _), (_, line) = self.node("a"), self.node("b")
        self.pass_time(2 * HEARTBEAT_SECONDS)
        line.is_cut = True
        self.pass_time(2 * HEARTBEAT_SECONDS)
        self.assertEqual({b"b"}, a.alive())
        self.pass_time(ALIVE_SECONDS - 2 * HEARTBEAT_SECONDS)
        self.assertEqual(set(), a.alive())
        line.is_cut = False
        self.pass_time(2 * HEARTBEAT_SECONDS)
        self.assertEqual({b"b"}, a.alive())

    def test_nobody_dies_unheard(self) -> None:
        """While the store is gone, and just after, all are taken to be there."""
        (a, first), (b, second) = self.node("a"), self.node("b")
        self.pass_time(2 * HEARTBEAT_SECONDS)
        first.is_cut = second.is_cut = True
        self.pass_time(10 * ALIVE_SECONDS)
        self.assertEqual((2, 2), (a.nodes, b.nodes))
        first.is_cut = False
        self.pass_time(2 * HEARTBEAT_SECONDS)
        self.assertEqual(2, a.nodes)

    def test_store_that_lost_everything(self) -> None:
        """The living are alive also when the store has forgotten them."""
        (a, _), (b, _) = self.node("a"), self.node("b")
        self.pass_time(2 * HEARTBEAT_SECONDS)
        self.store.close()
        for _ in range(200):
            self.pass_time(INTERVAL_SECONDS)
            self.assertEqual((2, 2), (a.nodes, b.nodes))


class MidnightTests(NodesCase):
    """Boards that are begun anew each day."""

    def test_around_midnight(self) -> None:
        """Nodes whose clocks differ hear of each other all night, and the dead of the day are left behind."""
        late, line = Clock(), Line(self.store)
        late.advance(NOON - 30)
        (a, _), b = self.node("a"), Leases(line, "test", late, b"b")
        self.successResultOf(Deferred.fromCoroutine(b.start()))
        self.store.post("test", b"dead", {b"%d k" % (NOON // 86400): b"9"}, 100_000)
        one, two = Count(ttl_seconds=120), Count(ttl_seconds=120)
        a.join(one)
        b.join(two)
        for clock in (self.clock, late):
            clock.advance(43200 - 200)
        for second in range(400):
            for leases, clock, share in ((a, self.clock, one), (b, late, two)):
                self.use(leases, share)
                clock.pump([INTERVAL_SECONDS] * 10)
            self.assertEqual(
                (b"%d" % second, b"%d" % (second + 1)), (one.heard[-1][b"b"], two.heard[-1][b"a"])
            )
        self.assertIn(b"dead", one.heard[2])
        self.assertEqual({b"b"}, set(one.heard[-1]))
        self.assertEqual((2, 2), (a.nodes, b.nodes))
