"""Usage into exact money, line by line."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from decimal import Decimal
from functools import cache, lru_cache
from importlib.resources import files
from operator import attrgetter, mul
from typing import Any

import attrs
import msgspec

from crabtwist.dialects.anthropic import usage_from as anthropic_usage
from crabtwist.money import DOLLAR, PriceRow, Rates
from crabtwist.settings import LONGEST_MODEL_NAME, not_negative, positive
from crabtwist.values import Usage

#: What a price per million tokens in dollars is in picodollars per token.
_PER_MILLION = DOLLAR // 10**6

#: How Anthropic and OpenAI date their models.
_DATE = re.compile(r"(?<=.)-(?:[0-9]{8}|[0-9]{4}-[0-9]{2}-[0-9]{2})\Z")

#: Tools of vendors whose calls are counted and cost nothing of their own.
FREE_TOOLS = frozenset({"web_fetch_requests"})

#: The classes of tokens: what a receipt calls them, their number in a `Usage`, and their price in `Rates`.
_CLASSES = (
    ("input", "input_tokens", "input"),
    ("cache read", "cache_read_tokens", "cache_read"),
    ("cache write, 5 minutes", "cache_write_tokens", "cache_write"),
    ("cache write, 1 hour", "cache_write_1h_tokens", "cache_write_1h"),
    ("output", "output_tokens", "output"),
    ("reasoning", "reasoning_tokens", "reasoning"),
)
_counts_of = attrgetter(*(count for _, count, _ in _CLASSES))
_prices_of = attrgetter(*(price for _, _, price in _CLASSES))

#: So many answers of `PriceBook.find` are remembered; upstreams may call their models anything.
MOST_FOUND = 1000


@attrs.frozen
class Line:
    """One line of a receipt: so many of something at so much each, in picodollars."""

    model: str
    what: str
    count: int
    price: int

    @property
    def amount(self) -> int:
        """What the line comes to."""
        return self.count * self.price


@attrs.frozen
class Receipt:
    """
    The arithmetic of one request's cost.

    `unpriced` names the models and tools that no price is known for; their cost is not in the total.
    """

    lines: tuple[Line, ...]
    unpriced: tuple[str, ...] = ()

    @classmethod
    def sum(cls, parts: Iterable[Receipt]) -> Receipt:
        """Return one receipt with the lines of several."""
        several = list(parts)
        lines = tuple(line for part in several for line in part.lines)
        return cls(lines, tuple(dict.fromkeys(name for part in several for name in part.unpriced)))

    @property
    def total(self) -> int:
        """What the request cost, in picodollars."""
        return sum(line.amount for line in self.lines)


class PriceBook:
    """
    All prices: a vendor's row for its model, with overrides by served name.

    `overrides` win over everything.  A model is looked up as the vendor names it, then without a date
    at its end (`-20250929`, `-2025-08-07`), at the vendor of that name or else, if all who have it agree,
    at any.
    """

    def __init__(
        self, rows: Iterable[PriceRow] = (), overrides: Mapping[str, PriceRow] | None = None
    ) -> None:
        self._rows = {(row.vendor, row.model): row for row in rows}
        self._overrides = dict(overrides or {})
        self._by_model: dict[str, list[PriceRow]] = {}
        for row in self._rows.values():
            self._by_model.setdefault(row.model, []).append(row)
        self._found = lru_cache(MOST_FOUND)(self._find)

    def find(self, vendor: str, model: str, served: str = "") -> PriceRow | None:
        """Return the row for a vendor's model; `served` is its name here, for overrides."""
        # A name that is longer is no real one, and not worth the memory.
        find = self._found if len(model) <= LONGEST_MODEL_NAME else self._find
        return find(vendor, model, served)

    def _find(self, vendor: str, model: str, served: str) -> PriceRow | None:
        override = self._overrides.get(served) or self._overrides.get(model)
        if override is not None:
            return override
        for name in (model, _undated(model)):
            row = self._rows.get((vendor, name)) or self._agreed(name)
            if row is not None:
                return row
        return None

    def cost(self, usage: Usage, vendor: str, model: str, served: str) -> tuple[PriceRow | None, int | None]:
        """Return the row for a model and what a usage of it costs, None where a price is unknown."""
        row = self.find(vendor, model, served)
        if row is not None and not usage.server_tool_calls and not _has_iterations(usage):
            # The one line of the receipt that most requests' totals come from, without the receipt.
            return row, sum(map(mul, _counts_of(usage), _prices_of(row.rates_for(usage.prompt_tokens))))
        priced = receipt(usage, row, self, vendor)
        return row, None if priced.unpriced else priced.total

    def named_in(self, usage: Usage, vendor: str) -> dict[str, PriceRow]:
        """Return the rows of the models that a usage's iterations name, as far as there are any."""
        iterations = _iterations(usage)
        if not iterations:
            return {}
        found = {model: self.find(vendor, model) for model, _ in iterations if model}
        return {model: row for model, row in found.items() if row is not None}

    def _agreed(self, model: str) -> PriceRow | None:
        rows = self._by_model.get(model, [])
        return rows[0] if rows and all(row.rates == rows[0].rates for row in rows) else None


