"""Amounts over the last minute."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from crabtwist.windows import SlidingMinute

steps = st.lists(st.tuples(st.floats(0, 30), st.integers(1, 5)), max_size=40)


def fill(steps: list[tuple[float, int]]) -> tuple[SlidingMinute, float]:
    """Return a window where something was used, and the time when that was done."""
    window, now = SlidingMinute(1), 1000.0
    for pause, amount in steps:
        now += pause
        window.add(now, [amount])
    return window, now


class SlidingMinuteTests(SynchronousTestCase):
    """What is remembered, and for how long."""

    @given(steps)
    def test_no_minute_has_more(self, steps: list[tuple[float, int]]) -> None:
        """Whoever waits as told never uses more than the limit within any sixty seconds."""
        window, now, used = SlidingMinute(1), 0.0, []
        for pause, amount in steps:
            now += pause
            now += window.wait_seconds(now, 0, 10 - amount)
            self.assertEqual(0, window.wait_seconds(now, 0, 10 - amount))
            window.add(now, [amount])
            used.append((now, amount))
            self.assertLessEqual(sum(each for at, each in used if at > now - 60), 10)

    @given(steps)
    def test_nothing_is_kept_for_long(self, steps: list[tuple[float, int]]) -> None:
        """After sixty-one seconds everything is forgotten."""
        window, now = SlidingMinute(1), 0.0
        for pause, amount in steps:
            now += pause
            window.add(now, [amount])
        self.assertEqual(0, window.at(now + 61)[0])

    def test_clock_put_back(self) -> None:
        """What was used while the clock was wrong is remembered for a minute, not until that time comes."""
        window = SlidingMinute(1)
        window.add(90_000.0, [2])
        window.add(90_001.0, [3])
        self.assertEqual(61, window.wait_seconds(1000.0, 0, 0))
        window.add(1010.0, [1])
        self.assertEqual([6, 1, 0], [window.at(now)[0] for now in (1060.9, 1061.0, 1071.0)])

    def test_wait(self) -> None:
        """The wait ends when enough is old, not when all is."""
        window = SlidingMinute(1)
        window.add(0, [5])
        window.add(30, [5])
        self.assertEqual((0, 31, 61), tuple(window.wait_seconds(30, 0, room) for room in (10, 5, 0)))

    def test_correct(self) -> None:
        """A correction changes what was used then, and is forgotten with it."""
        window = SlidingMinute(1)
        cell = window.add(0, [100])
        window.add(10, [1])
        self.assertTrue(window.correct(cell, [-90]))
        self.assertEqual((11, 1), (window.at(60)[0], window.at(61)[0]))
        self.assertFalse(window.correct(cell, [7]))
        self.assertEqual(1, window.at(61)[0])

    @given(steps, steps, st.integers(0, 20))
    def test_two_windows(
        self, here: list[tuple[float, int]], there: list[tuple[float, int]], room: int
    ) -> None:
        """The wait for two windows together is as long as it takes, to the second."""
        (one, begun), (other, ended) = fill(here), fill(there)
        now = max(begun, ended)
        wait = one.wait_seconds(now, 0, room, other)
        if wait:
            self.assertGreater(one.at(now + wait - 1)[0] + other.at(now + wait - 1)[0], room)
        self.assertLessEqual(one.at(now + wait)[0] + other.at(now + wait)[0], room)

    @given(steps)
    def test_coarse(self, steps: list[tuple[float, int]]) -> None:
        """Who is told in wider cells forgets nothing earlier, and everything five seconds later."""
        window, now = fill(steps)
        copy = SlidingMinute(1, [(second, 0, amount) for second, amount in window.coarse(now, 0)])
        self.assertEqual(window.at(now)[0], copy.used[0])
        self.assertLessEqual(len(copy.cells), 14)
        for second in range(66):
            later, late = copy.at(now + second)[0], window.at(now + second)[0]
            self.assertGreaterEqual(later, late)
        self.assertEqual(0, copy.at(now + 66)[0])

    def test_cells(self) -> None:
        """A window of several may be made of cells in any order."""
        window = SlidingMinute(1, [(7, 0, 1), (3, 0, 2), (7, 0, 4)])
        self.assertEqual((7, 5, 0), (window.at(10)[0], window.at(64)[0], window.at(68)[0]))

    def test_things_used_together(self) -> None:
        """Each thing has its own sum, its own wait, and its own time when all of it is forgotten."""
        window = SlidingMinute(2)
        window.add(0, [1, 100])
        cell = window.add(20, [1, 50])
        self.assertTrue(window.correct(cell, [0, -50]))
        self.assertEqual([2, 100], list(window.at(30)))
        self.assertEqual([81, 61], window.clear_at(30))
        self.assertEqual((51, 31), (window.wait_seconds(30, 0, 0), window.wait_seconds(30, 1, 0)))
        self.assertEqual([1, 0], list(window.at(61)))
        self.assertEqual([81, 62], window.clear_at(61.5))
