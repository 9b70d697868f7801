"""What every store has to do with boards; a part of the contract of stores."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import gatherResults
from twisted.trial.unittest import TestCase

EVERY_BYTE = bytes(range(256))


class BoardsContract(TestCase):
    """The part that holds for every store; the store, and how time passes, are the contract's."""

    TTL_SECONDS: float
    store: Any

    async def pass_time(self, seconds: float) -> None:
        """Let time pass, real or not."""
        raise NotImplementedError

    async def test_boards(self) -> None:
        """Who posts reads what everybody has posted under the same keys, its own notes included."""
        self.assertEqual(
            await self.store.post("n", b"a", {b"k": b"1", b"l": b"2"}),
            {b"k": {b"a": b"1"}, b"l": {b"a": b"2"}},
        )
        found = await self.store.post("n", b"b", {b"l": b"3", b"m": b"4"})
        self.assertEqual(found, {b"l": {b"a": b"2", b"b": b"3"}, b"m": {b"b": b"4"}})
        self.assertEqual(
            await self.store.boards("n"),
            {b"k": {b"a": b"1"}, b"l": {b"a": b"2", b"b": b"3"}, b"m": {b"b": b"4"}},
        )

    async def test_nothing_to_post(self) -> None:
        """Without notes nothing is put up and nothing read."""
        await self.store.post("n", b"a", {b"k": b"1"})
        self.assertEqual(await self.store.post("n", b"b", {}), {})
        self.assertEqual(await self.store.boards("n"), {b"k": {b"a": b"1"}})
        self.assertEqual(await self.store.boards("none"), {})

    async def test_note_replaced(self) -> None:
        """A member's note takes the place of the one before, on that board alone."""
        await self.store.post("n", b"a", {b"k": b"old", b"l": b"old"})
        await self.store.post("n", b"b", {b"k": b"other"})
        found = await self.store.post("n", b"a", {b"k": b"new"})
        self.assertEqual(found, {b"k": {b"a": b"new", b"b": b"other"}})
        self.assertEqual((await self.store.boards("n"))[b"l"], {b"a": b"old"})

    async def test_note_posted_again(self) -> None:
        """The same note posted again changes nothing."""
        await self.store.post("n", b"b", {b"k": b"other"})
        for _ in range(3):
            found = await self.store.post("n", b"a", {b"k": b"same"})
            self.assertEqual(found, {b"k": {b"a": b"same", b"b": b"other"}})
        self.assertEqual(await self.store.boards("n"), found)

    async def test_any_bytes_on_boards(self) -> None:
        """Keys, members and notes are bytes of any kind and number, none and NUL too."""
        words = (
            b"",
            b"\0",
            b"a\0",
            b"a\0b",
            b"\xff",
            b"-1.5",
            b"\r\n$3\r\n",
            b"3 4\n",
            b"k" * 300,
            EVERY_BYTE,
        )
        for member in words:
            await self.store.post("n", member, {key: key + member for key in words})
        expected = {key: {member: key + member for member in words} for key in words}
        self.assertEqual(await self.store.post("n", b"", {key: key for key in words}), expected)
        self.assertEqual(await self.store.boards("n"), expected)
        (board, *_) = expected.values()
        self.assertEqual({type(part) for note in board.items() for part in note}, {bytes})

    async def test_many_boards(self) -> None:
        """One call takes many notes, and large ones; all boards are found, each once."""
        notes = {b"%04d" % n: b"%d" % n for n in range(1500)} | {b"large": EVERY_BYTE * 4096}
        await self.store.post("n", b"a", notes)
        found = await self.store.post("n", b"b", notes)
        expected = {key: {b"a": note, b"b": note} for key, note in notes.items()}
        self.assertTrue(found == expected)
        self.assertTrue(await self.store.boards("n") == expected)

    async def test_posts_in_order(self) -> None:
        """Posts take effect in the order in which they were made, also when nobody waits between them."""
        calls = [self.store.post("n", b"a", {b"k": b"%d" % n, b"%d" % n: b""}) for n in range(30)]
        found = await gatherResults(calls)
        self.assertEqual([boards[b"k"] for boards in found], [{b"a": b"%d" % n} for n in range(30)])
        self.assertEqual((await self.store.boards("n"))[b"k"], {b"a": b"29"})

    async def test_what_was_read_is_ones_own(self) -> None:
        """What a caller does to notes that it gave, and to boards that it got, changes nothing."""
        notes = {b"k": b"1"}
        call = self.store.post("n", b"a", notes)
        notes[b"k"] = b"2"
        notes[b"l"] = b"2"
        (await call)[b"k"][b"b"] = b"3"
        (await self.store.boards("n"))[b"k"].clear()
        self.assertEqual(await self.store.boards("n"), {b"k": {b"a": b"1"}})

    async def test_namespaces_of_boards(self) -> None:
        """A board in one namespace is not to be seen from another, whatever both look like."""
        places = [("a", b"b:c"), ("a:b", b"c"), ("a:", b"b:c"), ("a%3Ab", b"c"), ("a*", b"c"), ("A", b"b:c")]
        for namespace, key in places:
            await self.store.post(namespace, b"m", {key: namespace.encode()})
        for namespace, key in places:
            self.assertEqual(await self.store.boards(namespace), {key: {b"m": namespace.encode()}})
        await self.store.delete("a:", b"b:c")
        self.assertEqual(
            [len(await self.store.boards(namespace)) for namespace, _ in places], [1, 1, 0, 1, 1, 1]
        )

    async def test_boards_are_apart(self) -> None:
        """A board, a value and a counter of one key do not touch each other; boards are not listed."""
        await self.store.post("n", b"a", {b"k": b"1", b"alone": b"1"})
        await self.store.set("n", b"k", b"v")
        await self.store.set("n", b"no board", b"v")
        self.assertEqual(await self.store.increment("n", b"k", 3), 3)
        self.assertEqual(await self.store.post("n", b"a", {b"k": b"2"}), {b"k": {b"a": b"2"}})
        self.assertEqual((await self.store.get("n", b"k"), await self.store.get("n", b"alone")), (b"v", None))
        self.assertEqual(await self.store.list("n"), [(b"k", b"v"), (b"no board", b"v")])
        self.assertEqual(await self.store.increment("n", b"k", 1), 4)
        self.assertEqual(set(await self.store.boards("n")), {b"k", b"alone"})

    async def test_board_deleted(self) -> None:
        """Deleting forgets the whole board, and no other."""
        for member in (b"a", b"b"):
            await self.store.post("n", member, {b"k": b"1", b"l": b"1"})
        self.assertIsNone(await self.store.delete("n", b"k"))
        self.assertEqual(await self.store.boards("n"), {b"l": {b"a": b"1", b"b": b"1"}})
        self.assertEqual(await self.store.post("n", b"c", {b"k": b"2"}), {b"k": {b"c": b"2"}})

    # Time.

    async def test_board_expires(self) -> None:
        """A board is there until its time has passed, and then nowhere: who posts then begins anew."""
        ttl = 2 * self.TTL_SECONDS
        await self.store.post("n", b"a", {b"k": b"1", b"l": b"1"}, ttl_seconds=ttl)
        await self.store.post("n", b"a", {b"long": b"1"}, ttl_seconds=100 * ttl)
        found = await self.store.post("n", b"b", {b"k": b"1", b"l": b"1"}, ttl_seconds=ttl)
        self.assertEqual(found[b"k"], {b"a": b"1", b"b": b"1"})
        await self.pass_time(ttl)
        self.assertEqual(await self.store.boards("n"), {b"long": {b"a": b"1"}})
        found = await self.store.post("n", b"b", {b"k": b"2", b"long": b"2"})
        self.assertEqual(found, {b"k": {b"b": b"2"}, b"long": {b"a": b"1", b"b": b"2"}})
        self.assertEqual(await self.store.boards("n"), found)

    async def test_any_note_prolongs_a_board(self) -> None:
        """The time of all notes of a board counts from the latest, whoever's, the same again too."""
        ttl = 3 * self.TTL_SECONDS
        await self.store.post("n", b"a", {b"k": b"1", b"l": b"1"}, ttl_seconds=ttl)
        for note in (b"1", b"1", b"2"):
            await self.pass_time(0.6 * ttl)
            found = await self.store.post("n", b"b", {b"k": note}, ttl_seconds=ttl)
            self.assertEqual(found, {b"k": {b"a": b"1", b"b": note}})
        self.assertEqual(await self.store.boards("n"), found)
        await self.pass_time(ttl)
        self.assertEqual(await self.store.boards("n"), {})

    async def test_board_without_time(self) -> None:
        """A note without a time keeps the whole board for ever, and a later one with a time ends that."""
        ttl = 2 * self.TTL_SECONDS
        await self.store.post("n", b"a", {b"k": b"1", b"l": b"1"}, ttl_seconds=ttl)
        await self.store.post("n", b"b", {b"k": b"2"})
        await self.store.post("n", b"b", {b"m": b"2"}, ttl_seconds=float("inf"))
        await self.pass_time(ttl)
        self.assertEqual(await self.store.boards("n"), {b"k": {b"a": b"1", b"b": b"2"}, b"m": {b"b": b"2"}})
        await self.store.post("n", b"a", {b"k": b"3"}, ttl_seconds=ttl)
        await self.pass_time(ttl)
        self.assertEqual(await self.store.boards("n"), {b"m": {b"b": b"2"}})
        self.assertEqual(await self.store.post("n", b"a", {b"k": b"4"}), {b"k": {b"a": b"4"}})

    async def test_board_without_any_time(self) -> None:
        """A note without any time left is read by who posts it, and the board is gone with it."""
        for ttl_seconds in (0, -5, -5.5):
            await self.store.post("n", b"a", {b"k": b"1"})
            found = await self.store.post("n", b"b", {b"k": b"2"}, ttl_seconds=ttl_seconds)
            self.assertEqual(found, {b"k": {b"a": b"1", b"b": b"2"}})
            self.assertEqual(await self.store.boards("n"), {})
            self.assertEqual(await self.store.post("n", b"c", {b"k": b"3"}), {b"k": {b"c": b"3"}})
            await self.store.delete("n", b"k")

    async def test_deleted_board_begins_anew(self) -> None:
        """The time of a deleted board does not end its successor."""
        await self.store.post("n", b"a", {b"k": b"old"}, ttl_seconds=self.TTL_SECONDS)
        await self.store.delete("n", b"k")
        await self.store.post("n", b"a", {b"k": b"new"})
        await self.pass_time(self.TTL_SECONDS)
        self.assertEqual(await self.store.boards("n"), {b"k": {b"a": b"new"}})


