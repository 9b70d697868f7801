"""The store in memory: the contract, and how little it remembers."""

from __future__ import annotations

from typing import Any

from twisted.internet.task import Clock

from crabtwist.storage.memory import MemoryStorage
from crabtwist.testing import FakeServices
from tests import storage_contract


class TestMemoryStorage(storage_contract.StorageContract):
    """The contract, with time that the test makes."""

    def make(self) -> MemoryStorage:
        return MemoryStorage(None, FakeServices(self.clock))

    async def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)

    def setUp(self) -> Any:
        self.clock = Clock()
        return super().setUp()

    async def test_expired_keys_take_no_memory(self) -> None:
        """Keys that nobody asks for again are forgotten when their time has passed."""
        for n in range(1000):
            self.store.set("n", b"%d" % n, b"v", ttl_seconds=10)
            self.store.increment("n", b"%d" % n, 1, ttl_seconds=10)
            self.store.post("n", b"m", {b"%d" % n: b"v"}, ttl_seconds=10)
        self.clock.advance(11)
        await self.store.get("n", b"other")
        for shelf in self.store._shelves:
            self.assertEqual((len(shelf._entries), len(shelf._expiries)), (0, 0))

    async def test_one_key_set_often_takes_little_memory(self) -> None:
        """Setting one key again and again leaves little behind, and its last time holds."""
        for _ in range(1000):
            self.store.set("n", b"k", b"v", ttl_seconds=10)
        self.assertLess(len(self.store._values._expiries), 100)
        self.clock.advance(10)
        self.assertIsNone(await self.store.get("n", b"k"))

    async def test_one_board_posted_to_often_takes_little_memory(self) -> None:
        """Posting to one board again and again leaves little behind."""
        for _ in range(1000):
            self.store.post("n", b"m", {b"k": b"v"}, ttl_seconds=10)
        self.assertLess(len(self.store._boards._expiries), 100)

    def test_for_oneself(self) -> None:
        """Other nodes see nothing of it."""
        self.assertIs(self.store.between_nodes, False)

    async def test_close(self) -> None:
        """What was kept is gone after the end."""
        await self.store.set("n", b"k", b"v")
        await self.store.increment("n", b"k", 1)
        await self.store.post("n", b"m", {b"k": b"v"})
        await self.store.close()
        self.assertEqual(await self.store.boards("n"), {})
        self.assertIsNone(await self.store.get("n", b"k"))
        self.assertEqual(await self.store.increment("n", b"k", 1), 1)
