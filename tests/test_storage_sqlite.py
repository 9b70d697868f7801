"""The store in an SQLite file: the contract, and what a file adds to it."""

from __future__ import annotations

import os
import sqlite3
import stat
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred, DeferredList, gatherResults
from twisted.internet.task import Clock
from twisted.internet.threads import deferToThread

from crabtwist.errors import StorageError
from crabtwist.storage import sqlite
from crabtwist.storage.sqlite import SQLiteSettings, SQLiteStorage
from crabtwist.testing import FakeServices
from tests import storage_contract

NOBODY = 65534


class ThreadedClock(Clock):
    """A clock that the test advances; what comes from other threads comes through the real reactor."""

    def callFromThread(self, work: Any, *arguments: Any, **named: Any) -> None:
        """Call it on the reactor's thread."""
        from twisted.internet import reactor

        reactor.callFromThread(work, *arguments, **named)  # type: ignore[attr-defined] # a module to mypy


class TestSQLiteStorage(storage_contract.SharedStorageContract):
    """The contract, in a folder for the file, and time that the test makes."""

    def make(self) -> SQLiteStorage:
        return SQLiteStorage(self.settings, FakeServices(self.clock, self.directory))

    async def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)

    def setUp(self) -> Any:
        self.clock = ThreadedClock()
        self.clock.advance(1_700_000_000)
        self.directory = Path(self.mktemp()).absolute()
        self.directory.mkdir()
        self.settings = SQLiteSettings()
        return super().setUp()

    async def move(self) -> None:
        self.settings = SQLiteSettings(path=f"{len(os.listdir(self.directory))}.db")

    @property
    def path(self) -> Path:
        """Where the file is."""
        return self.directory / "crabtwist.db"

    def run_sql(self, *statements: str) -> list[Any]:
        """Run statements from outside, and return the rows of the last."""
        database = sqlite3.connect(self.path, isolation_level=None)
        try:
            return [database.execute(statement).fetchall() for statement in statements][-1]
        finally:
            database.close()

    async def refused(self) -> str:
        """Return why a store does not open."""
        opening: Deferred[Any] = self.make().open()
        error: Exception = await self.assertFailure(opening, StorageError)
        self.assertIn(str(self.path.parent), str(error))
        return str(error)

    # Opening.

    async def test_mode(self) -> None:
        """The file and its log are for the owner alone; a mode that somebody gave it stays."""
        await self.store.set("n", b"k", b"v")
        modes = [stat.S_IMODE(path.stat().st_mode) for path in self.directory.iterdir()]
        self.assertEqual(modes, [0o600, 0o600, 0o600])
        self.path.chmod(0o640)
        await self.opened()
        self.assertEqual(stat.S_IMODE(self.path.stat().st_mode), 0o640)

    async def test_path(self) -> None:
        """A relative path begins at the configuration's folder, an absolute one at the root."""
        elsewhere = self.directory / "elsewhere"
        elsewhere.mkdir()
        for path in ("other.db", str(elsewhere / "absolute.db")):
            self.settings = SQLiteSettings(path=path)
            await self.opened()
        self.assertIn("other.db", os.listdir(self.directory))
        self.assertIn("absolute.db", os.listdir(elsewhere))

    async def test_header(self) -> None:
        """The file says whose it is, which schema it has, and that it has a log."""
        self.assertEqual(self.run_sql("PRAGMA user_version"), [(len(sqlite.STEPS),)])
        self.assertEqual(self.run_sql("PRAGMA application_id"), [(sqlite.APPLICATION_ID,)])
        self.assertEqual(self.run_sql("PRAGMA journal_mode"), [("wal",)])

    async def test_synchronous(self) -> None:
        """How much a loss of power may take is a setting."""
        for settings, number in ((SQLiteSettings(), 1), (SQLiteSettings(synchronous="full"), 2)):
            self.settings = settings
            found = (await self.opened())._ask(lambda db: db.execute("PRAGMA synchronous").fetchall())
            self.assertEqual(await found, [(number,)])

    async def test_older_file(self) -> None:
        """A file with an older schema takes the steps that it lacks, and keeps what it holds."""
        await self.store.set("n", b"k", b"v")
        await self.store.close()
        self.patch(
            sqlite, "STEPS", (*sqlite.STEPS, ("CREATE TABLE later (a)", "INSERT INTO later VALUES (1)"))
        )
        for _ in range(2):
            self.assertEqual(await (await self.opened()).get("n", b"k"), b"v")
        self.assertEqual(self.run_sql("SELECT * FROM later"), [(1,)])

    async def test_file_without_boards(self) -> None:
        """A file from before there were boards gets them, and keeps what it holds."""
        await self.store.close()
        await self.move()
        now = sqlite.STEPS
        self.patch(sqlite, "STEPS", now[:1])
        old = await self.opened()
        await old.set("n", b"k", b"v")
        await old.close()
        self.patch(sqlite, "STEPS", now)
        new = await self.opened()
        await new.post("n", b"m", {b"k": b"note"})
        self.assertEqual((await new.get("n", b"k"), await new.boards("n")), (b"v", {b"k": {b"m": b"note"}}))

    def test_for_oneself(self) -> None:
        """Other nodes see nothing of it."""
        self.assertIs(self.store.between_nodes, False)

    async def test_half_a_step(self) -> None:
        """A step that fails leaves the file as it was."""
        await self.store.close()
        self.patch(
            sqlite, "STEPS", (*sqlite.STEPS, ("CREATE TABLE later (a)", "INSERT INTO nowhere VALUES (1)"))
        )
        self.assertIn("nowhere", await self.refused())
        self.assertEqual(self.run_sql("SELECT * FROM sqlite_master WHERE name = 'later'"), [])
        self.assertEqual(self.run_sql("PRAGMA user_version"), [(len(sqlite.STEPS) - 1,)])

    async def test_newer_file(self) -> None:
        """A file with a newer schema is refused, and not touched."""
        await self.store.close()
        self.run_sql("PRAGMA user_version = 99")
        before = self.path.read_bytes()
        self.assertIn("schema version 99", await self.refused())
        self.assertEqual(self.path.read_bytes(), before)

    async def test_strangers(self) -> None:
        """Another program's database is refused, and not touched."""
        await self.store.close()
        for statement in ("CREATE TABLE theirs (a)", "PRAGMA application_id = 7"):
            self.path.unlink()
            self.run_sql(statement)
            before = self.path.read_bytes()
            self.assertIn("another program", await self.refused())
            self.assertEqual(self.path.read_bytes(), before)

    async def test_no_database(self) -> None:
        """A file that is no database is refused, and not touched; an empty one will do."""
        await self.store.close()
        self.path.write_bytes(b"What is this? " * 100)
        self.assertIn("not a database", await self.refused())
        self.assertTrue(self.path.read_bytes().startswith(b"What"))
        self.path.write_bytes(b"")
        await (await self.opened()).set("n", b"k", b"v")

    async def test_no_such_folder(self) -> None:
        """A path that leads nowhere, or to a folder, is refused with the reason."""
        await self.store.close()
        for path, why in (
            ("no/such.db", "No such file"),
            ("crabtwist.db/x", "Not a directory"),
            (".", "unable"),
        ):
            self.settings = SQLiteSettings(path=path)
            self.assertIn(why, await self.refused())

    def lose_privileges(self) -> None:
        """Be a user to whom something can be forbidden, if this is root."""
        if os.geteuid() == 0:
            self.addCleanup(os.seteuid, 0)
            os.seteuid(NOBODY)

    async def test_folder_not_writable(self) -> None:
        """Where nothing may be written the start fails, and says so."""
        self.directory.chmod(0o555)
        self.addCleanup(self.directory.chmod, 0o700)
        self.lose_privileges()
        self.settings = SQLiteSettings(path="new.db")
        self.assertIn("ermission denied", await self.refused())

    async def test_file_not_writable(self) -> None:
        """A file that may only be read is refused too, before the first call finds out."""
        await self.store.close()
        self.path.chmod(0o444)
        self.directory.chmod(0o777)
        self.lose_privileges()
        self.assertIn("cannot be used", await self.refused())

    # Together.

    async def trace(self) -> list[str]:
        """Return a list that collects the statements from now on."""
        statements: list[str] = []
        await self.store._ask(lambda database: database.set_trace_callback(statements.append), writes=False)
        return statements

    async def test_one_commit_for_many(self) -> None:
        """Calls that wait are done together: the first alone, those that came meanwhile in one go."""
        statements = await self.trace()
        await gatherResults([self.store.increment("n", b"k", 1) for _ in range(300)])
        self.assertEqual(statements.count("COMMIT"), 2)

    async def test_together_but_not_all(self) -> None:
        """One transaction takes a bounded number of calls, for others want to write as well."""
        statements = await self.trace()
        await gatherResults([self.store.set("n", b"k", b"v") for _ in range(2 * sqlite.MOST_TOGETHER + 2)])
        self.assertEqual(statements.count("COMMIT"), 4)

    async def test_reading_takes_no_lock(self) -> None:
        """Reading goes on while another process writes."""
        await self.store.set("n", b"k", b"v")
        await self.store.post("n", b"m", {b"k": b"v"})
        await self.locked()
        self.assertEqual(await self.store.get("n", b"k"), b"v")
        self.assertEqual(await self.store.boards("n"), {b"k": {b"m": b"v"}})
        self.assertEqual(await self.keys(), [b"k"])

    async def test_a_bad_call_among_good_ones(self) -> None:
        """What one caller did wrong fails that call, and no other of the same transaction."""
        first = self.store.set("n", b"first", b"v")
        bad = self.store.set("n", b"bad", object())
        huge = self.store.increment("n", b"huge", 2**70)
        good = self.store.set("n", b"good", b"v")
        await self.assertFailure(bad, StorageError)
        await self.assertFailure(huge, StorageError)
        await gatherResults([first, good])
        self.assertEqual(await self.keys(), [b"first", b"good"])

    async def test_failed_transaction(self) -> None:
        """If the transaction fails so does every call in it, and the next ones begin anew."""
        calls = [self.store.set("n", b"%d" % n, b"v") for n in range(3)]
        calls.append(self.store._ask(lambda database: database.execute("ROLLBACK")))
        outcomes = await DeferredList([*calls[1:]], consumeErrors=True)
        self.assertEqual([success for success, _ in outcomes], [False, False, False])
        self.assertEqual(await self.keys(), [b"0"])
        await self.store.set("n", b"k", b"v")

    async def test_too_many_waiting(self) -> None:
        """Calls beyond what may wait fail at once, and do not pile up in memory."""
        self.patch(sqlite, "MOST_WAITING", 10)
        calls = [self.store.set("n", b"%d" % n, b"v") for n in range(20)]
        outcomes = await DeferredList(calls, consumeErrors=True)
        self.assertEqual([success for success, _ in outcomes], [True] * 11 + [False] * 9)
        self.assertIn("too slow", outcomes[-1][1].getErrorMessage())

    # Others.

    async def locked(self) -> sqlite3.Connection:
        """Lock the file for writing, until the connection is closed."""
        database = sqlite3.connect(self.path, isolation_level=None)
        self.addCleanup(database.close)
        database.execute("BEGIN IMMEDIATE")
        return database

    async def test_waits_for_others(self) -> None:
        """A write waits while another process writes; the reactor does not."""
        other = await self.locked()
        done = self.store.set("n", b"k", b"v")
        for _ in range(5):
            await deferToThread(lambda: None)
        self.assertFalse(done.called)
        other.close()
        await done
        self.assertEqual(await self.keys(), [b"k"])

    async def test_waits_not_forever(self) -> None:
        """A file that stays locked fails the call after `busy_timeout`, and works again when it is free."""
        self.settings = SQLiteSettings(busy_timeout=0.05)
        store = await self.opened()
        other = await self.locked()
        error = await self.assertFailure(store.set("n", b"k", b"v"), StorageError)
        self.assertIn("locked", str(error))
        other.close()
        await store.set("n", b"k", b"v")

    # Expiry.

    async def rows(self) -> int:
        """Return how many rows there are, once all that was begun is done."""
        await self.store.get("n", b"k")
        tables = ("entry", "counter", "note")
        return sum(self.run_sql(f"SELECT count(*) FROM {table}")[0][0] for table in tables)

    async def test_expired_rows_are_deleted(self) -> None:
        """What has expired leaves the file though nobody asks for it, in small steps."""
        keys = [b"%d" % n for n in range(2 * sqlite.SWEEP_ROWS + 1)]
        await gatherResults([self.store.set("n", key, b"v", ttl_seconds=10) for key in keys])
        await gatherResults([self.store.increment("n", key, 1, ttl_seconds=10) for key in keys])
        await self.store.post("n", b"m", dict.fromkeys(keys, b"v"), ttl_seconds=10)
        await self.store.set("n", b"kept", b"v")
        await self.store.post("n", b"m", {b"kept": b"v"}, ttl_seconds=11)
        self.clock.advance(self.settings.sweep_interval)
        self.assertEqual([await self.rows() for _ in range(4)], [605, 5, 2, 2])

    async def test_sweeping_goes_on(self) -> None:
        """A sweep that failed is logged, and the next one comes all the same."""
        await self.store.set("n", b"k", b"v", ttl_seconds=1)
        self.run_sql("ALTER TABLE entry RENAME TO away")
        self.clock.advance(10)
        await self.assertFailure(self.store.get("n", b"k"), StorageError)
        self.run_sql("ALTER TABLE away RENAME TO entry")
        self.clock.advance(10)
        self.assertEqual(await self.rows(), 0)
