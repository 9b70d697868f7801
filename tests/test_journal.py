"""The journal, its files, and the way from it to the ledger."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count, pairwise
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, fail, maybeDeferred, succeed
from twisted.internet.task import Clock
from twisted.logger import ILogObserver, LogLevel, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import provider

from crabtwist.delivery import Delivery
from crabtwist.errors import ConfigurationError, RecordRefused
from crabtwist.journal import Journal, Recovery
from crabtwist.records import Record, Reservation
from crabtwist.segments import frame, unframe

SYNC_SECONDS = 0.1


class Ledger:
    """As much of a ledger as the delivery knows, in memory."""

    def __init__(self) -> None:
        self.kept: dict[str, Record] = {}
        self.offered: Counter[str] = Counter()
        self.appends = 0
        self.answer: Callable[[], Deferred[Any]] = lambda: succeed(None)
        #: Ids of records that it can never hold.
        self.refuses: set[str] = set()

    def append(self, records: Sequence[Record]) -> Deferred[Any]:
        self.appends += 1
        self.offered.update(record.id for record in records)
        if self.refuses & {record.id for record in records}:
            return fail(RecordRefused("no such thing"))
        return self.answer().addCallback(lambda _: self._keep(records))

    def _keep(self, records: Sequence[Record]) -> None:
        for record in records:
            self.kept.setdefault(record.id, record)


class Case(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.numbers = count()
        self.syncs = 0
        self.folder = Path(self.mktemp()) / "journal"

    def in_thread(self, work: Callable[[], None]) -> Deferred[None]:
        self.syncs += 1
        return maybeDeferred(work)

    def journal(self, folder: Path | None = None, **settings: Any) -> Journal:
        journal = Journal(
            folder or self.folder, self.clock, self.in_thread, sync_seconds=SYNC_SECONDS, **settings
        )
        self.addCleanup(lambda: self.successResultOf(journal.close()))
        return journal

    def opened(self, folder: Path | None = None, **settings: Any) -> Journal:
        journal = self.journal(folder, **settings)
        journal.open()
        return journal

    def folder_after_death(self, cut_bytes: int = 0) -> Path:
        """Return the folder as the next process would find it, its newest segment cut short."""
        self.end_turn()
        folder = Path(self.mktemp()) / f"after death {next(self.numbers)}"
        shutil.copytree(self.folder, folder)
        if cut_bytes:
            newest = max(folder.iterdir())
            os.truncate(newest, max(0, newest.stat().st_size - cut_bytes))
        return folder

    def end_turn(self) -> None:
        """Let happen what the journal puts off to the end of the reactor's turn."""
        self.clock.advance(0)

    def writes(self) -> list[int]:
        """Return the sizes of the writes from now on."""
        sizes, write = [], os.write

        def watched(file: int, data: bytes) -> int:
            sizes.append(len(data))
            return write(file, data)

        self.patch(os, "write", watched)
        return sizes

    def segments(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    def events(self, level: LogLevel) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []

        @provider(ILogObserver)
        def observe(event: Any) -> None:
            if event["log_level"] == level:
                found.append(event)

        publisher: Any = globalLogPublisher
        publisher.addObserver(observe)
        self.addCleanup(publisher.removeObserver, observe)
        return found


def ids(journal: Journal) -> list[str]:
    return [record.id for record in journal.read(10_000).records]


def deliver(journal: Journal, most: int = 10_000) -> list[str]:
    batch = journal.read(most)
    journal.delivered(batch)
    return [record.id for record in batch.records]


def settle(journal: Journal, *names: str) -> None:
    for name in names:
        journal.settle(Record(id=name, reason="complete", status=200))


def reserve(journal: Journal, *names: str) -> None:
    for name in names:
        journal.reserve(Reservation(id=name, max_completion_tokens=9, estimated_cost=8))


class TestLines(SynchronousTestCase):
    @given(st.binary().filter(lambda payload: b"\n" not in payload))
    @settings(deadline=None)
    def test_whole(self, payload: bytes) -> None:
        """A whole line gives back its kind and what was in it."""
        self.assertEqual(unframe(frame(b"S", payload)[:-1]), (b"S", payload))

    @given(st.binary(min_size=1), st.data())
    @settings(deadline=None)
    def test_damaged(self, payload: bytes, data: st.DataObject) -> None:
        """A line that was cut anywhere, or changed by a byte, is told from a whole one."""
        line = frame(b"S", payload)[:-1]
        place = data.draw(st.integers(0, len(line) - 1))
        other = bytes([line[place] ^ data.draw(st.integers(1, 255))])
        for damaged in (line[:place], line[:place] + other + line[place + 1 :]):
            self.assertRaises(ValueError, unframe, damaged)


class TestJournal(Case):
    def test_order(self) -> None:
        """Records come back whole, in the order in which they were settled, until they are delivered."""
        journal = self.opened()
        reserve(journal, "a", "b")
        settle(journal, "b", "c")
        self.assertEqual((ids(journal), ids(journal), journal.undelivered), (["b", "c"], ["b", "c"], 2))
        self.assertEqual(journal.read(1).records, (Record(id="b", reason="complete", status=200),))
        self.assertEqual((deliver(journal, 1), deliver(journal), deliver(journal)), (["b"], ["c"], []))
        self.assertEqual(journal.undelivered, 0)

    def test_found(self) -> None:
        """A record can be found by its id from its end until it was delivered."""
        journal = self.opened()
        settle(journal, "a", "b", "c")
        self.assertEqual(Record(id="b", reason="complete", status=200), journal.find("b"))
        self.assertIsNone(journal.find("d"))
        deliver(journal, 2)
        self.assertEqual([None, None, "c"], [getattr(journal.find(name), "id", None) for name in "abc"])

    def test_written_in_time(self) -> None:
        """What ended in a turn of the reactor is in the file after it, by one write."""
        journal, writes = self.opened(), self.writes()
        settle(journal, *"abc")
        self.assertEqual(writes, [])
        self.end_turn()
        (segment,) = self.folder.iterdir()
        self.assertEqual(writes, [segment.stat().st_size])
        self.assertIn(b'"id":"c"', segment.read_bytes())
        self.assertEqual((segment.stat().st_mode & 0o777, self.folder.stat().st_mode & 0o777), (0o600, 0o700))

    def test_reserved_at_once(self) -> None:
        """A reservation is in the file before the call returns, and so is what waited, by one write."""
        journal, writes = self.opened(), self.writes()
        settle(journal, "a", "b")
        reserve(journal, "c")
        (segment,) = self.folder.iterdir()
        self.assertEqual(writes, [segment.stat().st_size])
        self.assertEqual([line[18:19] for line in segment.read_bytes().splitlines()], [b"S", b"S", b"R"])

    def test_written_in_any_case(self) -> None:
        """Whoever reads, syncs or closes the journal has what waits written first."""
        for act in (ids, Journal._sync, Journal.close):
            folder = self.folder / f"{next(self.numbers)}"
            journal = self.opened(folder)
            settle(journal, "a")
            act(journal)
            self.assertIn(b'"id":"a"', next(folder.iterdir()).read_bytes())

    def test_sync(self) -> None:
        """What was written is brought to the disk within a tenth of a second, if anything was."""
        journal = self.opened()
        synced: list[int] = []
        self.patch(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino))
        (segment,) = self.folder.iterdir()
        self.clock.advance(SYNC_SECONDS)
        self.assertEqual(synced, [])
        settle(journal, "a", "b")
        self.clock.advance(SYNC_SECONDS)
        self.assertEqual(synced.count(segment.stat().st_ino), 1)
        self.assertEqual(self.syncs, 1)

    def test_sync_of_all(self) -> None:
        """Segments that were replaced since the last sync are brought to the disk too, and their folder."""
        journal = self.opened(segment_bytes=1)
        synced: list[int] = []
        self.patch(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino))
        settle(journal, "a", "b", "c")
        self.clock.advance(SYNC_SECONDS)
        places = [self.folder, *self.folder.iterdir()]
        self.assertEqual(sorted(synced), sorted(place.stat().st_ino for place in places))

    def test_failed_sync(self) -> None:
        """A disk that cannot sync is counted and logged, and tried again."""
        journal = self.opened()
        settle(journal, "a")
        patch = self.patch(os, "fsync", lambda _: os.close(-1))
        self.clock.advance(SYNC_SECONDS)
        patch.restore()
        self.assertEqual((journal.failed_syncs, len(self.flushLoggedErrors(OSError))), (1, 1))
        self.clock.advance(SYNC_SECONDS)
        self.assertEqual((journal.failed_syncs, self.syncs), (1, 2))

    def test_unwritable_record(self) -> None:
        """A record that cannot be written is dropped with a word, and raises nothing."""
        journal = self.opened()
        journal.settle(Record(id="\ud800"))
        self.assertEqual((journal.dropped_records, ids(journal)), (1, []))
        self.assertEqual(len(self.flushLoggedErrors(UnicodeEncodeError)), 1)

    def test_closed(self) -> None:
        """Before it is open and after it was closed it counts what it is given, and raises nothing."""
        journal = self.journal()
        reserve(journal, "a")
        journal.open()
        self.successResultOf(journal.close())
        settle(journal, "b")
        self.assertEqual((journal.dropped_reservations, journal.dropped_records), (1, 1))
        self.assertEqual(deliver(journal), [])
        self.successResultOf(journal.close())

    def test_one_process(self) -> None:
        """A folder that another journal has open is refused, and free again when that is closed."""
        first = self.opened()
        self.assertIn("another process", str(self.assertRaises(ConfigurationError, self.opened)))
        self.successResultOf(first.close())
        self.opened()

    def test_no_folder(self) -> None:
        """A folder that cannot be made is a configuration's fault, with its path."""
        self.folder.parent.mkdir()
        self.folder.touch()
        self.assertIn(str(self.folder), str(self.assertRaises(ConfigurationError, self.opened)))


