"""
A ledger in one SQLite file beside the configuration; nothing to install.

Everything happens in one thread of its own, in the order of the calls.  A commit is on the disk before
its Deferred fires: the journal forgets what the ledger has.
"""

# ruff: noqa: S608 - statements are put together from words of this file; what comes from outside is bound

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import attrs
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.threads import deferToThreadPool
from twisted.python.threadpool import ThreadPool
from zope.interface import implementer

from crabtwist.errors import ConfigurationError, RecordRefused, StorageError
from crabtwist.interfaces import ILedger
from crabtwist.ledger.columns import (
    GROUPINGS,
    LARGEST_NUMBER,
    LARGEST_PAGE,
    NAMES,
    SUMS,
    asked_for,
    by_rarity,
    clean,
    columns_of,
    cursor_of,
    day_numbers,
    read_cursor,
    searchable,
    summands,
    total_from,
    total_of,
)
from crabtwist.ledger.schema import upgrade
from crabtwist.money import DOLLAR
from crabtwist.records import Page, Record, Total, decode_record
from crabtwist.settings import not_blank

T = TypeVar("T")

BUSY_SECONDS = 5.0
CACHE_KIB = 16384

#: Sums of a day, key, model and provider end here, so that no sum over them can overflow: a quadrillion.
LARGEST_SUM = 10**15

#: A sum as it is kept: a cost may be more than fits into an integer of SQLite's.
_KEPT = (*SUMS[:-1], "cost_dollars", "cost_rest")

_INSERT = "INSERT INTO record VALUES (NULL, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING"
_WHERE_TOTAL = "WHERE by = ? AND day = ? AND principal = ? AND model = ? AND provider = ?"
_READ_TOTAL = f"SELECT {', '.join(_KEPT)} FROM total {_WHERE_TOTAL}"
_WRITE_TOTAL = f"INSERT OR REPLACE INTO total VALUES ({', '.join('?' * (5 + len(_KEPT)))})"

#: What an `append` raises when a record cannot be stored, now or later.
_REFUSALS = (sqlite3.DataError, sqlite3.IntegrityError, OverflowError, ValueError)

#: Day, principal, model, provider.
_Key = tuple[int, str, str, str]


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
        sums: dict[_Key, list[int]] = {}
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")
            for record in records:
                if self._database.execute(_INSERT, columns_of(record)).rowcount:
                    _add(sums.setdefault(total_of(record), [0] * len(SUMS)), summands(record))
            new = sum(requests for requests, *_ in sums.values())
            for grouping in GROUPINGS:
                for key, more in _grouped(sums, grouping).items():
                    self._add_to_total((",".join(grouping), *key), more)
        return new

    def _add_to_total(self, key: tuple[str | int, ...], more: list[int]) -> None:
        row = self._database.execute(_READ_TOTAL, key).fetchone()
        if row is not None:
            *counts, dollars, rest = row
            _add(more, [*counts, dollars * DOLLAR + rest])
        *counts, cost = more
        fitting = [*counts, *divmod(cost, DOLLAR)]
        self._database.execute(_WRITE_TOTAL, (*key, *(min(number, LARGEST_SUM) for number in fitting)))

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
        conditions = {f"{column} = ?": searchable(wanted[column] or "") for column in by_rarity(wanted)}
        # A `+` keeps SQLite from choosing the index of a column that leaves more.
        conditions = {f"{'+' * bool(n)}{each}": conditions[each] for n, each in enumerate(conditions)}
        bounds: dict[str, Any] = {"accepted_at >= ?": since, "accepted_at < ?": until}
        conditions |= {condition: value for condition, value in bounds.items() if value is not None}
        values: list[Any] = list(conditions.values())
        clauses = list(conditions)
        if before is not None:
            clauses.append("(accepted_at, number) < (?, ?)")
            values += read_cursor(before)
        where = f"WHERE {' AND '.join(clauses)}" if clauses else ""
        query = f"SELECT accepted_at, number, body FROM record {where} ORDER BY accepted_at DESC, number DESC"
        rows = self._database.execute(f"{query} LIMIT ?", (*values, limit + 1)).fetchall()
        more = len(rows) > limit
        records = tuple(decode_record(body) for _, _, body in rows[:limit])
        return Page(records, cursor_of(*rows[limit - 1][:2]) if more else None)

    def totals(self, by: Collection[str], since: date | None, until: date | None) -> list[Total]:
        groups, grouping = asked_for(by)
        sums = [f"SUM({column})" for column in _KEPT]
        query = f"SELECT {', '.join([*groups, *sums])} FROM total WHERE by = ? AND day >= ? AND day < ?"
        if groups:
            query += f" GROUP BY {', '.join(groups)} ORDER BY {', '.join(groups)}"
        bounds = (grouping, *day_numbers(since, until))
        with closing(self._database.execute(query, bounds)) as rows:
            return [_total(groups, row) for row in rows if row[len(groups)]]


def _grouped(sums: dict[_Key, list[int]], grouping: Collection[str]) -> dict[_Key, list[int]]:
    found: dict[_Key, list[int]] = {}
    for (day, *names), more in sums.items():
        principal, model, provider = (
            value if name in grouping else "" for name, value in zip(NAMES, names, strict=True)
        )
        _add(found.setdefault((day, principal, model, provider), [0] * len(more)), more)
    return found


def _add(sums: list[int], more: Sequence[int]) -> None:
    sums[:] = [a + b for a, b in zip(sums, more, strict=True)]


def _total(groups: Sequence[str], row: Sequence[Any]) -> Total:
    named: dict[str, Any] = dict(zip((*groups, *_KEPT), row, strict=True))
    cost = named.pop("cost_dollars") * DOLLAR + named.pop("cost_rest")
    return total_from({**named, "cost": cost})
