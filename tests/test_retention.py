"""What is forgotten, when, and what it does not disturb."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.logger import LogLevel, capturedLogs
from twisted.trial.unittest import SynchronousTestCase, TestCase

from crabtwist.ledger.sqlite import SQLiteLedger, SQLiteLedgerSettings
from crabtwist.records import Record
from crabtwist.retention import FIRST_AFTER_SECONDS, INTERVAL_SECONDS, TIMEOUT_SECONDS, Retention

NOW = 1_800_000_000
DAY = 86_400_000_000
MANY = 50_000


class Ledger:
    """Remembers what it was told to forget."""

    def __init__(self) -> None:
        self.told: list[tuple[int | None, int | None]] = []
        self.answer: Callable[[], Any] = lambda: succeed(0)

    def prune(self, *, older_than: int | None, max_records: int | None, step: int) -> Any:
        assert step > 0
        self.told.append((older_than, max_records))
        return self.answer()


class RetentionTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.clock.advance(NOW)
        self.ledger = Ledger()
        self.deliver: Callable[[], Deferred[bool]] = lambda: succeed(True)

    def start(self, keep_days: int = 2, keep_records: int = 5) -> Retention:
        retention = Retention(
            self.ledger,
            self.clock,
            self.deliver_now,
            keep_days=keep_days,
            keep_records=keep_records,
        )
        retention.start()
        self.addCleanup(retention.stop)
        return retention

    def deliver_now(self) -> Deferred[bool]:
        return self.deliver()

    def pass_looks(self, looks: int) -> None:
        for _ in range(looks):
            self.clock.advance(INTERVAL_SECONDS)

    def test_bounds(self) -> None:
        """What is older than so many days is forgotten, and what is beyond so many records."""
        self.start(keep_days=2, keep_records=5)
        self.clock.advance(FIRST_AFTER_SECONDS)
        started_at = (NOW + int(FIRST_AFTER_SECONDS)) * 1_000_000
        self.assertEqual(self.ledger.told, [(started_at - 2 * DAY, 5)])

    def test_for_ever(self) -> None:
        """0 days and 0 records each bound nothing; with both nobody is asked at all."""
        for days, records, told in ((0, 5, [(None, 5)]), (0, 0, [])):
            self.ledger = Ledger()
            self.start(days, records)
            self.clock.advance(FIRST_AFTER_SECONDS)
            self.assertEqual(self.ledger.told, told)
        self.start(10**12, 0)
        self.ledger.told.clear()
        self.clock.advance(FIRST_AFTER_SECONDS)
        self.assertEqual(self.ledger.told, [(0, None)])

    def test_times(self) -> None:
        """It looks some seconds after the start, and then at intervals."""
        self.start()
        self.clock.advance(FIRST_AFTER_SECONDS / 2)
        self.assertEqual(len(self.ledger.told), 0)
        self.clock.advance(FIRST_AFTER_SECONDS / 2)
        self.assertEqual(len(self.ledger.told), 1)
        self.pass_looks(3)
        self.assertEqual(len(self.ledger.told), 4)

    def test_one_at_a_time(self) -> None:
        """While one is under way no other is begun."""
        answer: Deferred[int] = Deferred()
        self.ledger.answer = lambda: answer
        self.start()
        self.pass_looks(4)
        self.assertEqual(len(self.ledger.told), 1)
        self.ledger.answer = lambda: succeed(0)
        answer.callback(7)
        self.pass_looks(2)
        self.assertEqual(len(self.ledger.told), 3)

    def test_undelivered(self) -> None:
        """Nothing is forgotten before the ledger has confirmed what there was."""
        delivering: Deferred[bool] = Deferred()
        for answer in (succeed(False), delivering):
            self.deliver = lambda answer=answer: answer  # type: ignore[misc] # bound at once, on purpose
            self.start()
            self.clock.advance(FIRST_AFTER_SECONDS)
            self.assertEqual(self.ledger.told, [])
        delivering.callback(True)
        self.assertEqual(len(self.ledger.told), 1)

    def test_failures(self) -> None:
        """Whatever a ledger raises is logged, and it is asked again."""

        def raises() -> None:
            raise RuntimeError("crashed")

        self.start()
        for answer in (lambda: fail(OSError("gone")), raises):
            self.ledger.answer = answer
            with capturedLogs() as events:
                self.pass_looks(1)
            self.assertEqual([event["log_level"] for event in events], [LogLevel.error])
        self.assertEqual(len(self.ledger.told), 2)

    def test_told(self) -> None:
        """How many were forgotten is logged, unless there were none."""
        self.start()
        with capturedLogs() as events:
            self.pass_looks(1)
            self.ledger.answer = lambda: succeed(7)
            self.pass_looks(1)
        self.assertEqual([event.get("forgotten") for event in events], [7])

    def test_hung(self) -> None:
        """A ledger that never answers is given up after a time, and asked again."""
        self.ledger.answer = Deferred
        self.start()
        with capturedLogs() as events:
            self.clock.advance(FIRST_AFTER_SECONDS)
            self.clock.advance(TIMEOUT_SECONDS)
        self.assertEqual([event["log_level"] for event in events], [LogLevel.error])
        self.pass_looks(1)
        self.assertEqual(len(self.ledger.told), 2)

    def test_stop(self) -> None:
        """Stopping gives up what is under way without a word, and nothing is asked after it."""
        cancelled: list[str] = []
        self.ledger.answer = lambda: Deferred(lambda _: cancelled.append("prune"))
        self.deliver = lambda: succeed(True)
        retention = self.start()
        self.clock.advance(FIRST_AFTER_SECONDS)
        with capturedLogs() as events:
            retention.stop()
            self.pass_looks(3)
        self.assertEqual((cancelled, events, len(self.ledger.told)), (["prune"], [], 1))
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_stop_early(self) -> None:
        """It can be stopped before its first look, and before it was started."""
        self.start().stop()
        Retention(self.ledger, self.clock, self.deliver, keep_days=1, keep_records=1).stop()
        self.pass_looks(3)
        self.assertEqual((self.ledger.told, self.clock.getDelayedCalls()), ([], []))


@attrs.frozen
class Services:
    clock: Any
    directory: Path


class SQLiteTests(TestCase):
    """Retention of a ledger with many records."""

    def setUp(self) -> None:
        self.directory = Path(self.mktemp()).absolute()
        self.directory.mkdir()

    async def opened(self) -> SQLiteLedger:
        from twisted.internet import reactor

        ledger = SQLiteLedger(SQLiteLedgerSettings(), Services(reactor, self.directory))
        await ledger.open()
        self.addCleanup(ledger.close)
        return ledger

    async def filled(self) -> SQLiteLedger:
        ledger = await self.opened()
        old = [Record(id=f"old {n}", accepted_at=n, reason="complete") for n in range(MANY)]
        for begin in range(0, MANY, 5000):
            await ledger.append(old[begin : begin + 5000])
        return ledger

    async def is_there(self, ledger: SQLiteLedger, name: str) -> bool:
        return await ledger.get(name) is not None

    async def test_in_between(self) -> None:
        """While many records are forgotten, others are appended and read between the steps."""
        ledger, clock = await self.filled(), Clock()
        retention = Retention(ledger, clock, lambda: succeed(True), keep_days=0, keep_records=1000)
        retention.start()
        clock.advance(FIRST_AFTER_SECONDS)
        doomed = ("old 0", f"old {MANY - 1001}")
        seen: list[list[bool]] = []
        while not retention._under_way.called:  # type: ignore[union-attr] # it is, since it looked
            await ledger.append([Record(id=f"new {len(seen)}", accepted_at=MANY, reason="complete")])
            seen.append([await self.is_there(ledger, name) for name in doomed])
        retention.stop()
        self.assertGreater(seen.count([False, True]), 10, "nothing came between the steps")
        kept = [f"old {MANY - 1}", *(f"new {n}" for n in range(len(seen)))]
        self.assertEqual([name for name in kept if not await self.is_there(ledger, name)], [])
        self.assertFalse(await self.is_there(ledger, doomed[1]))
        self.assertEqual((await ledger.totals(()))[0].requests, MANY + len(seen))
