"""
Boards in PostgreSQL: a row for each note, which its member alone writes.

So nodes that post at the same time do not wait for each other.  The end of a board is that of its latest
note, whatever the others say.  Rows are locked in the order of their keys, or two nodes could wait for
each other for ever.
"""

from __future__ import annotations

from collections.abc import Mapping

from crabtwist.storage.migrations import Boards, boards_of
from crabtwist.storage.postgres_connection import Connection

STEP = (
    """CREATE TABLE crabtwist_note (
        namespace text NOT NULL, key bytea NOT NULL, member bytea NOT NULL, note bytea NOT NULL,
        posted_at timestamptz NOT NULL, expires_at timestamptz NOT NULL,
        PRIMARY KEY (namespace, key, member))""",
    "CREATE INDEX ON crabtwist_note (expires_at) WHERE expires_at < 'infinity'",
)

# A note that is put up again meanwhile is later than the latest that was seen here, and stays.
_DELETE_EXPIRED = """
    DELETE FROM crabtwist_note WHERE ctid = ANY (ARRAY (
        SELECT note.ctid FROM crabtwist_note note JOIN (
            SELECT namespace, key, posted_at FROM crabtwist_note latest
            WHERE expires_at <= now() AND {which} AND NOT EXISTS (
                SELECT FROM crabtwist_note later
                WHERE later.namespace = latest.namespace AND later.key = latest.key
                    AND (later.posted_at, later.expires_at) > (latest.posted_at, latest.expires_at))
            LIMIT {most}) board USING (namespace, key)
        WHERE note.posted_at <= board.posted_at
        ORDER BY namespace, key, member FOR UPDATE OF note))"""
#: Deletes as many boards as it is given, at most.
SWEEP = _DELETE_EXPIRED.format(which="expires_at < 'infinity'", most="%s")
_DELETE_EXPIRED_OF = _DELETE_EXPIRED.format(which="namespace = %s AND key = ANY (%b::bytea[])", most="ALL")

# Reads what was there before it writes, which is enough: what it writes is known.
_POST = """
    WITH own AS (
        INSERT INTO crabtwist_note (namespace, key, member, note, posted_at, expires_at)
        SELECT %(namespace)s, key, %(member)b, note, now(),
            coalesce(now() + make_interval(secs => %(ttl_seconds)s), 'infinity')
        FROM unnest(%(keys)b::bytea[], %(notes)b::bytea[]) AS new (key, note) ORDER BY key
        ON CONFLICT (namespace, key, member) DO UPDATE SET
            note = EXCLUDED.note, posted_at = EXCLUDED.posted_at, expires_at = EXCLUDED.expires_at)
    SELECT key, member, note FROM crabtwist_note
    WHERE namespace = %(namespace)s AND key = ANY (%(keys)b::bytea[]) AND member <> %(member)b"""
_READ = """
    SELECT key, member, note FROM (
        SELECT key, member, note, first_value(expires_at) OVER (
            PARTITION BY key ORDER BY posted_at DESC, expires_at DESC) AS ends_at
        FROM crabtwist_note WHERE namespace = %s) board
    WHERE ends_at > now()"""


def post(
    connection: Connection,
    namespace: str,
    member: bytes,
    notes: Mapping[bytes, bytes],
    ttl_seconds: float | None,
) -> Boards:
    """Put up a member's notes, and return the boards that they are on."""
    values = {
        "namespace": namespace,
        "member": member,
        "keys": list(notes),
        "notes": list(notes.values()),
        "ttl_seconds": ttl_seconds,
    }
    connection.execute(_DELETE_EXPIRED_OF.encode(), (namespace, values["keys"]))
    boards = {key: {member: note} for key, note in notes.items()}
    for key, other, note in connection.execute(_POST, values, binary=True):
        boards[key][other] = note
    return boards


def read(connection: Connection, namespace: str) -> Boards:
    """Return all boards of a namespace."""
    return boards_of(connection.execute(_READ, (namespace,), binary=True))
