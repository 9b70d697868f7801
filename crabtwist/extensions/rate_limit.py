"""
The `rate_limit` extension: requests and tokens a minute, and requests at once.

Everything is looked at before anything is charged, so a refused request costs nobody anything.  Tokens
are charged from an estimate when a request begins and corrected when it has ended, so requests that run
at once cannot use together what each might have used alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import attrs

from crabtwist.errors import Refused
from crabtwist.extension import Extension
from crabtwist.settings import positive
from crabtwist.values import Context, Outcome
from crabtwist.windows import SlidingMinute

#: The answer's length where the client sets no bound.
ESTIMATED_OUTPUT_TOKENS = 1024

#: When to ask again where requests at once are the limit: nobody knows when one of them ends.
CONCURRENT_RETRY_SECONDS = 1

_KINDS = ("requests", "input_tokens", "output_tokens")
_WORDS = {"requests": "requests", "input_tokens": "input tokens", "output_tokens": "output tokens"}


@attrs.frozen(kw_only=True)
class LimitSettings:
    """Limits, each for itself; what is left out is not limited."""

    requests_per_minute: int | None = attrs.field(default=None, validator=positive)
    input_tokens_per_minute: int | None = attrs.field(default=None, validator=positive)
    output_tokens_per_minute: int | None = attrs.field(default=None, validator=positive)
    concurrent_requests: int | None = attrs.field(default=None, validator=positive)

    def per_minute(self) -> dict[str, int]:
        """Return the limits by the minute, by kind."""
        given = {kind: getattr(self, f"{kind}_per_minute") for kind in _KINDS}
        return {kind: limit for kind, limit in given.items() if limit is not None}


@attrs.frozen(kw_only=True)
class RateLimitSettings(LimitSettings):
    """
    The limits of each key; beside them those of everybody together, and exceptions.

    `keys.NAME` stands in the place of the limits of that key; `models.NAME` are those of each key for one
    model, beside all others.
    """

    all: LimitSettings | None = None
    keys: Mapping[str, LimitSettings] = attrs.field(factory=dict)
    models: Mapping[str, LimitSettings] = attrs.field(factory=dict)


class _Meter:
    """What one scope has used: windows by kind, and requests that run."""

    def __init__(self, whose: str, limits: LimitSettings) -> None:
        self.whose = whose
        self.limits = limits.per_minute()
        self.concurrent_limit = limits.concurrent_requests
        self.running = 0
        self.windows = {kind: SlidingMinute() for kind in self.limits}

    def fault(self, now: float, estimate: Mapping[str, int]) -> tuple[str, int] | None:
        """Return what is used up, in words, and in how many seconds to ask again; None if nothing is."""
        if self.concurrent_limit is not None and self.running >= self.concurrent_limit:
            return f"{self.concurrent_limit} requests at once", CONCURRENT_RETRY_SECONDS
        for kind, limit in self.limits.items():
            # Whoever wants more than all gets it when nothing else is used; else it could never be had.
            room = max(0, limit - estimate[kind])
            wait = self.windows[kind].wait_seconds(now, room)
            if wait:
                return f"{limit} {_WORDS[kind]} a minute", wait
        return None

    def charge(self, now: float, estimate: Mapping[str, int]) -> dict[str, int]:
        """Use what is estimated; returns where it was put down."""
        self.running += 1
        return {kind: window.add(now, estimate[kind]) for kind, window in self.windows.items()}

    def settle(self, cells: Mapping[str, int], change: Mapping[str, int]) -> None:
        """Make good what the estimate was wrong by."""
        self.running -= 1
        for kind, cell in cells.items():
            self.windows[kind].correct(cell, change[kind])


@attrs.frozen
class _Charge:
    estimate: Mapping[str, int]
    places: tuple[tuple[_Meter, Mapping[str, int]], ...]


class RateLimitExtension(Extension):
    """Refuses what is over a limit with a 429 that says whose, how much, and when to ask again."""

    name = "rate_limit"
    Settings = RateLimitSettings

    def __init__(self, settings: RateLimitSettings, services: Any) -> None:
        self._settings = settings
        self._clock = services.clock
        self._meters: dict[tuple[str, ...], _Meter] = {}
        self._charges: dict[str, _Charge] = {}

    def on_request(self, context: Context) -> None:
        """Refuse it, or charge the estimate to all whom it concerns."""
        now = self._clock.seconds()
        estimate = _estimate(context)
        meters = self._meters_for(context)
        faults = [(meter, fault) for meter in meters if (fault := meter.fault(now, estimate))]
        if faults:
            meter, (what, seconds) = max(faults, key=lambda each: each[1][1])
            self._say(context, meters, now)
            raise Refused(
                429,
                None,
                f"{meter.whose} may use {what}, and has; ask again in {seconds} s",
                {"retry-after": str(seconds)},
                slug="rate_limited",
            )
        places = tuple((meter, meter.charge(now, estimate)) for meter in meters)
        self._charges[context.request_id] = _Charge(estimate, places)
        self._say(context, meters, now)

    def on_end(self, context: Context, outcome: Outcome) -> None:
        """Correct what was charged."""
        charge = self._charges.pop(context.request_id, None)
        if charge is None:
            return
        used = _used(charge.estimate, outcome)
        change = {kind: used[kind] - charge.estimate[kind] for kind in _KINDS}
        for meter, cells in charge.places:
            meter.settle(cells, change)

    def _meters_for(self, context: Context) -> list[_Meter]:
        settings, key = self._settings, context.principal or "anybody"
        meters = []
        if settings.all is not None:
            meters.append(self._meter(("all",), "everybody together", settings.all))
        own = settings.keys.get(key, settings)
        meters.append(self._meter(("key", key), f"key {key!r}", own))
        if context.model in settings.models:
            whose = f"key {key!r} with model {context.model!r}"
            meters.append(self._meter(("model", key, context.model), whose, settings.models[context.model]))
        return meters

    def _meter(self, scope: tuple[str, ...], whose: str, limits: LimitSettings) -> _Meter:
        meter = self._meters.get(scope)
        if meter is None:
            meter = self._meters[scope] = _Meter(whose, limits)
        return meter

    def _say(self, context: Context, meters: list[_Meter], now: float) -> None:
        """Put the tightest limit of each kind into the answer's head, as the dialect says it."""
        for kind in _KINDS:
            limited = [meter for meter in meters if kind in meter.limits]
            if not limited:
                continue
            tightest = min(limited, key=lambda meter: meter.limits[kind] - meter.windows[kind].at(now))
            limit, window = tightest.limits[kind], tightest.windows[kind]
            left, reset = max(0, limit - window.at(now)), window.wait_seconds(now, 0)
            context.answer_headers.update(_headers(context.dialect, kind, limit, left, reset, now))


