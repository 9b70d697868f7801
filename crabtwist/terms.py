"""What a key may use, as a configuration or an administrator says it: limits, and a budget."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal

import attrs

from crabtwist.money import DOLLAR
from crabtwist.periods import Per, zone_named
from crabtwist.settings import not_negative, positive

#: What is limited by the minute.
KINDS = ("requests", "input_tokens", "output_tokens")


@attrs.frozen(kw_only=True)
class LimitSettings:
    """Limits, each for itself; what is left out is not limited."""

    requests_per_minute: int | None = attrs.field(default=None, validator=positive)
    input_tokens_per_minute: int | None = attrs.field(default=None, validator=positive)
    output_tokens_per_minute: int | None = attrs.field(default=None, validator=positive)
    concurrent_requests: int | None = attrs.field(default=None, validator=positive)

    def per_minute(self) -> dict[str, int]:
        """Return the limits by the minute, by kind."""
        given = {kind: getattr(self, f"{kind}_per_minute") for kind in KINDS}
        return {kind: limit for kind, limit in given.items() if limit is not None}

    @property
    def are_none(self) -> bool:
        """Whether nothing is limited."""
        return (
            self.requests_per_minute is None
            and self.input_tokens_per_minute is None
            and self.output_tokens_per_minute is None
            and self.concurrent_requests is None
        )


def picodollars(dollars: float) -> int:
    """Return dollars as a configuration wrote them, exactly; raises ValueError for too many decimals."""
    # The shortest text that means the float is what stood in the file.
    exact = Decimal(repr(dollars)) * DOLLAR
    if exact != exact.to_integral_value():
        raise ValueError("has more decimals than money here; twelve are the most")
    return int(exact)


def exact_dollars(_instance: object, _attribute: object, value: float | None) -> None:
    """Let through dollars that are whole in picodollars."""
    if value is not None:
        picodollars(value)


def time_zone(_instance: object, _attribute: object, value: str | None) -> None:
    """Let through the names of time zones."""
    if value is not None:
        zone_named(value)


@attrs.frozen(kw_only=True)
class KeyBudgetSettings:
    """One key's own budget; what is left out is as for all."""

    dollars: float | None = attrs.field(default=None, validator=[not_negative, exact_dollars])
    per: Per | None = None
    time_zone: str | None = attrs.field(default=None, validator=time_zone)


def unix_time(text: str) -> float:
    """Return a moment in RFC 3339 ("2027-01-31T18:00:00Z") as Unix time; raises ValueError for other text."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise ValueError('must be a moment with its zone, like "2027-01-31T18:00:00Z"')
    return moment.timestamp()


def moment(_instance: object, _attribute: object, value: str | None) -> None:
    """Let through moments, as `unix_time` reads them."""
    if value is not None:
        unix_time(value)