class TestSegments(Case):
    def test_deleted(self) -> None:
        """A segment is deleted when all in it was delivered, and not before the next sync."""
        journal = self.opened(segment_bytes=1)
        settle(journal, "a", "b", "c")
        first, second, third = self.segments()
        self.assertEqual(deliver(journal, 2), ["a", "b"])
        self.assertEqual(self.segments()[:2], [first, second])
        self.clock.advance(SYNC_SECONDS)
        self.assertEqual(self.segments()[:2], [second, third])
        self.assertEqual(ids(journal), ["c"])

    def test_size(self) -> None:
        """The size is that of the files, and shrinks with them."""
        journal = self.opened(segment_bytes=1)
        for _ in range(3):
            settle(journal, "a", "b", "c")
            self.end_turn()
            sizes = sum(path.stat().st_size for path in self.folder.iterdir())
            self.assertEqual(journal.size_bytes, sizes)
            deliver(journal)
            deliver(journal)
            self.clock.advance(SYNC_SECONDS)
        self.assertLess(len(self.segments()), 4)

    def test_carried_over(self) -> None:
        """A request that takes long keeps no segment alive, and is not forgotten either."""
        journal = self.opened(segment_bytes=1)
        reserve(journal, "long")
        for number in range(20):
            settle(journal, f"short {number}")
            deliver(journal)
            self.clock.advance(SYNC_SECONDS)
        self.assertLess(len(self.segments()), 5)
        next_one = self.opened(self.folder_after_death())
        self.assertEqual(ids(next_one), ["long"])

    def test_full(self) -> None:
        """Beyond its bound the journal keeps what it has, drops what comes, and says so once."""
        journal, alarms = self.opened(max_bytes=20_000, segment_bytes=1000), self.events(LogLevel.critical)
        names = [f"{number:04}" for number in range(1000)]
        settle(journal, *names)
        kept = ids(journal)
        self.assertEqual((kept, journal.dropped_records), (names[: len(kept)], 1000 - len(kept)))
        self.assertTrue(10 < len(kept) < 400 and journal.size_bytes <= 20_000, (kept, journal.size_bytes))
        self.assertEqual(len(alarms), 1)

    def test_room_again(self) -> None:
        """What was delivered makes room, and the next time that it is full is another alarm."""
        journal, alarms = self.opened(max_bytes=20_000, segment_bytes=1000), self.events(LogLevel.critical)
        for times in (1, 2):
            settle(journal, *"x" * 1000)
            deliver(journal)
            self.clock.advance(SYNC_SECONDS)
            self.assertEqual(len(alarms), times)
        dropped = journal.dropped_records
        settle(journal, "a")
        self.assertEqual((ids(journal), journal.dropped_records), (["a"], dropped))

    def test_room_for_the_reserved(self) -> None:
        """Requests that have a reservation have room for their record, however full it is."""
        journal = self.opened(max_bytes=40_000)
        names = [f"{number:04}" for number in range(100)]
        reserve(journal, *names)
        reserved = 100 - journal.dropped_reservations
        self.assertTrue(5 < reserved < 20, reserved)
        settle(journal, *names[:reserved])
        self.assertEqual((ids(journal), journal.dropped_records), (names[:reserved], 0))

    def test_torn_write(self) -> None:
        """A line that the disk takes only a part of is dropped, and harms no other."""
        journal, write = self.opened(), os.write
        settle(journal, "a")
        self.end_turn()
        patch = self.patch(os, "write", lambda file, data: write(file, data[:30]))
        settle(journal, "b")
        self.assertEqual(ids(journal), ["a"])
        patch.restore()
        settle(journal, "c")
        self.assertEqual((ids(journal), journal.dropped_records), (["a", "c"], 1))
        self.assertEqual(journal.size_bytes, next(self.folder.iterdir()).stat().st_size)
        self.assertEqual(ids(self.opened(self.folder_after_death())), ["a", "c"])
        deliver(journal)
        self.assertEqual(journal.undelivered, 0)

    def test_full_disk(self) -> None:
        """A record that the disk does not take is found at the next start if it was reserved."""
        journal = self.opened()
        reserve(journal, "a")
        patch = self.patch(os, "write", lambda file, _: os.close(-1))
        settle(journal, "a")
        reserve(journal, "b")
        patch.restore()
        self.assertEqual((journal.dropped_records, journal.dropped_reservations), (1, 1))
        self.assertEqual(ids(self.opened(self.folder_after_death())), ["a"])

    @given(st.integers(0, 400), st.booleans())
    @settings(deadline=None, max_examples=50)
    def test_cut_batch(self, room: int, refused: bool) -> None:
        """Of several that are written together those are dropped that the disk did not take whole."""
        self.folder, write = Path(self.mktemp()) / "journal", os.write
        journal = self.opened()
        settle(journal, "first")
        reserve(journal, *"abc")
        patch = self.patch(os, "write", lambda file, data: write(file, data[:room]) if room else os.close(-1))
        settle(journal, *"abcd")
        if refused:
            reserve(journal, "e")
        self.end_turn()
        patch.restore()
        kept = ids(journal)
        self.assertEqual(kept, ["first", *"abcd"][: len(kept)])
        self.assertEqual((journal.undelivered, journal.dropped_records), (len(kept), 5 - len(kept)))
        settle(journal, "z")
        self.end_turn()
        self.assertEqual(journal.size_bytes, next(self.folder.iterdir()).stat().st_size)
        left = [name for name in "abc" if name not in kept]
        left += ["e"] * (refused and not journal.dropped_reservations)
        self.assertEqual(ids(self.opened(self.folder_after_death())), [*kept, "z", *left])
        self.assertEqual(deliver(journal), [*kept, "z"])

    @given(
        st.lists(st.tuples(st.sampled_from("RSSETD"), st.integers(0, 5)), max_size=60), st.integers(1, 900)
    )
    @settings(deadline=None, max_examples=60)
    def test_anything(self, steps: list[tuple[str, int]], segment_bytes: int) -> None:
        """Whatever the disk takes of whatever happens, the journal knows what is in its files."""
        self.folder, write, takes = Path(self.mktemp()) / "journal", os.write, 9
        journal, numbers = self.opened(segment_bytes=segment_bytes), count()
        patch = self.patch(
            os, "write", lambda file, data: write(file, data[: takes * 50 if takes < 5 else None])
        )
        delivered = []
        for step, number in steps:
            if step == "R":
                reserve(journal, f"{number}")
            elif step == "S":
                settle(journal, f"{number} {next(numbers)}" if number % 2 else f"{number}")
            elif step == "D":
                delivered += deliver(journal, number + 1)
                self.clock.advance(SYNC_SECONDS)
            elif step == "T":
                takes = number
            elif step == "E":
                self.end_turn()
        patch.restore()
        left = ids(journal)
        self.assertEqual(journal.undelivered, len(left))
        self.assertEqual(journal.size_bytes, sum(path.stat().st_size for path in self.folder.iterdir()))
        settled = sum(step == "S" for step, _ in steps)
        self.assertEqual(len(delivered) + len(left) + journal.dropped_records, settled)
        found = self.opened(self.folder_after_death()).read(10_000).records
        whole = [record.id for record in found if record.reason == "complete"]
        # A note of what was delivered may be missing too: that is offered again.
        again = len(whole) - len(left)
        self.assertEqual(whole[again:], left)
        self.assertLessEqual(set(whole[:again]), set(delivered))


