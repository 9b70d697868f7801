"""
What is kept of a request after it has ended, and what is noted of it before.

A `Record` holds everything that a bill, an audit or a receipt needs, without the bodies.  A
`Reservation` is noted when a request goes upstream: should the process die, it is what is known of a
request that somebody may bill.  Both are JSON where they are kept; members that this version does not
know are passed over, and missing ones have their defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from functools import lru_cache
from itertools import islice
from typing import Any

import attrs
import msgspec

from crabtwist.money import PriceRow
from crabtwist.values import Attempt as AttemptMade
from crabtwist.values import Context, Outcome, Usage

MICROSECONDS = 1_000_000

#: Peers choose these texts; a record keeps no more of each than this many characters.
LONGEST_TEXT = 1000
#: A vendor's usage object that is longer is not kept: a part of it would be no JSON.
LONGEST_RAW_USAGE = 65536
MOST_TOOLS = 64
#: Models that answered a part of a request each, beside the one that answered it; mostly there is none.
MOST_OTHER_MODELS = 16

#: The `reason` of a request that was under way when the process died.
INTERRUPTED = "interrupted"


class Attempt(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One try at one deployment; see `crabtwist.values.Attempt`."""

    provider: str = ""
    model: str = ""
    status: int | None = None
    error: str | None = None
    started_after_seconds: float = 0.0
    duration_seconds: float = 0.0


