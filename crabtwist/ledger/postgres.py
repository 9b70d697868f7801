"""
A ledger in PostgreSQL, which several nodes may share.

Records are appended on one connection, and everything else is asked on the others, so that a long
question keeps no record waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from datetime import date
from functools import partial
from typing import Any

import attrs
from psycopg.conninfo import make_conninfo
from twisted.internet.defer import Deferred, DeferredList, fail
from zope.interface import implementer

from crabtwist.interfaces import ILedger
from crabtwist.ledger import postgres_tables as tables
from crabtwist.ledger.columns import LARGEST_NUMBER, LARGEST_PAGE
from crabtwist.ledger.postgres_tables import Connection
from crabtwist.records import Page, Record, Total
from crabtwist.settings import Secret, positive
from crabtwist.storage.migrations import MOST_WAITING, closed, migrate_postgres, overloaded
from crabtwist.storage.postgres_lane import MIGRATION_SECONDS, Lane, PostgresSettings, set_statement_timeout


def _usable_dsn(_instance: object, _attribute: object, value: Secret) -> None:
    PostgresSettings(dsn=value)


@attrs.frozen
class PostgresLedgerSettings:
    """
    `dsn` is a URL or a string of libpq's, which also says how to encrypt
    (https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNSTRING).

    No call takes longer than `call_timeout`, and none keeps the server busy for longer.
    `connect_timeout` is a whole number of seconds, 2 at least.  A node has up to `connections` connections.
    """

    dsn: Secret = attrs.field(validator=_usable_dsn)
    connections: int = attrs.field(default=2, validator=positive)
    connect_timeout: int = attrs.field(default=3, validator=positive)
    call_timeout: float = attrs.field(default=10.0, validator=positive)

    @property
    def as_of_a_store(self) -> PostgresSettings:
        """The same for a store."""
        # Whatever the environment says: a text that cannot be sent would be taken for a bad record.
        dsn = Secret(make_conninfo(self.dsn.reveal(), client_encoding="utf8"))
        return PostgresSettings(dsn, self.connections, self.connect_timeout, self.call_timeout)


@implementer(ILedger)
class PostgresLedger:
    """
    See `ILedger`; calls fail with `StorageError`.

    Sums are exact whatever their length.  `services.clock` has to provide `IReactorFromThreads` as well.
    """

    Settings = PostgresLedgerSettings

    def __init__(self, settings: PostgresLedgerSettings, services: Any) -> None:
        self._settings = settings.as_of_a_store
        self._reactor = services.clock
        self._lanes: Sequence[Lane] = ()

    def open(self) -> Deferred[None]:
        """Connect, and create or upgrade the tables.  Fails with `StorageError`."""
        return Deferred.fromCoroutine(self._open())

    async def _open(self) -> None:
        lanes = [Lane(self._reactor, self._settings) for _ in range(self._settings.connections)]
        try:
            await lanes[0].ask(self._migrate, self._settings.connect_timeout + MIGRATION_SECONDS)
        except Exception:
            await _close(lanes)
            raise
        self._lanes = lanes

    def _migrate(self, connection: Connection) -> None:
        tables.check(connection, self._settings.where)
        with connection.transaction():
            set_statement_timeout(connection, MIGRATION_SECONDS)
            migrate_postgres(connection, "ledger", tables.STEPS, self._settings.where)
            tables.fold(connection)
        set_statement_timeout(connection, self._settings.call_timeout)

    def close(self) -> Deferred[None]:
        """Finish what was asked for, and let the connections go; closing again is fine."""
        lanes, self._lanes = self._lanes, ()
        return Deferred.fromCoroutine(_close(lanes))

    def append(self, records: Sequence[Record]) -> Deferred[int]:
        """Add records in one transaction.  Fails with `RecordRefused` if one of them cannot be stored."""
        return self._ask(lambda: self._lanes[0], partial(tables.append, records=records))

    def get(self, request_id: str) -> Deferred[Record | None]:
        """Return one record."""
        return self._ask(self._least_busy, partial(tables.get, request_id=request_id))

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
        limit = min(max(limit, 1), LARGEST_PAGE)
        page = partial(tables.page, wanted=wanted, bounds=(since, until), before=before, limit=limit)
        return self._ask(self._least_busy, page)

    def totals(
        self, by: Collection[str], *, since: date | None = None, until: date | None = None
    ) -> Deferred[list[Total]]:
        """Return totals from the running ones."""
        return self._ask(self._least_busy, partial(tables.totals, by=by, since=since, until=until))

    def prune(
        self, *, older_than: int | None = None, max_records: int | None = None, step: int = 500
    ) -> Deferred[int]:
        """Forget records; several nodes may do so at the same time, and forget no more than one."""
        return Deferred.fromCoroutine(self._prune(older_than, max_records, step))

    async def _prune(self, older_than: int | None, max_records: int | None, step: int) -> int:
        ends = [] if older_than is None else [(min(older_than - 1, LARGEST_NUMBER), LARGEST_NUMBER)]
        if max_records is not None:
            excess = partial(tables.newest_excess, max_records=max_records)
            ends += await self._ask(self._least_busy, excess)
        pruned = 0
        if not ends:
            return 0
        pruned, forget = 0, partial(tables.forget, newest=max(ends), most=step)
        while gone := await self._ask(self._least_busy, forget):
            pruned += gone
        return pruned

    def _least_busy(self) -> Lane:
        return min(self._lanes[1:] or self._lanes, key=lambda lane: lane.waiting)

    def _ask(self, choose: Callable[[], Lane], work: Callable[[Connection], Any]) -> Deferred[Any]:
        if not self._lanes:
            return fail(closed(self._settings.where))
        lane = choose()
        if lane.waiting >= MOST_WAITING:
            return fail(overloaded(self._settings.where))
        return lane.ask(work, self._settings.call_timeout)


async def _close(lanes: Sequence[Lane]) -> None:
    await DeferredList([Deferred.fromCoroutine(lane.close()) for lane in lanes])
