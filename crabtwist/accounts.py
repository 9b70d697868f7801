"""One key's budget in one period: what was spent, what is reserved, and what other nodes have used of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import UTC, datetime, timedelta
from math import inf

import attrs

from crabtwist.leases import Lease
from crabtwist.periods import Per, Period
from crabtwist.terms import KeyBudgetSettings


@attrs.frozen
class Budget:
    """What one key may spend: `amount` picodollars per `per`, by the clocks of `zone`."""

    amount: int
    per: Per
    zone: str


@attrs.frozen
class BudgetState:
    """
    How a budget stands, on all nodes as far as was heard; amounts in picodollars.

    `reserved` is for what runs, and no part of `spent`.  `label` names the day or month ("" of a total),
    which begins and ends at these Unix times, in whole seconds; None is never.
    """

    principal: str
    per: Per
    label: str
    time_zone: str
    budget: int
    spent: int
    reserved: int
    begins_at: int | None
    ends_at: int | None

    @property
    def left(self) -> int:
        """What may still be reserved; 0 when more was spent than there was."""
        return max(0, self.budget - self.spent - self.reserved)


class Account:
    """
    A `crabtwist.leases.Share` of a budget: this node's part of what was used of it, and the others'.

    What is used is what was spent and what is reserved for requests that run.  A note says both: what was
    used, and how much of that is reserved.  `own` is what the key brought with it, if it brought anything.
    """

    def __init__(
        self, principal: str, budget: Budget, period: Period, own: KeyBudgetSettings | None = None
    ) -> None:
        self.principal = principal
        self.own = own
        self.budget = budget.amount
        self.period = period
        self.key = account_key(principal, period)
        self.ttl_seconds = period.kept_seconds
        self.ends_at = inf if period.ends_at is None else period.ends_at
        self.lease = Lease()
        self.reserved = 0
        self.running = 0
        #: What the others have used.
        self.others = 0
        self._heard: dict[bytes, tuple[int, int]] = {}

    def note(self) -> bytes:
        """Say what this node has used, and how much of that is reserved."""
        return b"%d %d" % (self.lease.say(), self.reserved)

    def hear(self, others: Mapping[bytes, bytes]) -> None:
        """Take what the other members have used; of one that is gone from the board the last note stays."""
        self.lease.was_heard()
        for member, note in others.items():
            used, reserved, *_ = map(int, note.split())
            self._heard[member] = used, reserved
        self.others = sum(used for used, _ in self._heard.values())

    # Using it.

    def reserve(self, amount: int) -> None:
        """Set an amount aside for a request that begins."""
        self.lease.used += amount
        self.reserved += amount
        self.running += 1

    def settle(self, reserved: int, spent: int) -> None:
        """Put what a request cost in the place of what was reserved for it."""
        self.lease.used += spent - reserved
        self.reserved -= reserved
        self.running -= 1

    # How it stands.

    @property
    def left(self) -> int:
        """What is neither spent nor reserved, as far as is known; negative when more was spent."""
        return self.budget - self.others - self.lease.used

    def part_left(self, nodes: int) -> int:
        """Return what is left of this node's part of what there was when the store was last heard of."""
        ahead = self.lease.ahead
        return (self.left + ahead) // nodes - ahead

    @property
    def is_urgent(self) -> bool:
        """Whether the others should hear of it at once."""
        return self.lease.runs_low(self.budget)

    def state(self, alive: Collection[bytes]) -> BudgetState:
        """Return how it stands; what members that are not `alive` had reserved counts as spent."""
        theirs = sum(reserved for member, (_, reserved) in self._heard.items() if member in alive)
        period = self.period
        return BudgetState(
            principal=self.principal,
            per=period.per,
            label=period.label,
            time_zone=period.zone,
            budget=self.budget,
            spent=self.lease.used - self.reserved + self.others - theirs,
            reserved=self.reserved + theirs,
            begins_at=None if period.begins_at is None else int(period.begins_at),
            ends_at=None if period.ends_at is None else int(period.ends_at),
        )


def account_key(principal: str, period: Period) -> bytes:
    """Return the key of an account's board: the period's three words, then the principal, whatever it is."""
    return f"{period.name} {principal}".encode()


def principal_in(key: bytes) -> str | None:
    """Return whose account a board is, None if it is none."""
    words = key.decode().split(" ", 3)
    return words[3] if len(words) == 4 else None


def is_over(key: bytes, now: float) -> bool:
    """Say whether a board is no account's, or of a period that had ended everywhere at a Unix time."""
    words = key.decode().split(" ", 3)
    if len(words) < 4:
        return True
    per, label = words[:2]
    # Somewhere it is still yesterday.
    yesterday = (datetime.fromtimestamp(now, UTC) - timedelta(days=1)).date().isoformat()
    return per != "total" and label < yesterday[: len(label)]
