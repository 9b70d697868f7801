"""
Money, exact.

Whole picodollars, a millionth of a millionth of a dollar, so that the price of a single token is whole
(published prices have at most five decimals per million tokens) and no sum is ever rounded.  Dollars
exist only where they are shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import attrs

#: One US dollar.
DOLLAR = 10**12


@attrs.frozen
class Rates:
    """Prices of one token, in picodollars, by class; see `crabtwist.values.Usage` for the classes."""

    input: int
    cache_read: int
    cache_write: int
    cache_write_1h: int
    output: int
    reasoning: int


@attrs.frozen(cache_hash=True)
class PriceRow:
    """
    What one model costs.

    `vendor` and `model` name the row.  `long_rates` replace `rates` for a whole request whose prompt,
    cached or not, has more than `long_above` tokens.  `tool_calls` are prices of one call of a vendor's
    tool, by the name in `Usage.server_tool_calls`.
    """

    vendor: str
    model: str
    rates: Rates
    long_above: int | None = None
    long_rates: Rates | None = None
    tool_calls: Mapping[str, int] = attrs.field(factory=dict, hash=False)

    def rates_for(self, prompt_tokens: int) -> Rates:
        """Return the rates of a request with a prompt of this size."""
        if self.long_rates is not None and self.long_above is not None and prompt_tokens > self.long_above:
            return self.long_rates
        return self.rates


@lru_cache(maxsize=64)
def in_dollars(picodollars: int) -> str:
    """Return an amount as people read it, exact and without trailing zeros: "$0.0000125"."""
    sign = "-" if picodollars < 0 else ""
    whole, rest = divmod(abs(picodollars), DOLLAR)
    digits = f"{rest:012d}".rstrip("0")
    return f"{sign}${whole}.{digits.ljust(2, '0')}"