class TestRecovery(Case):
    def test_nothing(self) -> None:
        """A folder that is new, or whose records were all delivered, holds nothing to recover."""
        journal = self.journal()
        self.assertEqual(journal.open(), Recovery(0, 0, 0))
        reserve(journal, "a")
        settle(journal, "a", "b")
        deliver(journal)
        self.assertEqual(self.journal(self.folder_after_death()).open(), Recovery(0, 0, 0))

    def test_undelivered(self) -> None:
        """Records that were settled and not delivered are there after a death, those delivered are not."""
        journal = self.opened(segment_bytes=100)
        settle(journal, "a", "b", "c", "d")
        deliver(journal, 2)
        next_one = self.journal(self.folder_after_death())
        self.assertEqual(next_one.open(), Recovery(undelivered=2, interrupted=0, torn=0))
        self.assertEqual((ids(next_one), next_one.undelivered), (["c", "d"], 2))

    def test_interrupted(self) -> None:
        """A request that was reserved and never settled was interrupted; its last reservation counts."""
        journal = self.opened()
        journal.reserve(Reservation(id="a", accepted_at=5, provider="first", max_completion_tokens=1))
        last = Reservation(id="a", accepted_at=5, provider="second", max_completion_tokens=7)
        journal.reserve(last)
        next_one = self.journal(self.folder_after_death())
        self.assertEqual(next_one.open(), Recovery(undelivered=1, interrupted=1, torn=0))
        (record,) = next_one.read(9).records
        self.assertEqual(record, last.interrupted(record.ended_at))
        self.assertGreater(record.ended_at, 1_700_000_000_000_000)

    def test_death_in_a_turn(self) -> None:
        """A request that ended, and whose end was not written yet, is still reserved."""
        journal = self.opened()
        reserve(journal, "a")
        folder = self.folder_after_death()
        settle(journal, "a")
        self.assertEqual(self.journal(folder).open(), Recovery(undelivered=1, interrupted=1, torn=0))

    def test_cut_everywhere(self) -> None:
        """Wherever the last write was torn, all before it is there, and nothing that never was."""
        journal = self.opened()
        reserve(journal, "a")
        settle(journal, "a")
        reserve(journal, "b")
        (segment,) = self.folder.iterdir()
        length, lines = segment.stat().st_size, segment.read_bytes().splitlines(keepends=True)
        for cut in range(length):
            whole = sum(length - cut >= len(b"".join(lines[:n])) - 1 for n in (1, 2, 3))
            next_one = self.opened(self.folder_after_death(cut_bytes=cut))
            states = [(record.id, record.reason) for record in next_one.read(9).records]
            expected = [[], [("a", "interrupted")], [("a", "complete")]]
            self.assertEqual(states, [*expected, [("a", "complete"), ("b", "interrupted")]][whole], cut)

    def test_damage(self) -> None:
        """A damaged line in the middle is passed over, counted and logged; those after it are read."""
        journal = self.opened()
        settle(journal, "a", "b", "c")
        folder = self.folder_after_death()
        (segment,) = folder.iterdir()
        segment.write_bytes(segment.read_bytes().replace(b'"id":"b"', b'"id":"x"'))
        warnings, next_one = self.events(LogLevel.warn), self.journal(folder)
        self.assertEqual(next_one.open(), Recovery(undelivered=2, interrupted=0, torn=1))
        self.assertEqual((deliver(next_one), next_one.undelivered), (["a", "c"], 0))
        self.assertEqual([event["torn"] for event in warnings], [1])

    def test_unreadable_reservation(self) -> None:
        """A reservation of which only the id can be read is still a request that was interrupted."""
        self.opened()
        folder = self.folder_after_death()
        next(folder.iterdir()).write_bytes(frame(b"R", b'{"id":"a","provider":1}') + frame(b"R", b"{}"))
        next_one = self.journal(folder)
        self.assertEqual(next_one.open(), Recovery(undelivered=1, interrupted=1, torn=1))
        self.assertEqual([(r.id, r.estimated) for r in next_one.read(9).records], [("a", True)])

    def test_idle_starts(self) -> None:
        """Starting again and again without work leaves no files behind."""
        for _ in range(10):
            journal = self.opened()
            deliver(journal)
            self.successResultOf(journal.close())
        self.assertLess(len(self.segments()), 3)

    def test_newer_writer(self) -> None:
        """Lines of a kind that only a newer version knows are passed over in silence."""
        self.opened()
        folder = self.folder_after_death()
        next(folder.iterdir()).write_bytes(frame(b"Z", b"?") + frame(b"S", b'{"id":"a","new":1}'))
        next_one = self.journal(folder)
        self.assertEqual(next_one.open(), Recovery(undelivered=1, interrupted=0, torn=0))
        self.assertEqual(ids(next_one), ["a"])

    def test_death_in_recovery(self) -> None:
        """However often the process dies while it recovers or delivers, each request is there once."""
        journal, ledger = self.opened(segment_bytes=200), Ledger()
        names = [f"{number}" for number in range(12)]
        reserve(journal, *names)
        settle(journal, *names[:5])
        for cut in (0, 1, 150, 151, 800, 3, 0, 0):
            self.folder = self.folder_after_death(cut_bytes=cut)
            journal = self.opened(segment_bytes=200)
            batch = journal.read(3)
            self.successResultOf(ledger.append(batch.records))
            if cut % 2:
                journal.delivered(batch)
        while records := journal.read(3).records:
            self.successResultOf(ledger.append(records))
            journal.delivered(journal.read(3))
        reasons = {name: "complete" if int(name) < 5 else "interrupted" for name in names}
        self.assertEqual({name: record.reason for name, record in ledger.kept.items()}, reasons)


