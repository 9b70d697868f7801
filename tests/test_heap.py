"""How often Python looks for garbage."""

from __future__ import annotations

import gc

from twisted.trial.unittest import SynchronousTestCase

from crabtwist import heap


class HeapTests(SynchronousTestCase):
    """Starting a process, and settling it when it is ready."""

    def test_growing(self) -> None:
        """Nobody looks while it grows, whatever comes of it; then all is as before."""
        before = gc.get_threshold()
        with heap.growing():
            self.assertEqual(0, gc.get_threshold()[0])
        self.assertEqual(before, gc.get_threshold())
        self.assertRaises(ZeroDivisionError, heap.growing()(divmod), 1, 0)
        self.assertEqual(before, gc.get_threshold())

    def test_settle(self) -> None:
        """What is there stays out of later looks, which are rarer and still find what refers to itself."""
        self.addCleanup(gc.set_threshold, *gc.get_threshold())
        self.addCleanup(gc.unfreeze)
        heap.settle()
        self.assertGreater(gc.get_freeze_count(), 1000)
        self.assertEqual(heap.YOUNG_OBJECTS, gc.get_threshold()[0])
        circle: list[object] = []
        circle.append(circle)
        del circle
        self.assertGreaterEqual(gc.collect(0), 1)
