"""
A store in one SQLite file: nothing to install, and kept when the process ends.

Everything of SQLite's happens on one thread of the store's own.  Calls that come while it is busy wait
for each other and are done in one transaction, so that a commit is paid for once and not by each.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import attrs
from twisted.internet.defer import Deferred, fail
from twisted.internet.task import LoopingCall
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from crabtwist.errors import StorageError
from crabtwist.interfaces import IStorage
from crabtwist.settings import not_blank, not_negative, positive
from crabtwist.storage import sqlite_boards
from crabtwist.storage.migrations import (
    MOST_WAITING,
    Boards,
    Step,
    closed,
    end_of_prefix,
    one_thread,
    overloaded,
    steps_after,
)

#: Says in the file's header whose it is ("ctwi"), see https://www.sqlite.org/pragma.html#pragma_application_id.
APPLICATION_ID = 0x63747769

#: Never change one that was released: append the next.
STEPS: Sequence[Step] = (
    (
        """CREATE TABLE entry (
            namespace TEXT NOT NULL, key BLOB NOT NULL, value BLOB NOT NULL, expires_at REAL,
            PRIMARY KEY (namespace, key))""",
        "CREATE INDEX entry_expiry ON entry (expires_at) WHERE expires_at IS NOT NULL",
        # A sum that does not fit would silently become a float.
        """CREATE TABLE counter (
            namespace TEXT NOT NULL, key BLOB NOT NULL, expires_at REAL,
            total INTEGER NOT NULL CHECK (typeof(total) = 'integer'),
            PRIMARY KEY (namespace, key))""",
        "CREATE INDEX counter_expiry ON counter (expires_at) WHERE expires_at IS NOT NULL",
    ),
    sqlite_boards.STEP,
)

#: How many calls share one transaction at most: other processes want to write too.
MOST_TOGETHER = 500
#: How many expired rows of each table are deleted at once; other calls come in between.
SWEEP_ROWS = 200

_GET = "SELECT value FROM entry WHERE namespace = ? AND key = ? AND (expires_at IS NULL OR expires_at > ?)"
_SET = "INSERT OR REPLACE INTO entry (namespace, key, value, expires_at) VALUES (?, ?, ?, ?)"
_INCREMENT = """
    INSERT INTO counter (namespace, key, total, expires_at) VALUES (:namespace, :key, :delta, :expires_at)
    ON CONFLICT (namespace, key) DO UPDATE SET
        total = iif(expires_at <= :now, 0, total) + :delta,
        expires_at = iif(expires_at <= :now, :expires_at, expires_at)"""
_TOTAL = "SELECT total FROM counter WHERE namespace = :namespace AND key = :key"
_LIST = """
    SELECT key, value FROM entry
    WHERE namespace = :namespace AND key >= :first AND (:end IS NULL OR key < :end)
        AND (expires_at IS NULL OR expires_at > :now)
    ORDER BY key"""
_DELETE = (
    "DELETE FROM entry WHERE namespace = ? AND key = ?",
    "DELETE FROM counter WHERE namespace = ? AND key = ?",
    sqlite_boards.DELETE,
)
_SWEEP = (
    "DELETE FROM entry WHERE rowid IN (SELECT rowid FROM entry WHERE expires_at <= ? LIMIT ?)",
    "DELETE FROM counter WHERE rowid IN (SELECT rowid FROM counter WHERE expires_at <= ? LIMIT ?)",
    sqlite_boards.SWEEP,
)


@attrs.frozen
class SQLiteSettings:
    """
    `path` begins at the configuration's folder.

    `synchronous = "normal"` survives a killed process whole, and may lose the last commits when the
    machine loses power; `"full"` does not, and is slower (https://www.sqlite.org/pragma.html#pragma_synchronous).
    `busy_timeout` is how long to wait for another process that writes to the file, `sweep_interval` the
    time between two looks for expired rows, both in seconds.
    """

    path: str = attrs.field(default="crabtwist.db", validator=not_blank)
    synchronous: Literal["normal", "full"] = "normal"
    busy_timeout: float = attrs.field(default=5.0, validator=not_negative)
    sweep_interval: float = attrs.field(default=10.0, validator=positive)


Work = Callable[[sqlite3.Connection], Any]


@attrs.define(eq=False)
class _Call:
    """Something to be done in a transaction, and who waits for it."""

    work: Work
    writes: bool
    done: Deferred[Any] = attrs.field(factory=Deferred)


class _File:
    """The open file; its methods are called on the store's thread alone."""

    def __init__(self, path: Path, settings: SQLiteSettings) -> None:
        self._where = f"the storage {path}"
        try:
            _create(path)
            self._database = sqlite3.connect(path, settings.busy_timeout, isolation_level=None)
            try:
                self._prepare(settings)
            except BaseException:
                self._database.close()
                raise
        except (OSError, sqlite3.Error) as error:
            raise StorageError(
                f"{self._where} cannot be used: {_words(error)}; `path` in [storage] names the file"
            ) from error

    def do(self, calls: Sequence[_Call]) -> list[Any]:
        """Do all in one transaction; return what each gave, or its Failure."""
        try:
            self._database.execute("BEGIN IMMEDIATE" if any(call.writes for call in calls) else "BEGIN")
            found = [self._outcome(call.work) for call in calls]
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            with suppress(sqlite3.Error):
                self._database.rollback()
            return [self._failure(error) for _ in calls]
        return found

    def close(self) -> None:
        """Let the file go."""
        self._database.close()

    def _outcome(self, work: Work) -> Any:
        try:
            return work(self._database)
        except Exception as error:
            # One caller's number too large is no trouble of those who wait with it.  After a full disk,
            # say, SQLite has undone what they did too.
            if not self._database.in_transaction:
                raise
            return self._failure(error)

    def _failure(self, error: Exception) -> Failure:
        return Failure(StorageError(f"{self._where} failed: {_words(error)}"))

    def _prepare(self, settings: SQLiteSettings) -> None:
        # Before anything is written: the file may be somebody else's.
        self._check_owner()
        (mode,) = self._database.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise StorageError(
                f"{self._where} cannot have a write-ahead log: is it on a network's file system?"
            )
        self._database.execute(f"PRAGMA synchronous = {settings.synchronous}")
        self._database.execute("BEGIN IMMEDIATE")
        for step in steps_after(self._pragma("user_version"), STEPS, self._where):
            for statement in step:
                self._database.execute(statement)
        self._database.execute(f"PRAGMA user_version = {len(STEPS)}")
        self._database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        self._database.execute("COMMIT")

    def _check_owner(self) -> None:
        # In one transaction: another process may be making the tables and signing them just now.
        self._database.execute("BEGIN")
        owner = self._pragma("application_id")
        (tables,) = self._database.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if owner != APPLICATION_ID and (owner or tables):
            raise StorageError(f"{self._where} is the database of another program; give another path")
        steps_after(self._pragma("user_version"), STEPS, self._where)
        self._database.execute("COMMIT")

    def _pragma(self, name: str) -> int:
        (value,) = self._database.execute(f"PRAGMA {name}").fetchone()
        return int(value)


@implementer(IStorage)
class SQLiteStorage:
    """
    See `IStorage`; calls fail with `StorageError`.

    Values, counters and boards are kept apart, as in memory.  Counters are 64-bit; one that would not fit
    keeps its total, and the increment fails.  Time is the clock's at the moment of the call.  What a call
    did is committed when its Deferred fires.  `services.clock` has to provide `IReactorFromThreads` as well.
    """

    Settings = SQLiteSettings
    between_nodes = False
    _log = Logger()

    def __init__(self, settings: SQLiteSettings, services: Any) -> None:
        self._settings = settings
        self._reactor = services.clock
        self._path: Path = services.directory / settings.path
        self._file: _File | None = None
        self._waiting: list[_Call] = []
        self._busy = False
        self._idle: Deferred[None] | None = None
        self._sweeping = LoopingCall(self._sweep)
        self._sweeping.clock = self._reactor

    def open(self) -> Deferred[None]:
        """Create or upgrade the file.  Fails with `StorageError` if it cannot be used."""
        return Deferred.fromCoroutine(self._open())

    async def _open(self) -> None:
        self._pool = one_thread("sqlite")
        self._pool.start()
        try:
            self._file = await self._on_thread(_File, self._path, self._settings)
        except BaseException:
            self._pool.stop()
            raise
        self._sweeping.start(self._settings.sweep_interval, now=False)

    def close(self) -> Deferred[None]:
        """Finish what was asked for, and let the file go; closing again is fine."""
        return Deferred.fromCoroutine(self._close())

    async def _close(self) -> None:
        file, self._file = self._file, None
        if file is None:
            return
        self._sweeping.stop()
        if self._busy:
            self._idle = Deferred()
            await self._idle
        await self._on_thread(file.close)
        self._pool.stop()

    def get(self, namespace: str, key: bytes) -> Deferred[bytes | None]:
        """Return the value, None if there is none or its time has passed."""
        now = self._reactor.seconds()

        def work(database: sqlite3.Connection) -> bytes | None:
            row = database.execute(_GET, (namespace, key, now)).fetchone()
            return None if row is None else bytes(row[0])

        return self._ask(work, writes=False)

    def set(
        self, namespace: str, key: bytes, value: bytes, ttl_seconds: float | None = None
    ) -> Deferred[None]:
        """Store a value, in place of the old one and of its time."""
        row = (namespace, key, value, self._expires_at(ttl_seconds))

        def work(database: sqlite3.Connection) -> None:
            database.execute(_SET, row)

        return self._ask(work)

    def increment(
        self, namespace: str, key: bytes, delta: int, ttl_seconds: float | None = None
    ) -> Deferred[int]:
        """Add to a counter; its time runs from its first increment and is not extended."""
        values = {
            "namespace": namespace,
            "key": key,
            "delta": delta,
            "now": self._reactor.seconds(),
            "expires_at": self._expires_at(ttl_seconds),
        }

        def work(database: sqlite3.Connection) -> int:
            database.execute(_INCREMENT, values)
            (total,) = database.execute(_TOTAL, values).fetchone()
            return int(total)

        return self._ask(work)

    def list(self, namespace: str, prefix: bytes = b"") -> Deferred[Sequence[tuple[bytes, bytes]]]:
        """Return the values whose keys begin so, sorted by key."""
        values = {
            "namespace": namespace,
            "first": prefix,
            "end": end_of_prefix(prefix),
            "now": self._reactor.seconds(),
        }
        return self._ask(lambda database: database.execute(_LIST, values).fetchall(), writes=False)

    def delete(self, namespace: str, key: bytes) -> Deferred[None]:
        """Forget the value, the counter and the board of a key."""

        def work(database: sqlite3.Connection) -> None:
            for statement in _DELETE:
                database.execute(statement, (namespace, key))

        return self._ask(work)

    def post(
        self, namespace: str, member: bytes, notes: Mapping[bytes, bytes], ttl_seconds: float | None = None
    ) -> Deferred[Boards]:
        """Put up a member's notes, and return the boards that they are on."""
        arguments = (namespace, member, dict(notes), self._reactor.seconds(), self._expires_at(ttl_seconds))
        return self._ask(lambda database: sqlite_boards.post(database, *arguments))

    def boards(self, namespace: str) -> Deferred[Boards]:
        """Return all boards of a namespace."""
        now = self._reactor.seconds()
        return self._ask(lambda database: sqlite_boards.read(database, namespace, now), writes=False)

    def _ask(self, work: Work, *, writes: bool = True) -> Deferred[Any]:
        if self._file is None:
            return fail(closed(f"the storage {self._path}"))
        if len(self._waiting) >= MOST_WAITING:
            return fail(overloaded(f"the storage {self._path}"))
        call = _Call(work, writes)
        self._waiting.append(call)
        if not self._busy:
            self._do_next(self._file)
        return call.done

    def _do_next(self, file: _File) -> None:
        # Those whose callers gave up while they waited are not done at all.
        waiting = [call for call in self._waiting if not call.done.called]
        calls, self._waiting = waiting[:MOST_TOGETHER], waiting[MOST_TOGETHER:]
        self._busy = bool(calls)
        if calls:
            doing = self._on_thread(file.do, calls)
            doing.addErrback(lambda failure: [failure] * len(calls))
            doing.addCallback(self._done, calls, file)
        elif self._idle is not None:
            self._idle.callback(None)

    def _done(self, outcomes: Sequence[Any], calls: Sequence[_Call], file: _File) -> None:
        for call, outcome in zip(calls, outcomes, strict=True):
            call.done.callback(outcome)
        self._do_next(file)

    async def _sweep(self) -> None:
        """Delete what has expired, a few rows at a time."""
        now = self._reactor.seconds()

        def work(database: sqlite3.Connection) -> int:
            return max(database.execute(statement, (now, SWEEP_ROWS)).rowcount for statement in _SWEEP)

        try:
            while self._file is not None and await self._ask(work) == SWEEP_ROWS:
                pass
        except StorageError as error:
            # A looping call that fails once would never come again.
            self._log.warn("expired rows were not deleted: {error}", error=error)

    def _expires_at(self, ttl_seconds: float | None) -> float | None:
        return None if ttl_seconds is None else self._reactor.seconds() + ttl_seconds

    def _on_thread(self, work: Callable[..., Any], *arguments: object) -> Deferred[Any]:
        return deferToThreadPool(self._reactor, self._pool, work, *arguments)


def _create(path: Path) -> None:
    """Create the file for its owner alone, if there is none; its log gets the same mode from SQLite."""
    # O_EXCL: opening and closing a file that is in use would drop the locks that this process has on it
    # (https://www.sqlite.org/howtocorrupt.html, 2.2).
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def _words(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
