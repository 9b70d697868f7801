"""
A store in PostgreSQL, shared by several nodes, through psycopg.

psycopg waits; it does so on a few threads, each with one connection.  A key always goes to the same
thread, so its calls take effect in the order in which they were made.  A call that takes too long is
given up by hanging up the connection that it waits on: a server that is stopped keeps no thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from zlib import crc32

from twisted.internet.defer import Deferred, DeferredList, fail
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from zope.interface import implementer

from crabtwist.errors import StorageError
from crabtwist.interfaces import IStorage
from crabtwist.storage import postgres_boards
from crabtwist.storage.migrations import (
    MOST_WAITING,
    Boards,
    Step,
    closed,
    end_of_prefix,
    migrate_postgres,
    overloaded,
)
from crabtwist.storage.postgres_connection import Connection
from crabtwist.storage.postgres_lane import (
    MIGRATION_SECONDS,
    Lane,
    PostgresSettings,
    Work,
    set_statement_timeout,
)

#: Never change one that was released: append the next.
STEPS: Sequence[Step] = (
    (
        """CREATE TABLE crabtwist_entry (
            namespace text NOT NULL, key bytea NOT NULL, value bytea NOT NULL, expires_at timestamptz,
            PRIMARY KEY (namespace, key))""",
        "CREATE INDEX ON crabtwist_entry (expires_at) WHERE expires_at IS NOT NULL",
        """CREATE TABLE crabtwist_counter (
            namespace text NOT NULL, key bytea NOT NULL, total bigint NOT NULL, expires_at timestamptz,
            PRIMARY KEY (namespace, key))""",
        "CREATE INDEX ON crabtwist_counter (expires_at) WHERE expires_at IS NOT NULL",
    ),
    postgres_boards.STEP,
)

#: How many expired rows of each table, or whole boards, are deleted at once.
SWEEP_ROWS = 500
#: Beyond that a time to live is no different from none.
LONGEST_TTL_SECONDS = 100 * 365 * 86400.0

_GET = """
    SELECT value FROM crabtwist_entry
    WHERE namespace = %s AND key = %b AND (expires_at IS NULL OR expires_at > now())"""
_SET = """
    INSERT INTO crabtwist_entry (namespace, key, value, expires_at)
    VALUES (%s, %b, %b, now() + make_interval(secs => %s))
    ON CONFLICT (namespace, key) DO UPDATE SET value = EXCLUDED.value, expires_at = EXCLUDED.expires_at"""
_INCREMENT = """
    INSERT INTO crabtwist_counter AS old (namespace, key, total, expires_at)
    VALUES (%s, %b, %s::bigint, now() + make_interval(secs => %s))
    ON CONFLICT (namespace, key) DO UPDATE SET
        total = CASE WHEN old.expires_at <= now() THEN 0 ELSE old.total END + EXCLUDED.total,
        expires_at = CASE WHEN old.expires_at <= now() THEN EXCLUDED.expires_at ELSE old.expires_at END
    RETURNING total"""
_LIST = """
    SELECT key, value FROM crabtwist_entry
    WHERE namespace = %(namespace)s AND key >= %(first)b
        AND (%(end)b::bytea IS NULL OR key < %(end)b::bytea)
        AND (expires_at IS NULL OR expires_at > now())
    ORDER BY key"""
_DELETE = """
    WITH counters AS (DELETE FROM crabtwist_counter WHERE namespace = %(namespace)s AND key = %(key)b),
        notes AS (DELETE FROM crabtwist_note WHERE namespace = %(namespace)s AND key = %(key)b)
    DELETE FROM crabtwist_entry WHERE namespace = %(namespace)s AND key = %(key)b"""
_SWEEP = (
    """DELETE FROM crabtwist_entry WHERE ctid = ANY (ARRAY (
        SELECT ctid FROM crabtwist_entry WHERE expires_at <= now() LIMIT %s FOR UPDATE SKIP LOCKED))""",
    """DELETE FROM crabtwist_counter WHERE ctid = ANY (ARRAY (
        SELECT ctid FROM crabtwist_counter WHERE expires_at <= now() LIMIT %s FOR UPDATE SKIP LOCKED))""",
    postgres_boards.SWEEP,
)


@implementer(IStorage)
class PostgresStorage:
    """
    See `IStorage`; calls fail with `StorageError`.

    Values, counters and boards are kept apart, as in memory.  Counters are 64-bit; one that would not fit
    keeps its total, and the increment fails.  A key, with a member's name, may have up to about 2600 bytes.
    Time is the server's.  Calls for one key take effect in order, those for different keys in any; those of
    `post` and `boards` in order among themselves.  `services.clock` has to provide `IReactorFromThreads`.
    """

    Settings = PostgresSettings
    between_nodes = True
    _log = Logger()

    def __init__(self, settings: PostgresSettings, services: Any) -> None:
        self._settings = settings
        self._reactor = services.clock
        self._lanes: Sequence[Lane] = ()
        self._sweeping = LoopingCall(self._sweep)
        self._sweeping.clock = self._reactor

    def open(self) -> Deferred[None]:
        """Connect, and create or upgrade the tables.  Fails with `StorageError`."""
        return Deferred.fromCoroutine(self._open())

    async def _open(self) -> None:
        lanes = [Lane(self._reactor, self._settings) for _ in range(self._settings.connections)]
        try:
            await lanes[0].ask(self._migrate, self._settings.connect_timeout + MIGRATION_SECONDS)
        except Exception:
            await DeferredList([Deferred.fromCoroutine(lane.close()) for lane in lanes])
            raise
        self._lanes = lanes
        self._sweeping.start(self._settings.sweep_interval, now=False)

    def _migrate(self, connection: Connection) -> None:
        with connection.transaction():
            set_statement_timeout(connection, MIGRATION_SECONDS)
            migrate_postgres(connection, "storage", STEPS, self._settings.where)
        set_statement_timeout(connection, self._settings.call_timeout)

    def close(self) -> Deferred[None]:
        """Finish what was asked for, and let the connections go; closing again is fine."""
        return Deferred.fromCoroutine(self._close())

    async def _close(self) -> None:
        lanes, self._lanes = self._lanes, ()
        if lanes:
            self._sweeping.stop()
            await DeferredList([Deferred.fromCoroutine(lane.close()) for lane in lanes])

    def get(self, namespace: str, key: bytes) -> Deferred[bytes | None]:
        """Return the value, None if there is none or its time has passed."""

        def work(connection: Connection) -> bytes | None:
            row = connection.execute(_GET, (namespace, key), binary=True).fetchone()
            return None if row is None else row[0]

        return self._ask(work, namespace, key)

    def set(
        self, namespace: str, key: bytes, value: bytes, ttl_seconds: float | None = None
    ) -> Deferred[None]:
        """Store a value, in place of the old one and of its time."""
        row = (namespace, key, value, _seconds(ttl_seconds))

        def work(connection: Connection) -> None:
            connection.execute(_SET, row)

        return self._ask(work, namespace, key)

    def increment(
        self, namespace: str, key: bytes, delta: int, ttl_seconds: float | None = None
    ) -> Deferred[int]:
        """Add to a counter; its time runs from its first increment and is not extended."""
        row = (namespace, key, delta, _seconds(ttl_seconds))

        def work(connection: Connection) -> int:
            ((total,),) = connection.execute(_INCREMENT, row).fetchall()
            return int(total)

        return self._ask(work, namespace, key)

    def list(self, namespace: str, prefix: bytes = b"") -> Deferred[Sequence[tuple[bytes, bytes]]]:
        """Return the values whose keys begin so, sorted by key."""
        values = {"namespace": namespace, "first": prefix, "end": end_of_prefix(prefix)}
        return self._ask(lambda it: it.execute(_LIST, values, binary=True).fetchall(), namespace, prefix)

    def delete(self, namespace: str, key: bytes) -> Deferred[None]:
        """Forget the value, the counter and the board of a key."""
        values: Mapping[str, object] = {"namespace": namespace, "key": key}

        def work(connection: Connection) -> None:
            connection.execute(_DELETE, values)

        return self._ask(work, namespace, key)

    def post(
        self, namespace: str, member: bytes, notes: Mapping[bytes, bytes], ttl_seconds: float | None = None
    ) -> Deferred[Boards]:
        """Put up a member's notes, and return the boards that they are on; all of them, or none."""
        arguments = (namespace, member, dict(notes), _seconds(ttl_seconds))
        return self._ask(lambda it: postgres_boards.post(it, *arguments), namespace, b"")

    def boards(self, namespace: str) -> Deferred[Boards]:
        """Return all boards of a namespace."""
        return self._ask(lambda it: postgres_boards.read(it, namespace), namespace, b"")

    def _ask(self, work: Work, namespace: str, key: bytes) -> Deferred[Any]:
        if not self._lanes:
            return fail(closed(self._settings.where))
        lane = self._lanes[crc32(key, crc32(namespace.encode())) % len(self._lanes)]
        if lane.waiting >= MOST_WAITING:
            return fail(overloaded(self._settings.where))
        return lane.ask(work, self._settings.call_timeout)

    async def _sweep(self) -> None:
        """Delete what has expired, a few rows at a time; other nodes may do the same."""

        def work(connection: Connection) -> int:
            return max(connection.execute(statement, (SWEEP_ROWS,)).rowcount for statement in _SWEEP)

        try:
            while self._lanes and await self._ask(work, "", b"") >= SWEEP_ROWS:
                pass
        except StorageError as error:
            # A looping call that fails once would never come again.
            self._log.warn("expired rows were not deleted: {error}", error=error)


def _seconds(ttl_seconds: float | None) -> float | None:
    return None if ttl_seconds is None else min(float(ttl_seconds), LONGEST_TTL_SECONDS)
