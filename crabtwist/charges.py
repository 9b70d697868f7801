"""What a request is charged: before it runs the most that it should cost, and after it what it did."""

from __future__ import annotations

from collections.abc import Iterable

from attrs import evolve

from crabtwist.errors import (
    ConnectFailed,
    ConnectTimedOut,
    CredentialMisdirected,
    CredentialRejected,
    NoConnectionFree,
    Redirected,
    UpstreamStatus,
)
from crabtwist.money import PriceRow
from crabtwist.pricing import PriceBook, receipt, reserve_cost
from crabtwist.values import BYTES_PER_TOKEN, Attempt, Context, Outcome

#: Faults of attempts that no upstream bills: it was not reached, or did not want to.
_UNBILLED = frozenset(
    fault.slug
    for fault in (
        ConnectFailed,
        ConnectTimedOut,
        CredentialMisdirected,
        CredentialRejected,
        NoConnectionFree,
        Redirected,
        UpstreamStatus,
    )
)

_NO_PRICES = PriceBook()


def dearest(rows: Iterable[PriceRow], prompt_tokens: int, output_tokens: int) -> tuple[PriceRow | None, int]:
    """Return the row by which so many tokens cost most, and what; None and 0 where there is no row."""
    found, most = None, 0
    for row in rows:
        cost = reserve_cost(row, prompt_tokens, output_tokens)
        if found is None or cost > most:
            found, most = row, cost
    return found, most


def charge(context: Context, outcome: Outcome, row: PriceRow | None, reserved: int) -> int:
    """
    Return what to charge for a request that has ended, in picodollars.

    What was counted to its end costs what it costs; `row` prices what the outcome has no price for, at 0 if
    it is None.  What nobody counted costs what is known of it, or an estimate, if that is more: of a plain
    answer that nobody saw whole all that was reserved, for it was made before it was sent; else the prompt
    and the bytes that the client was sent, and not more than was reserved.  What no upstream bills costs
    nothing.
    """
    counted = _counted(outcome, row)
    if outcome.usage is not None and outcome.usage.complete:
        return counted
    if row is None or not any(map(may_be_billed, outcome.attempts)):
        return counted
    if not context.stream and outcome.reason != "complete":
        return max(counted, reserved)
    sent = reserve_cost(row, context.estimated_prompt_tokens, outcome.bytes_out // BYTES_PER_TOKEN)
    return max(counted, min(reserved, sent))


def _counted(outcome: Outcome, row: PriceRow | None) -> int:
    if outcome.cost is not None:
        return outcome.cost
    row = outcome.price or row
    if outcome.usage is None or row is None:
        return 0
    # Without the vendor's own words, which may name models and their iterations that have no price either.
    return receipt(evolve(outcome.usage, raw=b""), row, _NO_PRICES, "").total


def may_be_billed(attempt: Attempt) -> bool:
    """Say whether an upstream may have taken an attempt on: it was reached, and did not refuse."""
    refused = attempt.status is not None and attempt.status >= 300
    return not refused and attempt.error not in _UNBILLED
