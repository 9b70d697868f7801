"""
One thread with one connection to PostgreSQL: psycopg waits, and the reactor must not.

A call that takes too long is given up by hanging up the connection that it waits on: a server that is
stopped keeps no thread.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from threading import Lock
from typing import Any

import attrs
import psycopg
from psycopg.conninfo import conninfo_to_dict
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThreadPool
from twisted.python.failure import Failure

from crabtwist.errors import StorageError
from crabtwist.settings import Secret, positive
from crabtwist.storage.migrations import one_thread
from crabtwist.storage.postgres_connection import Connection, hang_up, is_stale, words

#: How long a node may wait for another one's migration, and for its own.
MIGRATION_SECONDS = 60.0


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


Work = Callable[[Connection], Any]


@attrs.define(eq=False)
class _Call:
    """Something to be done on a lane's thread, and who waits for it."""

    work: Callable[[], Any]
    done: Deferred[Any] = attrs.field(factory=Deferred)


class Lane:
    """
    One thread with one connection, which is made when it is needed and made again when it is lost.

    `waiting` is the number of calls that are not done.
    """

    def __init__(self, reactor: Any, settings: PostgresSettings) -> None:
        self.waiting = 0
        self._reactor = reactor
        self._settings = settings
        self._pool = one_thread("postgres")
        self._connection: Connection | None = None
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
                hang_up(self._connection)
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
            return Failure(StorageError(f"{self._settings.where} failed: {words(error)}"))
        finally:
            with self._lock:
                self._running = None
                if self._connection is not None and self._connection.closed:
                    self._connection = None

    def _connected(self) -> Connection:
        if self._connection is not None and is_stale(self._connection):
            self._disconnect()
        if self._connection is None:
            self._connection = self._connect()
            set_statement_timeout(self._connection, self._settings.call_timeout)
            # Statements here take a millisecond or two; compiling one first takes a second.
            self._connection.execute("SELECT set_config('jit', 'off', false)")
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connect(self) -> Connection:
        return psycopg.connect(
            self._settings.dsn.reveal(),
            autocommit=True,
            connect_timeout=self._settings.connect_timeout,
            fallback_application_name="crabtwist",
        )


def set_statement_timeout(connection: Connection, seconds: float) -> None:
    """Let no statement on a connection take longer."""
    milliseconds = str(max(1, round(seconds * 1000)))
    connection.execute("SELECT set_config('statement_timeout', %s, false)", (milliseconds,))
