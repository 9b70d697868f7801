"""Days and months in time zones."""

from __future__ import annotations

from datetime import UTC, datetime
from zoneinfo import available_timezones

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from crabtwist import periods
from crabtwist.periods import EVER, Per, period_at, zone_named

ZONES = sorted(zone for zone in available_timezones() if "/" in zone)

HOUR = 3600.0

moments = st.floats(0, 4_000_000_000)
pers = st.sampled_from(["day", "month"])


def at(text: str) -> float:
    """Return the Unix time of a moment in UTC."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


class PeriodTests(SynchronousTestCase):
    """Where periods begin and end."""

    def test_day(self) -> None:
        """A day runs from midnight to midnight where it is, not in Greenwich."""
        day = period_at("day", "Asia/Tokyo", at("2026-03-01T20:00"))
        self.assertEqual("2026-03-02", day.label)
        self.assertEqual(
            (at("2026-03-01T15:00"), at("2026-03-02T15:00")),
            (day.begins_at, day.ends_at),
        )

    def test_month(self) -> None:
        """A month runs to the first of the next, over the end of a year too."""
        month = period_at("month", "UTC", at("2026-12-31T23:59"))
        self.assertEqual("2026-12", month.label)
        self.assertEqual((at("2026-12-01"), at("2027-01-01")), (month.begins_at, month.ends_at))

    def test_clocks_change(self) -> None:
        """A day on which the clocks are put forward has 23 hours, the one on which they go back 25."""
        for moment, hours in (("2026-03-29T12:00", 23), ("2026-10-25T12:00", 25), ("2026-06-01T12:00", 24)):
            day = period_at("day", "Europe/Berlin", at(moment))
            self.assertEqual(hours * HOUR, (day.ends_at or 0) - (day.begins_at or 0))

    def test_no_midnight(self) -> None:
        """Where the clocks skip midnight the day begins when they do."""
        day = period_at("day", "Africa/Cairo", at("2026-04-24T12:00"))
        self.assertEqual(at("2026-04-23T22:00"), day.begins_at)

    def test_over_midnight(self) -> None:
        """A minute that clocks, put back over midnight, show once more belongs to the day that had begun."""
        for moment in ("2000-10-29T02:30:30", "2000-10-29T02:31:30", "2000-10-29T12:00"):
            self.assertEqual("2000-10-29", period_at("day", "America/St_Johns", at(moment)).label)

    def test_skipped_day(self) -> None:
        """Samoa never had the 30th of December 2011."""
        before, after = (
            period_at("day", "Pacific/Apia", at(moment))
            for moment in ("2011-12-30T09:59:59", "2011-12-30T10:00:00")
        )
        self.assertEqual(("2011-12-29", "2011-12-31"), (before.label, after.label))
        self.assertEqual(before.ends_at, after.begins_at)

    @settings(deadline=None, max_examples=300)
    @given(pers, st.sampled_from(ZONES), moments)
    def test_no_gaps(self, per: Per, zone: str, now: float) -> None:
        """Every moment is in its period, and the next one begins where this one ends, with another name."""
        period = period_at(per, zone, now)
        assert period.begins_at is not None
        assert period.ends_at is not None
        self.assertTrue(period.begins_at <= now < period.ends_at)
        self.assertEqual(period, period_at(per, zone, period.begins_at))
        following = period_at(per, zone, period.ends_at)
        self.assertEqual(period.ends_at, following.begins_at)
        self.assertNotEqual(period.name, following.name)

    def test_ever(self) -> None:
        """All of time is one period, whatever the zone; it has no end, and what is in it is kept for ever."""
        self.assertEqual({EVER}, {period_at("total", zone, 0) for zone in ("UTC", "Asia/Tokyo")})
        self.assertEqual((None, ""), (EVER.kept_seconds, EVER.until))

    def test_names(self) -> None:
        """Periods that differ in anything have different names, of three words each."""
        found = [period_at(per, zone, 0).name for per in ("day", "month") for zone in ("UTC", "Asia/Tokyo")]
        found.append(EVER.name)
        self.assertEqual(5, len(set(found)))
        self.assertEqual({3}, {len(name.split(" ")) for name in found})

    def test_until(self) -> None:
        """The end is said in local time."""
        self.assertEqual(
            "2026-04-01 00:00 Europe/Berlin", period_at("month", "Europe/Berlin", at("2026-03-15")).until
        )

    def test_kept(self) -> None:
        """What was counted outlives its period, also the longest."""
        for per, longest in (("day", 25 * HOUR), ("month", (31 * 24 + 1) * HOUR)):
            self.assertGreater(period_at(per, "UTC", 0).kept_seconds or 0, longest)  # type: ignore[arg-type] # literals


class ZoneTests(SynchronousTestCase):
    """Names of time zones."""

    def test_unknown(self) -> None:
        """What is no zone is said to be none, whatever it looks like."""
        for name in ("Europe/Berlim", "", "Europe", "../etc/passwd", "/etc/localtime", "a\0b", "x" * 5000):
            error = self.assertRaises(ValueError, zone_named, name)
            self.assertIn("is not the name of a time zone", str(error))

    def test_without_a_database(self) -> None:
        """Where there is no database UTC works, and the complaint about others says what to install."""
        self.patch(periods, "available_timezones", set)
        self.assertEqual(UTC, zone_named("UTC"))
        self.assertIn("tzdata", str(self.assertRaises(ValueError, zone_named, "No/Where")))
