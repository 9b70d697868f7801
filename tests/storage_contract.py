"""What every store has to do, whatever it is made of; each kind's own tests begin with these."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, DeferredList, gatherResults
from twisted.internet.task import LoopingCall, deferLater
from twisted.internet.threads import deferToThread
from zope.interface.verify import verifyObject

from crabtwist.errors import StorageError
from crabtwist.interfaces import IStorage
from tests.boards_contract import BoardsContract, SharedBoardsContract

EVERY_BYTE = bytes(range(256))

#: How long a call may take before the store gives it up, in tests of what goes wrong.
CALL_SECONDS = 0.6
#: What the bounds may be exceeded by on a machine that is busy with other things.
GRACE_SECONDS = 1.0
#: How long the reactor may be away: less than any wait for a server that says nothing.
LONGEST_GAP_SECONDS = 0.5

#: Never the same twice: what the ground of a test on a shared server is named by.
next_number = itertools.count().__next__


class StorageContract(BoardsContract):
    """
    Subclassed with `make` and `pass_time`; refer to it by its module, or trial runs it by itself.

    `TTL_SECONDS` is how long a short time is: as short as can be where it is real.
    """

    TTL_SECONDS = 10.0

    def make(self) -> Any:
        """Return a store that is not open yet; all of one test's are on the same ground."""
        raise NotImplementedError

    async def pass_time(self, seconds: float) -> None:
        """Let time pass, real or not."""
        raise NotImplementedError

    async def opened(self) -> Any:
        """Return an open store, closed after the test."""
        store = self.make()
        await store.open()
        self.addCleanup(store.close)
        return store

    def setUp(self) -> Any:
        """Open a store."""
        return Deferred.fromCoroutine(self.begin())

    async def begin(self) -> None:
        """Open a store."""
        self.store = await self.opened()

    async def keys(self, namespace: str = "n", prefix: bytes = b"") -> list[bytes]:
        """Return the keys that are listed."""
        return [key for key, _ in await self.store.list(namespace, prefix)]

    def test_is_a_storage(self) -> None:
        """It provides the whole contract."""
        self.assertTrue(verifyObject(IStorage, self.store))

    # Values.

    async def test_values(self) -> None:
        """What was set can be got, the last of it, and nothing else."""
        self.assertIsNone(await self.store.set("n", b"k", b"one"))
        await self.store.set("n", b"k", b"two")
        self.assertEqual(await self.store.get("n", b"k"), b"two")
        self.assertIsNone(await self.store.get("n", b"other"))

    async def test_any_bytes(self) -> None:
        """Keys and values are bytes of any kind and number, none and NUL too; numbers stay bytes."""
        for key in (b"", b"\0", b"\0\0", b"a\0b", b"a\0", b"\xff", b"1.5", b"k" * 1024, EVERY_BYTE):
            for value in (b"", b"\0", b"12", b"-1.5", b"\r\n$3\r\n", EVERY_BYTE, key):
                await self.store.set("n", key, value)
                found = await self.store.get("n", key)
                self.assertEqual((type(found), found), (bytes, value))
        self.assertEqual(len(await self.keys()), 9)

    async def test_large_values(self) -> None:
        """A value of some megabytes comes back whole, beside small ones."""
        large = EVERY_BYTE * 4 * 4096
        await gatherResults([self.store.set("n", b"large", large), self.store.set("n", b"small", b"v")])
        found = await gatherResults([self.store.get("n", b"large"), self.store.get("n", b"small")])
        self.assertTrue(found == [large, b"v"])
        self.assertTrue(await self.store.list("n") == [(b"large", large), (b"small", b"v")])

    async def test_namespaces(self) -> None:
        """A key in one namespace is not to be seen from another, whatever both look like."""
        places = [("a", b"b:c"), ("a:b", b"c"), ("a:", b"b:c"), ("a%3Ab", b"c"), ("a*", b"c"), ("A", b"b:c")]
        for number, (namespace, key) in enumerate(places):
            await self.store.set(namespace, key, b"%d" % number)
            await self.store.increment(namespace, key, number)
        for number, (namespace, key) in enumerate(places):
            self.assertEqual(await self.store.list(namespace), [(key, b"%d" % number)])
            self.assertEqual(await self.store.increment(namespace, key, 0), number)

    async def test_order(self) -> None:
        """Calls take effect in the order in which they were made, also when nobody waits between them."""
        calls = [self.store.set("n", b"k", b"%d" % n) for n in range(50)]
        found = self.store.get("n", b"k")
        await gatherResults(calls)
        self.assertIn(await found, [None, *(b"%d" % n for n in range(50))])
        self.assertEqual(await self.store.get("n", b"k"), b"49")

    # Time.

    async def test_value_expires(self) -> None:
        """A value is there until its time has passed, and then nowhere."""
        await self.store.set("n", b"long", b"v", ttl_seconds=100 * self.TTL_SECONDS)
        await self.store.set("n", b"k", b"v", ttl_seconds=self.TTL_SECONDS)
        self.assertEqual(await self.store.get("n", b"k"), b"v")
        await self.pass_time(self.TTL_SECONDS)
        self.assertIsNone(await self.store.get("n", b"k"))
        self.assertEqual(await self.keys(), [b"long"])

    async def test_setting_again_sets_the_time_again(self) -> None:
        """The last setting alone says how long a value is kept."""
        await self.store.set("n", b"k", b"v", ttl_seconds=self.TTL_SECONDS)
        await self.store.set("n", b"k", b"v")
        await self.store.set("n", b"l", b"v")
        await self.store.set("n", b"l", b"v", ttl_seconds=self.TTL_SECONDS)
        await self.store.set("n", b"m", b"v", ttl_seconds=float("inf"))
        await self.pass_time(self.TTL_SECONDS)
        self.assertEqual(await self.keys(), [b"k", b"m"])

    async def test_no_time_at_all(self) -> None:
        """A value without any time left replaces the old one and is gone."""
        for ttl_seconds in (0, -5, -5.5):
            await self.store.set("n", b"k", b"old")
            await self.store.set("n", b"k", b"new", ttl_seconds=ttl_seconds)
            self.assertIsNone(await self.store.get("n", b"k"))

    async def test_counter_expires_from_its_beginning(self) -> None:
        """Increments do not prolong a counter's time; after it, it begins anew, with a new time."""
        ttl = self.TTL_SECONDS
        for _ in range(2):
            self.assertEqual(await self.store.increment("n", b"k", 1, ttl_seconds=ttl), 1)
            self.assertEqual(await self.store.increment("n", b"k", 1, ttl_seconds=100 * ttl), 2)
            self.assertEqual(await self.store.increment("n", b"k", 1), 3)
            await self.pass_time(ttl)
        self.assertEqual(await self.store.increment("n", b"k", 1), 1)

    async def test_counter_without_time(self) -> None:
        """A counter that began without a time keeps none, whatever later increments say."""
        await self.store.increment("n", b"k", 1)
        await self.store.increment("n", b"k", 1, ttl_seconds=self.TTL_SECONDS)
        self.assertEqual(await self.store.increment("n", b"gone", 5, ttl_seconds=0), 5)
        await self.pass_time(self.TTL_SECONDS)
        self.assertEqual(await self.store.increment("n", b"k", 1), 3)
        self.assertEqual(await self.store.increment("n", b"gone", 1), 1)

    # Counters.

    async def test_counters(self) -> None:
        """A counter begins at 0 and tells its new total, also downwards."""
        totals = [await self.store.increment("n", b"k", delta) for delta in (5, 0, -7)]
        self.assertEqual(totals, [5, 5, -2])

    async def test_large_totals(self) -> None:
        """Totals are exact to the last unit, where a float would not be."""
        await self.store.increment("n", b"k", 2**62)
        self.assertEqual(await self.store.increment("n", b"k", 1), 2**62 + 1)
        self.assertEqual(await self.store.increment("n", b"down", -(2**62) - 1), -(2**62) - 1)

    async def test_concurrent_increments(self) -> None:
        """Of many callers at once each gets a total of its own, and none is lost."""
        totals = await gatherResults([self.store.increment("n", b"k", 1) for _ in range(300)])
        self.assertEqual(sorted(totals), list(range(1, 301)))

    async def test_counters_and_values_are_apart(self) -> None:
        """A value and a counter of one key do not touch each other; deleting forgets both."""
        await self.store.set("n", b"k", b"v")
        self.assertEqual(await self.store.increment("n", b"k", 3), 3)
        self.assertEqual(await self.store.get("n", b"k"), b"v")
        await self.store.increment("n", b"counter alone", 1)
        self.assertEqual(await self.keys(), [b"k"])
        await self.store.delete("n", b"k")
        self.assertIsNone(await self.store.get("n", b"k"))
        self.assertEqual(await self.store.increment("n", b"k", 1), 1)

    # Lists.

    async def test_list(self) -> None:
        """Values are listed sorted by the bytes of their keys."""
        keys = [b"ab", b"b", b"", b"aa", b"a\xff", b"a\0", b"\xff\xff", b"Z", b"a", b"\xc3\xa9", b"_"]
        for key in keys:
            await self.store.set("n", key, b"v" + key)
        self.assertEqual(await self.store.list("n"), [(key, b"v" + key) for key in sorted(keys)])
        self.assertEqual(await self.store.list("none"), [])

    async def test_prefixes(self) -> None:
        """A prefix is bytes, and stands for nothing but itself."""
        specials = (
            b"*",
            b"?",
            b"[a]",
            b"[^a]",
            b"a-z",
            b"\\",
            b"%",
            b"_",
            b"'",
            b":",
            b"\0",
            b"\xff",
            b"\xff\xff",
        )
        keys = [b"a", b"A", b"aa", *(s for s in specials), *(s + b"tail" for s in specials), b"ztail", b"b"]
        for key in keys:
            await self.store.set("n", key, b"v")
        for prefix in (b"", b"a", b"aaa", *specials):
            expected = sorted(key for key in keys if key.startswith(prefix))
            self.assertEqual(await self.keys(prefix=prefix), expected, prefix)

    async def test_long_list(self) -> None:
        """A list is whole, however long, with each key once."""
        keys = [b"%04d" % n for n in range(2500)]
        for first in range(0, len(keys), 100):
            await gatherResults([self.store.set("n", key, key) for key in keys[first : first + 100]])
        await self.store.set("other", b"k", b"v")
        self.assertEqual(await self.store.list("n"), [(key, key) for key in keys])

    # Deleting.

    async def test_delete_what_is_not_there(self) -> None:
        """Forgetting what is not there is fine."""
        self.assertIsNone(await self.store.delete("n", b"k"))

    async def test_deleted_and_set_again(self) -> None:
        """The time of a deleted value does not end its successor."""
        await self.store.set("n", b"k", b"old", ttl_seconds=self.TTL_SECONDS)
        await self.store.delete("n", b"k")
        await self.store.set("n", b"k", b"new")
        await self.pass_time(self.TTL_SECONDS)
        self.assertEqual(await self.store.get("n", b"k"), b"new")

    # Callers.

    async def test_a_caller_that_gives_up(self) -> None:
        """A call may be cancelled at any time; the others do not notice."""
        calls: list[Deferred[Any]] = [self.store.increment("n", b"other", 1) for _ in range(20)]
        kept = self.store.set("n", b"k", b"v")
        for call in calls:
            call.addErrback(lambda failure: failure.trap(CancelledError) and None)
            call.cancel()
        await kept
        self.assertEqual(await self.store.get("n", b"k"), b"v")


