"""
A store in PostgreSQL, shared by several nodes, through psycopg.

psycopg waits; it does so on a few threads, each with one connection.  A key always goes to the same
thread, so its calls take effect in the order in which they were made.  A call that takes too long is
given up by hanging up the connection that it waits on: a server that is stopped keeps no thread.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from threading import Lock
from typing import Any
from zlib import crc32

import attrs
import psycopg
from psycopg.conninfo import conninfo_to_dict
from twisted.internet.defer import Deferred, DeferredList, fail
from twisted.internet.task import LoopingCall
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from crabtwist.errors import StorageError
from crabtwist.interfaces import IStorage
from crabtwist.settings import Secret, positive
from crabtwist.storage.migrations import (
    MOST_WAITING,
    Step,
    closed,
    end_of_prefix,
    migrate_postgres,
    one_thread,
    overloaded,
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
)

#: How long a node may wait for another one's migration, and for its own.
MIGRATION_SECONDS = 60.0
#: How many expired rows of each table are deleted at once.
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
    WITH counters AS (DELETE FROM crabtwist_counter WHERE namespace = %(namespace)s AND key = %(key)b)
    DELETE FROM crabtwist_entry WHERE namespace = %(namespace)s AND key = %(key)b"""
_SWEEP = (
    """DELETE FROM crabtwist_entry WHERE ctid = ANY (ARRAY (
        SELECT ctid FROM crabtwist_entry WHERE expires_at <= now() LIMIT %s FOR UPDATE SKIP LOCKED))""",
    """DELETE FROM crabtwist_counter WHERE ctid = ANY (ARRAY (
        SELECT ctid FROM crabtwist_counter WHERE expires_at <= now() LIMIT %s FOR UPDATE SKIP LOCKED))""",
)


def _usable_dsn(_instance: object, _attribute: object, value: Secret) -> None:
    # libpq's own complaints quote the string, and with it what may be a part of the password.
    try:
        options = conninfo_to_dict(value.reveal())
    except psycopg.Error:
        raise ValueError("is no connection string of PostgreSQL's") from None
    port = str(options.get("port") or "0")
    if "@" in f"{options.get('host')}{options.get('dbname')}" or not port.replace(",", "").isdigit():
        raise ValueError("cannot be read; in a URL, write @ / : and the like of a password as %40 %2F %3A")


@attrs.frozen
class PostgresSettings:
    """
    `dsn` is a URL or a string of libpq's, which also says how to encrypt
    (https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNSTRING).

    No call takes longer than `call_timeout`, and none keeps the server busy for longer.
    `connect_timeout` is a whole number of seconds, 2 at least.  `sweep_interval` is the time between two
    looks for expired rows.  A node has up to `connections` connections.
    """

    dsn: Secret = attrs.field(validator=_usable_dsn)
    connections: int = attrs.field(default=4, validator=positive)
    connect_timeout: int = attrs.field(default=3, validator=positive)
    call_timeout: float = attrs.field(default=2.0, validator=positive)
    sweep_interval: float = attrs.field(default=30.0, validator=positive)

    @property
    def where(self) -> str:
        """What errors call the server."""
        options = conninfo_to_dict(self.dsn.reveal())
        place = ":".join(str(options[name]) for name in ("host", "port") if options.get(name))
        return f"PostgreSQL at {place or 'its usual place'}"


_Connection = psycopg.Connection[tuple[Any, ...]]
Work = Callable[[_Connection], Any]


@attrs.define(eq=False)
class _Call:
    """Something to be done on a lane's thread, and who waits for it."""

    work: Callable[[], Any]
    done: Deferred[Any] = attrs.field(factory=Deferred)


