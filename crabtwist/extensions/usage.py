"""
The `usage` extension: totals by key, model, provider and day, with any store and without a ledger.

Each process counts for itself, in memory, and tells the store in the background, through
`crabtwist.leases`, one row for a day, key, model and provider.  What others tell, nodes and former lives of
this one, is added when somebody asks.  Rows of past days are told until they are sure to be known and then
left alone, so what is exchanged is as large as what is used today, however long the totals are kept.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from typing import Any

import attrs
from twisted.application.service import IService, Service
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import deferLater
from twisted.logger import Logger
from zope.interface import implementer

from crabtwist.errors import Refusal
from crabtwist.extension import AdminRoute, Extension
from crabtwist.extensions.usage_rows import (
    GROUPS,
    SUMS,
    Days,
    Row,
    Who,
    add,
    added,
    fold_oldest,
    read_note,
    read_place,
    sums_of,
    who_of,
    without_names,
)
from crabtwist.leases import Boards, Leases
from crabtwist.money import in_dollars
from crabtwist.records import Total
from crabtwist.settings import positive
from crabtwist.values import Context, Outcome

NAMESPACE = "usage"

#: After so many rows whoever else waits for the reactor has a turn.
ROWS_AT_ONCE = 500

#: What is kept for longer is kept as long.
MOST_DAYS = 36500

_DAY = timedelta(days=1)
_DAY_SECONDS = 86400


@attrs.frozen(kw_only=True)
class UsageSettings:
    """How many days totals are kept for, and how many rows a process counts in and remembers."""

    keep_days: int = attrs.field(default=400, validator=positive)
    max_rows: int = attrs.field(default=100_000, validator=positive)


class _Store:
    """The store as `Leases` sees it: what is there at the start is read once, and kept as sums alone."""

    def __init__(self, storage: Any, take: Any) -> None:
        self._take = take
        self._storage = storage
        self.post = storage.post

    async def boards(self, namespace: str) -> Boards:
        await self._take(await self._storage.boards(namespace))
        return {}


@implementer(IService)
class UsageExtension(Extension, Service):
    """Counts every request at its end, and shows the totals at `/v1/admin/extensions/usage/totals`."""

    name = "usage"
    Settings = UsageSettings
    _log = Logger()

    def __init__(self, settings: UsageSettings, services: Any) -> None:
        self._max_rows = settings.max_rows
        self._kept = min(settings.keep_days, MOST_DAYS) * _DAY
        self._clock = services.clock
        self._storage = services.storage
        self._member = secrets.token_bytes(8)
        self._leases = Leases(_Store(self._storage, self._take), NAMESPACE, self._clock, self._member)
        #: What this process has counted, by day, until the day is over and told.
        self._own: dict[date, dict[Who, Row]] = {}
        #: What all others have, and this one on the days that are not its own any more.
        self._heard: Days = {}
        #: Requests of earlier days, which nobody runs for so long, count here: those days are closed.
        self._open_from = self._today() - _DAY
        self._warned_on: date | None = None
        self._has_folded = False

    def startService(self) -> Any:
        """Read what is there; fires when that is done."""
        super().startService()
        return Deferred.fromCoroutine(self._leases.start())

    def stopService(self) -> Any:
        """Tell what was not told yet; fires when that is done."""
        super().stopService()
        return Deferred.fromCoroutine(self._leases.stop())

    def on_end(self, context: Context, outcome: Outcome) -> None:
        """Count a request, on the day when it came."""
        day = max(_day_of(context.started_at), self._open_from)
        if day not in self._own:
            self._close_days()
            day = max(day, self._open_from)
        row = self._row(day, who_of(context, outcome))
        add(row.sums, sums_of(outcome))
        self._leases.changed(row)

    # Rows.

    def _row(self, day: date, who: Who) -> Row:
        rows = self._own.setdefault(day, {})
        row = rows.get(who)
        if row is None:
            if sum(map(len, self._own.values())) >= self._max_rows:
                who = without_names(who)
                self._warn_full(day)
            row = rows.get(who)
        if row is None:
            row = rows[who] = Row(day, who, (self._kept + _DAY).total_seconds(), self._told)
        if not row.is_joined:
            row.begin()
            self._leases.join(row)
        return row

    def _told(self, row: Row, others: Mapping[bytes, bytes]) -> None:
        if not row.is_joined:
            return
        if others:
            self._heard.setdefault(row.day, {})[row.who] = added(self._readable(others.values()))
        if row.day < self._today() and row.is_settled:
            self._leases.leave(row)
            row.is_joined = False

    def _close_days(self) -> None:
        """Forget which of the sums are this process's own, for days that are over and told."""
        for day in sorted(each for each in self._own if each < self._today() - _DAY):
            rows = self._own[day]
            if any(row.is_joined for row in rows.values()):
                break
            heard = self._heard.setdefault(day, {})
            for who, row in rows.items():
                heard[who] = added([row.sums, heard[who]] if who in heard else [row.sums])
            del self._own[day]
        self._open_from = max(self._open_from, min([*self._own, self._today() - _DAY]))
        self._bound()

    def _bound(self) -> None:
        oldest = self._oldest_day()
        for day in [each for each in self._heard if each < oldest]:
            del self._heard[day]
        if fold_oldest(self._heard, self._open_from, self._max_rows) and not self._has_folded:
            self._has_folded = True
            self._log.warn(
                "usage: there are more than {max_rows} rows; of the oldest days only the sums by provider "
                "are shown from now on",
                max_rows=self._max_rows,
            )

    def _warn_full(self, day: date) -> None:
        if self._warned_on != day:
            self._warned_on = day
            self._log.warn(
                "usage: {max_rows} rows are counted; what needs another is counted under (other) on {day}",
                max_rows=self._max_rows,
                day=day.isoformat(),
            )

    # Reading.

    async def refresh(self) -> bool:
        """Read what others have told; returns whether the store answered."""
        try:
            await self._take(await self._storage.boards(NAMESPACE))
        except CancelledError:
            raise
        except Exception as error:
            self._log.error("usage: the store does not answer: {error!r}; showing what is known", error=error)
            return False
        return True

    async def _take(self, boards: Boards) -> None:
        own_days, oldest, heard = set(self._own), self._oldest_day(), Days()
        for number, (key, board) in enumerate(boards.items(), 1):
            if not number % ROWS_AT_ONCE:
                await deferLater(self._clock, 0)
            place = read_place(key)
            if place is None or place[0] < oldest:
                continue
            day, who = place
            notes = [board[each] for each in board if each != self._member or day not in own_days]
            if notes:
                heard.setdefault(day, {})[who] = added(self._readable(notes))
        # What was closed meanwhile was passed over as this process's own.
        closed = own_days - set(self._own)
        heard.update({day: rows for day, rows in self._heard.items() if day in closed})
        self._heard = heard
        self._bound()

    def _readable(self, notes: Iterable[bytes]) -> Iterable[list[int]]:
        for note in notes:
            try:
                yield read_note(note)
            except ValueError:
                self._log.error("usage: a note in the store cannot be read: {note!r}", note=note[:200])

    def totals(
        self, by: Collection[str], since: date | None = None, until: date | None = None
    ) -> Deferred[list[Total]]:
        """Return what `crabtwist.interfaces.ILedger.totals` does, of all nodes, as far as was heard."""
        return Deferred.fromCoroutine(self._totals(by, since, until))

    async def _totals(self, by: Collection[str], since: date | None, until: date | None) -> list[Total]:
        groups = _groups(by)
        await self._catch_up()
        return await self._summed(groups, since, until)

    async def _catch_up(self) -> bool:
        """Hear of other nodes, if there may be any; returns whether nothing is missing."""
        return await self.refresh() if self._storage.between_nodes else True

    async def _summed(self, groups: list[str], since: date | None, until: date | None) -> list[Total]:
        sums: dict[tuple[Any, ...], list[int]] = {}
        for number, (day, who, more) in enumerate(self._rows(since, until), 1):
            if not number % ROWS_AT_ONCE:
                await deferLater(self._clock, 0)
            named = dict(zip(GROUPS, (*who, day), strict=True))
            add(sums.setdefault(tuple(named[group] for group in groups), [0] * len(SUMS)), more)
        return [_total(groups, names, sums[names]) for names in sorted(sums)]

    def _rows(self, since: date | None, until: date | None) -> Iterator[tuple[date, Who, list[int]]]:
        """Return all rows of those days, taken at once: later one may change its place."""
        first, end = max(since or date.min, self._oldest_day()), until or date.max
        own = {day: {who: row.sums for who, row in rows.items()} for day, rows in self._own.items()}
        taken = [
            (day, list(rows.items()))
            for days in (own, self._heard)
            for day, rows in days.items()
            if first <= day < end
        ]
        return ((day, who, sums) for day, rows in taken for who, sums in rows if any(sums))

    def _today(self) -> date:
        return _day_of(self._clock.seconds())

    def _oldest_day(self) -> date:
        return self._today() - self._kept

    # Showing.

    def admin_routes(self) -> Mapping[str, AdminRoute]:
        """Show the totals."""
        return {"totals": self._show_totals}

    async def _show_totals(self, query: Mapping[str, str]) -> dict[str, Any]:
        unknown = set(query) - {"by", "since", "until"}
        if unknown:
            raise _wrong(f"there are by, since and until, not {', '.join(sorted(unknown))}")
        since, until = _date(query, "since"), _date(query, "until")
        try:
            groups = _groups([word for word in query.get("by", "").split(",") if word])
        except ValueError as error:
            raise _wrong(str(error)) from error
        is_current = await self._catch_up()
        totals = await self._summed(groups, since, until)
        return {"totals": [_shown(total) for total in totals], "current": is_current}


