"""
A ledger in one SQLite file beside the configuration; nothing to install.

Everything happens in one thread of its own, in the order of the calls.  A commit is on the disk before
its Deferred fires: the journal forgets what the ledger has.
"""

# ruff: noqa: S608 - statements are put together from words of this file; what comes from outside is bound

from __future__ import annotations

import os
import sqlite3
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import closing
from datetime import date, timedelta
from pathlib import Path
from typing import Any, TypeVar

import attrs
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.threads import deferToThreadPool
from twisted.python.threadpool import ThreadPool
from zope.interface import implementer

from crabtwist.errors import ConfigurationError
from crabtwist.interfaces import ILedger
from crabtwist.ledger.schema import upgrade
from crabtwist.money import DOLLAR
from crabtwist.records import MICROSECONDS, Page, Record, Tokens, Total, decode_record, encode
from crabtwist.settings import not_blank

T = TypeVar("T")

BUSY_SECONDS = 5.0
CACHE_KIB = 16384
LARGEST_PAGE = 1000

#: Sums of a day, key, model and provider end here, so that no sum over them can overflow: a quadrillion.
LARGEST_SUM = 10**15

_DAY = 86400 * MICROSECONDS
_EPOCH = date(1970, 1, 1)

_NAMES = ("principal", "model", "provider")
_GROUPS = (*_NAMES, "day")
#: What there are totals by, besides the day; the last are by everything.
_GROUPINGS: tuple[tuple[str, ...], ...] = ((), *((name,) for name in _NAMES), _NAMES)
_TOKENS = (
    *("input_tokens", "cache_read_tokens", "cache_write_tokens"),
    *("cache_write_1h_tokens", "output_tokens", "reasoning_tokens"),
)
_SUMS = ("requests", "unpriced", "estimated", *_TOKENS, "cost_dollars", "cost_rest")
_NO_TOKENS = Tokens()

_INSERT = "INSERT INTO record VALUES (NULL, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING"
_WHERE_TOTAL = "WHERE by = ? AND day = ? AND principal = ? AND model = ? AND provider = ?"
_READ_TOTAL = f"SELECT {', '.join(_SUMS)} FROM total {_WHERE_TOTAL}"
_WRITE_TOTAL = f"INSERT OR REPLACE INTO total VALUES ({', '.join('?' * (5 + len(_SUMS)))})"

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
            return fail(RuntimeError("the ledger is not open"))
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
        """Forget records; each step takes its turn among the other calls."""
        return Deferred.fromCoroutine(self._prune(older_than, max_records, step))

    async def _prune(self, older_than: int | None, max_records: int | None, step: int) -> int:
        pruned, excess = 0, 0
        while older_than is not None and (gone := await self._do(_File.forget, older_than, step)):
            pruned += gone
        if max_records is not None:
            excess = await self._do(_File.count) - max_records
        while excess > 0 and (gone := await self._do(_File.forget, None, min(step, excess))):
            pruned += gone
            excess -= gone
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
            raise ConfigurationError([f"{path}: {error}"]) from error

    def close(self) -> None:
        self._database.close()

    # Writing.

    def append(self, records: Iterable[Record]) -> int:
        sums: dict[_Key, list[int]] = {}
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")
            for record in records:
                if self._database.execute(_INSERT, _row(record)).rowcount:
                    _add(sums.setdefault(_key(record), [0] * (len(_SUMS) - 1)), _summands(record))
            new = sum(requests for requests, *_ in sums.values())
            for grouping in _GROUPINGS:
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

    def forget(self, older_than: int | None, most: int) -> int:
        where = "" if older_than is None else "WHERE accepted_at < :older_than"
        oldest = f"SELECT number FROM record {where} ORDER BY accepted_at, number LIMIT :most"
        statement = f"DELETE FROM record WHERE number IN ({oldest})"
        with self._database:
            return self._database.execute(statement, {"older_than": older_than, "most": most}).rowcount

    # Reading.

    def get(self, name: str) -> Record | None:
        row = self._database.execute("SELECT body FROM record WHERE id = ?", (name,)).fetchone()
        return None if row is None else decode_record(row[0])

    def count(self) -> int:
        (number,) = self._database.execute("SELECT COUNT(*) FROM record").fetchone()
        return int(number)

    def page(
        self,
        wanted: dict[str, str | None],
        since: int | None,
        until: int | None,
        before: str | None,
        limit: int,
    ) -> Page:
        conditions = {
            f"{column} = ?": wanted[column] for column in _by_rarity(wanted) if wanted[column] is not None
        }
        # A `+` keeps SQLite from choosing the index of a column that leaves more.
        conditions = {f"{'+' * bool(n)}{each}": conditions[each] for n, each in enumerate(conditions)}
        bounds: dict[str, Any] = {"accepted_at >= ?": since, "accepted_at < ?": until}
        conditions |= {condition: value for condition, value in bounds.items() if value is not None}
        values: list[Any] = list(conditions.values())
        clauses = list(conditions)
        if before is not None:
            clauses.append("(accepted_at, number) < (?, ?)")
            values += _read_cursor(before)
        where = f"WHERE {' AND '.join(clauses)}" if clauses else ""
        query = f"SELECT accepted_at, number, body FROM record {where} ORDER BY accepted_at DESC, number DESC"
        rows = self._database.execute(f"{query} LIMIT ?", (*values, limit + 1)).fetchall()
        more = len(rows) > limit
        records = tuple(decode_record(body) for _, _, body in rows[:limit])
        return Page(records, _cursor(*rows[limit - 1][:2]) if more else None)

    def totals(self, by: Collection[str], since: date | None, until: date | None) -> list[Total]:
        if not set(by) <= set(_GROUPS):
            raise ValueError(f"totals are by {', '.join(_GROUPS)}, not by {', '.join(by)}")
        groups = [group for group in _GROUPS if group in by]
        grouping = min((each for each in _GROUPINGS if set(by) <= {*each, "day"}), key=len)
        sums = [f"SUM({column})" for column in _SUMS]
        query = f"SELECT {', '.join([*groups, *sums])} FROM total WHERE by = ? AND day >= ? AND day < ?"
        if groups:
            query += f" GROUP BY {', '.join(groups)} ORDER BY {', '.join(groups)}"
        bounds = (",".join(grouping), _number(since or date.min), _number(until or date.max))
        with closing(self._database.execute(query, bounds)) as rows:
            return [_total(groups, row) for row in rows if row[len(groups)]]


