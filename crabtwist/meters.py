"""
Meters: what one scope, such as a key, has used of its limits, and whether a request still fits.

A plain meter counts for one process.  A shared one knows the other nodes too, through `leases`: a request
has to fit with what all have used as far as was heard, and this node may only go a block ahead of what the
others have heard.
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import msgspec
from twisted.internet.interfaces import IReactorTime

from crabtwist.leases import Lease, Leases
from crabtwist.terms import LimitSettings
from crabtwist.windows import COARSE_SECONDS, MINUTE_SECONDS, SlidingMinute

_WORDS = {"requests": "requests", "input_tokens": "input tokens", "output_tokens": "output tokens"}

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
    """What one scope has used: windows by kind, and requests that run."""

    def __init__(self, whose: str, settings: LimitSettings) -> None:
        self.whose = whose
        self.running = 0
        self.asked_at = 0.0
        self.windows: dict[str, SlidingMinute] = {}
        #: What other nodes have used, for kinds where there are any.
        self.elsewhere: dict[str, SlidingMinute] = {}
        self.hold_to(settings)

    def hold_to(self, settings: LimitSettings) -> None:
        """Hold the scope to other limits from now on; what it has used stays used."""
        self.settings = settings
        self.limits = settings.per_minute()
        self.concurrent_limit = settings.concurrent_requests
        self.windows = {kind: self.windows.get(kind) or SlidingMinute() for kind in self.limits}

    def running_elsewhere(self) -> int:
        """Return how many requests other nodes run."""
        return 0

    def standings(self, now: float) -> dict[str, Standing]:
        """Return how each limit by the minute stands, for all nodes, by kind."""
        standings = {}
        for kind, limit in self.limits.items():
            used, clear_at = self.windows[kind].used_until(now)
            others = self.elsewhere.get(kind)
            if others is not None:
                used_there, clear_there = others.used_until(now)
                used, clear_at = used + used_there, max(clear_at, clear_there)
            standings[kind] = limit - used, limit, clear_at
        return standings

    def wait_seconds(self, kind: str, now: float, room: int) -> int:
        """Return in how many whole seconds all have used no more than `room`."""
        return self.windows[kind].wait_seconds(now, room, self.elsewhere.get(kind))

    def fault(self, now: float, estimate: Mapping[str, int]) -> _Fault | None:
        """Return why a request does not fit, None if it does."""
        concurrent = self.concurrent_limit
        if concurrent is not None and self.running + self.running_elsewhere() >= concurrent:
            return f"{self.whose} may use {concurrent} requests at once, and has", CONCURRENT_RETRY_SECONDS
        for kind, limit in self.limits.items():
            others = self.elsewhere.get(kind)
            used = self.windows[kind].at(now) + (0 if others is None else others.at(now))
            # Whoever wants more than all gets it when nothing else is used; else it could never be had.
            if used and used + estimate[kind] > limit:
                wait = self.wait_seconds(kind, now, max(0, limit - estimate[kind]))
                return f"{self.whose} may use {limit} {_WORDS[kind]} a minute, and has", wait
        return None

    def charge(self, now: float, estimate: Mapping[str, int]) -> dict[str, int]:
        """Use what is estimated; returns where it was put down."""
        self.running += 1
        return {kind: window.add(now, estimate[kind]) for kind, window in self.windows.items()}

    def settle(self, cells: Mapping[str, int], change: Mapping[str, int]) -> None:
        """Make good what the estimate was wrong by."""
        self.running -= 1
        for kind, cell in cells.items():
            if change[kind]:
                self.correct(kind, cell, change[kind])

    def correct(self, kind: str, cell: int, change: int) -> int:
        """Change what was put down; returns the change that was made."""
        window = self.windows.get(kind)
        # The limit may have been lifted since.
        return 0 if window is None else window.correct(cell, change)

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
        self._amounts: dict[str, Lease] = {}
        self._heard: dict[bytes, _Heard] = {}
        super().__init__(whose, settings)
        leases.join(self)

    def hold_to(self, settings: LimitSettings) -> None:
        """Hold the scope to other limits from now on."""
        super().hold_to(settings)
        self._amounts = {kind: self._amounts.get(kind) or Lease() for kind in self.limits}
        self._add_up()

    # Deciding.

    def running_elsewhere(self) -> int:
        """Return how many requests the living among the other nodes run."""
        alive = self._leases.alive()
        return sum(each.running for member, each in self._heard.items() if member in alive)

    def fault(self, now: float, estimate: Mapping[str, int]) -> _Fault | None:
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

    def _fault_alone(self, now: float, estimate: Mapping[str, int]) -> _Fault | None:
        words = "{} may use {} {}, {} of them by this node while it cannot reach the store, and has"
        nodes, concurrent = self._leases.nodes, self.concurrent_limit
        if concurrent is not None and self.running >= (part := max(1, concurrent // nodes)):
            return words.format(self.whose, concurrent, "requests at once", part), CONCURRENT_RETRY_SECONDS
        for kind, limit in self.limits.items():
            part = max(1, limit // nodes)
            wait = self.windows[kind].wait_seconds(now, max(0, part - estimate[kind]))
            if wait:
                return words.format(self.whose, limit, f"{_WORDS[kind]} a minute", part), wait
        return None

    def _covers(self, estimate: Mapping[str, int]) -> bool:
        if self.concurrent_limit is not None and not self._slots.covers(1, self.concurrent_limit):
            return False
        return all(lease.covers(estimate[kind], self.limits[kind]) for kind, lease in self._amounts.items())

    def _runs_low(self) -> bool:
        if self.concurrent_limit is not None and self._slots.runs_low(self.concurrent_limit):
            return True
        return any(lease.runs_low(self.limits[kind]) for kind, lease in self._amounts.items())

    # Counting.

    def charge(self, now: float, estimate: Mapping[str, int]) -> dict[str, int]:
        """Use what is estimated, and have it told."""
        self._slots.used += 1
        for kind, lease in self._amounts.items():
            lease.used += estimate[kind]
        self._leases.changed(self, urgent=self._leases.nodes > 1 and self._runs_low())
        return super().charge(now, estimate)

    def settle(self, cells: Mapping[str, int], change: Mapping[str, int]) -> None:
        """Make good what the estimate was wrong by, and have it told."""
        self._slots.used -= 1
        super().settle(cells, change)
        self._leases.changed(self)

    def correct(self, kind: str, cell: int, change: int) -> int:
        """Change what was put down."""
        made = super().correct(kind, cell, change)
        # What is given back is not had again before it was heard: it may be forgotten elsewhere by then.
        if made > 0 and kind in self._amounts:
            self._amounts[kind].used += made
        return made

    # Telling and hearing.

    def note(self) -> bytes:
        """Say what this node has used within the last minute, and how many requests it runs."""
        for lease in (self._slots, *self._amounts.values()):
            lease.say()
        now = self._clock.seconds()
        return _encode((self.running, {kind: window.coarse(now) for kind, window in self.windows.items()}))

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
        self.elsewhere = {
            kind: SlidingMinute(cell for heard in self._heard.values() for cell in heard.cells.get(kind, ()))
            for kind in self.limits
        }

    def leave(self) -> None:
        """Be forgotten; what the others have not heard yet is still told."""
        self._leases.leave(self)
