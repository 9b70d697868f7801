"""
The tables of the ledger in PostgreSQL, and what is asked of them; everything here blocks.

Each statement is a transaction of its own, so that a node that is stopped between two of them keeps
nothing locked.
"""

# ruff: noqa: S608 - statements are put together from words of this file; what comes from outside is bound

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import date
from typing import Any

import msgspec
import psycopg
from psycopg.errors import ProgramLimitExceeded

from crabtwist.errors import RecordRefused, StorageError
from crabtwist.ledger.columns import (
    GROUPINGS,
    GROUPS,
    NAMES,
    SUMS,
    asked_for,
    by_rarity,
    clean,
    columns_of,
    cursor_of,
    day_numbers,
    day_of,
    end_of,
    searchable,
    summands,
    total_from,
    total_of,
)
from crabtwist.ledger.spans import LENGTHS, covering
from crabtwist.records import Page, Record, Total, decode_record

Connection = psycopg.Connection[tuple[Any, ...]]

_TEXT = 'text COLLATE "C" NOT NULL'

_COPY = f"""
    INSERT INTO crabtwist_total (grouping_by, days, first, principal, model, provider, {", ".join(SUMS)})
    SELECT '{{}}', 1, first, {{}}, {{}}, {{}}, {", ".join(f"sum({name})" for name in SUMS)}
    FROM crabtwist_total WHERE grouping_by = 'principal,model,provider' GROUP BY 1, 2, 3, 4, 5, 6"""
_PAIRS = (
    ("principal,model", "principal", "model", "''"),
    ("principal,provider", "principal", "''", "provider"),
    ("model,provider", "''", "model", "provider"),
)

#: Never change one that was released: append the next.
STEPS: Sequence[Sequence[str]] = (
    (
        "CREATE SEQUENCE crabtwist_record_number",
        f"""CREATE TABLE crabtwist_record (
            number bigint PRIMARY KEY, id {_TEXT} UNIQUE, accepted_at bigint NOT NULL,
            principal {_TEXT}, model {_TEXT}, provider {_TEXT}, reason {_TEXT}, body text NOT NULL)""",
        "CREATE INDEX ON crabtwist_record (accepted_at, number)",
        "CREATE INDEX ON crabtwist_record (principal, accepted_at, number)",
        "CREATE INDEX ON crabtwist_record (model, accepted_at, number)",
        "CREATE INDEX ON crabtwist_record (provider, accepted_at, number)",
        "CREATE INDEX ON crabtwist_record (reason, accepted_at, number)",
        # As in the ledger in SQLite; `grouping_by` names the columns that a row is about.
        f"""CREATE TABLE crabtwist_total (
            grouping_by {_TEXT}, day integer NOT NULL, principal {_TEXT}, model {_TEXT}, provider {_TEXT},
            {", ".join(f"{name} numeric NOT NULL" for name in SUMS)},
            PRIMARY KEY (grouping_by, day, principal, model, provider))""",
    ),
    (
        # A row is about a span of days from now on, see `spans`, and there are totals by more.
        "ALTER TABLE crabtwist_total RENAME COLUMN day TO first",
        "ALTER TABLE crabtwist_total ADD COLUMN days integer NOT NULL DEFAULT 1",
        "ALTER TABLE crabtwist_total ALTER COLUMN days DROP DEFAULT",
        "ALTER TABLE crabtwist_total DROP CONSTRAINT crabtwist_total_pkey",
        *(_COPY.format(*each) for each in _PAIRS),
        """ALTER TABLE crabtwist_total
            ADD PRIMARY KEY (grouping_by, days, first, principal, model, provider)""",
        # The day before which those spans of several days end that have sums.
        "CREATE TABLE crabtwist_spans (over_until integer NOT NULL)",
        "INSERT INTO crabtwist_spans VALUES (0)",
    ),
)

_COLUMNS = ("id", "accepted_at", "principal", "model", "provider", "reason", "body")
_TOTAL_COLUMNS = ("total_day", "total_principal", "total_model", "total_provider")
_GIVEN = (*_COLUMNS, *_TOTAL_COLUMNS, *SUMS)
_NUMBERS = {"accepted_at": "bigint", "total_day": "integer", **dict.fromkeys(SUMS, "numeric")}
_GIVEN_TYPES = ", ".join(f"{name} {_NUMBERS.get(name, 'text')}" for name in _GIVEN)
#: A row for each grouping: its name, and whether it is by each of `NAMES`.
_ROWS = ", ".join(
    f"('{','.join(each)}', {', '.join(str(name in each) for name in NAMES)})" for each in GROUPINGS
)

