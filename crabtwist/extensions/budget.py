"""
The `budget` extension: dollars per key, in all, by the day or by the month.

What a request may cost is reserved when it begins, and made good by what it did cost when it has ended,
however that was.  The nodes tell each other, and the store, what they have used; no request waits for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any, Literal, NamedTuple

import attrs
from twisted.application.service import Service
from twisted.internet.defer import Deferred

from crabtwist.accounts import Account, Budget, BudgetState, is_over, principal_in
from crabtwist.charges import charge, dearest
from crabtwist.dialects.operations import OPERATIONS
from crabtwist.errors import ConfigurationError, Refused
from crabtwist.extension import Extension
from crabtwist.extensions.budget_refusals import (
    reserved,
    spent,
    too_dear,
    unheard,
    unpriced,
    without_store,
)
from crabtwist.leases import Leases, WithoutStore
from crabtwist.money import PriceRow
from crabtwist.periods import Per, period_at
from crabtwist.pricing import ModelSettings
from crabtwist.settings import key_path, not_negative, positive
from crabtwist.terms import KeyBudgetSettings, exact_dollars, picodollars, time_zone
from crabtwist.values import Context, Outcome

#: Who asks without a key.
ANYBODY = "anybody"

#: The answer's length where the client sets no bound, if the configuration does not say.
ESTIMATED_OUTPUT_TOKENS = 4096

#: What no vendor bills.
_FREE = frozenset(operation.name for operation in OPERATIONS.values() if not operation.counts)


@attrs.frozen(kw_only=True)
class BudgetSettings:
    """
    The budget of each key, and exceptions.

    Without `dollars` only those keys have one that are named here, or bring one with them.  `fallback` is
    the price of models that have none of their own, where `unknown_price` says so.
    """

    dollars: float | None = attrs.field(default=None, validator=[not_negative, exact_dollars])
    per: Per = "month"
    time_zone: str = attrs.field(default="UTC", validator=time_zone)
    output_tokens: int = attrs.field(default=ESTIMATED_OUTPUT_TOKENS, validator=positive)
    unknown_price: Literal["refuse", "free", "fallback"] = "refuse"
    fallback: ModelSettings | None = None
    without_store: WithoutStore = "local"
    keys: Mapping[str, KeyBudgetSettings] = attrs.field(factory=dict)

    def __attrs_post_init__(self) -> None:
        """Raise ValueError for what does not go together."""
        if (self.unknown_price == "fallback") != (self.fallback is not None):
            raise ValueError('unknown_price = "fallback" and the table `fallback` need each other')
        faults = [] if self.fallback is None else self.fallback.faults("fallback")
        if faults:
            raise ValueError(f"fallback: {faults[0]}")
        poor = [name for name, own in self.keys.items() if own.dollars is None and self.dollars is None]
        if poor:
            raise ValueError(f"{key_path('keys', poor[0])} has no `dollars`, and there are none for all keys")

    def budget(self, own: KeyBudgetSettings) -> Budget | None:
        """Return the budget of a key with settings of its own, None if it has none."""
        dollars = self.dollars if own.dollars is None else own.dollars
        if dollars is None:
            return None
        return Budget(picodollars(dollars), own.per or self.per, own.time_zone or self.time_zone)


class _Reservation(NamedTuple):
    account: Account
    amount: int
    row: PriceRow | None


class BudgetExtension(Extension, Service):
    """Refuses what a key has no money for, in words that say whose budget, how much, and until when."""

    name = "budget"
    Settings = BudgetSettings

    def __init__(self, settings: BudgetSettings, services: Any) -> None:
        if services.storage is None:
            raise ConfigurationError(["extensions.budget: needs a store, to remember what was spent"])
        self._settings = settings
        self._clock = services.clock
        self._leases = Leases(services.storage, "budget", services.clock)
        self._leases.show_in(services)
        self._shared = bool(services.storage.between_nodes)
        self._fallback = settings.fallback.row("fallback") if settings.fallback is not None else None
        self._default = settings.budget(KeyBudgetSettings())
        self._budgets = {name: settings.budget(own) for name, own in settings.keys.items()}
        self._accounts: dict[str, Account] = {}
        self._next_end = inf
        self._reservations: dict[str, _Reservation] = {}

    # Starting and stopping.

    def startService(self) -> Deferred[None]:
        """Read what was spent before; the Deferred fails if the store does."""
        Service.startService(self)
        return Deferred.fromCoroutine(self._start())

    async def _start(self) -> None:
        await self._leases.start()
        now = self._clock.seconds()
        for principal in (*self._budgets, *map(principal_in, self._leases.found)):
            if principal is not None:
                self._account(principal, None, now)
        self._forget_found(now)

    def stopService(self) -> Deferred[None]:
        """Tell the store what was spent since it last heard."""
        Service.stopService(self)
        return Deferred.fromCoroutine(self._leases.stop())

    # Requests.

    def on_request(self, context: Context) -> None:
        """Reserve what it may cost, or refuse it."""
        account = self._account(context.principal or ANYBODY, context.budget, context.started_at)
        if account is None or context.operation in _FREE:
            return
        row, amount = dearest(
            self._rows(context, account),
            context.estimated_prompt_tokens,
            context.most_output_tokens(self._settings.output_tokens),
        )
        # What costs nothing may be had when nothing is left.
        if amount and not self._may_use(account, amount):
            # Only who tells hears, and the others may have given something back.
            self._leases.changed(account)
            raise self._refusal(account, amount)
        account.reserve(amount)
        self._reservations[context.request_id] = _Reservation(account, amount, row)
        self._leases.changed(account, urgent=account.is_urgent)

    def on_end(self, context: Context, outcome: Outcome) -> None:
        """Put what it cost in the place of what was reserved."""
        reservation = self._reservations.pop(context.request_id, None)
        if reservation is None:
            return
        account, amount = reservation.account, reservation.amount
        account.settle(amount, charge(context, outcome, reservation.row, amount))
        if self._accounts.get(account.principal) is account:
            self._leases.changed(account, urgent=account.is_urgent)
        elif not account.running:
            self._leases.leave(account)

    def state(self) -> list[BudgetState]:
        """Return how every budget stands, by principal; those that nobody asked for yet are left out."""
        self._forget_ended(self._clock.seconds())
        alive = self._alive()
        return [self._accounts[principal].state(alive) for principal in sorted(self._accounts)]

    def state_of(self, principal: str, own: KeyBudgetSettings | None) -> BudgetState | None:
        """Return how a key's budget stands, `own` being what the key brings with it; None without one."""
        account = self._account(principal, own, self._clock.seconds())
        return None if account is None else account.state(self._alive())

    def _alive(self) -> set[bytes]:
        return self._leases.alive() if self._shared else set()

    # Accounts.

    def _account(self, principal: str, own: KeyBudgetSettings | None, now: float) -> Account | None:
        account = self._accounts.get(principal)
        if account is None or now >= account.ends_at or account.own is not own:
            return self._open(principal, own, now)
        return account

    def _open(self, principal: str, own: KeyBudgetSettings | None, now: float) -> Account | None:
        """Return the account of a key that has none yet, whose period is over, or that was given another."""
        # What a key brings with it says more than what the configuration says of it.
        budget = self._budgets.get(principal, self._default) if own is None else self._settings.budget(own)
        self._forget_ended(now)
        old = self._accounts.get(principal)
        if budget is None:
            self._close(old)
            return None
        account = Account(principal, budget, period_at(budget.per, budget.zone, now), own)
        if old is not None and old.key == account.key:
            # The same account, of which it is only said anew how much it may spend.
            old.budget, old.own = budget.amount, own
            return old
        self._close(old)
        self._accounts[principal] = account
        self._next_end = min(self._next_end, account.ends_at)
        self._leases.join(account)
        return account

    def _close(self, account: Account | None) -> None:
        """Drop an account; one that something runs on is left when that has ended."""
        if account is not None:
            del self._accounts[account.principal]
            if not account.running:
                self._leases.leave(account)

    def _forget_ended(self, now: float) -> None:
        """Drop the accounts of periods that are over; those that something runs on go when it has ended."""
        if now < self._next_end:
            return
        ended = [account for account in self._accounts.values() if account.ends_at <= now]
        for account in ended:
            self._close(account)
        self._forget_found(now)
        self._next_end = min((account.ends_at for account in self._accounts.values()), default=inf)

    def _forget_found(self, now: float) -> None:
        self._leases.forget_found(lambda key: is_over(key, now))

    # Deciding.

    def _rows(self, context: Context, account: Account) -> Sequence[PriceRow]:
        """Return the prices that may apply, those that nobody knows replaced as the settings say."""
        known = [row for row in context.prices if row is not None]
        if len(known) < len(context.prices) or not known:
            if self._settings.unknown_price == "refuse":
                raise unpriced(context, account)
            if self._fallback is not None:
                known.append(self._fallback)
        return known

    def _may_use(self, account: Account, amount: int) -> bool:
        if amount > account.left:
            return False
        if not self._shared:
            return True
        if self._leases.in_touch:
            return account.lease.covers(amount, account.budget)
        return self._settings.without_store == "local" and amount <= account.part_left(self._leases.nodes)

    def _refusal(self, account: Account, amount: int) -> Refused:
        state = account.state(self._alive())
        if state.spent >= state.budget:
            return spent(account, state)
        if amount > state.budget - state.spent:
            return too_dear(account, state, amount)
        if amount > account.left:
            return reserved(account, state)
        return unheard(account, state) if self._leases.in_touch else without_store(account)
