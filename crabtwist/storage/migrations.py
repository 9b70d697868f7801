"""What the stores outside of this process have in common: errors, schemas, threads, prefixes, boards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from threading import Thread
from typing import Any

from twisted.python.threadpool import ThreadPool

from crabtwist.errors import StorageError

#: The SQL statements that lead from one version of a schema to the next.
Step = Sequence[str]

#: Notes by keys, and by members.
Boards = dict[bytes, dict[bytes, bytes]]

#: How many calls may wait in one store; what comes on top fails at once, for memory has an end.
MOST_WAITING = 10_000

#: Nodes that start together wait for each other here ("ctwi"); the number is anybody's in the database.
MIGRATION_LOCK = 0x63747769

_SCHEMA = "CREATE TABLE crabtwist_schema (part text PRIMARY KEY, version integer NOT NULL)"
_SET_VERSION = """
    INSERT INTO crabtwist_schema (part, version) VALUES (%s, %s)
    ON CONFLICT (part) DO UPDATE SET version = EXCLUDED.version"""


def closed(where: str) -> StorageError:
    """Return the error of a call before `open` or after `close`."""
    return StorageError(f"{where} is not open")


def overloaded(where: str) -> StorageError:
    """Return the error of a call that found `MOST_WAITING` others before it."""
    return StorageError(f"{where} is too slow: {MOST_WAITING} calls wait already")


def steps_after(version: int, steps: Sequence[Step], where: str) -> Sequence[Step]:
    """
    Return the steps that a schema of `version` still has to take; version 0 has nothing yet.

    Raises `StorageError` for a schema that is newer than the last step: nobody here knows what it means.
    """
    if not 0 <= version <= len(steps):
        raise StorageError(
            f"{where} has schema version {version}, and this crabtwist knows those up to {len(steps)}: "
            "use the newer crabtwist that wrote it, or another place"
        )
    return steps[version:]


def migrate_postgres(connection: Any, part: str, steps: Sequence[Step], where: str) -> None:
    """
    Bring a part of a PostgreSQL schema up to date, in the open transaction of a psycopg connection.

    Nodes that do it at the same time wait for each other.  Raises `StorageError` if it is newer
    than `steps`, `psycopg.Error` if something else is in the way.
    """
    connection.execute("SELECT pg_advisory_xact_lock(%s)", (MIGRATION_LOCK,))
    # Not `IF NOT EXISTS`, for which one must be allowed to create tables even where there is one.
    if connection.execute("SELECT to_regclass('crabtwist_schema')").fetchall() == [(None,)]:
        connection.execute(_SCHEMA)
    row = connection.execute("SELECT version FROM crabtwist_schema WHERE part = %s", (part,)).fetchone()
    version = 0 if row is None else row[0]
    for step in steps_after(version, steps, where):
        for statement in step:
            connection.execute(statement.encode())
    if version < len(steps):
        connection.execute(_SET_VERSION, (part, len(steps)))


def one_thread(name: str) -> ThreadPool:
    """Return a running pool of one thread, the same one for all that it is given; `stop` it at last."""
    pool = ThreadPool(1, 1, name)
    # A process that ends without `stop`, for its start failed half way, does not wait for the thread.
    pool.threadFactory = partial(Thread, daemon=True)  # type: ignore[assignment] # any maker will do
    pool.start()
    return pool


def end_of_prefix(prefix: bytes) -> bytes | None:
    """Return the least key after all keys that begin with `prefix`, None where there is none."""
    stem = prefix.rstrip(b"\xff")
    return stem[:-1] + bytes([stem[-1] + 1]) if stem else None


def boards_of(rows: Iterable[tuple[bytes, bytes, bytes]]) -> Boards:
    """Return the boards that rows of key, member and note are on."""
    boards: Boards = {}
    for key, member, note in rows:
        boards.setdefault(key, {})[member] = note
    return boards
