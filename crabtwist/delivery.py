"""From the journal to the ledger, in the background."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, DeferredLock, maybeDeferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from crabtwist.errors import RecordRefused
from crabtwist.journal import Journal
from crabtwist.records import Record, encode

INTERVAL_SECONDS = 0.25
BATCH_RECORDS = 500
#: Between two looks at the journal the reactor has other things to do.
BATCHES_A_STEP = 8
TIMEOUT_SECONDS = 30.0
LONGEST_WAIT_SECONDS = 30.0
MOST_DOUBLINGS = 16


class Delivery:
    """
    Gives a ledger what the journal has, oldest first, until the ledger has confirmed it.

    Looks every `interval_seconds`.  An `append` that fails, or takes longer than `timeout_seconds`, is
    tried again, with the same records, after a wait that doubles up to `longest_wait_seconds`;
    `failures` counts those in a row, 0 when all is well.

    When the ledger refuses records (`RecordRefused`), it is offered ever fewer of them, until one alone is
    refused: that one is logged whole, counted in `refused`, and passed over.
    """

    _log = Logger()

    def __init__(
        self,
        journal: Journal,
        ledger: Any,
        clock: IReactorTime,
        *,
        interval_seconds: float = INTERVAL_SECONDS,
        batch_records: int = BATCH_RECORDS,
        timeout_seconds: float = TIMEOUT_SECONDS,
        longest_wait_seconds: float = LONGEST_WAIT_SECONDS,
    ) -> None:
        self.failures = 0
        self.refused = 0
        self._journal = journal
        self._ledger = ledger
        self._clock = clock
        self._interval_seconds = interval_seconds
        self._batch_records = batch_records
        self._timeout_seconds = timeout_seconds
        self._longest_wait_seconds = longest_wait_seconds
        self._not_before = 0.0
        self._most_records = batch_records
        self._looking = LoopingCall(self._look)
        self._looking.clock = clock
        self._lock = DeferredLock()

    def start(self) -> None:
        """Begin to look."""
        self._looking.start(self._interval_seconds, now=False)

    def stop(self) -> None:
        """Stop looking; a batch that is under way still arrives."""
        if self._looking.running:
            self._looking.stop()

    def flush(self) -> Deferred[bool]:
        """
        Deliver everything now, whatever failed before.

        Fires with whether the ledger has it all, but for what it refuses: after the first failure the rest
        stays in the journal.
        May be cancelled, with the same effect.
        """
        return Deferred.fromCoroutine(self._deliver(None))

    def _look(self) -> Deferred[bool] | None:
        if self._clock.seconds() < self._not_before:
            return None
        return Deferred.fromCoroutine(self._deliver(BATCHES_A_STEP))

    async def _deliver(self, batches: int | None) -> bool:
        try:
            await self._lock.acquire()
        except CancelledError:
            return False
        try:
            return await self._deliver_alone(batches)
        except CancelledError:
            return False
        except Exception as error:
            # Whatever a ledger raises, the records are still in the journal.
            self._failed(error)
            return False
        finally:
            self._lock.release()

    async def _deliver_alone(self, batches: int | None) -> bool:
        while batches is None or batches > 0:
            batches = None if batches is None else batches - 1
            batch = self._journal.read(self._most_records)
            if batch.records and not await self._accepted(batch.records):
                continue
            self._journal.delivered(batch)
            if batch.last:
                return True
        return False

    async def _accepted(self, records: Sequence[Record]) -> bool:
        """Say whether the ledger is done with records: it has them, or it never will."""
        try:
            await self._append(records)
        except RecordRefused as error:
            self._answered()
            if len(records) > 1:
                self._most_records = len(records) // 2
                return False
            self._pass_over(records[0], error)
        else:
            self._most_records = min(self._most_records * 2, self._batch_records)
        return True

    def _pass_over(self, record: Record, error: RecordRefused) -> None:
        self.refused += 1
        self._log.critical(
            "the ledger refuses a record, which is in this line alone from now on: {error}; {record}",
            error=error,
            record=encode(record).decode(),
        )

    async def _append(self, records: Sequence[Record]) -> None:
        appending: Deferred[Any] = maybeDeferred(self._ledger.append, records)
        await appending.addTimeout(self._timeout_seconds, self._clock)
        self._answered()

    def _answered(self) -> None:
        if self.failures:
            self._log.info("the ledger answers again, after {failures} failures", failures=self.failures)
        self.failures, self._not_before = 0, 0.0

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        doublings = min(self.failures, MOST_DOUBLINGS)
        wait = min(self._interval_seconds * 2**doublings, self._longest_wait_seconds)
        self._not_before = self._clock.seconds() + wait
        self._log.error(
            "the ledger takes no records: {error!r}; {undelivered} are in the journal, again in {wait} s",
            error=error,
            undelivered=self._journal.undelivered,
            wait=wait,
        )