# Rows.


def _by_rarity(wanted: dict[str, str | None]) -> tuple[str, ...]:
    """Return the columns of filters, first the one that probably leaves least."""
    others = ("principal", "model", "provider")
    return (*others, "reason") if wanted["reason"] == "complete" else ("reason", *others)


def _row(record: Record) -> tuple[str | int, ...]:
    who = (record.principal or "", record.model, record.provider, record.reason)
    return (record.id, record.accepted_at, *who, encode(record).decode())


def _key(record: Record) -> _Key:
    # A request that reached nobody may name a model that there is not: rows would grow without end.
    model = record.model if record.provider or record.cache_hit else ""
    return record.accepted_at // _DAY, record.principal or "", model, record.provider


def _grouped(sums: dict[_Key, list[int]], grouping: Collection[str]) -> dict[_Key, list[int]]:
    found: dict[_Key, list[int]] = {}
    for (day, *names), more in sums.items():
        principal, model, provider = (
            value if name in grouping else "" for name, value in zip(_NAMES, names, strict=True)
        )
        _add(found.setdefault((day, principal, model, provider), [0] * len(more)), more)
    return found


def _summands(record: Record) -> list[int]:
    usage = record.usage or _NO_TOKENS
    return [
        1,
        record.cost is None,
        record.estimated,
        *(getattr(usage, name) for name in _TOKENS),
        record.cost or 0,
    ]


def _add(sums: list[int], more: Sequence[int]) -> None:
    sums[:] = [a + b for a, b in zip(sums, more, strict=True)]


def _total(groups: Sequence[str], row: Sequence[Any]) -> Total:
    named: dict[str, Any] = dict(zip((*groups, *_SUMS), row, strict=True))
    named["cost"] = named.pop("cost_dollars") * DOLLAR + named.pop("cost_rest")
    if "day" in named:
        named["day"] = _EPOCH + timedelta(days=named["day"])
    return Total(**named)


def _number(day: date) -> int:
    return (day - _EPOCH).days


def _cursor(accepted_at: int, number: int) -> str:
    return urlsafe_b64encode(f"{accepted_at}.{number}".encode()).decode().rstrip("=")


def _read_cursor(cursor: str) -> tuple[int, int]:
    try:
        text = urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode()
        accepted_at, number = text.split(".")
        return int(accepted_at), int(number)
    except ValueError:
        raise ValueError("`before` is not one that a page had") from None
