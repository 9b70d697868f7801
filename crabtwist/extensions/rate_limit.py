"""
The `rate_limit` extension: requests and tokens a minute, and requests at once.

Everything is looked at before anything is charged, so a refused request costs nobody anything.  Tokens
are charged from an estimate when a request begins and corrected when it has ended, so requests that run
at once cannot use together what each might have used alone.

Where the store is one that nodes share, the limits are those of all nodes together, by `leases`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from math import ceil
from operator import itemgetter, sub
from typing import Any

import attrs
import msgspec
from twisted.application.service import IService, Service
from twisted.internet.defer import Deferred, succeed
from zope.interface import implementer

from crabtwist.charges import may_be_billed
from crabtwist.dialects.operations import OPERATIONS
from crabtwist.errors import Refused
from crabtwist.extension import Extension
from crabtwist.leases import Leases, WithoutStore
from crabtwist.meters import IDLE_SECONDS, Amounts, Meter, SharedMeter, Standing
from crabtwist.terms import KINDS, LimitSettings
from crabtwist.values import BYTES_PER_TOKEN, Context, Outcome

#: The answer's length where the client sets no bound.
ESTIMATED_OUTPUT_TOKENS = 1024

#: What uses no tokens.
_TOKENLESS = frozenset(operation.name for operation in OPERATIONS.values() if not operation.counts)

#: As `Amounts`.
_ONE_REQUEST = (1, 0, 0)

#: When to ask again where the store has to come back.
STORE_RETRY_SECONDS = 5


@attrs.frozen(kw_only=True)
class RateLimitSettings(LimitSettings):
    """
    The limits of each key; beside them those of everybody together, and exceptions.

    `keys.NAME` stands in the place of the limits of that key, and what a key brings with it in the place of
    both; `models.NAME` are those of each key for one model, beside all others.  `without_store` says what to
    do while nodes cannot hear of each other.
    """

    all: LimitSettings | None = None
    keys: Mapping[str, LimitSettings] = attrs.field(factory=dict)
    models: Mapping[str, LimitSettings] = attrs.field(factory=dict)
    without_store: WithoutStore = "local"


#: What was estimated for a request, and the meters that it was charged to, with the cells that it is in.
_Charge = tuple[Amounts, list[tuple[Meter, int]]]


@implementer(IService)
class RateLimitExtension(Extension, Service):
    """Refuses what is over a limit with a 429 that says whose, how much, and when to ask again."""

    name = "rate_limit"
    Settings = RateLimitSettings

    def __init__(self, settings: RateLimitSettings, services: Any) -> None:
        self._settings = settings
        self._refuses_alone = settings.without_store == "refuse"
        self._clock = services.clock
        self._leases: Leases | None = None
        if services.storage is not None and services.storage.between_nodes:
            self._leases = Leases(services.storage, self.name, services.clock)
            self._leases.show_in(services)
        self._meters: dict[tuple[str, ...], Meter] = {}
        self._look_for_idle_at = 0.0
        self._charges: dict[str, _Charge] = {}

    def startService(self) -> Deferred[None]:
        """Read what other nodes have used; fails if the store does."""
        super().startService()
        self._look_for_idle_at = self._clock.seconds() + IDLE_SECONDS
        return succeed(None) if self._leases is None else Deferred.fromCoroutine(self._leases.start())

    def stopService(self) -> Deferred[None]:
        """Tell the other nodes what was used here."""
        super().stopService()
        return succeed(None) if self._leases is None else Deferred.fromCoroutine(self._leases.stop())

    def on_request(self, context: Context) -> None:
        """Refuse it, or charge the estimate to all whom it concerns."""
        now = self._clock.seconds()
        if now >= self._look_for_idle_at:
            self._forget_idle(now)
        estimate = _estimate(context)
        meters = self._meters_for(context, now)
        if meters and self._refuses_alone and self._leases is not None and not self._leases.in_touch:
            raise _out_of_touch(meters[0])
        faults = [fault for meter in meters if (fault := meter.fault(now, estimate))]
        if faults:
            words, seconds = max(faults, key=itemgetter(1))
            self._say(context, meters, now)
            raise Refused(
                429,
                None,
                f"{words}; ask again in {seconds} s",
                {"retry-after": str(seconds)},
                slug="rate_limited",
            )
        self._charges[context.request_id] = estimate, [(m, m.charge(now, estimate)) for m in meters]
        self._say(context, meters, now)

    def on_end(self, context: Context, outcome: Outcome) -> None:
        """Correct what was charged."""
        charge = self._charges.pop(context.request_id, None)
        if charge is None:
            return
        estimate, places = charge
        changes = tuple(map(sub, _used(estimate, outcome), estimate))
        for meter, cell in places:
            meter.settle(cell, changes)

    def _meters_for(self, context: Context, now: float) -> list[Meter]:
        settings, key = self._settings, context.principal or "anybody"
        meters: list[Meter] = []
        if settings.all is not None:
            meters += self._meters_of(("all",), settings.all, now)
        # What a key brings with it says more than what the configuration says of it.
        meters += self._meters_of(("key", key), context.limits or settings.keys.get(key, settings), now)
        if context.model in settings.models:
            meters += self._meters_of(("model", key, context.model), settings.models[context.model], now)
        return meters

    def _meters_of(self, scope: tuple[str, ...], limits: LimitSettings, now: float) -> Sequence[Meter]:
        """Return the meter of a scope, which may be new, or have other limits from now on; none without."""
        meter = self._meters.get(scope)
        if meter is None or meter.settings is not limits:
            if limits.are_none:
                return ()
            if meter is None:
                meter = self._meters[scope] = self._make_meter(scope, limits)
            else:
                meter.hold_to(limits)
        meter.asked_at = now
        return (meter,)

    def _make_meter(self, scope: tuple[str, ...], limits: LimitSettings) -> Meter:
        whose = _whose(*scope)
        if self._leases is None:
            return Meter(whose, limits)
        key = msgspec.json.encode(scope)
        return SharedMeter(whose, limits, key=key, clock=self._clock, leases=self._leases)

    def _forget_idle(self, now: float) -> None:
        """Forget whom nobody asks for, or memory would grow with everybody who ever did."""
        self._look_for_idle_at = now + IDLE_SECONDS / 2
        if self._leases is not None:
            # What was there at the start is older than a minute by now.
            self._leases.forget_found(lambda _key: True)
        for scope, meter in list(self._meters.items()):
            if not meter.running and meter.asked_at < now - IDLE_SECONDS:
                del self._meters[scope]
                meter.leave()

    def _say(self, context: Context, meters: list[Meter], now: float) -> None:
        """Put the tightest limit of each kind into the answer's head, as the dialect says it."""
        tightest = meters[0].standings(now) if len(meters) == 1 else _tightest(meters, now)
        said, names, reset = context.answer_headers, _NAMES[context.dialect], _RESETS[context.dialect]
        for column, (left, limit, clear_at) in tightest.items():
            if column in names:
                limit_name, left_name, reset_name = names[column]
                said[limit_name] = b"%d" % limit
                said[left_name] = b"%d" % left if left > 0 else b"0"
                said[reset_name] = reset(clear_at, now)