#: Two nodes that append at the same time meet in the same order, first on records and then on totals, so
#: that none waits for one that waits for it.  Only records that were new are summed up.  While `state` is
#: locked nobody makes sums of further spans: they would lack what is being added.
_APPEND = f"""
    WITH given AS MATERIALIZED (
        SELECT nextval('crabtwist_record_number') AS number, row.*
        FROM json_to_recordset(%s) AS row ({_GIVEN_TYPES})
    ), new AS (
        INSERT INTO crabtwist_record (number, {", ".join(_COLUMNS)})
        SELECT number, {", ".join(_COLUMNS)} FROM given ORDER BY id, number
        ON CONFLICT (id) DO NOTHING
        RETURNING number
    ), state AS MATERIALIZED (
        SELECT over_until FROM crabtwist_spans FOR SHARE
    ), added AS (
        INSERT INTO crabtwist_total AS old
            (grouping_by, days, first, {", ".join(NAMES)}, {", ".join(SUMS)})
        SELECT grouping_by, length, total_day / length * length,
            {", ".join(f"CASE WHEN by_{name} THEN total_{name} ELSE '' END" for name in NAMES)},
            {", ".join(f"sum({name})" for name in SUMS)}
        FROM new JOIN given USING (number)
            CROSS JOIN (VALUES {_ROWS}) AS asked (grouping_by, {", ".join(f"by_{name}" for name in NAMES)})
            JOIN unnest(ARRAY{[*LENGTHS]}) AS length ON length = 1 OR
                (total_day >= 0 AND (total_day / length + 1) * length <= (SELECT over_until FROM state))
        GROUP BY 1, 2, 3, 4, 5, 6 ORDER BY 1, 2, 3, 4, 5, 6
        ON CONFLICT (grouping_by, days, first, {", ".join(NAMES)}) DO UPDATE SET
            {", ".join(f"{name} = old.{name} + EXCLUDED.{name}" for name in SUMS)}
    )
    SELECT (SELECT count(*) FROM new), (SELECT over_until FROM state)"""

#: Makes the sums of the spans that are over, unless somebody is just appending, or doing the same.  What
#: others had appended before the lock was there is seen only by the statements after it.
_FOLD = f"""
    DO $$
    DECLARE
        before integer;
        now_over integer;
        length integer;
    BEGIN
        PERFORM set_config('jit', 'off', true);
        SELECT over_until INTO before FROM crabtwist_spans FOR UPDATE SKIP LOCKED;
        SELECT max(first) INTO now_over FROM crabtwist_total WHERE grouping_by = '' AND days = 1;
        IF now_over > before THEN
            FOREACH length IN ARRAY ARRAY{[*LENGTHS[1:]]} LOOP
                INSERT INTO crabtwist_total
                    (grouping_by, days, first, {", ".join(NAMES)}, {", ".join(SUMS)})
                SELECT grouping_by, length, first / length * length, {", ".join(NAMES)},
                    {", ".join(f"sum({name})" for name in SUMS)}
                FROM crabtwist_total
                WHERE grouping_by IN ({", ".join(f"'{','.join(each)}'" for each in GROUPINGS)})
                    AND days = length / 2
                    AND first >= before / length * length AND first < now_over / length * length
                GROUP BY 1, 2, 3, 4, 5, 6;
            END LOOP;
            UPDATE crabtwist_spans SET over_until = now_over;
        END IF;
    END $$"""

#: To compile a statement takes longer than to carry it out.
_OVER_UNTIL = "SELECT over_until, set_config('jit', 'off', false) FROM crabtwist_spans"

_GET = "SELECT body FROM crabtwist_record WHERE id = %s"

#: The newest record of those that are too many.
_NEWEST_EXCESS = """
    SELECT accepted_at, number FROM crabtwist_record
    ORDER BY accepted_at DESC, number DESC OFFSET %s LIMIT 1"""
#: Rows that another node is about to forget are passed over.
_FORGET = """
    DELETE FROM crabtwist_record WHERE number = ANY (ARRAY (
        SELECT number FROM crabtwist_record WHERE (accepted_at, number) <= (%s, %s)
        ORDER BY accepted_at, number LIMIT %s FOR UPDATE SKIP LOCKED))"""

#: What PostgreSQL says when a record cannot be stored, now or later; the last is a key that is too long.
_REFUSALS = (psycopg.DataError, ProgramLimitExceeded)


def check(connection: Connection, where: str) -> None:
    """Check that the database can hold any text.  Raises `StorageError`."""
    ((encoding,),) = connection.execute("SHOW server_encoding").fetchall()
    if encoding != "UTF8":
        raise StorageError(f"{where}: the database's encoding is {encoding}, and has to be UTF8")