def _day_of(seconds: float) -> date:
    return _day_numbered(int(seconds // _DAY_SECONDS))


@lru_cache(maxsize=8)
def _day_numbered(number: int) -> date:
    """Return a day, told how many there were since 1970."""
    return datetime.fromtimestamp(number * _DAY_SECONDS, UTC).date()


def _groups(by: Collection[str]) -> list[str]:
    if not set(by) <= set(GROUPS):
        raise ValueError(f"totals are by {', '.join(GROUPS)}, not by {', '.join(by)}")
    return [group for group in GROUPS if group in by]


def _date(query: Mapping[str, str], name: str) -> date | None:
    if name not in query:
        return None
    try:
        return date.fromisoformat(query[name])
    except ValueError:
        raise _wrong(f"{name} has to be a day such as 2026-11-30, in UTC") from None


def _wrong(message: str) -> Refusal:
    return Refusal(400, "invalid_query", message)


def _total(groups: list[str], names: tuple[Any, ...], sums: list[int]) -> Total:
    named: dict[str, Any] = dict(zip((*groups, *SUMS), (*names, *sums), strict=True))
    return Total(**named)


def _shown(total: Total) -> dict[str, Any]:
    """Return a total as JSON has it: dollars exact, as a text, for JSON's numbers are floats to many."""
    shown = {name: value for name, value in attrs.asdict(total).items() if value is not None}
    shown["cost_dollars"] = in_dollars(shown.pop("cost")).removeprefix("$")
    if total.day is not None:
        shown["day"] = total.day.isoformat()
    return shown
