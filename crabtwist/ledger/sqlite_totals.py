"""The running totals in a ledger's SQLite file; everything here blocks, and is part of a transaction."""

# ruff: noqa: S608 - statements are put together from words of this file; what comes from outside is bound

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from datetime import date
from operator import add as plus
from typing import Any

from crabtwist.ledger.columns import GROUPINGS, GROUPS, NAMES, SUMS, asked_for, day_numbers, total_from
from crabtwist.ledger.spans import LENGTHS, covering, newly_over, spans_of
from crabtwist.money import DOLLAR
from crabtwist.records import Total

#: Sums of a row end here, so that no sum over them can overflow: a quadrillion.
LARGEST_SUM = 10**15

#: Day, principal, model, provider.
Key = tuple[int, str, str, str]

#: A sum as it is kept: a cost may be more than fits into an integer of SQLite's.
_KEPT = (*SUMS[:-1], "cost_dollars", "cost_rest")
_COUNTS = _KEPT[:-2]
_ADDED = ", ".join(
    [
        *(f"{name} = min({name} + excluded.{name}, {LARGEST_SUM})" for name in _COUNTS),
        f"""cost_dollars = min({LARGEST_SUM},
            cost_dollars + excluded.cost_dollars + (cost_rest + excluded.cost_rest) / {DOLLAR})""",
        f"cost_rest = (cost_rest + excluded.cost_rest) % {DOLLAR}",
    ]
)
_ADD = f"INSERT INTO total VALUES ({', '.join('?' * (6 + len(_KEPT)))}) ON CONFLICT DO UPDATE SET {_ADDED}"

_FOLDED = ", ".join(
    [
        *(f"min(SUM({name}), {LARGEST_SUM})" for name in _COUNTS),
        f"min(SUM(cost_dollars) + SUM(cost_rest) / {DOLLAR}, {LARGEST_SUM})",
        f"SUM(cost_rest) % {DOLLAR}",
    ]
)
_FOLD = f"""
    INSERT INTO total
    SELECT grouping_bits, :length, first - first % :length, {", ".join(NAMES)}, {_FOLDED} FROM total
    WHERE grouping_bits = :bits AND days = :length / 2 AND first >= :first AND first < :end
    GROUP BY first - first % :length, {", ".join(NAMES)}"""

_BITS = {grouping: sum(1 << NAMES.index(name) for name in grouping) for grouping in GROUPINGS}


def add(database: sqlite3.Connection, sums: Mapping[Key, Sequence[int]]) -> None:
    """Add sums of days, principals, models and providers."""
    if not sums:
        return
    over_until = _over_until(database)
    spans = {day: spans_of(day, over_until) for day in {key[0] for key in sums}}
    rows = [
        (bits, *span, *names, *_kept(more))
        for bits, grouped in _grouped(sums).items()
        for (day, *names), more in grouped.items()
        for span in spans[day]
    ]
    database.executemany(_ADD, rows)
    fold(database)


def fold(database: sqlite3.Connection) -> None:
    """Make the sums of the spans that are over: that end with the newest day or before."""
    before = _over_until(database)
    newest = "SELECT MAX(first) FROM total WHERE grouping_bits = 0 AND days = 1"
    (now,) = database.execute(newest).fetchone()
    if now is None or now <= before:
        return
    for length in LENGTHS[1:]:
        first, end = newly_over(length, before, now)
        bounds = {"length": length, "first": first, "end": end}
        if first < end:
            database.executemany(_FOLD, [{**bounds, "bits": bits} for bits in _BITS.values()])
    database.execute("UPDATE spans SET over_until = ?", (now,))


def totals(
    database: sqlite3.Connection, by: Collection[str], since: date | None, until: date | None
) -> list[Total]:
    """Return totals, sorted by what they are by."""
    groups, grouping = asked_for(by)
    # Sums of single days for what is by day.
    over_until = 0 if "day" in by else _over_until(database)
    runs = covering(*day_numbers(since, until), over_until)
    values = ", ".join(["(?, ?, ?)"] * len(runs)) or "(NULL, NULL, NULL)"
    columns = [{"day": "total.first"}.get(name, name) if name in groups else "NULL" for name in GROUPS]
    query = f"""
        WITH run (length, first, until) AS (VALUES {values})
        SELECT {", ".join(columns)}, {", ".join(f"SUM({name})" for name in _KEPT)}
        FROM run CROSS JOIN total
        WHERE grouping_bits = ? AND days = length AND total.first >= run.first AND total.first < until"""
    if groups:
        order = ", ".join({"day": "total.first"}.get(name, name) for name in groups)
        query += f" GROUP BY {order} ORDER BY {order}"
    bound = [number for run in runs for number in run]
    with closing(database.execute(query, (*bound, _BITS[grouping]))) as rows:
        return [_total(row) for row in rows if row[len(GROUPS)]]


def _over_until(database: sqlite3.Connection) -> int:
    (day,) = database.execute("SELECT over_until FROM spans").fetchone()
    return int(day)


def _grouped(sums: Mapping[Key, Sequence[int]]) -> dict[int, dict[Key, Sequence[int]]]:
    """Return the sums by each grouping, by its bits."""
    # About in the order of the table: rows on one page follow each other.
    found = {_BITS[NAMES]: dict(sorted(sums.items()))}
    for bits in reversed(range(_BITS[NAMES])):
        # Made of those that are by one name more, and of these probably the fewest.
        more = max(name for name in range(len(NAMES)) if not bits >> name & 1)
        found[bits] = _without(found[bits | 1 << more], 1 + more)
    return found


def _without(sums: Mapping[Key, Sequence[int]], place: int) -> dict[Key, Sequence[int]]:
    found: dict[Key, Sequence[int]] = {}
    for key, more in sums.items():
        less: Any = (*key[:place], "", *key[place + 1 :])
        found[less] = [*map(plus, found[less], more)] if less in found else more
    return found


def _kept(sums: Sequence[int]) -> list[int]:
    *counts, cost = sums
    kept = [*counts, *divmod(cost, DOLLAR)]
    return kept if max(kept) <= LARGEST_SUM else [min(number, LARGEST_SUM) for number in kept]


def _total(row: Sequence[Any]) -> Total:
    *others, dollars, rest = row
    return total_from([*others, dollars * DOLLAR + rest])