def _undated(model: str) -> str:
    return _DATE.sub("", model)


def receipt(usage: Usage, row: PriceRow | None, book: PriceBook, vendor: str) -> Receipt:
    """
    Return the arithmetic for a request's usage.

    `row` is that of the model that answered; where the vendor reports several iterations, each is priced
    by its own model, found in `book`.
    """
    iterations = _iterations(usage)
    if not iterations:
        return Receipt.sum([_tokens(usage, row, ""), _tool_calls(usage, row)])
    parts = [
        _tokens(counted, book.find(vendor, model) if model else row, model) for model, counted in iterations
    ]
    return Receipt.sum([*parts, _tool_calls(usage, row)])


def reserve_cost(row: PriceRow, prompt_tokens: int, output_tokens: int) -> int:
    """Return what so many tokens cost at most, in picodollars: each at the dearest rate that it may have."""
    prompt, output = _dearest(row, prompt_tokens)
    return prompt_tokens * prompt + output_tokens * output


def reserved_lines(row: PriceRow, prompt_tokens: int, output_tokens: int) -> tuple[Line, ...]:
    """Return the lines of `reserve_cost`."""
    prompt, output = _dearest(row, prompt_tokens)
    lines = (
        Line(row.model, "input, estimated", prompt_tokens, prompt),
        Line(row.model, "output, estimated", output_tokens, output),
    )
    return tuple(line for line in lines if line.count)


def _dearest(row: PriceRow, prompt_tokens: int) -> tuple[int, int]:
    rates = row.rates_for(prompt_tokens)
    return max(rates.input, rates.cache_write, rates.cache_write_1h), max(rates.output, rates.reasoning)


def _tokens(usage: Usage, row: PriceRow | None, model: str) -> Receipt:
    if row is None:
        used = usage.prompt_tokens or usage.completion_tokens
        return Receipt((), (model or "model",) if used else ())
    counts, prices = _counts_of(usage), _prices_of(row.rates_for(usage.prompt_tokens))
    counted = zip(_CLASSES, counts, prices, strict=True)
    return Receipt(
        tuple(Line(row.model, what, count, price) for (what, *_), count, price in counted if count)
    )


def _tool_calls(usage: Usage, row: PriceRow | None) -> Receipt:
    known = row.tool_calls if row is not None else {}
    calls = {name: count for name, count in usage.server_tool_calls.items() if name not in FREE_TOOLS}
    lines = [Line(row.model, name, calls[name], known[name]) for name in calls if row and name in known]
    return Receipt(tuple(lines), tuple(sorted(calls.keys() - known.keys())))


def _has_iterations(usage: Usage) -> bool:
    # Or may have: it is the words that are looked for, wherever they stand.
    return b'"iterations"' in usage.raw


def _iterations(usage: Usage) -> list[tuple[str, Usage]]:
    """Return the iterations that a vendor's usage reports, each with its model ("" for the answer's own)."""
    if not _has_iterations(usage):
        return []
    listed = msgspec.json.decode(usage.raw).get("iterations")
    if not isinstance(listed, list):
        return []
    return [
        (str(each.get("model") or ""), anthropic_usage(each, complete=True))
        for each in listed
        if isinstance(each, dict)
    ]


# The published table, and the configuration's own rows.


