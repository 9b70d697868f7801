"""Amounts over the last minute."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from crabtwist.windows import SlidingMinute

steps = st.lists(st.tuples(st.floats(0, 30), st.integers(1, 5)), max_size=40)


class SlidingMinuteTests(SynchronousTestCase):
    """What is remembered, and for how long."""

    @given(steps)
    def test_no_minute_has_more(self, steps: list[tuple[float, int]]) -> None:
        """Whoever waits as told never uses more than the limit within any sixty seconds."""
        window, now, used = SlidingMinute(), 0.0, []
        for pause, amount in steps:
            now += pause
            now += window.wait_seconds(now, 10 - amount)
            self.assertEqual(0, window.wait_seconds(now, 10 - amount))
            window.add(now, amount)
            used.append((now, amount))
            self.assertLessEqual(sum(each for at, each in used if at > now - 60), 10)

    @given(steps)
    def test_nothing_is_kept_for_long(self, steps: list[tuple[float, int]]) -> None:
        """After sixty-one seconds everything is forgotten."""
        window, now = SlidingMinute(), 0.0
        for pause, amount in steps:
            now += pause
            window.add(now, amount)
        self.assertEqual(0, window.at(now + 61))

    def test_wait(self) -> None:
        """The wait ends when enough is old, not when all is."""
        window = SlidingMinute()
        window.add(0, 5)
        window.add(30, 5)
        self.assertEqual((0, 31, 61), tuple(window.wait_seconds(30, room) for room in (10, 5, 0)))

    def test_correct(self) -> None:
        """A correction changes what was used then, and is forgotten with it."""
        window = SlidingMinute()
        cell = window.add(0, 100)
        window.add(10, 1)
        window.correct(cell, -90)
        self.assertEqual((11, 1), (window.at(60), window.at(61)))
        window.correct(cell, 7)
        self.assertEqual(1, window.at(61))
