"""The ledger in SQLite: the contract, and its file."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from threading import active_count
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from crabtwist.errors import ConfigurationError, RecordRefused
from crabtwist.ledger.schema import MIGRATIONS, upgrade
from crabtwist.ledger.sqlite import LARGEST_SUM, SQLiteLedger, SQLiteLedgerSettings, _File
from crabtwist.money import DOLLAR
from crabtwist.records import Tokens
from crabtwist.testing import FakeServices
from tests import ledger_contract
from tests.ledger_contract import DAY, names, record


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