class SharedStorageContract(StorageContract, SharedBoardsContract):
    """What also holds for stores that live outside of this process."""

    async def test_two_stores(self) -> None:
        """Two stores on one ground share values, and count together without losing anything."""
        other = await self.opened()
        await self.store.set("n", b"k", b"v")
        self.assertEqual(await other.get("n", b"k"), b"v")
        stores = (self.store, other)
        totals = await gatherResults(
            [store.increment("n", b"k", 1, ttl_seconds=600) for _ in range(150) for store in stores]
        )
        self.assertEqual(sorted(totals), list(range(1, 301)))

    async def move(self) -> None:
        """Give the stores that are made from now on new ground, where nothing is."""
        raise NotImplementedError

    async def test_opened_at_once(self) -> None:
        """Several may open on new ground at the same time."""
        for _ in range(3):
            await self.move()
            stores = await gatherResults([Deferred.fromCoroutine(self.opened()) for _ in range(6)])
            totals = await gatherResults([store.increment("n", b"k", 1) for store in stores])
            self.assertEqual(sorted(totals), [1, 2, 3, 4, 5, 6])

    async def test_reopened(self) -> None:
        """Values and counters outlive the store, with their times."""
        await self.store.set("n", b"k", b"v")
        await self.store.set("n", b"short", b"v", ttl_seconds=self.TTL_SECONDS)
        await self.store.increment("n", b"k", 7)
        await self.store.close()
        await self.pass_time(self.TTL_SECONDS)
        other = await self.opened()
        self.assertEqual(await other.list("n"), [(b"k", b"v")])
        self.assertEqual(await other.increment("n", b"k", 1), 8)

    async def test_after_close(self) -> None:
        """Every call after the end fails, and says why."""
        await self.store.close()
        await self.store.close()
        for call in (
            self.store.get("n", b"k"),
            self.store.set("n", b"k", b"v"),
            self.store.increment("n", b"k", 1),
            self.store.list("n"),
            self.store.delete("n", b"k"),
            self.store.post("n", b"m", {b"k": b"v"}),
            self.store.post("n", b"m", {}),
            self.store.boards("n"),
        ):
            error = await self.assertFailure(call, StorageError)
            self.assertIn("not open", str(error))

    async def test_close_finishes(self) -> None:
        """Closing waits for what was asked for before it."""
        calls = [self.store.set("n", b"%d" % n, b"v") for n in range(50)]
        await self.store.close()
        await gatherResults(calls)
        other = await self.opened()
        self.assertEqual(len(await other.list("n")), 50)

    async def test_total_too_large(self) -> None:
        """A total beyond 64 bits is refused, and the counter keeps what it has."""
        await self.store.increment("n", b"k", 2**63 - 1)
        for delta in (1, 2**70):
            await self.assertFailure(self.store.increment("n", b"k", delta), StorageError)
        self.assertEqual(await self.store.increment("n", b"k", 0), 2**63 - 1)
        await self.store.set("n", b"k", b"others go on")


