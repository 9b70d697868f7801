"""Cool-downs: who is left alone, and until when."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from crabtwist.health import Health


class HealthTests(SynchronousTestCase):
    """One deployment that fails three times cools down for thirty seconds."""

    def setUp(self) -> None:
        self.health = Health(failures=3, seconds=30.0)

    def fails(self, *times: float, retry_after_seconds: float | None = None) -> None:
        """Let it fail at these times."""
        for now in times:
            self.health.failed("a", now, retry_after_seconds)

    def test_unknown(self) -> None:
        """Who never failed is well."""
        self.assertEqual(0.0, self.health.cool_until("a", 100.0))

    def test_too_few_failures(self) -> None:
        """Two failures are bad luck."""
        self.fails(100.0, 101.0)
        self.assertEqual(0.0, self.health.cool_until("a", 101.0))

    def test_cools_down(self) -> None:
        """The third starts a cool-down, which ends by itself."""
        self.fails(100.0, 101.0, 102.0)
        self.assertEqual(
            (132.0, 132.0), (self.health.cool_until("a", 102.0), self.health.cool_until("a", 131.9))
        )
        self.assertEqual(0.0, self.health.cool_until("a", 132.0))

    def test_others(self) -> None:
        """One deployment's failures are not another's."""
        self.fails(100.0, 101.0, 102.0)
        self.assertEqual(0.0, self.health.cool_until("b", 102.0))

    def test_success_forgets(self) -> None:
        """A success forgets the failures before it, and ends a cool-down."""
        self.fails(100.0, 101.0)
        self.health.succeeded("a")
        self.fails(102.0, 103.0)
        self.assertEqual(0.0, self.health.cool_until("a", 103.0))
        self.fails(104.0)
        self.health.succeeded("a")
        self.assertEqual(0.0, self.health.cool_until("a", 104.0))

    def test_fails_again(self) -> None:
        """After a cool-down one more failure starts the next."""
        self.fails(100.0, 100.0, 100.0, 200.0)
        self.assertEqual(230.0, self.health.cool_until("a", 200.0))

    def test_fails_while_cooling(self) -> None:
        """A failure during a cool-down prolongs it."""
        self.fails(100.0, 100.0, 100.0, 110.0)
        self.assertEqual(140.0, self.health.cool_until("a", 110.0))

    def test_retry_after(self) -> None:
        """An upstream that asks for more time gets it, within ten cool-downs; less is not granted."""
        for asked, granted in ((60.0, 60.0), (5.0, 30.0), (86400.0, 300.0), (None, 30.0)):
            self.health.succeeded("a")
            self.fails(0.0, 0.0, 0.0, retry_after_seconds=asked)
            self.assertEqual(granted, self.health.cool_until("a", 1.0))

    def test_success_of_the_unknown(self) -> None:
        """A success with nothing to forget is fine."""
        self.health.succeeded("a")
        self.assertEqual(0.0, self.health.cool_until("a", 0.0))