class Tokens(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Usage by class; see `crabtwist.values.Usage`, whose `raw` is here a text."""

    input_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    cache_write_1h_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    server_tool_calls: dict[str, int] = {}
    raw: str = ""
    complete: bool = True

    @property
    def values(self) -> Usage:
        """The same as a value, to price it again."""
        return Usage(**{**msgspec.structs.asdict(self), "raw": self.raw.encode()})


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """
    One request's outcome.

    Times are Unix time in microseconds; `first_byte_at` is None when no byte of a body was sent.  `usage`
    is None when nothing is known.  `cost` is in picodollars, None when the price is unknown, and
    `price_row` the row of the price list that it was made with, None if there was none; `other_price_rows`
    are those of the models that `usage.raw` names for parts of the answer, by these names.  With `estimated`
    usage and cost are not what was reported but the most that was to be expected.  The other fields are
    those of `crabtwist.values.Context` and `Outcome`.
    """

    id: str
    accepted_at: int = 0
    first_byte_at: int | None = None
    ended_at: int = 0
    principal: str | None = None
    operation: str = ""
    dialect: str = ""
    model_asked: str = ""
    model: str = ""
    model_answered: str | None = None
    provider: str = ""
    upstream_model: str = ""
    attempts: tuple[Attempt, ...] = ()
    status: int = 0
    ended_by: str = "gateway"
    reason: str = ""
    message: str | None = None
    stream: bool = False
    usage: Tokens | None = None
    cost: int | None = None
    price_row: dict[str, Any] | None = None
    other_price_rows: dict[str, dict[str, Any]] = {}
    cache_hit: bool = False
    bytes_in: int = 0
    bytes_out: int = 0
    estimated: bool = False

    @property
    def price(self) -> PriceRow | None:
        """The price row as a value, for a receipt.  Raises `msgspec.ValidationError` if it is none."""
        return None if self.price_row is None else msgspec.convert(self.price_row, PriceRow)

    @property
    def other_prices(self) -> dict[str, PriceRow]:
        """The other price rows as values.  Raises `msgspec.ValidationError` if one is none."""
        return {model: msgspec.convert(row, PriceRow) for model, row in self.other_price_rows.items()}


class Reservation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """
    A request that goes upstream, and the most that is to be expected of it.

    `estimated_cost` is in picodollars, None when the price is unknown.
    """

    id: str
    accepted_at: int = 0
    principal: str | None = None
    operation: str = ""
    dialect: str = ""
    model_asked: str = ""
    model: str = ""
    provider: str = ""
    upstream_model: str = ""
    stream: bool = False
    prompt_tokens: int = 0
    max_completion_tokens: int = 0
    estimated_cost: int | None = None
    price_row: dict[str, Any] | None = None

    def interrupted(self, ended_at: int) -> Record:
        """Return the record of a request that was never settled."""
        return Record(
            id=self.id,
            accepted_at=self.accepted_at,
            ended_at=max(self.accepted_at, ended_at),
            principal=self.principal,
            operation=self.operation,
            dialect=self.dialect,
            model_asked=self.model_asked,
            model=self.model,
            provider=self.provider,
            upstream_model=self.upstream_model,
            reason=INTERRUPTED,
            message="the gateway's process ended before the request did",
            stream=self.stream,
            usage=Tokens(
                input_tokens=self.prompt_tokens, output_tokens=self.max_completion_tokens, complete=False
            ),
            cost=self.estimated_cost,
            price_row=self.price_row,
            estimated=True,
        )


@attrs.frozen
class Page:
    """Some records, newest first; `before` asks for those that follow, None when there are none."""

    records: tuple[Record, ...]
    before: str | None


@attrs.frozen
class Total:
    """
    The sum of some requests.

    `principal`, `model`, `provider` and `day` (UTC, of `accepted_at`) say of which; one that was not asked
    for is None.  `principal` "" stands for requests without a key, `provider` "" for those that reached
    none, and `model` "" for those of them that no cache answered either: clients make up names.  `cost` is
    in picodollars and holds nothing for the `unpriced` requests, whose price is unknown.  `estimated`
    counts the requests that are in it by estimate.
    """

    principal: str | None = None
    model: str | None = None
    provider: str | None = None
    day: date | None = None
    requests: int = 0
    unpriced: int = 0
    estimated: int = 0
    input_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    cache_write_1h_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    cost: int = 0


def record_of(context: Context, outcome: Outcome) -> Record:
    """Return the record of a request that has ended."""
    usage, started_at, first_byte = outcome.usage, context.started_at, outcome.first_byte_seconds
    return Record(
        id=context.request_id,
        accepted_at=round(started_at * MICROSECONDS),
        first_byte_at=None if first_byte is None else round((started_at + first_byte) * MICROSECONDS),
        ended_at=round((started_at + outcome.duration_seconds) * MICROSECONDS),
        principal=context.principal,
        operation=context.operation,
        dialect=context.dialect,
        model_asked=_kept(context.model_asked),
        model=_kept(context.model),
        model_answered=None if outcome.model_answered is None else _kept(outcome.model_answered),
        provider=context.provider,
        upstream_model=context.upstream_model,
        attempts=tuple(map(_attempt, outcome.attempts)),
        status=outcome.status,
        ended_by=outcome.ended_by,
        reason=outcome.reason,
        message=None if outcome.message is None else _kept(outcome.message),
        stream=context.stream,
        usage=None if usage is None else _tokens(usage),
        cost=outcome.cost,
        price_row=None if outcome.price is None else _row(outcome.price),
        other_price_rows=_rows(outcome.other_prices) if outcome.other_prices else {},
        cache_hit=outcome.cache_hit,
        bytes_in=outcome.bytes_in,
        bytes_out=outcome.bytes_out,
    )


def reservation_of(
    context: Context,
    *,
    prompt_tokens: int,
    max_completion_tokens: int,
    estimated_cost: int | None,
    price: PriceRow | None = None,
) -> Reservation:
    """Return what is to be noted of a request before its current attempt."""
    return Reservation(
        id=context.request_id,
        accepted_at=round(context.started_at * MICROSECONDS),
        principal=context.principal,
        operation=context.operation,
        dialect=context.dialect,
        model_asked=_kept(context.model_asked),
        model=_kept(context.model),
        provider=context.provider,
        upstream_model=context.upstream_model,
        stream=context.stream,
        prompt_tokens=prompt_tokens,
        max_completion_tokens=max_completion_tokens,
        estimated_cost=estimated_cost,
        price_row=None if price is None else _row(price),
    )


def microseconds(seconds: float) -> int:
    """Return a time in seconds in whole microseconds."""
    return round(seconds * MICROSECONDS)


def encode(kept: Record | Reservation) -> bytes:
    """Return one line of JSON, without its end."""
    return msgspec.json.encode(kept)


def decode_record(data: bytes) -> Record:
    """Return what `encode` was given.  Raises `msgspec.MsgspecError` for anything else."""
    return _RECORDS.decode(data)


def decode_reservation(data: bytes) -> Reservation:
    """Return what `encode` was given.  Raises `msgspec.MsgspecError` for anything else."""
    return _RESERVATIONS.decode(data)


_RECORDS = msgspec.json.Decoder(Record)
_RESERVATIONS = msgspec.json.Decoder(Reservation)


@lru_cache(1024)
def _row(price: PriceRow) -> dict[str, Any]:
    # The same few rows, again and again.
    return attrs.asdict(price)


def _rows(prices: Mapping[str, PriceRow]) -> dict[str, dict[str, Any]]:
    several = islice(prices.items(), MOST_OTHER_MODELS)
    return {model: _row(price) for model, price in several if len(model) <= LONGEST_TEXT}


def _attempt(attempt: AttemptMade) -> Attempt:
    return Attempt(
        provider=attempt.provider,
        model=attempt.model,
        status=attempt.status,
        error=attempt.error,
        started_after_seconds=attempt.started_after_seconds,
        duration_seconds=attempt.duration_seconds,
    )


def _tokens(usage: Usage) -> Tokens:
    calls = usage.server_tool_calls
    return Tokens(
        input_tokens=usage.input_tokens,
        cache_read_tokens=usage.cache_read_tokens,
        cache_write_tokens=usage.cache_write_tokens,
        cache_write_1h_tokens=usage.cache_write_1h_tokens,
        output_tokens=usage.output_tokens,
        reasoning_tokens=usage.reasoning_tokens,
        server_tool_calls=_calls(calls) if calls else {},
        raw=usage.raw.decode("utf-8", "replace") if len(usage.raw) <= LONGEST_RAW_USAGE else "",
        complete=usage.complete,
    )


def _calls(calls: Mapping[str, int]) -> dict[str, int]:
    return {_kept(name): number for name, number in islice(calls.items(), MOST_TOOLS)}


def _kept(text: str) -> str:
    if text.isascii() and len(text) <= LONGEST_TEXT and "\0" not in text:
        return text
    # Half a surrogate pair is no UTF-8, and PostgreSQL takes no NUL: a record must fit every store.
    whole = text[:LONGEST_TEXT].encode("utf-8", "replace").decode()
    return whole.replace("\0", "\N{REPLACEMENT CHARACTER}")
