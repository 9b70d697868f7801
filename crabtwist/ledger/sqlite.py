"""
A ledger in one SQLite file beside the configuration; nothing to install.

Everything happens in one thread of its own, in the order of the calls.  A commit is on the disk before
its Deferred fires: the journal forgets what the ledger has.
"""

# ruff: noqa: S608 - statements are put together from words of this file; what comes from outside is bound

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import date
from itertools import chain
from operator import add
from pathlib import Path
from typing import Any, TypeVar

import attrs
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.threads import deferToThreadPool
from twisted.python.threadpool import ThreadPool
from zope.interface import implementer

from crabtwist.errors import ConfigurationError, RecordRefused, StorageError
from crabtwist.interfaces import ILedger
from crabtwist.ledger import sqlite_totals
from crabtwist.ledger.columns import (
    LARGEST_NUMBER,
    LARGEST_PAGE,
    by_rarity,
    clean,
    columns_of,
    cursor_of,
    end_of,
    searchable,
    summands,
    total_of,
)
from crabtwist.ledger.schema import upgrade
from crabtwist.records import Page, Record, Total, decode_record
from crabtwist.settings import not_blank

T = TypeVar("T")

BUSY_SECONDS = 5.0
CACHE_KIB = 16384
SOON_LOOKED_THROUGH = 2000

_INSERT = "INSERT INTO record VALUES (NULL, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING"

#: What an `append` raises when a record cannot be stored, now or later.
_REFUSALS = (sqlite3.DataError, sqlite3.IntegrityError, OverflowError, ValueError)


@attrs.frozen
class SQLiteLedgerSettings:
    """`path` begins at the configuration's folder."""

    path: str = attrs.field(default="crabtwist-ledger.db", validator=not_blank)


@implementer(ILedger)
class SQLiteLedger:
    """See `ILedger`.  Costs are exact up to a quadrillion dollars a day, key, model and provider."""

    Settings = SQLiteLedgerSettings

    def __init__(self, settings: SQLiteLedgerSettings, services: Any) -> None:
        self._path: Path = services.directory / settings.path
        self._reactor = services.clock
        self._thread = ThreadPool(1, 1, "ledger")
        self._file: _File | None = None

    def open(self) -> Deferred[None]:
        """Open the file, made if it is not there."""
        self._thread.start()
        opening: Deferred[None] = deferToThreadPool(self._reactor, self._thread, self._open)
        return opening.addErrback(self._stop_thread)

    def close(self) -> Deferred[None]:
        """Close it after all that was begun before; what is begun later fails."""
        if self._file is None:
            return succeed(None)
        closing: Deferred[None] = self._do(_File.close)
        self._file = None
        return closing.addBoth(self._stop_thread)

    def _open(self) -> None:
        self._file = _File(self._path)

    def _stop_thread(self, result: T) -> T:
        self._thread.stop()
        return result

    def _do(self, act: Callable[..., T], *arguments: object) -> Deferred[T]:
        if self._file is None:
            return fail(StorageError(f"{self._path} is not open"))
        return deferToThreadPool(self._reactor, self._thread, act, self._file, *arguments)

    def append(self, records: Sequence[Record]) -> Deferred[int]:
        """Add records in one transaction."""
        return self._do(_File.append, records)

    def get(self, request_id: str) -> Deferred[Record | None]:
        """Return one record."""
        return self._do(_File.get, request_id)

    def records(
        self,
        *,
        principal: str | None = None,
        model: str | None = None,
        provider: str | None = None,
        reason: str | None = None,
        since: int | None = None,
        until: int | None = None,
        before: str | None = None,
        limit: int = 100,
    ) -> Deferred[Page]:
        """Return a page of at most a thousand records."""
        wanted = {"principal": principal, "model": model, "provider": provider, "reason": reason}
        return self._do(_File.page, wanted, since, until, before, min(max(limit, 1), LARGEST_PAGE))

    def totals(
        self, by: Collection[str], *, since: date | None = None, until: date | None = None
    ) -> Deferred[list[Total]]:
        """Return totals from the running ones."""
        return self._do(_File.totals, by, since, until)

    def prune(
        self, *, older_than: int | None = None, max_records: int | None = None, step: int = 500
    ) -> Deferred[int]:
        """
        Forget records; each step takes its turn among the other calls.

        Several may do so at the same time on one file, and forget no more than one would.
        """
        return Deferred.fromCoroutine(self._prune(older_than, max_records, step))

    async def _prune(self, older_than: int | None, max_records: int | None, step: int) -> int:
        ends = [] if older_than is None else [(min(older_than - 1, LARGEST_NUMBER), LARGEST_NUMBER)]
        if max_records is not None:
            ends += await self._do(_File.newest_excess, max_records)
        if not ends:
            return 0
        pruned = 0
        while gone := await self._do(_File.forget, max(ends), step):
            pruned += gone
        return pruned


