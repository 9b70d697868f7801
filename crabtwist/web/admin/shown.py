"""
Records, receipts, totals and budgets as JSON has them: dollars and times as texts, and exact.

The classes have no slots, for the members of what has are in the order of the alphabet, and people read this.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import msgspec

from crabtwist.accounts import BudgetState
from crabtwist.money import in_dollars
from crabtwist.receipts import receipt_of
from crabtwist.records import MICROSECONDS, Attempt, Record, Tokens, Total
from crabtwist.web.admin.endpoint import about
from crabtwist.web.admin.times import rfc3339

_EXACT = "dollars, exact"
_WHEN = "RFC 3339, in UTC"


def dollars(picodollars: int) -> str:
    """Return an amount, exact: "0.0000125"; JSON's own numbers are floats to many."""
    return in_dollars(picodollars).replace("$", "")


def moment(microseconds: int) -> str:
    """Return a Unix time in microseconds as text."""
    return rfc3339(microseconds / MICROSECONDS)


@attrs.frozen(kw_only=True, slots=False)
class AttemptShown:
    """One try at one deployment."""

    provider: str
    model: str
    status: int | None = attrs.field(metadata=about("the upstream's HTTP status; null when no head came"))
    error: str | None = attrs.field(metadata=about("what went wrong; null for the attempt that answered"))
    started_after_seconds: float = attrs.field(metadata=about("from the request's start"))
    duration_seconds: float


@attrs.frozen(kw_only=True, slots=False)
class TokensShown:
    """What was used, by classes that have nothing in common."""

    input_tokens: int
    cache_read_tokens: int
    cache_write_tokens: int
    cache_write_1h_tokens: int
    output_tokens: int
    reasoning_tokens: int
    server_tool_calls: Mapping[str, int]
    complete: bool = attrs.field(metadata=about("false when the answer broke off before its last count"))


@attrs.frozen(kw_only=True, slots=False)
class RequestShown:
    """One request that has ended."""

    id: str
    accepted_at: str = attrs.field(metadata=about(_WHEN))
    first_byte_at: str | None = attrs.field(metadata=about("null when no byte of a body was sent"))
    ended_at: str = attrs.field(metadata=about(_WHEN))
    principal: str | None = attrs.field(metadata=about("the key's name; null where there was none"))
    operation: str
    dialect: str
    model_asked: str = attrs.field(metadata=about("the client's word"))
    model: str = attrs.field(metadata=about("what that stands for here"))
    model_answered: str | None = attrs.field(metadata=about("the model's name in the answer"))
    provider: str = attrs.field(metadata=about('"" where nobody was asked'))
    upstream_model: str = attrs.field(metadata=about("the model's name there"))
    attempts: tuple[AttemptShown, ...]
    status: int = attrs.field(
        metadata=about("the HTTP status that was sent; 499: the client left, 0: the answer broke")
    )
    ended_by: str = attrs.field(metadata=about("upstream, client or gateway"))
    reason: str = attrs.field(metadata=about('"complete", or what ended it'))
    message: str | None
    stream: bool
    usage: TokensShown | None = attrs.field(metadata=about("null when nothing is known"))
    cost_dollars: str | None = attrs.field(metadata=about(f"{_EXACT}; null when it is unknown"))
    cache_hit: bool
    bytes_in: int
    bytes_out: int
    estimated: bool = attrs.field(
        metadata=about("whether usage and cost are the most that was to be expected, as nobody reported any")
    )


@attrs.frozen(kw_only=True, slots=False)
class LineShown:
    """So many of something at so much each."""

    model: str
    what: str
    count: int
    price_dollars: str = attrs.field(metadata=about(f"{_EXACT}, of one"))
    amount_dollars: str = attrs.field(metadata=about("count times price"))


@attrs.frozen(kw_only=True, slots=False)
class ReceiptShown:
    """The arithmetic of a request's cost."""

    lines: tuple[LineShown, ...]
    unpriced: tuple[str, ...] = attrs.field(metadata=about("models and tools whose price is unknown"))
    total_dollars: str | None = attrs.field(metadata=about("the sum of the lines; null when it is not all"))


