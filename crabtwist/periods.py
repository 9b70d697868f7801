"""
Days and months, as clocks on a wall somewhere tell them.

A period begins at its first local midnight and ends where the next one begins, so that they follow each
other without gaps whatever the clocks there are put to: a day may have 23 or 25 hours.
"""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, tzinfo
from functools import cache
from typing import Literal
from zoneinfo import ZoneInfo, available_timezones

import attrs

Per = Literal["total", "day", "month"]

_DAY = timedelta(days=1)
_DAY_SECONDS = 86400.0


@attrs.frozen
class Period:
    """
    One day or month, or all of time.

    `label` is the date or month, "" for all of time; `zone` the zone's name, "" likewise.  It begins at
    `begins_at`, included, and ends at `ends_at`, excluded, both in Unix time; None is never.
    """

    per: Per
    label: str
    zone: str
    begins_at: float | None
    ends_at: float | None

    @property
    def name(self) -> str:
        """What tells it from all others: three words with a space between them."""
        return " ".join((self.per, self.label or "-", self.zone or "-"))

    @property
    def kept_seconds(self) -> float | None:
        """How long what was counted in it is worth keeping after it was last counted, None for ever."""
        return {"total": None, "day": 3 * _DAY_SECONDS, "month": 40 * _DAY_SECONDS}[self.per]

    @property
    def until(self) -> str:
        """When it ends, as people there say it; "" for never."""
        if self.ends_at is None:
            return ""
        return f"{datetime.fromtimestamp(self.ends_at, zone_named(self.zone)):%Y-%m-%d %H:%M} {self.zone}"


EVER = Period("total", "", "", None, None)


@cache
def zone_named(name: str) -> tzinfo:
    """
    Return the time zone of a name from IANA's database, as "Europe/Berlin".

    "UTC" needs no database.  Raises ValueError, in words for whoever wrote the name.
    """
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        # A name that is none may look like anything, also like a folder or a path out of it.
        pass
    if not available_timezones():
        raise ValueError("this machine knows no time zones but UTC; install the Python package tzdata")
    raise ValueError("is not the name of a time zone; give one like Europe/Berlin, or UTC")


def period_at(per: Per, zone: str, now: float) -> Period:
    """Return the period that a moment, in Unix time, is in; raises ValueError for an unknown zone."""
    if per == "total":
        return EVER
    place = zone_named(zone)
    begins_on = _first_day(per, datetime.fromtimestamp(now, place).date())
    ends_on = _next(per, begins_on)
    if now >= _midnight(ends_on, place):
        # Clocks that were put back over midnight show the old day once more.
        begins_on, ends_on = ends_on, _next(per, ends_on)
    return Period(
        per,
        begins_on.isoformat() if per == "day" else f"{begins_on:%Y-%m}",
        zone,
        _midnight(begins_on, place),
        _midnight(ends_on, place),
    )


def _first_day(per: Per, day: date) -> date:
    return day.replace(day=1) if per == "month" else day


def _next(per: Per, day: date) -> date:
    return _first_day(per, day + (timedelta(days=31) if per == "month" else _DAY))


def _midnight(day: date, place: tzinfo) -> float:
    # A midnight that there are two of is the first; one that was left out is when it was.
    return datetime(day.year, day.month, day.day, tzinfo=place).timestamp()