class Gaps:
    """Measures how long the reactor was away at most."""

    def __init__(self, reactor: Any) -> None:
        self.longest_seconds = 0.0
        self._reactor = reactor
        self._last = reactor.seconds()
        self._call = LoopingCall(self._look)
        self._call.start(0.01)

    def stop(self) -> None:
        """Measure no more."""
        self._call.stop()

    def _look(self) -> None:
        now = self._reactor.seconds()
        self.longest_seconds = max(self.longest_seconds, now - self._last)
        self._last = now


class ServedStorageContract(SharedStorageContract):
    """The contract with real time, on a real server; and that server's misfortunes."""

    TTL_SECONDS = 0.25
    #: How long calls may take where nothing goes wrong, on a machine that is busy with other things.
    patience_seconds = 10.0
    server: Any
    number = 0

    def setUp(self) -> Any:
        from twisted.internet import reactor

        self.reactor: Any = reactor
        self.number = next_number()
        return super().setUp()

    async def pass_time(self, seconds: float) -> None:
        await deferLater(self.reactor, seconds + 0.01)

    async def lose_patience(self) -> None:
        """From here on calls have little time, and the reactor must be there all the time."""
        self.patience_seconds = CALL_SECONDS
        self.store = await self.opened()
        gaps = Gaps(self.reactor)
        self.addCleanup(lambda: self.assertLess(gaps.longest_seconds, LONGEST_GAP_SECONDS))
        self.addCleanup(gaps.stop)

    async def timed(self, call: Deferred[Any]) -> tuple[bool, float]:
        """Return whether a call succeeded, and how long it took; a failure must be ours."""
        began = self.reactor.seconds()
        ((success, outcome),) = await DeferredList([call], consumeErrors=True)
        if not success:
            outcome.trap(StorageError)
        return success, self.reactor.seconds() - began

    async def each_call(self) -> list[tuple[bool, float]]:
        """Make every kind of call at once, several times, and time them all."""
        calls = [
            call
            for n in range(10)
            for call in (
                self.store.get("n", b"%d" % n),
                self.store.set("n", b"%d" % n, b"v"),
                self.store.increment("n", b"%d" % n, 1),
                self.store.list("n", b"%d" % n),
                self.store.delete("n", b"other"),
                self.store.post("n", b"m", {b"%d" % n: b"v", b"k": b"v"}, ttl_seconds=600),
                self.store.boards("n"),
            )
        ]
        return await gatherResults([Deferred.fromCoroutine(self.timed(call)) for call in calls])

    async def until_it_works(self, call: Callable[[], Deferred[Any]], seconds: float = 10.0) -> Any:
        """Call until it succeeds, and return what it gave."""
        deadline = self.reactor.seconds() + seconds
        while True:
            try:
                return await call()
            except StorageError:
                if self.reactor.seconds() > deadline:
                    raise
            await deferLater(self.reactor, 0.05)

    async def test_hang(self) -> None:
        """A server that hangs fails calls within their bound, again and again, and later they work."""
        await self.lose_patience()
        await self.store.set("n", b"kept", b"v")
        self.server.pause()
        try:
            for _ in range(2):
                timed = await self.each_call()
                self.assertEqual({success for success, _ in timed}, {False})
                self.assertLess(max(seconds for _, seconds in timed), CALL_SECONDS + GRACE_SECONDS)
        finally:
            self.server.resume()
        found = await self.until_it_works(lambda: self.store.get("n", b"kept"))
        self.assertEqual(found, b"v")
        self.assertEqual({success for success, _ in await self.each_call()}, {True})

    async def test_kill_and_restart(self) -> None:
        """A server that dies under calls fails them, none counts twice, and it all works when it is back."""
        await self.lose_patience()
        counted = [self.store.increment("n", b"k", 1) for _ in range(100)]
        await counted[0]
        self.server.pause()
        calls = Deferred.fromCoroutine(self.each_call())
        await deferToThread(self.server.kill)
        try:
            self.assertEqual({success for success, _ in await calls}, {False})
            began = self.reactor.seconds()
            timed = await self.each_call()
            self.assertEqual({success for success, _ in timed}, {False})
            self.assertLess(self.reactor.seconds() - began, CALL_SECONDS + GRACE_SECONDS)
        finally:
            await deferToThread(self.server.start)
        total = await self.until_it_works(lambda: self.store.increment("n", b"k", 0))
        outcomes = await DeferredList(counted, consumeErrors=True)
        self.assertTrue(sum(success for success, _ in outcomes) <= total <= 100)
        self.assertEqual({success for success, _ in await self.each_call()}, {True})

    async def test_restart_while_idle(self) -> None:
        """A server that was restarted while nobody asked for anything is not even noticed."""
        await self.each_call()
        await deferToThread(self.server.kill)
        await deferToThread(self.server.start)
        self.assertEqual({success for success, _ in await self.each_call()}, {True})

    async def test_close_while_it_hangs(self) -> None:
        """A store can be closed though its server hangs."""
        await self.lose_patience()
        self.server.pause()
        try:
            calls = Deferred.fromCoroutine(self.each_call())
            success, seconds = await self.timed(self.store.close())
            self.assertTrue(success)
            self.assertLess(seconds, 4 + GRACE_SECONDS)
            self.assertEqual({success for success, _ in await calls}, {False})
        finally:
            self.server.resume()

    async def refused(self, **changes: Any) -> str:
        """Return why a store does not open, which must not tell the password."""
        store = self.make(**changes)
        error: Exception = await self.assertFailure(store.open(), StorageError)
        for secret in ("p@ss", "p%40ss", "wrong-word"):
            self.assertNotIn(secret, f"{error} {error!r} {store._settings!r}")
        return str(error)
