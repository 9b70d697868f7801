"""Boards in SQLite: a row for each note, all those of one board with the same end."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping

from crabtwist.storage.migrations import Boards, boards_of

STEP = (
    """CREATE TABLE note (
        namespace TEXT NOT NULL, key BLOB NOT NULL, member BLOB NOT NULL, note BLOB NOT NULL, expires_at REAL,
        PRIMARY KEY (namespace, key, member))""",
    "CREATE INDEX note_expiry ON note (expires_at) WHERE expires_at IS NOT NULL",
)

DELETE = "DELETE FROM note WHERE namespace = ? AND key = ?"
SWEEP = "DELETE FROM note WHERE rowid IN (SELECT rowid FROM note WHERE expires_at <= ? LIMIT ?)"

_FORGET_EXPIRED = "DELETE FROM note WHERE namespace = ? AND key = ? AND expires_at <= ?"
_POST = "INSERT OR REPLACE INTO note (namespace, key, member, note, expires_at) VALUES (?, ?, ?, ?, ?)"
_PROLONG = "UPDATE note SET expires_at = ? WHERE namespace = ? AND key = ? AND member <> ?"
_READ = "SELECT member, note FROM note WHERE namespace = ? AND key = ?"
_READ_ALL = """
    SELECT key, member, note FROM note WHERE namespace = ? AND (expires_at IS NULL OR expires_at > ?)"""


def post(
    database: sqlite3.Connection,
    namespace: str,
    member: bytes,
    notes: Mapping[bytes, bytes],
    now: float,
    expires_at: float | None,
) -> Boards:
    """Put up a member's notes, in the open transaction, and return the boards that they are on."""
    database.executemany(_FORGET_EXPIRED, [(namespace, key, now) for key in notes])
    database.executemany(_POST, [(namespace, key, member, note, expires_at) for key, note in notes.items()])
    database.executemany(_PROLONG, [(expires_at, namespace, key, member) for key in notes])
    return {key: dict(database.execute(_READ, (namespace, key)).fetchall()) for key in notes}


def read(database: sqlite3.Connection, namespace: str, now: float) -> Boards:
    """Return all boards of a namespace."""
    return boards_of(database.execute(_READ_ALL, (namespace, now)))