@attrs.frozen(kw_only=True, slots=False)
class RequestInFull(RequestShown):
    """One request that has ended, with all that is known of it."""

    raw_usage: str = attrs.field(metadata=about("the vendor's own usage, as JSON"))
    price_row: Mapping[str, Any] | None = attrs.field(
        metadata=about("the row of the price list, in picodollars a token")
    )
    other_price_rows: Mapping[str, Mapping[str, Any]] = attrs.field(
        metadata=about("those of the models that the usage names for parts of the answer")
    )
    receipt: ReceiptShown


@attrs.frozen(kw_only=True, slots=False)
class TotalShown:
    """The sum of some requests; what it was not asked to be by is null."""

    principal: str | None = attrs.field(metadata=about('the key\'s name; "" for requests without'))
    model: str | None
    provider: str | None = attrs.field(metadata=about('"" for requests that reached none'))
    day: str | None = attrs.field(metadata=about("UTC"))
    requests: int
    unpriced: int = attrs.field(metadata=about("requests whose cost is unknown; it is not in the sum"))
    estimated: int = attrs.field(metadata=about("requests that are in it by estimate"))
    input_tokens: int
    cache_read_tokens: int
    cache_write_tokens: int
    cache_write_1h_tokens: int
    output_tokens: int
    reasoning_tokens: int
    cost_dollars: str = attrs.field(metadata=about(_EXACT))


@attrs.frozen(kw_only=True, slots=False)
class BudgetShown:
    """How a key's budget stands."""

    principal: str
    per: str = attrs.field(metadata=about("day, month or total"))
    label: str = attrs.field(metadata=about('which day or month; "" of a total'))
    time_zone: str
    budget_dollars: str = attrs.field(metadata=about(_EXACT))
    spent_dollars: str
    reserved_dollars: str = attrs.field(metadata=about("for requests that run; no part of what is spent"))
    left_dollars: str
    begins_at: str | None = attrs.field(metadata=about(f"{_WHEN}; null for never"))
    ends_at: str | None


def request_shown(record: Record) -> RequestShown:
    """Return a record as lists have it."""
    return RequestShown(**_common(record))


def request_in_full(record: Record) -> RequestInFull:
    """Return a record with its receipt."""
    return RequestInFull(
        **_common(record),
        raw_usage="" if record.usage is None else record.usage.raw,
        price_row=record.price_row,
        other_price_rows=record.other_price_rows,
        receipt=receipt_shown(record),
    )


def _common(record: Record) -> dict[str, Any]:
    shown = {field.name: getattr(record, field.name, None) for field in attrs.fields(RequestShown)}
    first = record.first_byte_at
    return {
        **shown,
        "accepted_at": moment(record.accepted_at),
        "first_byte_at": None if first is None else moment(first),
        "ended_at": moment(record.ended_at),
        "attempts": tuple(map(_attempt, record.attempts)),
        "usage": None if record.usage is None else _tokens(record.usage),
        "cost_dollars": None if record.cost is None else dollars(record.cost),
    }


def _attempt(attempt: Attempt) -> AttemptShown:
    return AttemptShown(**msgspec.structs.asdict(attempt))


def _tokens(tokens: Tokens) -> TokensShown:
    return TokensShown(**{field.name: getattr(tokens, field.name) for field in attrs.fields(TokensShown)})


def receipt_shown(record: Record) -> ReceiptShown:
    """Return the receipt of a record, made from it alone."""
    made = receipt_of(record)
    lines = (
        LineShown(
            model=line.model,
            what=line.what,
            count=line.count,
            price_dollars=dollars(line.price),
            amount_dollars=dollars(line.amount),
        )
        for line in made.lines
    )
    total = None if record.cost is None else dollars(made.total)
    return ReceiptShown(lines=tuple(lines), unpriced=made.unpriced, total_dollars=total)


def total_shown(total: Total) -> TotalShown:
    """Return a total."""
    shown = attrs.asdict(total)
    cost = dollars(shown.pop("cost"))
    return TotalShown(**{**shown, "day": total.day and total.day.isoformat()}, cost_dollars=cost)


def budget_shown(state: BudgetState) -> BudgetShown:
    """Return how a budget stands."""
    begins, ends = state.begins_at, state.ends_at
    return BudgetShown(
        principal=state.principal,
        per=state.per,
        label=state.label,
        time_zone=state.time_zone,
        budget_dollars=dollars(state.budget),
        spent_dollars=dollars(state.spent),
        reserved_dollars=dollars(state.reserved),
        left_dollars=dollars(state.left),
        begins_at=None if begins is None else rfc3339(begins),
        ends_at=None if ends is None else rfc3339(ends),
    )
