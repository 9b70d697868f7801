"""
The rows of the `usage` extension: sums of one day, key, model and provider, and how they are written down.

A row's board is named by a JSON array of these four; a note on it is a JSON object of what one process has
counted, without the zeros.  Members that this version does not know are passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from operator import add as plus
from operator import attrgetter

import attrs
import msgspec

from crabtwist.records import Total
from crabtwist.values import Context, Outcome, Usage

#: What there are totals by.
GROUPS = ("principal", "model", "provider", "day")
#: What is summed up.
SUMS = tuple(field.name for field in attrs.fields(Total) if field.name not in GROUPS)

#: Stands for the names of rows that there was no room for.
OTHER = "(other)"

#: Principal, model, provider.
Who = tuple[str, str, str]
Days = dict[date, dict[Who, list[int]]]

_NO_USAGE = Usage()
_tokens_of = attrgetter(*(name for name in SUMS if name.endswith("_tokens")))
_PLACES = msgspec.json.Decoder(tuple[date, str, str, str])
_NOTES = msgspec.json.Decoder(dict[str, int])


def who_of(context: Context, outcome: Outcome) -> Who:
    """Return whose row a request belongs to."""
    # A request that reached nobody may name a model that there is not: rows would grow without end.
    model = context.model if context.provider or outcome.cache_hit else ""
    return context.principal or "", model, context.provider


def without_names(who: Who) -> Who:
    """Return the row for those without rows of their own; providers are few, and stay."""
    return OTHER, OTHER, who[2]


def sums_of(outcome: Outcome) -> list[int]:
    """Return what one request adds, in the order of `SUMS`: tokens stand between estimates and cost."""
    cost = outcome.cost
    return [1, int(cost is None), 0, *_tokens_of(outcome.usage or _NO_USAGE), cost or 0]


def add(sums: list[int], more: Sequence[int]) -> None:
    """Add to sums, in place."""
    sums[:] = map(plus, sums, more)


def added(many: Iterable[Sequence[int]]) -> list[int]:
    """Return the sum of sums."""
    total = [0] * len(SUMS)
    for each in many:
        add(total, each)
    return total


def write_place(day: date, who: Who) -> bytes:
    """Return the name of a row's board."""
    return msgspec.json.encode((day, *who))


def read_place(key: bytes) -> tuple[date, Who] | None:
    """Return whose board this is, None if it is no row's."""
    try:
        day, *who = _PLACES.decode(key)
    except ValueError:
        return None
    return day, (who[0], who[1], who[2])


def write_note(sums: Sequence[int]) -> bytes:
    """Return sums as a note."""
    return msgspec.json.encode({name: number for name, number in zip(SUMS, sums, strict=True) if number})


def read_note(note: bytes) -> list[int]:
    """Return the sums in a note.  Raises ValueError if it is none."""
    said = _NOTES.decode(note)
    return [said.get(name, 0) for name in SUMS]


def fold_oldest(days: Days, before: date, max_rows: int) -> bool:
    """
    Fold the oldest days, until there are at most so many rows or all days `before` one are folded.

    Of a folded day the sums of each provider stay.  Returns whether anything was folded.
    """
    number, has_folded = sum(map(len, days.values())), False
    for day in sorted(each for each in days if each < before):
        if number <= max_rows:
            break
        folded: dict[Who, list[int]] = {}
        for who, sums in days[day].items():
            add(folded.setdefault(without_names(who), [0] * len(SUMS)), sums)
        has_folded = has_folded or len(folded) < len(days[day])
        number += len(folded) - len(days[day])
        days[day] = folded
    return has_folded


class Row:
    """
    What this process has counted in a row: a share of `crabtwist.leases.Leases`.

    `told` is called with it and the notes of the others whenever these have come.  `is_joined` is for
    whoever lets it join.
    """

    def __init__(
        self,
        day: date,
        who: Who,
        ttl_seconds: float,
        told: Callable[[Row, Mapping[bytes, bytes]], None],
    ) -> None:
        self.day = day
        self.who = who
        self.key = write_place(day, who)
        self.ttl_seconds: float | None = ttl_seconds
        self.sums = [0] * len(SUMS)
        self.is_joined = False
        self._told = told
        self._said: list[int] | None = None
        self._said_before: list[int] | None = None

    def begin(self) -> None:
        """Make ready to join, also again: what is heard counts only after something was said."""
        self.is_joined, self._said, self._said_before = True, None, None

    def note(self) -> bytes:
        """Say all that was counted."""
        self._said = list(self.sums)
        return write_note(self._said)

    def hear(self, others: Mapping[bytes, bytes]) -> None:
        """Take the notes of the others."""
        if self._said is not None:
            self._told(self, others)
            self._said_before = self._said

    @property
    def is_settled(self) -> bool:
        """
        Whether the same was said twice in a row, and is all that there is.

        Once is not enough: an older note that was thought lost may have come in after it.
        """
        return self._said is not None and self._said_before == self._said == self.sums
