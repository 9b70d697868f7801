"""Every request in the ledger: noted in the journal when it begins and ends, delivered in the background."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger

from crabtwist.delivery import Delivery
from crabtwist.errors import ConfigurationError
from crabtwist.journal import MAX_BYTES, SEGMENT_BYTES, Journal
from crabtwist.metrics import Metrics
from crabtwist.money import PriceRow
from crabtwist.pricing import reserve_cost
from crabtwist.records import record_of, reservation_of
from crabtwist.retention import Retention
from crabtwist.values import Context, Outcome

#: Only whole segments are deleted: a journal of few would be full of what was delivered long ago.
LEAST_SEGMENTS = 16

_JOURNAL_ADVICE = (
    "each gateway needs a folder of its own for its journal, that it can write to:"
    " name one with `journal` in [ledger]"
)

#: The longest answer that is expected where the client sets no bound.
ESTIMATED_OUTPUT_TOKENS = 4096

#: The longest answer that is estimated at all: clients may set any bound, and totals stay for ever.
MOST_OUTPUT_TOKENS = 1_000_000


class Bookkeeping:
    """
    The journal, the ledger, the way from one to the other, and how long the other keeps it.

    The journal's folder is this process's alone.  For `keep_days` and `keep_records`, 0 if all is kept, see
    `Retention`.  `start` first, `stop` last; between them nothing raises, and no request waits for a disk or
    a server.
    """

    _log = Logger()

    def __init__(
        self,
        ledger: Any,
        reactor: Any,
        journal_folder: Path,
        *,
        journal_max_bytes: int = MAX_BYTES,
        keep_days: int = 0,
        keep_records: int = 0,
    ) -> None:
        self.ledger = ledger
        self._reactor = reactor
        self.journal = Journal(
            journal_folder,
            reactor,
            self._in_thread,
            max_bytes=journal_max_bytes,
            segment_bytes=min(SEGMENT_BYTES, journal_max_bytes // LEAST_SEGMENTS),
        )
        self._delivery = Delivery(self.journal, ledger, reactor)
        self._retention = Retention(
            ledger, reactor, self._deliver, keep_days=keep_days, keep_records=keep_records
        )

    def show_in(self, metrics: Metrics) -> None:
        """Show what the journal holds, and what should alarm somebody."""
        journal = self.journal
        show = metrics.show
        show("journal_undelivered", "Records that no ledger has confirmed.", lambda: journal.undelivered)
        show("journal_bytes", "What the journal takes on the disk.", lambda: journal.size_bytes)
        show("journal_dropped", "Records and reservations that there was no room for.", lambda: self.dropped)
        show("journal_refused", "Records that the ledger cannot hold.", lambda: self._delivery.refused)
        show("journal_failed_syncs", "Syncs that the disk refused.", lambda: journal.failed_syncs)

    @property
    def dropped(self) -> int:
        """How much there was no room for."""
        return self.journal.dropped_records + self.journal.dropped_reservations

    async def start(self) -> None:
        """Open both; fails, and then nothing was started, if one of them cannot be."""
        await self.ledger.open()
        try:
            self._open_journal()
        except Exception:
            await self.ledger.close()
            raise
        self._delivery.start()
        self._retention.start()

    async def stop(self) -> None:
        """Deliver what there is, as far as the ledger takes it, and close both."""
        self._retention.stop()
        self._delivery.stop()
        if not await self._delivery.flush():
            self._log.warn("the ledger took not all; the rest stays in the journal for the next start")
        await self.journal.close()
        await self.ledger.close()

    def _open_journal(self) -> None:
        try:
            self.journal.open()
        except ConfigurationError as error:
            raise ConfigurationError([f"{each}; {_JOURNAL_ADVICE}" for each in error.complaints]) from error

    async def _deliver(self) -> bool:
        # A ledger that takes nothing is asked again by the delivery itself, at its own pace.
        return not self._delivery.failures and await self._delivery.flush()

    def _in_thread(self, work: Callable[[], None]) -> Deferred[Any]:
        return deferToThreadPool(self._reactor, self._reactor.getThreadPool(), work)

    def reserve(self, context: Context, price: PriceRow | None) -> None:
        """Note a request that goes upstream, with an estimate of what it will use: at the dearest rates."""
        prompt = context.estimated_prompt_tokens
        answer = min(context.most_output_tokens(ESTIMATED_OUTPUT_TOKENS), MOST_OUTPUT_TOKENS)
        cost = None if price is None else reserve_cost(price, prompt, answer)
        self.journal.reserve(
            reservation_of(
                context, prompt_tokens=prompt, max_completion_tokens=answer, estimated_cost=cost, price=price
            )
        )

    def settle(self, context: Context, outcome: Outcome) -> None:
        """Note how a request ended, once."""
        self.journal.settle(record_of(context, outcome))
