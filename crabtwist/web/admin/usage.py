"""The doors of sums: what was used and spent, by whom, and how budgets stand."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import date
from typing import Any, Literal, cast

import attrs
from twisted.internet.defer import DeferredLock

from crabtwist.errors import Refusal
from crabtwist.records import Total
from crabtwist.web.admin.endpoint import ADMIN, Asked, Endpoint, about
from crabtwist.web.admin.inside import Inside
from crabtwist.web.admin.requests import books_of, from_ledger
from crabtwist.web.admin.shown import BudgetShown, TotalShown, budget_shown, total_shown

Group = Literal["principal", "model", "provider", "day"]
OwnGroup = Literal["model", "day"]

_Totals = Callable[..., Awaitable[list[Total]]]


def _day(text: str | None) -> date | None:
    return None if text is None else date.fromisoformat(text)


def a_day(_instance: object, _attribute: object, value: str | None) -> None:
    """Let through days."""
    try:
        _day(value)
    except ValueError:
        raise ValueError("must be a day such as 2026-11-30, in UTC") from None


@attrs.frozen(kw_only=True)
class Days:
    """From which day on, and until before which."""

    since: str | None = attrs.field(default=None, validator=a_day, metadata=about("the first day, in UTC"))
    until: str | None = attrs.field(default=None, validator=a_day, metadata=about("the day after the last"))

    @property
    def bounds(self) -> dict[str, date | None]:
        """Return both as days."""
        return {"since": _day(self.since), "until": _day(self.until)}


@attrs.frozen(kw_only=True)
class Sums(Days):
    """Which sums."""

    by: tuple[Group, ...] = attrs.field(default=(), metadata=about("left out, there is one total"))


@attrs.frozen(kw_only=True)
class OwnSums(Days):
    """Which sums of one's own."""

    by: tuple[OwnGroup, ...] = attrs.field(default=(), metadata=about("left out, there is one total"))


@attrs.frozen(slots=False)
class Totals:
    """Sums, sorted by what they are by."""

    by: tuple[str, ...]
    totals: tuple[TotalShown, ...]


@attrs.frozen(slots=False)
class Budgets:
    """The budgets that keys bring with them, that the configuration names, or that somebody has spent of."""

    budgets: tuple[BudgetShown, ...]


@attrs.frozen(slots=False)
class OwnUsage:
    """What one key has used; `budget` is null where it has none."""

    principal: str
    by: tuple[str, ...]
    totals: tuple[TotalShown, ...]
    budget: BudgetShown | None


def usage_endpoints(inside: Inside) -> list[Endpoint]:
    """Return the endpoints of sums; one of them is for whoever has a key."""
    own = _Own(inside)
    nothing_kept = {404: "nobody counts what is used", 503: "the ledger does not answer"}
    return [
        Endpoint(
            "GET",
            f"{ADMIN}usage",
            "Sum up what was used and spent",
            lambda asked: _totals(inside, asked.query),
            query=Sums,
            answer=Totals,
            refusals=nothing_kept,
        ),
        Endpoint(
            "GET",
            f"{ADMIN}budgets",
            "Show how budgets stand",
            lambda _asked: _budgets(inside),
            description="Those of all nodes, as far as this one has heard.",
            answer=Budgets,
        ),
        Endpoint(
            "GET",
            "/v1/usage",
            "Sum up what the key that asks has used and spent",
            own.show,
            query=OwnSums,
            answer=OwnUsage,
            refusals=nothing_kept,
            for_keys=True,
        ),
    ]


async def _totals(inside: Inside, query: Sums) -> Totals:
    found = await from_ledger(_source(inside)(query.by, **query.bounds))
    return Totals(query.by, tuple(map(total_shown, found)))


def _source(inside: Inside) -> _Totals:
    """Return what sums up: the ledger, or where there is none the extension that counts without."""
    counting = inside.extension("usage")
    if inside.gateway.books is None and hasattr(counting, "totals"):
        return cast(_Totals, counting.totals)
    return cast(_Totals, books_of(inside).ledger.totals)


def _budgets(inside: Inside) -> Budgets:
    budget = inside.extension("budget")
    if budget is None:
        return Budgets(())
    for key in inside.gateway.keys or ():
        # What a key brings with it is only known from its requests else, and not after a start.
        if key.budget is not None:
            budget.state_of(key.name, key.budget)
    return Budgets(tuple(map(budget_shown, budget.state())))


class _Own:
    """What is shown to keys, of themselves."""

    def __init__(self, inside: Inside) -> None:
        self._inside = inside
        # However many keys ask at once, the ledger has one of their questions to answer.
        self._lock = DeferredLock()

    async def show(self, asked: Asked) -> OwnUsage:
        """Show one key what it has used."""
        key = asked.key
        if key is None:
            raise Refusal(404, "no_keys", "this gateway has no keys, so nobody's use is told from another's")
        source, query = _source(self._inside), asked.query
        await self._lock.acquire()
        try:
            totals = await from_ledger(source(("principal", *query.by), **query.bounds))
        finally:
            self._lock.release()
        mine = [total for total in totals if total.principal == key.name]
        return OwnUsage(key.name, query.by, tuple(map(total_shown, mine)), self._budget(key))

    def _budget(self, key: Any) -> BudgetShown | None:
        extension = self._inside.extension("budget")
        state = None if extension is None else extension.state_of(key.name, key.budget)
        return None if state is None else budget_shown(state)
