"""What a ledger has kept for long enough is forgotten, in the background."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, maybeDeferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from crabtwist.records import microseconds

INTERVAL_SECONDS = 60.0
#: A start has better things to do.
FIRST_AFTER_SECONDS = 10.0
#: So many records at once, with room for others in between.
STEP_RECORDS = 200
#: What is not forgotten by then is when it is looked again; so one call that never ends stops nothing.
TIMEOUT_SECONDS = 600.0
DAY_SECONDS = 86400


class Retention:
    """
    Has a ledger forget records older than `keep_days`, and those beyond the newest `keep_records`.

    0 keeps all.  Looks some seconds after its start and then every `interval_seconds`; one look ends before
    the next begins.  What is forgotten and then delivered again would count twice, so `deliver` comes first:
    it returns whether the ledger has confirmed everything that ended before.  If not, nothing is forgotten
    until the next look.  What ends later is among the newest, and those stay.
    """

    _log = Logger()

    def __init__(
        self,
        ledger: Any,
        clock: IReactorTime,
        deliver: Callable[[], Awaitable[bool]],
        *,
        keep_days: int,
        keep_records: int,
        interval_seconds: float = INTERVAL_SECONDS,
    ) -> None:
        self._ledger = ledger
        self._clock = clock
        self._deliver = deliver
        self._keep_days = keep_days
        self._keep_records = keep_records
        self._interval_seconds = interval_seconds
        self._looking = LoopingCall(self._look)
        self._looking.clock = clock
        self._waiting: Any = None
        self._under_way: Deferred[None] | None = None

    def start(self) -> None:
        """Begin to look, if there is anything to be forgotten ever."""
        if self._keep_days or self._keep_records:
            self._waiting = self._clock.callLater(
                FIRST_AFTER_SECONDS, self._looking.start, self._interval_seconds
            )

    def stop(self) -> None:
        """Stop looking, and leave to the next start what is not forgotten yet; waits for nothing."""
        if self._waiting is not None and self._waiting.active():
            self._waiting.cancel()
        if self._looking.running:
            self._looking.stop()
        if self._under_way is not None:
            self._under_way.cancel()

    def _look(self) -> Deferred[None]:
        self._under_way = Deferred.fromCoroutine(self._forget())
        return self._under_way

    async def _forget(self) -> None:
        try:
            if await self._deliver():
                await self._prune().addTimeout(TIMEOUT_SECONDS, self._clock)
        except CancelledError:
            return
        except Exception as error:
            # Whatever a ledger raises: it has more than it should for a while, and that is all.
            self._log.error(
                "the ledger did not forget old records: {error!r}; again in {wait} s",
                error=error,
                wait=self._interval_seconds,
            )

    def _prune(self) -> Deferred[None]:
        pruning: Deferred[int] = maybeDeferred(
            self._ledger.prune,
            older_than=self._older_than(),
            max_records=self._keep_records or None,
            step=STEP_RECORDS,
        )
        return pruning.addCallback(self._tell)

    def _older_than(self) -> int | None:
        if not self._keep_days:
            return None
        # An age beyond the beginning of time is none that anything could have.
        return max(0, microseconds(self._clock.seconds() - self._keep_days * DAY_SECONDS))

    def _tell(self, forgotten: int) -> None:
        if forgotten:
            self._log.info("the ledger forgot {forgotten} old records", forgotten=forgotten)