def _estimate(context: Context) -> dict[str, int]:
    given = context.max_tokens
    return {
        "requests": 1,
        "input_tokens": context.estimated_prompt_tokens,
        "output_tokens": ESTIMATED_OUTPUT_TOKENS if given is None else given,
    }


def _used(estimate: Mapping[str, int], outcome: Outcome) -> Mapping[str, int]:
    """Return what a request really used; the estimate where an upstream was asked and nobody counted."""
    if not outcome.attempts:
        # Another guard refused it, or a cache had it.
        return {"requests": int(outcome.cache_hit), "input_tokens": 0, "output_tokens": 0}
    if outcome.usage is None:
        return estimate
    # What the vendor's cache gave is not counted, as at the vendors.
    return {
        "requests": 1,
        "input_tokens": outcome.usage.prompt_tokens - outcome.usage.cache_read_tokens,
        "output_tokens": outcome.usage.completion_tokens,
    }


def _headers(dialect: str, kind: str, limit: int, left: int, reset: int, now: float) -> dict[str, str]:
    if dialect == "anthropic":
        at = datetime.fromtimestamp(now + reset, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        name = f"anthropic-ratelimit-{kind.replace('_', '-')}"
        return {f"{name}-limit": str(limit), f"{name}-remaining": str(left), f"{name}-reset": at}
    # OpenAI's clients know requests and tokens; its tokens are those of the prompt.
    if kind == "output_tokens":
        return {}
    word = "requests" if kind == "requests" else "tokens"
    return {
        f"x-ratelimit-limit-{word}": str(limit),
        f"x-ratelimit-remaining-{word}": str(left),
        f"x-ratelimit-reset-{word}": f"{reset}s",
    }