class _Lane:
    """
    One thread with one connection, which is made when it is needed and made again when it is lost.

    `waiting` is the number of calls that are not done.
    """

    def __init__(self, reactor: Any, settings: PostgresSettings) -> None:
        self.waiting = 0
        self._reactor = reactor
        self._settings = settings
        self._pool = one_thread("postgres")
        self._connection: _Connection | None = None
        # Keeps a call from being ended while another one begins, and the wrong one from being hung up.
        self._lock = Lock()
        self._running: _Call | None = None

    def ask(self, work: Work, timeout_seconds: float) -> Deferred[Any]:
        """Do it after what was asked for before; fails with `StorageError`, at the latest after that time."""
        return self._ask(lambda: work(self._connected()), timeout_seconds)

    def _ask(self, work: Callable[[], Any], timeout_seconds: float) -> Deferred[Any]:
        call = _Call(work)
        self.waiting += 1
        timer = self._reactor.callLater(timeout_seconds, self._give_up, call, timeout_seconds)
        doing = deferToThreadPool(self._reactor, self._pool, self._do, call)
        doing.addBoth(self._did, call, timer)
        return call.done

    async def close(self) -> None:
        """Finish what was asked for, and let the thread go."""
        patience = self._settings.connect_timeout + self._settings.call_timeout
        with suppress(StorageError):
            await self._ask(self._disconnect, patience)
        if not self.waiting:
            # Stopping waits for the thread; one that still hangs (in a resolver, say) is left to itself.
            self._pool.stop()

    # On the reactor's thread.

    def _give_up(self, call: _Call, seconds: float) -> None:
        with self._lock:
            if self._running is call and self._connection is not None:
                _hang_up(self._connection)
        if not call.done.called:
            call.done.errback(StorageError(f"{self._settings.where} did not answer within {seconds:g} s"))

    def _did(self, outcome: Any, call: _Call, timer: Any) -> None:
        self.waiting -= 1
        if timer.active():
            timer.cancel()
        if not call.done.called:
            call.done.callback(outcome)

    # On the lane's own thread.

    def _do(self, call: _Call) -> Any:
        if call.done.called:
            return None
        with self._lock:
            self._running = call
        try:
            return call.work()
        except psycopg.Error as error:
            return Failure(StorageError(f"{self._settings.where} failed: {_words(error)}"))
        finally:
            with self._lock:
                self._running = None
                if self._connection is not None and self._connection.closed:
                    self._connection = None

    def _connected(self) -> _Connection:
        if self._connection is not None and _is_stale(self._connection):
            self._disconnect()
        if self._connection is None:
            self._connection = self._connect()
            _set_statement_timeout(self._connection, self._settings.call_timeout)
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connect(self) -> _Connection:
        return psycopg.connect(
            self._settings.dsn.reveal(),
            autocommit=True,
            connect_timeout=self._settings.connect_timeout,
            fallback_application_name="crabtwist",
        )


