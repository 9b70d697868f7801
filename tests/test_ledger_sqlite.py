"""The ledger in SQLite: the contract, and its file."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from datetime import date
from pathlib import Path
from threading import active_count
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from crabtwist.errors import ConfigurationError, RecordRefused
from crabtwist.ledger.columns import columns_of, summands, total_of
from crabtwist.ledger.schema import MIGRATIONS, upgrade
from crabtwist.ledger.spans import LENGTHS, covering, newly_over, spans_of
from crabtwist.ledger.sqlite import SQLiteLedger, SQLiteLedgerSettings, _File
from crabtwist.ledger.sqlite_totals import LARGEST_SUM
from crabtwist.money import DOLLAR
from crabtwist.records import Record, Tokens
from crabtwist.testing import FakeServices
from tests import ledger_contract
from tests.ledger_contract import DAY, names, record, scattered


class TestSQLiteLedger(ledger_contract.LedgerContract):
    def setUp(self) -> None:
        self.path = Path(self.mktemp()).absolute()

    def make(self, path: Path | None = None) -> SQLiteLedger:
        from twisted.internet import reactor

        clock: Any = reactor
        path = path or self.path
        return SQLiteLedger(SQLiteLedgerSettings(path.name), FakeServices(clock, path.parent))

    async def test_no_thread_stays(self) -> None:
        """A ledger that was closed leaves no thread behind."""
        threads = active_count()
        ledger = await self.filled([record(1)])
        await ledger.close()
        self.assertEqual(active_count(), threads)

    async def test_durable(self) -> None:
        """A commit is on the disk before it is confirmed, and the file is its owner's alone."""
        ledger = await self.opened()
        pragma = ledger._file._database.execute
        modes = await ledger._do(lambda _: [pragma(f"PRAGMA {name}").fetchone()[0] for name in PRAGMAS])
        self.assertEqual(modes, ["wal", FULL])
        self.assertEqual(self.path.stat().st_mode & 0o777, 0o600)

    async def test_unusable(self) -> None:
        """A file that cannot be opened, or is none of SQLite's, is named; no thread stays behind."""
        threads, path = active_count(), self.path
        path.write_text("dear diary, " * 1000)
        for unusable in (path, path.parent, path / "below"):
            error = await self.assert_fails(ConfigurationError, self.make(unusable).open())
            self.assertIn(str(unusable), str(error))
        self.assertEqual((active_count(), path.read_text()[:10]), (threads, "dear diary"))

    async def test_of_version_1(self) -> None:
        """A file with totals of days alone is brought up to date, and its totals are what they were."""
        records = scattered(200, days=70)
        with closing(sqlite3.connect(self.path, isolation_level=None)) as database:
            upgrade(database, "a.db", MIGRATIONS[:1])
            database.executemany(f"INSERT INTO total VALUES ({', '.join('?' * 16)})", totals_1(records))
        ledger, new = await self.opened(), self.make(self.path.with_name("new"))
        await new.open()
        self.addCleanup(new.close)
        for each in (ledger, new):
            await each.append(records if each is new else [])
            await each.append([record(60 * DAY, id="late"), record(80 * DAY, id="new")])
        for by in ((), ("principal",), ("model", "provider"), ("principal", "model", "provider"), ("day",)):
            for days in ({}, {"since": date(1970, 1, 6), "until": date(1970, 3, 3)}):
                self.assertEqual(await ledger.totals(by, **days), await new.totals(by, **days))

    async def test_newer(self) -> None:
        """A file of a newer version is refused and left alone."""
        ledger = await self.opened()
        await ledger.close()
        with closing(sqlite3.connect(self.path)) as database:
            database.execute("PRAGMA user_version = 99")
        error = await self.assert_fails(ConfigurationError, self.make().open())
        self.assertIn("newer", str(error))
        with closing(sqlite3.connect(self.path)) as database:
            self.assertEqual(database.execute("PRAGMA user_version").fetchone(), (99,))

    async def test_wrong_type(self) -> None:
        """What does not fit into a column is refused as a record that cannot be stored."""
        ledger = await self.opened()
        await self.assert_fails(RecordRefused, ledger.append([record(1, accepted_at=1.5)]))
        self.assertEqual(names(await ledger.records()), [])

    async def test_largest_sums(self) -> None:
        """What nobody can have used or paid stops at a bound."""
        usage = Tokens(input_tokens=2**80)
        ledger = await self.filled([record(n, usage=usage, cost=10**60) for n in range(3)])
        await ledger.append([record(DAY + n, usage=usage, cost=10**60) for n in range(3)])
        (total,) = await ledger.totals(())
        self.assertEqual((total.input_tokens, total.cost // DOLLAR), (2 * LARGEST_SUM, 2 * LARGEST_SUM))

    @given(st.lists(st.integers(0, 10**15), min_size=1, max_size=20), st.integers(1, 5))
    @settings(deadline=None, max_examples=30)
    def test_any_batches(self, costs: list[int], batch: int) -> None:
        """However records come, the totals are the sum of the records."""
        file = _File(Path(self.mktemp()))
        self.addCleanup(file.close)
        records = [record(n * DAY // 3, id=str(n), cost=cost) for n, cost in enumerate(costs)]
        for start in range(0, len(records), batch):
            # Each batch begins with the end of the one before it, as after a crash.
            file.append(records[max(0, start - 2) : start + batch])
        (total,) = file.totals((), None, None)
        self.assertEqual((total.requests, total.cost), (len(costs), sum(costs)))

    async def test_prune_takes_turns(self) -> None:
        """Others are served between two steps."""
        ledger = await self.filled([record(number) for number in range(100)])
        pruning = ledger.prune(max_records=0, step=1)
        self.assertEqual(len((await ledger.records()).records), 100)
        left = len((await ledger.records()).records)
        self.assertTrue(0 < left < 100, left)
        self.assertEqual(await pruning, 100)


def totals_1(records: Sequence[Record]) -> list[tuple[Any, ...]]:
    """Return the totals by everything as they were kept in version 1."""
    sums: dict[Any, list[int]] = {}
    for each in records:
        more = summands(each)
        total = total_of(each, columns_of(each))
        sums[total] = [a + b for a, b in zip(sums.get(total, [0] * 10), more, strict=True)]
    rows = [(key, counts, divmod(cost, DOLLAR)) for key, (*counts, cost) in sums.items()]
    return [("principal,model,provider", *key, *counts, *cost) for key, counts, cost in rows]


class TestSpans(SynchronousTestCase):
    @given(st.integers(-50, 3000), st.integers(-50, 3000), st.integers(0, 3000))
    @settings(deadline=None)
    def test_covering(self, first: int, end: int, over_until: int) -> None:
        """Every day is in one of the spans, and all of them have sums."""
        days: list[int] = []
        for length, begin, stop in covering(first, end, over_until):
            for start in range(begin, stop, length):
                self.assertIn((length, start), spans_of(start, over_until))
                days += range(start, start + length)
        self.assertEqual(sorted(days), list(range(first, end)))

    def test_few(self) -> None:
        """Few spans make up many days."""
        for first in range(20000, 20400):
            runs = covering(first, first + 31, 20300)
            number = sum((end - begin) // length for length, begin, end in runs if begin < 20300 - length)
            self.assertLessEqual(number, 8)

    @given(st.lists(st.integers(0, 3000), min_size=1, max_size=5))
    @settings(deadline=None)
    def test_newly_over(self, days: list[int]) -> None:
        """As days go by, the sums of every span that is over are made once, and after those of its halves."""
        made: set[tuple[int, int]] = set()
        before = 0
        for now in sorted(days):
            for length in LENGTHS[1:]:
                new = {(length, first) for first in range(*newly_over(length, before, now), length)}
                self.assertFalse(new & made)
                made |= new
            before = now
            over = {(n, day // n * n) for n in LENGTHS[1:] for day in range(now) if day // n * n + n <= now}
            self.assertEqual(made, over)


PRAGMAS, FULL = ("journal_mode", "synchronous"), 2


class TestMigrations(SynchronousTestCase):
    MORE = ("ALTER TABLE record ADD COLUMN mood TEXT", "UPDATE record SET mood = 'fine'")

    def setUp(self) -> None:
        self.database = sqlite3.connect(":memory:", isolation_level=None)
        self.addCleanup(self.database.close)
        upgrade(self.database, "a.db")
        self.database.execute("INSERT INTO record VALUES (1, 'a', 2, 'p', 'm', 'v', 'r', '{}')")

    def rows(self) -> list[Any]:
        return self.database.execute("SELECT * FROM record").fetchall()

    def version(self) -> int:
        return int(self.database.execute("PRAGMA user_version").fetchone()[0])

    def test_older(self) -> None:
        """An older file takes the steps that it lacks, once, and keeps what it has."""
        for _ in range(2):
            upgrade(self.database, "a.db", [*MIGRATIONS, self.MORE])
            self.assertEqual(self.rows(), [(1, "a", 2, "p", "m", "v", "r", "{}", "fine")])
            self.assertEqual(self.version(), len(MIGRATIONS) + 1)

    def test_failed_step(self) -> None:
        """A step that fails leaves nothing of itself behind."""
        broken = (*self.MORE, "SELECT nonsense")
        self.assertRaises(sqlite3.Error, upgrade, self.database, "a.db", [*MIGRATIONS, broken])
        self.assertEqual(self.rows(), [(1, "a", 2, "p", "m", "v", "r", "{}")])
        self.assertEqual(self.version(), len(MIGRATIONS))

    def test_strangers(self) -> None:
        """Another program's file is refused, whether it has an owner or not."""
        for statement in ("PRAGMA application_id = 5", "CREATE TABLE theirs (a)"):
            with closing(sqlite3.connect(":memory:", isolation_level=None)) as database:
                database.execute(statement)
                self.assertRaises(ConfigurationError, upgrade, database, "a.db")
                self.assertEqual(database.execute("PRAGMA user_version").fetchone(), (0,))