def _tightest(meters: list[Meter], now: float) -> dict[int, Standing]:
    tightest: dict[int, Standing] = {}
    for meter in meters:
        for column, standing in meter.standings(now).items():
            if column not in tightest or standing[0] < tightest[column][0]:
                tightest[column] = standing
    return dict(sorted(tightest.items()))


def _out_of_touch(meter: Meter) -> Refused:
    return Refused(
        503,
        None,
        f"the store that says how much of its limits {meter.whose} has used does not answer",
        {"retry-after": str(STORE_RETRY_SECONDS)},
        slug="store_unreachable",
    )


def _whose(scope: str, key: str = "", model: str = "") -> str:
    if scope == "all":
        return "everybody together"
    return f"key {key!r}" if scope == "key" else f"key {key!r} with model {model!r}"


def _estimate(context: Context) -> Amounts:
    if context.operation in _TOKENLESS:
        return _ONE_REQUEST
    return 1, context.estimated_prompt_tokens, context.most_output_tokens(ESTIMATED_OUTPUT_TOKENS)


def _used(estimate: Amounts, outcome: Outcome) -> Amounts:
    """Return what a request really used; the estimate where an upstream took it on and nobody counted."""
    if not outcome.attempts:
        # Another guard refused it, or a cache had it.
        return int(outcome.cache_hit), 0, 0
    if not any(map(may_be_billed, outcome.attempts)):
        return _ONE_REQUEST
    if outcome.usage is None:
        return estimate
    output_tokens = outcome.usage.completion_tokens
    if not outcome.usage.complete:
        # An answer is counted at its end; who leaves before must not have had it for nothing.
        sent = outcome.bytes_out // BYTES_PER_TOKEN
        output_tokens = max(output_tokens, min(estimate[2], sent))
    # What the vendor's cache gave is not counted, as at the vendors.
    return 1, outcome.usage.prompt_tokens - outcome.usage.cache_read_tokens, output_tokens


@lru_cache(maxsize=256)
def _timestamp(seconds: int) -> bytes:
    # Costs as much as all the rest of a request's limits, and most requests of a second share it.
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ").encode()


def _names(stem: str) -> tuple[bytes, bytes, bytes]:
    limit, left, reset = (stem.format(word).encode() for word in ("limit", "remaining", "reset"))
    return limit, left, reset


#: By dialect and column, the fields that say a limit, what is left of it, and when all of it will be there.
#: OpenAI's clients know requests and tokens; its tokens are those of the prompt.
_NAMES = {
    "anthropic": {
        column: _names(f"anthropic-ratelimit-{kind.replace('_', '-')}-{{}}")
        for column, kind in enumerate(KINDS)
    },
    "openai": {0: _names("x-ratelimit-{}-requests"), 1: _names("x-ratelimit-{}-tokens")},
}

#: How each dialect says when that is.
_RESETS: Mapping[str, Callable[[int, float], bytes]] = {
    "anthropic": lambda clear_at, _now: _timestamp(clear_at),
    "openai": lambda clear_at, now: b"%ds" % ceil(clear_at - now),
}