class TestDelivery(Case):
    def setUp(self) -> None:
        super().setUp()
        self.ledger = Ledger()
        self.live = self.opened()
        self.delivery = Delivery(
            self.live, self.ledger, self.clock, interval_seconds=1, batch_records=2, timeout_seconds=10
        )
        self.delivery.start()
        self.addCleanup(self.delivery.stop)

    def advance(self, seconds: int) -> None:
        self.clock.pump([1] * seconds)

    def break_ledger(self) -> None:
        self.ledger.answer = lambda: fail(OSError("gone"))

    def mend_ledger(self) -> None:
        self.ledger.answer = lambda: succeed(None)

    def test_in_the_background(self) -> None:
        """What is settled is in the ledger a moment later, each record offered once."""
        settle(self.live, *"abcde")
        self.assertEqual(self.ledger.appends, 0)
        self.advance(1)
        settle(self.live, "f")
        self.advance(3)
        self.assertEqual(self.ledger.offered, Counter("abcdef"))
        self.assertEqual((self.live.undelivered, self.ledger.appends), (0, 4))

    def test_nothing_to_deliver(self) -> None:
        """Segments without records are left behind as well."""
        journal = self.opened(self.folder / "other", segment_bytes=1)
        reserve(journal, "a", "b", "c")
        (first, *_) = sorted((self.folder / "other").iterdir())
        self.assertIs(self.successResultOf(Delivery(journal, self.ledger, self.clock).flush()), True)
        self.clock.advance(SYNC_SECONDS)
        self.assertFalse(first.exists())
        self.assertEqual(self.ledger.appends, 0)

    def test_failure(self) -> None:
        """A ledger that is gone is asked again with ever longer waits, and then gets everything once."""
        self.break_ledger()
        settle(self.live, *"abc")
        self.advance(100)
        self.assertTrue(4 <= self.ledger.appends <= 8, self.ledger.appends)
        self.assertEqual((self.delivery.failures, self.live.undelivered), (self.ledger.appends, 3))
        self.mend_ledger()
        self.advance(30)
        self.assertEqual((list(self.ledger.kept), self.delivery.failures), (list("abc"), 0))
        self.assertEqual(self.live.undelivered, 0)

    def test_crashing_ledger(self) -> None:
        """A ledger that raises is one that failed."""
        self.ledger.answer = lambda: Deferred.fromCoroutine(1 / 0)  # type: ignore[arg-type] # never gets there
        settle(self.live, "a")
        self.advance(1)
        self.assertEqual((self.delivery.failures, ids(self.live)), (1, ["a"]))

    def test_hung_ledger(self) -> None:
        """A ledger that never answers is given up after a time, and asked again with the same."""
        self.ledger.answer = Deferred
        settle(self.live, "a")
        self.advance(11)
        self.assertEqual((self.delivery.failures, self.ledger.appends), (1, 1))
        self.mend_ledger()
        self.advance(3)
        self.assertEqual((self.ledger.offered, list(self.ledger.kept)), (Counter(a=2), ["a"]))

    def test_one_at_a_time(self) -> None:
        """While the ledger has not answered it is not asked again."""
        answer: Deferred[None] = Deferred()
        self.ledger.answer = lambda: answer
        settle(self.live, *"abc")
        self.advance(5)
        self.assertEqual(self.ledger.offered, Counter("ab"))
        self.mend_ledger()
        answer.callback(None)
        self.assertEqual(self.ledger.offered, Counter("abc"))

    def test_flush(self) -> None:
        """A flush delivers everything at once, whatever failed before, and says so."""
        self.break_ledger()
        settle(self.live, *map(str, range(100)))
        self.advance(5)
        self.mend_ledger()
        self.delivery.stop()
        self.assertIs(self.successResultOf(self.delivery.flush()), True)
        self.assertEqual((len(self.ledger.kept), self.live.undelivered), (100, 0))

    def test_failed_flush(self) -> None:
        """A flush that fails says so, and the records stay in the journal."""
        self.break_ledger()
        settle(self.live, "a")
        self.assertIs(self.successResultOf(self.delivery.flush()), False)
        self.assertEqual(ids(self.live), ["a"])

    def test_cancelled_flush(self) -> None:
        """A flush can be given up, alone or behind a delivery that hangs, and again asked for."""
        self.ledger.answer = Deferred
        settle(self.live, "a")
        first, second = self.delivery.flush(), self.delivery.flush()
        for flush in (second, first):
            self.assertNoResult(flush)
            flush.cancel()
            self.assertIs(self.successResultOf(flush), False)
        self.mend_ledger()
        self.assertIs(self.successResultOf(self.delivery.flush()), True)

    def test_unreadable_record(self) -> None:
        """A record of a type that nobody can read any more does not stop those behind it."""
        folder = self.folder_after_death()
        next(folder.iterdir()).write_bytes(
            frame(b"S", b'{"id":"a","status":"red"}') + frame(b"S", b'{"id":"b"}')
        )
        journal = self.opened(folder)
        self.assertIs(self.successResultOf(Delivery(journal, self.ledger, self.clock).flush()), True)
        self.assertEqual((list(self.ledger.kept), journal.undelivered), (["b"], 0))

    def test_an_hour_away(self) -> None:
        """A ledger that is away for an hour is asked twice a minute, and gets everything once afterwards."""
        times: list[float] = []

        def refuse_to_answer() -> Deferred[None]:
            times.append(self.clock.seconds())
            return fail(OSError("gone"))

        self.ledger.answer = refuse_to_answer
        for number in range(3600):
            settle(self.live, f"{number}")
            self.clock.advance(1)
        waits = [later - sooner for sooner, later in pairwise(times)]
        self.assertEqual((waits[:4], set(waits[4:])), ([2, 4, 8, 16], {30}))
        self.assertEqual((self.live.undelivered, self.ledger.kept), (3600, {}))
        tried = set(self.ledger.offered)
        self.mend_ledger()
        self.advance(30 + 3600 // (2 * 8) + 1)
        self.assertEqual((len(self.ledger.kept), self.live.undelivered), (3600, 0))
        self.assertEqual({self.ledger.offered[f"{n}"] for n in range(3600) if f"{n}" not in tried}, {1})


class TestFullWhileAway(Case):
    def test_alarm(self) -> None:
        """A ledger that is away for too long fills the journal: an alarm, and what was kept arrives once."""
        alarms, ledger = self.events(LogLevel.critical), Ledger()
        journal = self.opened(max_bytes=50_000, segment_bytes=2000)
        delivery = Delivery(journal, ledger, self.clock, interval_seconds=1)
        ledger.answer = lambda: fail(OSError("gone"))
        delivery.start()
        self.addCleanup(delivery.stop)
        for number in range(3600):
            settle(journal, f"{number}")
            self.clock.advance(1)
        kept = journal.undelivered
        self.assertEqual((len(alarms), journal.dropped_records), (1, 3600 - kept))
        self.assertLessEqual(journal.size_bytes, 50_000)
        ledger.answer = lambda: succeed(None)
        self.clock.pump([1] * 60)
        self.assertEqual(list(ledger.kept), [f"{number}" for number in range(kept)])
        settle(journal, "later")
        self.clock.pump([1, 1])
        self.assertIn("later", ledger.kept)


class TestRefused(Case):
    def setUp(self) -> None:
        super().setUp()
        self.ledger, self.live = Ledger(), self.opened()
        self.delivery = Delivery(self.live, self.ledger, self.clock, interval_seconds=1, batch_records=64)
        self.alarms = self.events(LogLevel.critical)
        self.names = [f"{number}" for number in range(200)]

    def flush(self) -> list[str]:
        """Deliver everything, and return what the ledger has."""
        self.assertIs(self.successResultOf(self.delivery.flush()), True)
        self.assertEqual(self.live.undelivered, 0)
        return list(self.ledger.kept)

    @given(st.sets(st.integers(0, 199), max_size=8))
    @settings(deadline=None, max_examples=20)
    def test_passed_over(self, refused: set[int]) -> None:
        """Records that the ledger refuses hold up no others, wherever they are."""
        self.ledger, self.folder = Ledger(), Path(self.mktemp()) / "journal"
        self.live = self.opened()
        self.delivery = Delivery(self.live, self.ledger, self.clock, batch_records=64)
        self.ledger.refuses = {f"{number}" for number in refused}
        settle(self.live, *self.names)
        self.assertEqual(self.flush(), [name for name in self.names if name not in self.ledger.refuses])
        self.assertEqual(self.delivery.refused, len(refused))

    def test_told_whole(self) -> None:
        """A record that is passed over stands whole in the log, once, at the highest level."""
        self.ledger.refuses = {"7"}
        settle(self.live, *self.names)
        self.flush()
        (alarm,) = self.alarms
        self.assertEqual(alarm["record"], '{"id":"7","status":200,"reason":"complete"}')
        self.flush()
        self.assertEqual(len(self.alarms), 1)

    def test_few_attempts(self) -> None:
        """One bad record is found in few steps, and batches are large again after it."""
        self.ledger.refuses = {"70"}
        settle(self.live, *self.names)
        self.flush()
        self.assertLess(self.ledger.appends, 25)
        self.ledger.appends = 0
        settle(self.live, *(f"later {number}" for number in range(128)))
        self.flush()
        self.assertLessEqual(self.ledger.appends, 4)

    def test_refused_and_away(self) -> None:
        """A ledger that goes away while it is searched for what it refuses is asked again for the rest."""
        self.ledger.refuses = {"0", "9"}
        settle(self.live, *self.names[:10])
        answers = iter([fail(OSError("gone"))] * 2)
        self.ledger.answer = lambda: next(answers, succeed(None))
        for _ in range(2):
            self.assertIs(self.successResultOf(self.delivery.flush()), False)
        self.assertEqual(self.flush(), self.names[1:9])
        self.assertEqual((self.delivery.refused, len(self.alarms)), (2, 2))