def append(connection: Connection, records: Sequence[Record]) -> int:
    """Add records and their sums, all or none, and return how many were new."""
    # What a server may have switched off, to be faster: the journal forgets what is confirmed here.
    connection.execute(
        "SELECT set_config('synchronous_commit', 'on', false) "
        "WHERE current_setting('synchronous_commit') = 'off'"
    )
    try:
        given = msgspec.json.encode([_given(record) for record in records]).decode()
        ((new, over_until),) = connection.execute(_APPEND.encode(), (given,)).fetchall()
    except _REFUSALS as error:
        raise RecordRefused(f"PostgreSQL cannot hold it: {error.diag.message_primary}") from error
    except ValueError as error:
        raise RecordRefused(f"PostgreSQL cannot hold it: {error}") from error
    if any(day_of(record) > over_until for record in records):
        fold(connection)
    return int(new)


def fold(connection: Connection) -> None:
    """Make the sums of the spans that are over: that end with the newest day or before."""
    connection.execute(_FOLD.encode())


def _given(record: Record) -> dict[str, str | int]:
    columns = columns_of(record)
    values: tuple[str | int, ...] = (*columns, *total_of(record, columns), *summands(record))
    return dict(zip(_GIVEN, values, strict=True))


def get(connection: Connection, request_id: str) -> Record | None:
    """Return the record of a request."""
    row = connection.execute(_GET, (clean(request_id),)).fetchone()
    return None if row is None else decode_record(row[0])


def page(
    connection: Connection,
    wanted: Mapping[str, str | None],
    bounds: tuple[int | None, int | None],
    before: str | None,
    limit: int,
) -> Page:
    """Return records that fit, newest first."""
    since, _ = bounds
    conditions: list[tuple[str, tuple[Any, ...]]] = [
        (f"{column} = %s", (searchable(wanted[column] or ""),)) for column in by_rarity(wanted)
    ]
    conditions += [("accepted_at >= %s", (since,))] * (since is not None)
    if (end := end_of(bounds[1], before)) is not None:
        conditions.append(("(accepted_at, number) < (%s, %s)", end))
    where = "WHERE " * bool(conditions) + " AND ".join(clause for clause, _ in conditions)
    query = f"""SELECT accepted_at, number, body FROM crabtwist_record {where}
        ORDER BY accepted_at DESC, number DESC LIMIT %s"""
    values = [value for _, values in conditions for value in values]
    rows = connection.execute(query.encode(), (*values, limit + 1)).fetchall()
    records = tuple(decode_record(body) for _, _, body in rows[:limit])
    return Page(records, cursor_of(*rows[limit - 1][:2]) if len(rows) > limit else None)


def totals(
    connection: Connection, by: Collection[str], since: date | None, until: date | None
) -> list[Total]:
    """Return totals, sorted by what they are by."""
    groups, grouping = asked_for(by)
    ((over_until, _),) = connection.execute(_OVER_UNTIL).fetchall()
    # Sums of single days for what is by day.
    runs = covering(*day_numbers(since, until), 0 if "day" in by else over_until)
    if not runs:
        return []
    columns = [{"day": "first"}.get(name, name) if name in groups else "NULL" for name in GROUPS]
    query = f"""SELECT {", ".join([*columns, *(f"sum({name})::text" for name in SUMS)])}
        FROM (VALUES {", ".join(["(%s, %s, %s)"] * len(runs))}) AS run (length, since, until)
            JOIN crabtwist_total ON days = run.length AND first >= run.since AND first < run.until
        WHERE grouping_by = %s"""
    if groups:
        order = ", ".join({"day": "first"}.get(name, name) for name in groups)
        query += f" GROUP BY {order} ORDER BY {order}"
    bound = [number for run in runs for number in run]
    rows = connection.execute(query.encode(), (*bound, ",".join(grouping))).fetchall()
    return [_total(row) for row in rows if row[len(GROUPS)]]


def _total(row: Sequence[Any]) -> Total:
    sums = map(int, row[len(GROUPS) :])
    return total_from([*row[: len(GROUPS)], *sums])


def newest_excess(connection: Connection, max_records: int) -> list[tuple[Any, ...]]:
    """Return time and number of the newest record beyond so many; nothing if there are no more."""
    return connection.execute(_NEWEST_EXCESS, (max(max_records, 0),)).fetchall()


def forget(connection: Connection, newest: Sequence[int], most: int) -> int:
    """Forget the oldest records, up to and with one, and return how many: at most so many."""
    return connection.execute(_FORGET, (*newest, most)).rowcount
