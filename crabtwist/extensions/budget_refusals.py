"""What a budget refuses, in words: whose it is, how much, until when, and whether asking again may help."""

from __future__ import annotations

from crabtwist.accounts import Account, BudgetState
from crabtwist.errors import Refused
from crabtwist.money import in_dollars
from crabtwist.settings import key_path
from crabtwist.values import Context

#: When to ask again where only requests that run are in the way: nobody knows when one of them ends.
RESERVED_RETRY_SECONDS = 1

#: When to ask again where the store is.
WITHOUT_STORE_RETRY_SECONDS = 5

_STOP = {"x-should-retry": "false"}


def _span(account: Account) -> str:
    until = account.period.until
    return f"for the {account.period.per}, which ends {until}" if until else "in all"


def _more(account: Account) -> str:
    return "" if account.period.until else "; ask whoever runs this gateway for more"


def spent(account: Account, state: BudgetState) -> Refused:
    """Say that it is all spent; clients then stop."""
    return Refused(
        429,
        None,
        f"key {account.principal!r} has spent its budget: {in_dollars(state.spent)} of"
        f" {in_dollars(state.budget)} {_span(account)}{_more(account)}",
        _STOP,
        slug="budget_spent",
    )


def too_dear(account: Account, state: BudgetState, amount: int) -> Refused:
    """Say that a request may cost more than is left; asking again changes nothing."""
    return Refused(
        429,
        None,
        f"this request may cost {in_dollars(amount)}, and key {account.principal!r} has"
        f" {in_dollars(state.budget - state.spent)} left of its {in_dollars(state.budget)} {_span(account)};"
        f" set a lower max_tokens, or ask for less{_more(account)}",
        _STOP,
        slug="budget_too_small",
    )


def reserved(account: Account, state: BudgetState) -> Refused:
    """Say that only requests that run are in the way."""
    return _soon(
        f"what key {account.principal!r} has left of its {in_dollars(state.budget)} {_span(account)} is"
        f" reserved for requests that still run ({in_dollars(state.reserved)})"
    )


def unheard(account: Account, state: BudgetState) -> Refused:
    """Say that a node has first to tell the others what it has let in."""
    return _soon(
        f"the nodes of this gateway are telling each other what key {account.principal!r} has left of its"
        f" {in_dollars(state.budget)} {_span(account)}"
    )


def _soon(why: str) -> Refused:
    return Refused(
        429,
        None,
        f"{why}; ask again in {RESERVED_RETRY_SECONDS} s",
        {"retry-after": str(RESERVED_RETRY_SECONDS)},
        slug="budget_reserved",
    )


def without_store(account: Account) -> Refused:
    """Say that nobody knows what is left while the store is out of reach."""
    return Refused(
        503,
        None,
        f"the gateway cannot reach its store, so nobody can say what key {account.principal!r} has left of"
        f" its budget; ask again in {WITHOUT_STORE_RETRY_SECONDS} s",
        {"retry-after": str(WITHOUT_STORE_RETRY_SECONDS)},
        slug="store_unreachable",
    )


def unpriced(context: Context, account: Account) -> Refused:
    """Say that nobody knows what a model costs; after a 403 real clients stop by themselves."""
    return Refused(
        403,
        None,
        f"nobody knows what model {context.model!r} costs, and key {account.principal!r} has a budget;"
        f" whoever runs this gateway can give it a price in [{key_path('models', context.model)}], or set"
        " `unknown_price` in [extensions.budget]",
        _STOP,
        slug="price_unknown",
    )
