"""Words of a command line that mean something: spans, moments, days, dollars, pairs."""

from __future__ import annotations

import json
import re
from datetime import UTC, date, datetime, timedelta
from typing import Any

import click

_SPAN = re.compile(r"(\d{1,9}(?:\.\d{1,3})?)\s*([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_DOLLARS = re.compile(r"\$?(\d{1,9}(?:\.\d{1,12})?)")

Parameter = click.Parameter | None
Context = click.Context | None


class Word(click.ParamType):  # type: ignore[type-arg] # which older releases of click do not know
    """A word that means something."""


class Span(Word):
    """A span of time such as 30d, 12h or 90m, as seconds; 0 is none."""

    name = "SPAN"

    def convert(self, value: Any, param: Parameter, ctx: Context) -> float:
        """Return seconds."""
        seconds = 0.0 if value == "0" else span_seconds(str(value))
        if seconds is None:
            self.fail(f"{value!r} is no span of time like 30d, 12h, 90m or 45s", param, ctx)
        return seconds


class Moment(Word):
    """
    A moment, as RFC 3339 has it in UTC: given as that, as a day (its begin), or as a span from now.

    `sign` says whether a span counts ahead, 1, or back, -1.
    """

    name = "MOMENT"

    def __init__(self, sign: int) -> None:
        self._sign = sign

    def convert(self, value: Any, param: Parameter, ctx: Context) -> str:
        """Return its text."""
        seconds = span_seconds(str(value))
        try:
            moment = datetime.fromisoformat(value) if seconds is None else _from_now(self._sign * seconds)
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is no moment like 2027-01-31T18:00:00Z, 2027-01-31 or 30d", param, ctx)
        # What has no zone is UTC, as days are everywhere in the gateway.
        known = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
        return known.isoformat().replace("+00:00", "Z")


class Day(Word):
    """A day in UTC, given as 2026-11-30, as `today`, or as a span back from today."""

    name = "DAY"

    def convert(self, value: Any, param: Parameter, ctx: Context) -> str:
        """Return its text."""
        seconds = 0 if value == "today" else span_seconds(str(value))
        try:
            day = date.fromisoformat(value) if seconds is None else _from_now(-seconds).date()
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is no day like 2026-11-30, today or 7d", param, ctx)
        return day.isoformat()


class Dollars(Word):
    """An amount of dollars, exact to twelve decimals."""

    name = "DOLLARS"

    def convert(self, value: Any, param: Parameter, ctx: Context) -> float:
        """Return the number whose shortest text is what was given."""
        match = _DOLLARS.fullmatch(str(value))
        if match is None:
            self.fail(f"{value!r} is no amount of dollars like 1 or 0.50", param, ctx)
        number = float(match[1])
        return int(number) if number.is_integer() else number


class Pair(Word):
    """A name and what it is to be, with `=` between them; as a pair of texts."""

    name = "NAME=VALUE"

    def convert(self, value: Any, param: Parameter, ctx: Context) -> tuple[str, str]:
        """Return both."""
        if isinstance(value, tuple):
            return value
        name, separator, text = str(value).partition("=")
        if not (name and separator):
            self.fail(f"{value!r} has to be NAME=VALUE", param, ctx)
        return name, text


SPAN, AHEAD, BACK, DAY, DOLLARS, PAIR = Span(), Moment(1), Moment(-1), Day(), Dollars(), Pair()


def span_seconds(text: str) -> float | None:
    """Return the seconds of a span such as "30d", None for other text."""
    match = _SPAN.fullmatch(text)
    return None if match is None else float(match[1]) * _SECONDS[match[2]]


def _from_now(seconds: float) -> datetime:
    return datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=seconds)


def value_of(text: str) -> Any:
    """Return what a setting's text means: what JSON says where it is JSON, but for null, else itself."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return text if value is None else value


def nulls(paths: tuple[str, ...]) -> dict[str, Any]:
    """Return the merge patch that removes what is at these paths, as "limits.requests_per_minute"."""
    patch: dict[str, Any] = {}
    for path in paths:
        *tables, last = path.split(".")
        place = patch
        for table in tables:
            inner = place.get(table)
            place = inner if isinstance(inner, dict) else place.setdefault(table, {})
            if place is None:
                break
        else:
            place[last] = None
    return patch


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Return two merge patches as one; where both say something of one member, the second does."""
    result = dict(first)
    for name, value in second.items():
        old = result.get(name)
        result[name] = joined(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result
