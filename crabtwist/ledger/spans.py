"""
Spans of days that there are sums of, so that a question about many days adds up few rows.

A span has as many days as one of `LENGTHS`, and begins at a multiple of that, counted from 1970.  Sums of
single days are kept as records come.  Those of longer spans are made when their days are over, of the two
halves; whatever comes later for these days is added to every span that they are in.
"""

from __future__ import annotations

from collections.abc import Sequence

LENGTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

#: Length, first day, and the day after the last: spans of one length that follow each other.
Run = tuple[int, int, int]


def spans_of(day: int, over_until: int) -> list[tuple[int, int]]:
    """
    Return length and first day of all spans that have sums, and a day in them.

    Those of several days have sums if they are over: end at `over_until` or before, and not before 1970.
    """
    spans = [(length, day // length * length) for length in LENGTHS]
    return [
        (length, first)
        for length, first in spans
        if length == 1 or (first >= 0 and first + length <= over_until)
    ]


def covering(first: int, end: int, over_until: int) -> Sequence[Run]:
    """Return the fewest spans that have sums and make up the days from `first` to before `end`."""
    runs: list[Run] = []
    for length in LENGTHS:
        longer = 2 * length
        inner_first = max(-(-first // longer) * longer, 0)
        inner_end = min(end, over_until) // longer * longer
        if length == LENGTHS[-1] or inner_first >= inner_end:
            runs.append((length, first, end))
            break
        runs += [(length, first, inner_first), (length, inner_end, end)]
        first, end = inner_first, inner_end
    return [(length, first, end) for length, first, end in runs if first < end]


def newly_over(length: int, before: int, now: int) -> tuple[int, int]:
    """Return from where to where spans of a length are over `now` that were not when `before` was that."""
    return before // length * length, now // length * length
