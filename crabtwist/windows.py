"""
Amounts over the last minute, told the time.

A minute here is any sixty seconds, not one by the clock: what was used within the last sixty seconds is
never forgotten early, so nobody gets two minutes' worth around a minute's edge.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from heapq import merge
from math import ceil

MINUTE_SECONDS = 60

#: The cells that are told to other nodes are this wide.
COARSE_SECONDS = 5


class SlidingMinute:
    """
    What was used in the last minute, in cells of a second.

    A cell is forgotten when its youngest amount is a minute old, so an amount counts for sixty seconds, and
    for one more at the most.  `now` is in seconds; where it falls, what was used before counts from then on.
    `cells` are seconds and amounts, in any order, to begin with.
    """

    __slots__ = ("_looked_at", "cells", "used")

    def __init__(self, cells: Iterable[tuple[int, int]] = ()) -> None:
        amounts: dict[int, int] = {}
        for second, amount in cells:
            amounts[second] = amounts.get(second, 0) + amount
        self.used = sum(amounts.values())
        self.cells: deque[list[int]] = deque([second, amounts[second]] for second in sorted(amounts))
        self._looked_at: float | None = None

    def at(self, now: float) -> int:
        """Forget what is old; return what is used."""
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
            self.used -= cells.popleft()[1]

    def add(self, now: float, amount: int) -> int:
        """Use an amount; returns the cell that it is in, for `correct`."""
        if now != self._looked_at:
            self.at(now)
        self.used += amount
        second = int(now)
        if self.cells:
            latest = self.cells[-1]
            if latest[0] >= second:
                latest[1] += amount
                return latest[0]
        self.cells.append([second, amount])
        return second

    def correct(self, cell: int, change: int) -> int:
        """Change an amount that was used before; of what is forgotten, nothing.  Returns the change made."""
        # Most are corrected soon after they were used.
        for each in reversed(self.cells):
            if each[0] == cell:
                each[1] += change
                self.used += change
                return change
        return 0

    def coarse(self, now: float) -> list[tuple[int, int]]:
        """Return what is used in wider cells, whoever makes a window of which forgets later, not earlier."""
        self.at(now)
        amounts: dict[int, int] = {}
        for second, amount in self.cells:
            if amount:
                last = second + -second % COARSE_SECONDS
                amounts[last] = amounts.get(last, 0) + amount
        return list(amounts.items())

    def used_until(self, now: float) -> tuple[int, int]:
        """Return what is used, and when all of it will be forgotten, in whole seconds; `now` for nothing."""
        if now != self._looked_at:
            self.at(now)
        used = self.used
        return used, self.cells[-1][0] + MINUTE_SECONDS + 1 if used else ceil(now)

    def wait_seconds(self, now: float, room: int, others: SlidingMinute | None = None) -> int:
        """Return in how many whole seconds no more than `room` is used, here and there; 0 for now."""
        used = self.at(now)
        if others is not None:
            used += others.at(now)
        if used <= room:
            return 0
        cells: Iterable[list[int]] = reversed(self.cells)
        if others is not None and others.cells:
            cells = merge(cells, reversed(others.cells), reverse=True)
        # The youngest may stay as long as there is room for them; the first that has none has to go.
        second = 0
        for second, amount in cells:  # noqa: B007 - where it breaks off is what is looked for
            room -= amount
            if room < 0:
                break
        return max(1, ceil(second + MINUTE_SECONDS + 1 - now))