class SharedBoardsContract(BoardsContract):
    """What also holds for stores that live outside of this process."""

    async def opened(self) -> Any:
        """Return an open store, closed after the test."""
        raise NotImplementedError

    async def test_two_stores_post(self) -> None:
        """Two stores on one ground read each other's notes."""
        other = await self.opened()
        await self.store.post("n", b"a", {b"k": b"1", b"l": b"1"}, ttl_seconds=600)
        found = await other.post("n", b"b", {b"k": b"2"}, ttl_seconds=600)
        self.assertEqual(found, {b"k": {b"a": b"1", b"b": b"2"}})
        self.assertEqual(await self.store.boards("n"), {**found, b"l": {b"a": b"1"}})
        self.assertEqual(await other.boards("n"), await self.store.boards("n"))

    async def test_concurrent_posts(self) -> None:
        """Of many stores that post at once none fails and none loses a note, on fresh and on dead boards."""
        stores = [self.store, *[await self.opened() for _ in range(3)]]
        keys = [b"%d" % n for n in range(40)]
        for ttl in (self.TTL_SECONDS, self.TTL_SECONDS, 600):
            for turn in range(5):
                posts = [
                    store.post(
                        "n", b"%d" % member, dict.fromkeys(keys[:: 1 - 2 * (member % 2)], b"%d" % turn), ttl
                    )
                    for member, store in enumerate(stores)
                ]
                await gatherResults(posts)
            await self.pass_time(self.TTL_SECONDS)
        board = {b"%d" % member: b"4" for member in range(4)}
        self.assertEqual(await self.store.boards("n"), dict.fromkeys(keys, board))

    async def test_boards_outlive_the_store(self) -> None:
        """Boards are there for who comes later, with their times."""
        await self.store.post("n", b"a", {b"k": b"1"})
        await self.store.post("n", b"a", {b"short": b"1"}, ttl_seconds=self.TTL_SECONDS)
        await self.store.close()
        await self.pass_time(self.TTL_SECONDS)
        self.assertEqual(await (await self.opened()).boards("n"), {b"k": {b"a": b"1"}})

    async def test_close_finishes_posts(self) -> None:
        """Closing waits for what was posted before it."""
        calls = [self.store.post("n", b"a", {b"%d" % n: b"1"}) for n in range(20)]
        await self.store.close()
        await gatherResults(calls)
        self.assertEqual(len(await (await self.opened()).boards("n")), 20)
