"""
What the ledgers in SQL keep beside a record itself: columns to search by, and sums.

The running totals have a row for each span of days (see `spans`), principal, model and provider, and
others for less, so that a question is answered from the rows that are about as little as it asks for.
"""

from __future__ import annotations

import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Collection, Mapping, Sequence
from datetime import date, timedelta
from functools import lru_cache
from itertools import combinations
from operator import attrgetter
from typing import Any

import msgspec

from crabtwist.records import MICROSECONDS, Record, Tokens, Total, encode

LARGEST_PAGE = 1000
#: What a column for whole numbers holds.
LARGEST_NUMBER = 2**63 - 1

#: Indexes take no more of a text; a name that is longer is found by its beginning.
LONGEST_NAME_BYTES = 500

NAMES = ("principal", "model", "provider")
GROUPS = (*NAMES, "day")
#: What there are totals by, besides the day: any of these together.
GROUPINGS = tuple(chosen for length in range(len(NAMES) + 1) for chosen in combinations(NAMES, length))
TOKENS = (
    *("input_tokens", "cache_read_tokens", "cache_write_tokens"),
    *("cache_write_1h_tokens", "output_tokens", "reasoning_tokens"),
)
#: What is summed up, in the order of `summands`.
SUMS = ("requests", "unpriced", "estimated", *TOKENS, "cost")


_DAY = 86400 * MICROSECONDS
_EPOCH = date(1970, 1, 1)
_NO_TOKENS = Tokens()
_tokens_of = attrgetter(*TOKENS)

#: Id, time, principal, model, provider, reason and body of a record.
Columns = tuple[str, int, str, str, str, str, str]


# Into columns.


def clean(text: str) -> str:
    """Return a text without what some store refuses: NUL, and halves of surrogate pairs."""
    if text.isascii() and "\0" not in text:
        return text
    return text.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


def searchable(text: str) -> str:
    """Return what a column holds of a text, and what a filter is compared with."""
    if text.isascii() and len(text) <= LONGEST_NAME_BYTES and "\0" not in text:
        return text
    return clean(text).encode()[:LONGEST_NAME_BYTES].decode("utf-8", "ignore")


def columns_of(record: Record) -> Columns:
    """
    Return what is in the columns for a record.

    Raises ValueError for a number with more digits than Python writes.
    """
    return (
        clean(record.id),
        record.accepted_at,
        searchable(record.principal or ""),
        searchable(record.model),
        searchable(record.provider),
        searchable(record.reason),
        _body(record),
    )


def _body(record: Record) -> str:
    try:
        return encode(record).decode()
    except UnicodeEncodeError:
        text = json.dumps(msgspec.to_builtins(record), ensure_ascii=False)
        return text.encode("utf-8", "replace").decode()


def day_of(record: Record) -> int:
    """Return the day, counted from 1970, of the totals that a record counts in."""
    return record.accepted_at // _DAY


def total_of(record: Record, columns: Columns) -> tuple[int, str, str, str]:
    """Return day, principal, model and provider of the totals that a record with these columns counts in."""
    _, _, principal, model, provider, _, _ = columns
    # A request that reached nobody may name a model that there is not: rows would grow without end.
    return day_of(record), principal, model if provider or record.cache_hit else "", provider


def summands(record: Record) -> list[int]:
    """Return what a record adds to each of `SUMS`."""
    usage = record.usage or _NO_TOKENS
    return [
        1,
        int(record.cost is None),
        int(record.estimated),
        *_tokens_of(usage),
        record.cost or 0,
    ]


# Out of them.


def asked_for(by: Collection[str]) -> tuple[list[str], tuple[str, ...]]:
    """
    Return the columns that totals are wanted by, sorted, and the grouping to take them from.

    Raises ValueError for words that there are no totals by.
    """
    if not set(by) <= set(GROUPS):
        raise ValueError(f"totals are by {', '.join(GROUPS)}, not by {', '.join(by)}")
    return [group for group in GROUPS if group in by], tuple(name for name in NAMES if name in by)


def day_numbers(since: date | None, until: date | None) -> tuple[int, int]:
    """Return the bounds of days as they are kept: from 1970 on."""
    first, end = ((day - _EPOCH).days for day in (since or date.min, until or date.max))
    return first, end


def total_from(row: Sequence[Any]) -> Total:
    """Return the total of a row: each of `GROUPS`, None where not asked for, and `SUMS`."""
    principal, model, provider, day, *sums = row
    return Total(principal, model, provider, None if day is None else _day(day), *sums)


@lru_cache(maxsize=1000)
def _day(number: int) -> date:
    return _EPOCH + timedelta(days=number)


def by_rarity(wanted: Mapping[str, str | None]) -> Sequence[str]:
    """Return the columns of the filters that are set, first the one that probably leaves least."""
    columns = (*NAMES, "reason") if wanted["reason"] == "complete" else ("reason", *NAMES)
    return [column for column in columns if wanted[column] is not None]


def cursor_of(accepted_at: int, number: int) -> str:
    """Return the cursor of what comes after a row."""
    return urlsafe_b64encode(f"{accepted_at}.{number}".encode()).decode().rstrip("=")


def read_cursor(cursor: str) -> tuple[int, int]:
    """Return the row that a cursor names.  Raises ValueError for what is no cursor."""
    try:
        text = urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode()
        accepted_at, number = map(int, text.split("."))
    except ValueError:
        accepted_at = number = LARGEST_NUMBER + 1
    if max(abs(accepted_at), abs(number)) > LARGEST_NUMBER:
        raise ValueError("`before` is not one that a page had")
    return accepted_at, number


def end_of(until: int | None, before: str | None) -> tuple[int, int] | None:
    """
    Return the row that a page's rows come before, None if there is none.

    One bound, and not two: an index is begun at one of them, and maybe not at the right one.  Raises
    ValueError for a cursor that is none.
    """
    ends = [] if until is None else [(until, -LARGEST_NUMBER)]
    if before is not None:
        ends.append(read_cursor(before))
    return min(ends, default=None)