@implementer(IStorage)
class PostgresStorage:
    """
    See `IStorage`; calls fail with `StorageError`.

    Values and counters are kept apart, as in memory.  Counters are 64-bit; one that would not fit keeps
    its total, and the increment fails.  A key may have up to about 2600 bytes.  Time is the server's.
    Calls for one key take effect in order, those for different keys in any.  `services.clock` has to
    provide `IReactorFromThreads` as well.
    """

    Settings = PostgresSettings
    _log = Logger()

    def __init__(self, settings: PostgresSettings, services: Any) -> None:
        self._settings = settings
        self._reactor = services.clock
        self._lanes: Sequence[_Lane] = ()
        self._sweeping = LoopingCall(self._sweep)
        self._sweeping.clock = self._reactor

    def open(self) -> Deferred[None]:
        """Connect, and create or upgrade the tables.  Fails with `StorageError`."""
        return Deferred.fromCoroutine(self._open())

    async def _open(self) -> None:
        lanes = [_Lane(self._reactor, self._settings) for _ in range(self._settings.connections)]
        try:
            await lanes[0].ask(self._migrate, self._settings.connect_timeout + MIGRATION_SECONDS)
        except Exception:
            await DeferredList([Deferred.fromCoroutine(lane.close()) for lane in lanes])
            raise
        self._lanes = lanes
        self._sweeping.start(self._settings.sweep_interval, now=False)

    def _migrate(self, connection: _Connection) -> None:
        with connection.transaction():
            _set_statement_timeout(connection, MIGRATION_SECONDS)
            migrate_postgres(connection, "storage", STEPS, self._settings.where)
        _set_statement_timeout(connection, self._settings.call_timeout)

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

        def work(connection: _Connection) -> bytes | None:
            row = connection.execute(_GET, (namespace, key), binary=True).fetchone()
            return None if row is None else row[0]

        return self._ask(work, namespace, key)

    def set(
        self, namespace: str, key: bytes, value: bytes, ttl_seconds: float | None = None
    ) -> Deferred[None]:
        """Store a value, in place of the old one and of its time."""
        row = (namespace, key, value, _seconds(ttl_seconds))

        def work(connection: _Connection) -> None:
            connection.execute(_SET, row)

        return self._ask(work, namespace, key)

    def increment(
        self, namespace: str, key: bytes, delta: int, ttl_seconds: float | None = None
    ) -> Deferred[int]:
        """Add to a counter; its time runs from its first increment and is not extended."""
        row = (namespace, key, delta, _seconds(ttl_seconds))

        def work(connection: _Connection) -> int:
            ((total,),) = connection.execute(_INCREMENT, row).fetchall()
            return int(total)

        return self._ask(work, namespace, key)

    def list(self, namespace: str, prefix: bytes = b"") -> Deferred[Sequence[tuple[bytes, bytes]]]:
        """Return the values whose keys begin so, sorted by key."""
        values = {"namespace": namespace, "first": prefix, "end": end_of_prefix(prefix)}
        return self._ask(lambda it: it.execute(_LIST, values, binary=True).fetchall(), namespace, prefix)

    def delete(self, namespace: str, key: bytes) -> Deferred[None]:
        """Forget the value and the counter of a key."""
        values: Mapping[str, object] = {"namespace": namespace, "key": key}

        def work(connection: _Connection) -> None:
            connection.execute(_DELETE, values)

        return self._ask(work, namespace, key)

    def _ask(self, work: Work, namespace: str, key: bytes) -> Deferred[Any]:
        if not self._lanes:
            return fail(closed(self._settings.where))
        lane = self._lanes[crc32(key, crc32(namespace.encode())) % len(self._lanes)]
        if lane.waiting >= MOST_WAITING:
            return fail(overloaded(self._settings.where))
        return lane.ask(work, self._settings.call_timeout)

    async def _sweep(self) -> None:
        """Delete what has expired, a few rows at a time; other nodes may do the same."""

        def work(connection: _Connection) -> int:
            return max(connection.execute(statement, (SWEEP_ROWS,)).rowcount for statement in _SWEEP)

        try:
            while self._lanes and await self._ask(work, "", b"") == SWEEP_ROWS:
                pass
        except StorageError as error:
            # A looping call that fails once would never come again.
            self._log.warn("expired rows were not deleted: {error}", error=error)


def _set_statement_timeout(connection: _Connection, seconds: float) -> None:
    milliseconds = str(max(1, round(seconds * 1000)))
    connection.execute("SELECT set_config('statement_timeout', %s, false)", (milliseconds,))


def _seconds(ttl_seconds: float | None) -> float | None:
    return None if ttl_seconds is None else min(float(ttl_seconds), LONGEST_TTL_SECONDS)


def _is_stale(connection: _Connection) -> bool:
    """Say whether the server has hung up, or was about to, while nobody used the connection."""
    # A server that was asked nothing says nothing, but for its last words and the end.
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def _hang_up(connection: _Connection) -> None:
    """Wake the thread that waits on the connection; closing it from here would not."""
    with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as own:
        own.shutdown(socket.SHUT_RDWR)


def _words(error: psycopg.Error) -> str:
    return " ".join(str(error).split()) or type(error).__name__
