"""Every request in the ledger: noted in the journal at once, delivered behind everybody's back."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger

from crabtwist.delivery import Delivery
from crabtwist.journal import Journal
from crabtwist.metrics import Metrics
from crabtwist.money import PriceRow
from crabtwist.records import record_of, reservation_of
from crabtwist.values import Context, Outcome

#: The journal's folder, beside the configuration.
JOURNAL_FOLDER = "crabtwist-journal"

#: The longest answer that is expected where the client sets no bound.
ESTIMATED_OUTPUT_TOKENS = 4096


class Bookkeeping:
    """
    The journal, the ledger, and the way from one to the other.

    `start` first, `stop` last; between them nothing raises, and no request waits for a disk or a server.
    """

    _log = Logger()

    def __init__(self, ledger: Any, reactor: Any, directory: Path) -> None:
        self.ledger = ledger
        self.journal = Journal(
            directory / JOURNAL_FOLDER, reactor, partial(deferToThreadPool, reactor, reactor.getThreadPool())
        )
        self._delivery = Delivery(self.journal, ledger, reactor)

    def show_in(self, metrics: Metrics) -> None:
        """Show what the journal holds, and what should alarm somebody."""
        journal = self.journal
        show = metrics.show
        show("journal_undelivered", "Records that no ledger has confirmed.", lambda: journal.undelivered)
        show("journal_bytes", "What the journal takes on the disk.", lambda: journal.size_bytes)
        show("journal_dropped", "Records and reservations that there was no room for.", lambda: self.dropped)
        show("journal_failed_syncs", "Syncs that the disk refused.", lambda: journal.failed_syncs)

    @property
    def dropped(self) -> int:
        """How much there was no room for."""
        return self.journal.dropped_records + self.journal.dropped_reservations

    async def start(self) -> None:
        """Open both; fails, and then nothing was started, if one of them cannot be."""
        await self.ledger.open()
        try:
            self.journal.open()
        except Exception:
            await self.ledger.close()
            raise
        self._delivery.start()

    async def stop(self) -> None:
        """Deliver what there is, as far as the ledger takes it, and close both."""
        self._delivery.stop()
        if not await self._delivery.flush():
            self._log.warn("the ledger took not all; the rest stays in the journal for the next start")
        await self.journal.close()
        await self.ledger.close()

    def reserve(self, context: Context, price: PriceRow | None) -> None:
        """Note a request that goes upstream, with an estimate of what it will use: at the dearest rates."""
        prompt = context.estimated_prompt_tokens
        given = context.max_tokens
        answer = ESTIMATED_OUTPUT_TOKENS if given is None else given
        cost = None
        if price is not None:
            rates = price.rates_for(prompt)
            cost = prompt * max(rates.input, rates.cache_write_1h) + answer * max(
                rates.output, rates.reasoning
            )
        self.journal.reserve(
            reservation_of(
                context, prompt_tokens=prompt, max_completion_tokens=answer, estimated_cost=cost, price=price
            )
        )

    def settle(self, context: Context, outcome: Outcome) -> None:
        """Note how a request ended, once."""
        self.journal.settle(record_of(context, outcome))
