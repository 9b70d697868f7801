"""The tables of the ledger's SQLite file, from version to version."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from crabtwist.errors import ConfigurationError

#: "crbl", so that nobody takes another program's file for a ledger.
APPLICATION_ID = 0x6372626C

#: In version 2 there are totals by more than before, which are made of those by everything.
_COPY = """
    INSERT INTO total
    SELECT {bits}, 1, day, {principal}, {model}, {provider},
        SUM(requests), SUM(unpriced), SUM(estimated),
        SUM(input_tokens), SUM(cache_read_tokens), SUM(cache_write_tokens), SUM(cache_write_1h_tokens),
        SUM(output_tokens), SUM(reasoning_tokens),
        SUM(cost_dollars) + SUM(cost_rest) / 1000000000000, SUM(cost_rest) % 1000000000000
    FROM total_by_day WHERE by = 'principal,model,provider'
    GROUP BY day, {principal}, {model}, {provider}"""
_GROUPINGS_2 = (
    (0, "''", "''", "''"),
    (1, "principal", "''", "''"),
    (2, "''", "model", "''"),
    (4, "''", "''", "provider"),
    (3, "principal", "model", "''"),
    (5, "principal", "''", "provider"),
    (6, "''", "model", "provider"),
    (7, "principal", "model", "provider"),
)

#: The statements that lead from each version to the next; the version is how many were taken.
#:
#: `record.body` is the record as JSON; the columns before it are copies to search by.  The pages of a
#: filter are read from its index in order; the index has the other columns too, so that rows that another
#: filter leaves out are not even looked at.
#:
#: `total` has a row for each day, principal, model and provider, and others for less: `by` names those
#: columns that a row is about ("" for the day alone), the others are empty.  A question is answered from
#: the rows that are about as little as it asks for.
#:
#: Since version 2 the rows of `total` are about spans of days, see spans.py: `days` are how many, `first` is
#: the first, and `spans.over_until` the day before which those of several days end that have sums.
#: `grouping_bits` says what a row is about: 1 a principal, 2 a model, 4 a provider, or several of them.
#:
#: SQLite's integers have 64 bits, and so many picodollars are only nine million dollars: a cost is kept
#: as whole dollars and the rest, which is less than a dollar.  They are added up outside of SQL.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """
        CREATE TABLE record (
            number INTEGER PRIMARY KEY,
            id TEXT NOT NULL UNIQUE,
            accepted_at INTEGER NOT NULL,
            principal TEXT NOT NULL,
            model TEXT NOT NULL,
            provider TEXT NOT NULL,
            reason TEXT NOT NULL,
            body TEXT NOT NULL
        ) STRICT
        """,
        "CREATE INDEX record_accepted_at ON record (accepted_at, number)",
        "CREATE INDEX record_principal ON record (principal, accepted_at, number, model, provider, reason)",
        "CREATE INDEX record_model ON record (model, accepted_at, number, principal, provider, reason)",
        "CREATE INDEX record_provider ON record (provider, accepted_at, number, principal, model, reason)",
        "CREATE INDEX record_reason ON record (reason, accepted_at, number, principal, model, provider)",
        """
        CREATE TABLE total (
            by TEXT NOT NULL,
            day INTEGER NOT NULL,
            principal TEXT NOT NULL,
            model TEXT NOT NULL,
            provider TEXT NOT NULL,
            requests INTEGER NOT NULL,
            unpriced INTEGER NOT NULL,
            estimated INTEGER NOT NULL,
            input_tokens INTEGER NOT NULL,
            cache_read_tokens INTEGER NOT NULL,
            cache_write_tokens INTEGER NOT NULL,
            cache_write_1h_tokens INTEGER NOT NULL,
            output_tokens INTEGER NOT NULL,
            reasoning_tokens INTEGER NOT NULL,
            cost_dollars INTEGER NOT NULL,
            cost_rest INTEGER NOT NULL,
            PRIMARY KEY (by, day, principal, model, provider)
        ) STRICT, WITHOUT ROWID
        """,
    ),
    (
        "ALTER TABLE total RENAME TO total_by_day",
        """
        CREATE TABLE total (
            grouping_bits INTEGER NOT NULL,
            days INTEGER NOT NULL,
            first INTEGER NOT NULL,
            principal TEXT NOT NULL,
            model TEXT NOT NULL,
            provider TEXT NOT NULL,
            requests INTEGER NOT NULL,
            unpriced INTEGER NOT NULL,
            estimated INTEGER NOT NULL,
            input_tokens INTEGER NOT NULL,
            cache_read_tokens INTEGER NOT NULL,
            cache_write_tokens INTEGER NOT NULL,
            cache_write_1h_tokens INTEGER NOT NULL,
            output_tokens INTEGER NOT NULL,
            reasoning_tokens INTEGER NOT NULL,
            cost_dollars INTEGER NOT NULL,
            cost_rest INTEGER NOT NULL,
            PRIMARY KEY (grouping_bits, days, first, principal, model, provider)
        ) STRICT, WITHOUT ROWID
        """,
        *(_COPY.format(bits=bits, principal=p, model=m, provider=v) for bits, p, m, v in _GROUPINGS_2),
        "DROP TABLE total_by_day",
        "CREATE TABLE spans (over_until INTEGER NOT NULL) STRICT",
        "INSERT INTO spans VALUES (0)",
    ),
)


def upgrade(
    database: sqlite3.Connection, name: str, migrations: Sequence[Sequence[str]] = MIGRATIONS
) -> None:
    """
    Bring a file to the newest version, each step whole or not at all.

    `name` is the file's, for words.  Raises `ConfigurationError` for a file of a newer version or of
    another program.
    """
    (version,) = database.execute("PRAGMA user_version").fetchone()
    (owner,) = database.execute("PRAGMA application_id").fetchone()
    if owner not in (0, APPLICATION_ID) or (owner == 0 and not _is_empty(database)):
        raise ConfigurationError([f"{name}: it is another program's file"])
    if version > len(migrations):
        raise ConfigurationError(
            [f"{name}: a newer crabtwist wrote it (version {version}, this one knows {len(migrations)})"]
        )
    for number, statements in enumerate(migrations[version:], version + 1):
        with database:
            database.execute("BEGIN IMMEDIATE")
            for statement in statements:
                database.execute(statement)
            database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            database.execute(f"PRAGMA user_version = {number}")


def _is_empty(database: sqlite3.Connection) -> bool:
    return database.execute("SELECT 1 FROM sqlite_master").fetchone() is None
