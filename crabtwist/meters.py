"""
Meters: what one scope, such as a key, has used of its limits, and whether a request still fits.

A plain meter counts for one process.  A shared one knows the other nodes too, through `leases`: a request
has to fit with what all have used as far as was heard, and this node may only go a block ahead of what the
others have heard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import add

import attrs
import msgspec
from twisted.internet.interfaces import IReactorTime

from crabtwist.leases import Lease, Leases
from crabtwist.terms import KINDS, LimitSettings
from crabtwist.windows import COARSE_SECONDS, MINUTE_SECONDS, SlidingMinute

#: Amounts are sequences with one for each of `KINDS`; a column is a place in them.
Amounts = Sequence[int]

_WORDS = tuple(kind.replace("_", " ") for kind in KINDS)

#: When to ask again where requests at once are the limit: nobody knows when one of them ends.
CONCURRENT_RETRY_SECONDS = 1
#: When to ask again where other nodes have to be heard first.
HEARING_RETRY_SECONDS = 1

#: Whose limits nobody asked for this long is forgotten.
IDLE_SECONDS = 120.0

#: What is used up, in words, and in how many seconds to ask again.
_Fault = tuple[str, int]

#: What is left of a limit (less than nothing where more was used), the limit, and when all that is used now
#: will be forgotten, in whole seconds.
Standing = tuple[int, int, int]


class Meter:
    """What one scope has used: a window, and requests that run."""

    def __init__(self, whose: str, settings: LimitSettings) -> None:
        self.whose = whose
        self.running = 0
        self.asked_at = 0.0
        self.window = SlidingMinute(len(KINDS))
        #: What other nodes have used, if there are any.
        self.elsewhere: SlidingMinute | None = None
        self.hold_to(settings)

    def hold_to(self, settings: LimitSettings) -> None:
        """Hold the scope to other limits from now on; what it has used stays used."""
        self.settings = settings
        #: By column, for those that are limited.
        self.limits = {KINDS.index(kind): limit for kind, limit in settings.per_minute().items()}
        self.concurrent_limit = settings.concurrent_requests

    def running_elsewhere(self) -> int:
        """Return how many requests other nodes run."""
        return 0

    def used(self, now: float) -> Amounts:
        """Return what all nodes have used."""
        used = self.window.at(now)
        return used if self.elsewhere is None else list(map(add, used, self.elsewhere.at(now)))

    def standings(self, now: float) -> dict[int, Standing]:
        """Return how each limit by the minute stands, for all nodes, by column."""
        used, clear_at = self.used(now), self.window.clear_at(now)
        if self.elsewhere is not None:
            clear_at = list(map(max, clear_at, self.elsewhere.clear_at(now)))
        return {c: (limit - used[c], limit, clear_at[c]) for c, limit in self.limits.items()}

    def fault(self, now: float, estimate: Amounts) -> _Fault | None:
        """Return why a request does not fit, None if it does."""
        concurrent = self.concurrent_limit
        if concurrent is not None and self.running + self.running_elsewhere() >= concurrent:
            return f"{self.whose} may use {concurrent} requests at once, and has", CONCURRENT_RETRY_SECONDS
        used = self.used(now)
        for column, limit in self.limits.items():
            # Whoever wants more than all gets it when nothing else is used; else it could never be had.
            if used[column] and used[column] + estimate[column] > limit:
                room = max(0, limit - estimate[column])
                wait = self.window.wait_seconds(now, column, room, self.elsewhere)
                return f"{self.whose} may use {limit} {_WORDS[column]} a minute, and has", wait
        return None

    def charge(self, now: float, estimate: Amounts) -> int:
        """Use what is estimated; returns the cell where it was put down."""
        self.running += 1
        return self.window.add(now, estimate)

    def settle(self, cell: int, changes: Amounts) -> None:
        """Make good what the estimate was wrong by."""
        self.running -= 1
        self.window.correct(cell, changes)

    def leave(self) -> None:
        """Be forgotten."""


#: Requests that run, and by kind what was used in which coarse cell.
_Note = tuple[int, dict[str, list[tuple[int, int]]]]
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(_Note).decode


@attrs.frozen
class _Heard:
    """What one other node said; one that is ahead of our time is taken to speak of now."""

    note: bytes
    running: int
    cells: Mapping[str, list[tuple[int, int]]]

    @classmethod
    def read(cls, note: bytes, now: float) -> _Heard:
        try:
            running, cells = _decode(note)
        except msgspec.MsgspecError:
            # Another version's; those are never long side by side.
            return cls(note, 0, {})
        latest = int(now) + COARSE_SECONDS - 1
        return cls(note, running, {kind: [(min(s, latest), n) for s, n in cells[kind]] for kind in cells})

    def until(self) -> float:
        """Return when all of it is forgotten."""
        last = max((second for cells in self.cells.values() for second, _ in cells), default=0)
        return last + MINUTE_SECONDS + 1


class SharedMeter(Meter):
    """A `leases.Share`: what one scope has used on this node, and what is known of the others."""

    ttl_seconds: float | None = IDLE_SECONDS

    def __init__(
        self,
        whose: str,
        settings: LimitSettings,
        *,
        key: bytes,
        clock: IReactorTime,
        leases: Leases,
    ) -> None:
        self.key = key
        self._clock = clock
        self._leases = leases
        self._slots = Lease()
        self._amounts: dict[int, Lease] = {}
        self._heard: dict[bytes, _Heard] = {}
        super().__init__(whose, settings)
        leases.join(self)

    def hold_to(self, settings: LimitSettings) -> None:
        """Hold the scope to other limits from now on."""
        super().hold_to(settings)
        self._amounts = {column: self._amounts.get(column) or Lease() for column in self.limits}
        self._add_up()

    # Deciding.

    def running_elsewhere(self) -> int:
        """Return how many requests the living among the other nodes run."""
        alive = self._leases.alive()
        return sum(each.running for member, each in self._heard.items() if member in alive)

    def fault(self, now: float, estimate: Amounts) -> _Fault | None:
        """Return why a request does not fit, None if it does."""
        fault = super().fault(now, estimate)
        if fault is None:
            if not self._leases.in_touch:
                fault = self._fault_alone(now, estimate)
            elif self._leases.nodes > 1 and not self._covers(estimate):
                words = (
                    f"this node waits to hear how much of the limits of {self.whose} other nodes have used"
                )
                fault = words, HEARING_RETRY_SECONDS
        if fault is not None:
            # Only who tells hears, and the others may have given something back.
            self._leases.changed(self)
        return fault

    def _fault_alone(self, now: float, estimate: Amounts) -> _Fault | None:
        words = "{} may use {} {}, {} of them by this node while it cannot reach the store, and has"
        nodes, concurrent = self._leases.nodes, self.concurrent_limit
        if concurrent is not None and self.running >= (part := max(1, concurrent // nodes)):
            return words.format(self.whose, concurrent, "requests at once", part), CONCURRENT_RETRY_SECONDS
        for column, limit in self.limits.items():
            part = max(1, limit // nodes)
            wait = self.window.wait_seconds(now, column, max(0, part - estimate[column]))
            if wait:
                return words.format(self.whose, limit, f"{_WORDS[column]} a minute", part), wait
        return None

    def _covers(self, estimate: Amounts) -> bool:
        if self.concurrent_limit is not None and not self._slots.covers(1, self.concurrent_limit):
            return False
        return all(lease.covers(estimate[c], self.limits[c]) for c, lease in self._amounts.items())

    def _runs_low(self) -> bool:
        if self.concurrent_limit is not None and self._slots.runs_low(self.concurrent_limit):
            return True
        return any(lease.runs_low(self.limits[column]) for column, lease in self._amounts.items())

    # Counting.

    def charge(self, now: float, estimate: Amounts) -> int:
        """Use what is estimated, and have it told."""
        self._slots.used += 1
        for column, lease in self._amounts.items():
            lease.used += estimate[column]
        self._leases.changed(self, urgent=self._leases.nodes > 1 and self._runs_low())
        return super().charge(now, estimate)

    def settle(self, cell: int, changes: Amounts) -> None:
        """Make good what the estimate was wrong by, and have it told."""
        self._slots.used -= 1
        self.running -= 1
        if self.window.correct(cell, changes):
            # What is given back is not had again before it was heard: it may be forgotten elsewhere by then.
            for column, lease in self._amounts.items():
                lease.used += max(0, changes[column])
        self._leases.changed(self)

    # Telling and hearing.

    def note(self) -> bytes:
        """Say what this node has used within the last minute, and how many requests it runs."""
        for lease in (self._slots, *self._amounts.values()):
            lease.say()
        now = self._clock.seconds()
        cells = {KINDS[column]: self.window.coarse(now, column) for column in self.limits}
        return _encode((self.running, cells))

    def hear(self, others: Mapping[bytes, bytes]) -> None:
        """Take what the others have used; who says nothing any more has still used what it said."""
        for lease in (self._slots, *self._amounts.values()):
            lease.was_heard()
        now = self._clock.seconds()
        news = {
            member: _Heard.read(note, now)
            for member, note in others.items()
            if member not in self._heard or self._heard[member].note != note
        }
        if news:
            alive, known = self._leases.alive(), self._heard | news
            self._heard = {m: h for m, h in known.items() if m in others or m in alive or h.until() > now}
            self._add_up()

    def _add_up(self) -> None:
        amounts = [
            (second, column, amount)
            for heard in self._heard.values()
            for column, kind in enumerate(KINDS)
            for second, amount in heard.cells.get(kind, ())
        ]
        self.elsewhere = SlidingMinute(len(KINDS), amounts) if amounts else None

    def leave(self) -> None:
        """Be forgotten; what the others have not heard yet is still told."""
        self._leases.leave(self)