class _File:
    """The file itself; everything blocks, and belongs to the thread that made it."""

    def __init__(self, path: Path) -> None:
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            self._database = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
            try:
                upgrade(self._database, str(path))
                for pragma in ("journal_mode = WAL", "synchronous = FULL", f"cache_size = -{CACHE_KIB}"):
                    self._database.execute(f"PRAGMA {pragma}").fetchall()
                with self._database:
                    self._database.execute("BEGIN IMMEDIATE")
                    sqlite_totals.fold(self._database)
            except BaseException:
                self._database.close()
                raise
        except (OSError, sqlite3.Error) as error:
            words = error.strerror if isinstance(error, OSError) else error
            complaint = f"{path}: cannot be used: {words}; `path` in [ledger] names the file"
            raise ConfigurationError([complaint]) from error

    def close(self) -> None:
        self._database.close()

    # Writing.

    def append(self, records: Iterable[Record]) -> int:
        try:
            return self._append(records)
        except _REFUSALS as error:
            raise RecordRefused(f"the ledger cannot hold it: {error}") from error

    def _append(self, records: Iterable[Record]) -> int:
        sums: dict[sqlite_totals.Key, list[int]] = {}
        new = 0
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")
            for record in records:
                columns = columns_of(record)
                if self._database.execute(_INSERT, columns).rowcount:
                    new += 1
                    key, more = total_of(record, columns), summands(record)
                    sums[key] = [*map(add, sums[key], more)] if key in sums else more
            sqlite_totals.add(self._database, sums)
        return new

    def forget(self, newest: Sequence[int], most: int) -> int:
        """Forget the oldest records, up to and with one, and return how many: at most so many."""
        oldest = "SELECT number FROM record WHERE (accepted_at, number) <= (?, ?)"
        statement = f"DELETE FROM record WHERE number IN ({oldest} ORDER BY accepted_at, number LIMIT ?)"
        with self._database:
            return self._database.execute(statement, (*newest, most)).rowcount

    # Reading.

    def get(self, name: str) -> Record | None:
        row = self._database.execute("SELECT body FROM record WHERE id = ?", (clean(name),)).fetchone()
        return None if row is None else decode_record(row[0])

    def newest_excess(self, max_records: int) -> list[tuple[int, int]]:
        """Return time and number of the newest record beyond so many; nothing if there are no more."""
        newest = "SELECT accepted_at, number FROM record ORDER BY accepted_at DESC, number DESC"
        return self._database.execute(f"{newest} LIMIT 1 OFFSET ?", (max(max_records, 0),)).fetchall()

    def page(
        self,
        wanted: dict[str, str | None],
        since: int | None,
        until: int | None,
        before: str | None,
        limit: int,
    ) -> Page:
        bounds: dict[str, Sequence[int]] = {} if since is None else {"accepted_at >= ?": (since,)}
        if (end := end_of(until, before)) is not None:
            bounds["(accepted_at, number) < (?, ?)"] = end
        filters = [(column, searchable(wanted[column] or "")) for column in by_rarity(wanted)]
        if len(filters) > 1:
            filters.sort(key=lambda each: self._leaves(each[0], each[1], bounds))
        # A `+` keeps SQLite from choosing the index of a column that leaves more.
        clauses = [*(f"{'+' * bool(n)}{column} = ?" for n, (column, _) in enumerate(filters)), *bounds]
        values = [*(name for _, name in filters), *chain(*bounds.values())]
        where = f"WHERE {' AND '.join(clauses)}" if clauses else ""
        query = f"SELECT accepted_at, number, body FROM record {where} ORDER BY accepted_at DESC, number DESC"
        rows = self._database.execute(f"{query} LIMIT ?", (*values, limit + 1)).fetchall()
        more = len(rows) > limit
        records = tuple(decode_record(body) for _, _, body in rows[:limit])
        return Page(records, cursor_of(*rows[limit - 1][:2]) if more else None)

    def _leaves(self, column: str, name: str, bounds: Mapping[str, Sequence[int]]) -> int:
        """Return how many records a filter leaves; no more than are soon looked through."""
        where = " AND ".join([f"{column} = ?", *bounds])
        query = f"SELECT COUNT(*) FROM (SELECT 1 FROM record WHERE {where} LIMIT {SOON_LOOKED_THROUGH})"
        (number,) = self._database.execute(query, (name, *chain(*bounds.values()))).fetchone()
        return int(number)

    def totals(self, by: Collection[str], since: date | None, until: date | None) -> list[Total]:
        return sqlite_totals.totals(self._database, by, since, until)
