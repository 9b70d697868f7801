"""Which failures are tried again, and when."""

from __future__ import annotations

from email.utils import formatdate
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from crabtwist.errors import ConnectFailed, CredentialRejected, Truncated, UpstreamError
from crabtwist.retry import (
    CREDENTIAL_STATUSES,
    FIRST_BACKOFF_SECONDS,
    LONGEST_BACKOFF_SECONDS,
    TRANSIENT_STATUSES,
    delay_before_retry,
    retry_after_seconds,
)
from crabtwist.routing import Deployment
from crabtwist.testing import FakeProvider

NOW = 1_800_000_000.0
#: A date in a year that no machine has a number for.
ENDLESS = b"Mon, 01 Jan 99999999999999999999 00:00:00 GMT"


class StatusTests(SynchronousTestCase):
    """Statuses."""

    def test_transient(self) -> None:
        """Timeouts, conflicts, limits, overload and broken gateways may pass; a caller's mistakes do not."""
        expected = {408, 409, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529}
        self.assertEqual(expected, TRANSIENT_STATUSES)

    def test_credential(self) -> None:
        """What is said of the gateway's own credential is no passing trouble."""
        self.assertEqual({401, 403}, CREDENTIAL_STATUSES)
        self.assertFalse(CREDENTIAL_STATUSES & TRANSIENT_STATUSES)


class DelayTests(SynchronousTestCase):
    """How long to wait before the same deployment is asked again."""

    def delay(
        self,
        tries: int = 1,
        elapsed_seconds: float = 0.0,
        error: UpstreamError | None = None,
        *,
        retry_after_seconds: float | None = None,
        max_retries: int = 9,
        retry_deadline_seconds: float = 30.0,
        seed: int = 0,
    ) -> float | None:
        """Return the delay for a deployment of these settings."""
        deployment = Deployment(
            FakeProvider(),
            "m",
            "m",
            max_retries=max_retries,
            retry_deadline_seconds=retry_deadline_seconds,
        )
        error = error or ConnectFailed("refused")
        error.retry_after_seconds = retry_after_seconds
        return delay_before_retry(deployment, tries, elapsed_seconds, error, Random(seed))

    def test_back_off(self) -> None:
        """Each wait is drawn from the upper half of a bound that doubles up to the longest."""
        for tries, longest in ((1, 0.25), (2, 0.5), (3, 1), (4, 2), (5, 4), (6, 8), (7, 8), (9, 8)):
            delays = [self.delay(tries, seed=seed) or 0.0 for seed in range(200)]
            self.assertTrue(longest / 2 <= min(delays) < longest * 0.55, (tries, min(delays)))
            self.assertTrue(longest * 0.95 < max(delays) <= longest, (tries, max(delays)))

    def test_bounds(self) -> None:
        """The bounds are those that are documented."""
        self.assertEqual((0.25, 8.0), (FIRST_BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS))

    def test_not_transient(self) -> None:
        """What will not pass is not waited for."""
        self.assertIsNone(self.delay(error=CredentialRejected("no")))
        self.assertIsNone(self.delay(error=Truncated("cut")))

    def test_max_retries(self) -> None:
        """As many retries as the deployment allows; none if it allows none."""
        self.assertIsNotNone(self.delay(2, max_retries=2))
        self.assertIsNone(self.delay(3, max_retries=2))
        self.assertIsNone(self.delay(1, max_retries=0))

    def test_retry_after(self) -> None:
        """The upstream's word is a wait's least length; a shorter one changes nothing."""
        self.assertEqual(12.0, self.delay(retry_after_seconds=12.0))
        self.assertEqual(self.delay(), self.delay(retry_after_seconds=0.01))
        self.assertEqual(self.delay(), self.delay(retry_after_seconds=0.0))

    def test_deadline(self) -> None:
        """A retry that could not start in time is not waited for."""
        self.assertEqual(10.0, self.delay(elapsed_seconds=20.0, retry_after_seconds=10.0))
        self.assertIsNone(self.delay(elapsed_seconds=20.0, retry_after_seconds=10.5))
        self.assertIsNone(self.delay(elapsed_seconds=30.0))
        self.assertIsNone(self.delay(retry_after_seconds=3600.0))
        self.assertIsNone(self.delay(retry_deadline_seconds=0.0))


class RetryAfterTests(SynchronousTestCase):
    """What upstreams say of waiting."""

    def test_seconds(self) -> None:
        """Seconds, whole or not."""
        for text, seconds in ((b"7", 7.0), (b"0", 0.0), (b" 1.5 ", 1.5)):
            self.assertEqual(seconds, retry_after_seconds(None, text, NOW))

    def test_milliseconds(self) -> None:
        """Milliseconds win over seconds, unless they are nonsense."""
        self.assertEqual(0.25, retry_after_seconds(b"250", b"7", NOW))
        self.assertEqual(0.25, retry_after_seconds(b"250", None, NOW))
        self.assertEqual(7.0, retry_after_seconds(b"soon", b"7", NOW))

    def test_date(self) -> None:
        """A date is measured against the given time; a past one means now."""
        self.assertEqual(90.0, retry_after_seconds(None, formatdate(NOW + 90, usegmt=True).encode(), NOW))
        self.assertEqual(90.0, retry_after_seconds(None, formatdate(NOW + 90).encode(), NOW))
        self.assertEqual(0.0, retry_after_seconds(None, formatdate(NOW - 90, usegmt=True).encode(), NOW))

    def test_nothing(self) -> None:
        """An upstream that does not say, or says nonsense, has not said."""
        for text in (
            None,
            b"",
            b"soon",
            b"-5",
            b"nan",
            b"inf",
            b"1e999",
            b"\xff",
            b"Fri, 99 Foo 2026",
            ENDLESS,
        ):
            self.assertIsNone(retry_after_seconds(None, text, NOW))
            self.assertIsNone(retry_after_seconds(text, text, NOW))

    @given(st.binary(max_size=40) | st.text("0123456789 :,+-.eMonJaGT", max_size=40).map(str.encode))
    @settings(deadline=None)
    def test_anything(self, text: bytes) -> None:
        """Nothing raises; a wait is never negative and never endless."""
        seconds = retry_after_seconds(text, text, NOW)
        self.assertTrue(seconds is None or 0 <= seconds < float("inf"))
