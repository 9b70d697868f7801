"""
Amounts of several things over the last minute, told the time.

A minute here is any sixty seconds, not one by the clock: what was used within the last sixty seconds is
never forgotten early, so nobody gets two minutes' worth around a minute's edge.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from heapq import merge
from math import ceil
from operator import add, sub

MINUTE_SECONDS = 60

#: The cells that are told to other nodes are this wide.
COARSE_SECONDS = 5


class SlidingMinute:
    """
    What was used in the last minute, in cells of a second.

    Of `columns` things, which are used together: amounts are sequences of so many numbers.  A cell is
    forgotten when its youngest amount is a minute old, so an amount counts for sixty seconds, and for one
    more at the most.  `now` is in seconds; where it falls, what was used before counts from then on.
    `amounts` are seconds, columns and amounts, in any order, to begin with.
    """

    __slots__ = ("_looked_at", "cells", "used")

    def __init__(self, columns: int, amounts: Iterable[tuple[int, int, int]] = ()) -> None:
        cells: dict[int, list[int]] = {}
        self.used = [0] * columns
        for second, column, amount in amounts:
            cells.setdefault(second, [second] + [0] * columns)[1 + column] += amount
            self.used[column] += amount
        #: Each is a second, and what was used in it of each thing.
        self.cells: deque[list[int]] = deque(cells[second] for second in sorted(cells))
        self._looked_at: float | None = None

    def at(self, now: float) -> Sequence[int]:
        """Forget what is old; return what is used, of each thing."""
        # One request asks many times at the same moment.
        if now != self._looked_at:
            self._looked_at = now
            self._forget(now)
        return self.used

    def _forget(self, now: float) -> None:
        cells = self.cells
        if cells and cells[-1][0] > now + COARSE_SECONDS:
            # The clock was put back: what lies ahead would be remembered until then.
            for cell in cells:
                cell[0] = min(cell[0], int(now))
        while cells and cells[0][0] <= now - MINUTE_SECONDS - 1:
            self.used = list(map(sub, self.used, cells.popleft()[1:]))

    def add(self, now: float, amounts: Sequence[int]) -> int:
        """Use amounts; returns the cell that they are in, for `correct`."""
        if now != self._looked_at:
            self.at(now)
        self.used = list(map(add, self.used, amounts))
        cells, second = self.cells, int(now)
        if cells and cells[-1][0] >= second:
            latest = cells[-1]
            latest[1:] = map(add, latest[1:], amounts)
            return latest[0]
        cells.append([second, *amounts])
        return second

    def correct(self, cell: int, changes: Sequence[int]) -> bool:
        """Change what was used before; nothing of what is forgotten.  Returns whether that was done."""
        # Most are corrected soon after they were used.
        for each in reversed(self.cells):
            if each[0] == cell:
                each[1:] = map(add, each[1:], changes)
                self.used = list(map(add, self.used, changes))
                return True
        return False

    def coarse(self, now: float, column: int) -> list[tuple[int, int]]:
        """Return what is used in wider cells, whoever makes a window of which forgets later, not earlier."""
        self.at(now)
        amounts: dict[int, int] = {}
        for second, amount in self._of(column):
            if amount:
                last = second + -second % COARSE_SECONDS
                amounts[last] = amounts.get(last, 0) + amount
        return list(amounts.items())

    def clear_at(self, now: float) -> list[int]:
        """Return when all that is used of each will be forgotten, in whole seconds; `now` for nothing."""
        if all(self.at(now)) and all(latest := self.cells[-1]):
            # Most have just used some of everything.
            return [latest[0] + MINUTE_SECONDS + 1] * len(self.used)
        clear_at = [ceil(now)] * len(self.used)
        for second, *amounts in self.cells:
            for column, amount in enumerate(amounts):
                if amount:
                    clear_at[column] = second + MINUTE_SECONDS + 1
        return clear_at

    def wait_seconds(self, now: float, column: int, room: int, others: SlidingMinute | None = None) -> int:
        """Return in how many whole seconds no more than `room` is used, here and there; 0 for now."""
        used = self.at(now)[column]
        if others is not None:
            used += others.at(now)[column]
        if used <= room:
            return 0
        cells = self._of(column)
        if others is not None and others.cells:
            cells = merge(cells, others._of(column), reverse=True)  # noqa: SLF001 - one of its own
        # The youngest may stay as long as there is room for them; the first that has none has to go.
        second = 0
        for second, amount in cells:  # noqa: B007 - where it breaks off is what is looked for
            room -= amount
            if room < 0:
                break
        return max(1, ceil(second + MINUTE_SECONDS + 1 - now))

    def _of(self, column: int) -> Iterator[tuple[int, int]]:
        """Return the seconds and the amounts of one thing, the youngest first."""
        return ((cell[0], cell[1 + column]) for cell in reversed(self.cells))