@cache
def published() -> tuple[PriceRow, ...]:
    """Return the rows of the price list that the package ships."""
    text = files("crabtwist").joinpath("data/models.toml").read_text("utf-8")
    return tuple(rows_from(tomllib.loads(text, parse_float=Decimal)))


@attrs.frozen(kw_only=True)
class ModelSettings:
    """
    One `[models.NAME]`: what a model costs, in dollars per million tokens, `web_search_per_call` in dollars.

    Prices that are left out are those of the class that they are a kind of.  With `tier_above`, those
    that begin with `tier_` hold for requests whose prompt is longer.
    """

    input: float = attrs.field(validator=not_negative)
    output: float = attrs.field(validator=not_negative)
    cache_read: float | None = attrs.field(default=None, validator=not_negative)
    cache_write_5m: float | None = attrs.field(default=None, validator=not_negative)
    cache_write_1h: float | None = attrs.field(default=None, validator=not_negative)
    reasoning: float | None = attrs.field(default=None, validator=not_negative)
    web_search_per_call: float | None = attrs.field(default=None, validator=not_negative)
    tier_above: int | None = attrs.field(default=None, validator=positive)
    tier_input: float | None = attrs.field(default=None, validator=not_negative)
    tier_output: float | None = attrs.field(default=None, validator=not_negative)
    tier_cache_read: float | None = attrs.field(default=None, validator=not_negative)
    tier_cache_write_5m: float | None = attrs.field(default=None, validator=not_negative)
    tier_cache_write_1h: float | None = attrs.field(default=None, validator=not_negative)

    def faults(self, name: str) -> list[str]:
        """Return what is wrong with the prices, if anything is."""
        try:
            self.row(name)
        except ValueError as error:
            return [str(error)]
        return []

    def row(self, name: str) -> PriceRow:
        """Return the row for the model; raises ValueError for prices with too many decimals or of no tier."""
        prices = attrs.asdict(self, filter=lambda _, value: value is not None)
        tier = [key for key in prices if key.startswith("tier_")]
        if tier and self.tier_above is None:
            raise ValueError(f"`{tier[0]}` means nothing without `tier_above`, the size from which it holds")
        # The shortest text that means the float is what stood in the file.
        entry = {key: Decimal(repr(value)) for key, value in prices.items()}
        return row_from("configuration", name, entry)


def rows_from(table: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[PriceRow]:
    """Return the rows of a table of vendors, models and prices per million tokens in dollars."""
    return [
        row_from(vendor, model, entry) for vendor, models in table.items() for model, entry in models.items()
    ]


def row_from(vendor: str, model: str, entry: Mapping[str, Any]) -> PriceRow:
    """
    Return the row of one entry, prices as `Decimal` or int.

    A missing price of a class is that of the class it is a kind of: cached tokens are input, reasoning is
    output, an hour's cache write is five minutes'.  Raises ValueError for a price that is not whole in
    picodollars per token.
    """
    search = entry.get("web_search_per_call")
    above = entry.get("tier_above")
    return PriceRow(
        vendor=vendor,
        model=model,
        rates=_rates(entry, ""),
        long_above=int(above) if above is not None else None,
        long_rates=_rates(entry, "tier_") if above is not None else None,
        tool_calls={} if search is None else {"web_search_requests": _whole(search, DOLLAR)},
    )


def _rates(entry: Mapping[str, Any], prefix: str) -> Rates:
    def price(name: str, otherwise: int) -> int:
        value = entry.get(prefix + name)
        return otherwise if value is None else _whole(value, _PER_MILLION)

    standard = _rates(entry, "") if prefix else None
    given = price("input", standard.input if standard else 0)
    output = price("output", standard.output if standard else 0)
    write = price("cache_write_5m", standard.cache_write if standard else given)
    return Rates(
        input=given,
        output=output,
        cache_read=price("cache_read", standard.cache_read if standard else given),
        cache_write=write,
        cache_write_1h=price("cache_write_1h", standard.cache_write_1h if standard else write),
        reasoning=price("reasoning", output),
    )


def _whole(dollars: Decimal | int, unit: int) -> int:
    exact = Decimal(dollars) * unit
    if exact != exact.to_integral_value() or exact < 0:
        raise ValueError(f"{dollars} has more decimals than money here; six per million tokens are the most")
    return int(exact)
