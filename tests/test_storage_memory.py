"""The store in memory, by its contract."""

from __future__ import annotations

import attrs
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from crabtwist.interfaces import IStorage
from crabtwist.storage.memory import MemoryStorage


@attrs.frozen
class Services:
    clock: Clock


class TestMemoryStorage(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.store = MemoryStorage(None, Services(self.clock))
        self.successResultOf(self.store.open())

    def get(self, namespace: str, key: bytes) -> bytes | None:
        return self.successResultOf(self.store.get(namespace, key))

    def set(self, namespace: str, key: bytes, value: bytes, ttl_seconds: float | None = None) -> None:
        self.successResultOf(self.store.set(namespace, key, value, ttl_seconds))

    def add(self, key: bytes, delta: int, ttl_seconds: float | None = None) -> int:
        return self.successResultOf(self.store.increment("n", key, delta, ttl_seconds))

    def keys(self, namespace: str, prefix: bytes = b"") -> list[bytes]:
        return [key for key, _ in self.successResultOf(self.store.list(namespace, prefix))]

    def test_is_a_storage(self) -> None:
        """It provides the whole contract."""
        self.assertTrue(verifyObject(IStorage, self.store))

    def test_values(self) -> None:
        """What was set can be got, the last of it, and nothing else."""
        self.set("n", b"k", b"one")
        self.set("n", b"k", b"two")
        self.assertEqual(self.get("n", b"k"), b"two")
        self.assertIsNone(self.get("n", b"other"))

    def test_namespaces(self) -> None:
        """A key in one namespace is not to be seen from another, whatever it looks like."""
        self.set("a", b"b:c", b"1")
        self.set("a:b", b"c", b"2")
        self.assertEqual((self.get("a", b"b:c"), self.get("a:b", b"c")), (b"1", b"2"))
        self.assertEqual((self.keys("a"), self.keys("a:b")), ([b"b:c"], [b"c"]))

    def test_value_expires(self) -> None:
        """A value is there until its time has passed, and then nowhere."""
        self.set("n", b"k", b"v", ttl_seconds=10)
        self.clock.advance(9.9)
        self.assertEqual(self.get("n", b"k"), b"v")
        self.clock.advance(0.1)
        self.assertIsNone(self.get("n", b"k"))
        self.assertEqual(self.keys("n"), [])

    def test_setting_again_sets_the_time_again(self) -> None:
        """The last setting alone says how long a value is kept."""
        self.set("n", b"k", b"v", ttl_seconds=10)
        self.set("n", b"k", b"v")
        self.set("n", b"l", b"v")
        self.set("n", b"l", b"v", ttl_seconds=10)
        self.clock.advance(20)
        self.assertEqual(self.keys("n"), [b"k"])

    def test_no_time_at_all(self) -> None:
        """A value without any time left replaces the old one and is gone."""
        self.set("n", b"k", b"old")
        self.set("n", b"k", b"new", ttl_seconds=0)
        self.assertIsNone(self.get("n", b"k"))

    def test_counters(self) -> None:
        """A counter begins at 0 and tells its new total, also downwards."""
        self.assertEqual([self.add(b"k", delta) for delta in (5, 0, -7)], [5, 5, -2])

    def test_counter_expires_from_its_beginning(self) -> None:
        """Increments do not prolong a counter's time; after it, it begins anew, with a new time."""
        self.assertEqual(self.add(b"k", 1, ttl_seconds=60), 1)
        self.clock.advance(59)
        self.assertEqual(self.add(b"k", 1, ttl_seconds=60), 2)
        self.clock.advance(1)
        self.assertEqual(self.add(b"k", 1, ttl_seconds=60), 1)
        self.clock.advance(59)
        self.assertEqual(self.add(b"k", 1, ttl_seconds=60), 2)

    def test_list(self) -> None:
        """Values are listed by prefix, sorted, and without counters."""
        for key in (b"ab", b"b", b"aa", b"a\xff"):
            self.set("n", key, b"v" + key)
        self.add(b"ac", 1)
        listed = self.successResultOf(self.store.list("n", b"a"))
        self.assertEqual(listed, [(b"aa", b"vaa"), (b"ab", b"vab"), (b"a\xff", b"va\xff")])
        self.assertEqual(len(self.keys("n")), 4)

    def test_counters_and_values_are_apart(self) -> None:
        """A value and a counter of one key do not touch each other; deleting forgets both."""
        self.set("n", b"k", b"v")
        self.assertEqual(self.add(b"k", 3), 3)
        self.assertEqual(self.get("n", b"k"), b"v")
        self.successResultOf(self.store.delete("n", b"k"))
        self.assertIsNone(self.get("n", b"k"))
        self.assertEqual(self.add(b"k", 1), 1)

    def test_delete_what_is_not_there(self) -> None:
        """Forgetting what is not there is fine."""
        self.assertIsNone(self.successResultOf(self.store.delete("n", b"k")))

    def test_deleted_and_set_again(self) -> None:
        """The time of a deleted value does not end its successor."""
        self.set("n", b"k", b"old", ttl_seconds=10)
        self.successResultOf(self.store.delete("n", b"k"))
        self.set("n", b"k", b"new", ttl_seconds=30)
        self.clock.advance(20)
        self.assertEqual(self.get("n", b"k"), b"new")

    def test_expired_keys_take_no_memory(self) -> None:
        """Keys that nobody asks for again are forgotten when their time has passed."""
        for n in range(1000):
            self.set("n", b"%d" % n, b"v", ttl_seconds=10)
            self.add(b"%d" % n, 1, ttl_seconds=10)
        self.clock.advance(11)
        self.get("n", b"other")
        for shelf in (self.store._values, self.store._counters):
            self.assertEqual((len(shelf._entries), len(shelf._expiries)), (0, 0))

    def test_one_key_set_often_takes_little_memory(self) -> None:
        """Setting one key again and again leaves little behind, and its last time holds."""
        for _ in range(1000):
            self.set("n", b"k", b"v", ttl_seconds=10)
        self.assertLess(len(self.store._values._expiries), 100)
        self.clock.advance(10)
        self.assertIsNone(self.get("n", b"k"))

    def test_close(self) -> None:
        """What was kept is gone after the end."""
        self.set("n", b"k", b"v")
        self.add(b"k", 1)
        self.successResultOf(self.store.close())
        self.assertIsNone(self.get("n", b"k"))
        self.assertEqual(self.add(b"k", 1), 1)
