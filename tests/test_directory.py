"""What was made through the admin API, on one node and on several."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred, fail
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from crabtwist.directory import POLL_SECONDS, Directory
from crabtwist.errors import StorageError
from crabtwist.storage.memory import MemoryStorage
from crabtwist.testing import FakeServices


class SharedStorage(MemoryStorage):
    """A store that other nodes see too, and that can be gone."""

    between_nodes = True
    gone = False

    def increment(self, namespace: str, key: bytes, delta: int, ttl_seconds: float | None = None) -> Any:
        """Fail while it is gone."""
        if self.gone:
            return fail(StorageError("gone"))
        return super().increment(namespace, key, delta, ttl_seconds)


class DirectoryTests(SynchronousTestCase):
    """Two nodes on one store."""

    def setUp(self) -> None:
        """Start both."""
        self.clock = Clock()
        self.storage = SharedStorage(None, FakeServices(self.clock))
        self.changes: list[frozenset[str]] = []
        self.here, self.there = self.directory(), self.directory()
        self.there.changed = self.changes.append

    def directory(self) -> Directory:
        """Return a directory that has been started."""
        directory = Directory(self.storage, self.clock, ("keys", "providers"))
        self.do(directory.start())
        self.addCleanup(directory.stop)
        return directory

    def do(self, work: Any) -> Any:
        """Return what a coroutine comes to."""
        return self.successResultOf(Deferred.fromCoroutine(work))

    def test_made(self) -> None:
        """What one node makes is there at once, and on the other after its next look, which is told so."""
        self.do(self.here.put("keys", "a", b"1"))
        self.assertEqual({"a": b"1"}, self.here.entries("keys"))
        self.assertEqual({}, self.there.entries("keys"))
        self.clock.advance(POLL_SECONDS)
        self.assertEqual({"a": b"1"}, self.there.entries("keys"))
        self.assertEqual([frozenset({"keys"})], self.changes)

    def test_deleted(self) -> None:
        """What one node deletes is gone on the other too."""
        self.do(self.here.put("providers", "p", b"1"))
        self.clock.advance(POLL_SECONDS)
        self.do(self.here.delete("providers", "p"))
        self.assertEqual({}, self.here.entries("providers"))
        self.clock.advance(POLL_SECONDS)
        self.assertEqual({}, self.there.entries("providers"))

    def test_within_a_second(self) -> None:
        """A change holds on every node within a second."""
        self.assertLess(POLL_SECONDS, 1)

    def test_made_twice(self) -> None:
        """Of two nodes that make an entry of the same name at the same time one is told that it has not."""
        self.assertTrue(self.do(self.here.make("keys", "a", b"1")))
        self.assertFalse(self.do(self.there.make("keys", "a", b"2")))
        self.assertEqual({"a": b"1"}, self.here.entries("keys"))
        self.do(self.here.delete("keys", "a"))
        self.assertTrue(self.do(self.there.make("keys", "a", b"3")))

    def test_quiet(self) -> None:
        """Nobody is told of anything while nothing changes."""
        for _ in range(5):
            self.clock.advance(POLL_SECONDS)
        self.assertEqual([], self.changes)

    def test_later_start(self) -> None:
        """A node that starts later finds what was made before."""
        self.do(self.here.put("keys", "a", b"1"))
        self.assertEqual({"a": b"1"}, self.directory().entries("keys"))

    def test_one_at_a_time(self) -> None:
        """Of two that change a sort, the second begins when the first has ended, well or not."""
        begun: list[str] = []
        first, second = Deferred[None](), Deferred[None]()

        def change(sort: str, name: str, until: Deferred[None]) -> Deferred[None]:
            async def work() -> None:
                begun.append(name)
                await until

            return Deferred.fromCoroutine(self.here.change(sort, work))

        working = change("keys", "a", first)
        change("keys", "b", second)
        change("providers", "c", second)
        self.assertEqual(["a", "c"], begun)
        first.errback(StorageError("gone"))
        self.assertEqual(["a", "c", "b"], begun)
        self.failureResultOf(working, StorageError)

    def test_change_looks_first(self) -> None:
        """Whoever changes something finds what another node has just made."""
        self.do(self.here.put("keys", "a", b"1"))

        async def found() -> Any:
            return dict(self.there.entries("keys"))

        self.assertEqual({"a": b"1"}, self.do(self.there.change("keys", found)))

    def test_store_gone(self) -> None:
        """While the store is gone what is known holds, said once; when it is back, changes come again."""
        self.do(self.here.put("keys", "a", b"1"))
        self.clock.advance(POLL_SECONDS)
        self.storage.gone = True
        for _ in range(3):
            self.clock.advance(POLL_SECONDS)
        self.assertEqual({"a": b"1"}, self.there.entries("keys"))
        self.assertEqual(2, len(self.flushLoggedErrors(StorageError)), "once for each node")
        self.storage.gone = False
        self.do(self.here.put("keys", "b", b"2"))
        self.clock.advance(POLL_SECONDS)
        self.assertEqual({"a", "b"}, set(self.there.entries("keys")))

    def test_store_lost_everything(self) -> None:
        """A store that comes back empty is told again what is known, and nobody's key stops working."""
        self.do(self.here.put("keys", "a", b"1"))
        self.clock.advance(POLL_SECONDS)
        self.changes.clear()
        self.storage.close()
        self.clock.advance(POLL_SECONDS)
        self.assertEqual(({"a": b"1"}, []), (self.there.entries("keys"), self.changes))
        self.assertEqual({"a": b"1"}, self.directory().entries("keys"))

    def test_store_went_back(self) -> None:
        """A store that comes back as it was some time ago does not bring back what was deleted since."""
        self.do(self.here.put("keys", "a", b"old"))
        self.do(self.here.put("keys", "a", b"new"))
        self.clock.advance(POLL_SECONDS)
        self.storage.close()
        for name, value in ((b"a", b"old"), (b"deleted", b"1")):
            self.storage.set("admin.keys", name, value)
        self.clock.advance(POLL_SECONDS)
        self.assertEqual({"a": b"new"}, self.directory().entries("keys"))

    def test_changed_after_a_loss(self) -> None:
        """What is made or deleted before anybody saw the loss is as it was asked for."""
        for name in ("a", "b"):
            self.do(self.here.put("keys", name, b"1"))
        self.storage.close()
        self.do(self.here.put("keys", "c", b"1"))
        self.assertEqual({"a", "b", "c"}, set(self.here.entries("keys")))
        self.storage.close()
        self.do(self.here.delete("keys", "a"))
        self.assertEqual({"b", "c"}, set(self.here.entries("keys")))

    def test_put_fails(self) -> None:
        """A change that the store does not take fails, so that nobody thinks it was made."""
        self.storage.gone = True
        self.failureResultOf(Deferred.fromCoroutine(self.here.put("keys", "a", b"1")), StorageError)
