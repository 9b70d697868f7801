"""
Amounts over the last minute, told the time.

A minute here is any sixty seconds, not one by the clock: what was used within the last sixty seconds is
never forgotten early, so nobody gets two minutes' worth around a minute's edge.
"""

from __future__ import annotations

from collections import deque
from math import ceil

MINUTE_SECONDS = 60


class SlidingMinute:
    """
    What was used in the last minute, in cells of a second.

    A cell is forgotten when its youngest amount is a minute old, so an amount counts for sixty seconds, and
    for one more at the most.  `now` is in seconds and does not fall.
    """

    __slots__ = ("_cells", "used")

    def __init__(self) -> None:
        self.used = 0
        self._cells: deque[list[int]] = deque()

    def at(self, now: float) -> int:
        """Forget what is old; return what is used."""
        cells = self._cells
        while cells and cells[0][0] <= now - MINUTE_SECONDS - 1:
            self.used -= cells.popleft()[1]
        return self.used

    def add(self, now: float, amount: int) -> int:
        """Use an amount; returns the cell that it is in, for `correct`."""
        self.at(now)
        second = int(now)
        if self._cells and self._cells[-1][0] >= second:
            self._cells[-1][1] += amount
        else:
            self._cells.append([second, amount])
        self.used += amount
        return self._cells[-1][0]

    def correct(self, cell: int, change: int) -> None:
        """Change an amount that was used before; of what is forgotten, nothing."""
        for each in self._cells:
            if each[0] == cell:
                each[1] += change
                self.used += change
                return

    def wait_seconds(self, now: float, room: int) -> int:
        """Return in how many whole seconds no more than `room` is used; 0 for now."""
        left = self.at(now)
        for second, amount in self._cells:
            if left <= room:
                break
            left -= amount
            due = second
        return 0 if self.used <= room else max(1, ceil(due + MINUTE_SECONDS + 1 - now))
