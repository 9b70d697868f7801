"""
What several nodes use together, counted by each at once and told to the others in the background.

Each node posts, on a board in the store, how much it has used by itself, as one absolute number or a
window of them, and reads there what the others have.  Telling the same twice changes nothing, and a store
that lost everything is told it again, so nothing drifts apart.  No request ever waits for the store: a node
decides by what it has heard, and may go ahead of what the others have heard of it by a block, its lease,
which every exchange with the store renews.  So the nodes together use more than a limit by no more than
the blocks of those that have not been heard yet.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, Literal, Protocol

import attrs
from twisted.internet.defer import Deferred, DeferredLock
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

#: What changed is told this often, and what matters more at once.
INTERVAL_SECONDS = 0.1
#: Everything is told again this often, so that a store which lost it has it again and nobody's view is older.
REFRESH_SECONDS = 30.0
#: A reply that takes longer than this is not waited for: the node goes on as if the store were gone.
PATIENCE_SECONDS = 0.5
#: How long a store that failed is left alone.
RETRY_SECONDS = 0.5
#: How many shares are told in one call.
MOST_NOTES = 500
#: How often a node says that it is there, and how long after that it counts as dead at the latest.
HEARTBEAT_SECONDS = 2.0
ALIVE_SECONDS = 10.0

#: A block is this part of a limit, or a single request that is larger.
BLOCKS = 10

#: A board that is kept no longer than this after its latest note is begun anew each day.
SHORT_SECONDS = 3600.0

_DAY_SECONDS = 86400
#: A member is dead that was found to say nothing new this often; one time less, for heartbeats may be late.
_MOST_SILENCES = int(ALIVE_SECONDS / HEARTBEAT_SECONDS) - 1

#: What to do while the store is gone: go on with this node's part of each limit, or refuse.
WithoutStore = Literal["local", "refuse"]

Boards = Mapping[bytes, Mapping[bytes, bytes]]


class Share(Protocol):
    """
    One thing that nodes use together, as one of them sees it.

    `key` is the same on all nodes; neither it nor `ttl_seconds` ever changes.
    """

    @property
    def key(self) -> bytes:
        """Return what names it."""

    @property
    def ttl_seconds(self) -> float | None:
        """Return how long its board is kept, None for ever."""

    def note(self) -> bytes:
        """Say what this node has used so far."""

    def hear(self, others: Mapping[bytes, bytes]) -> None:
        """
        Take the notes of the other members, those of the dead included.

        Called when all have heard the latest `note` of this one, and once before the first.  A member
        that was there before is missing when the store lost its note, or when the board is a new one.
        """


@attrs.define
class Lease:
    """How far one node has gone ahead of what the others know, in one amount: `used` less what was heard."""

    used: int = 0
    _said: int = 0
    #: The least that the others may know: what was said and not answered may have been heard or not.
    _known: int = 0

    def say(self) -> int:
        """Return what is to be told now."""
        self._said = self.used
        self._known = min(self._known, self.used)
        return self.used

    def was_heard(self) -> None:
        """Note that all know what was said last."""
        self._known = self._said

    @property
    def ahead(self) -> int:
        """What was used since."""
        return self.used - self._known

    def covers(self, amount: int, limit: int) -> bool:
        """Say whether an amount may be used before the others hear of it: one request, or a block."""
        ahead = self.used - self._known
        return ahead <= 0 or ahead + amount <= limit // BLOCKS

    def runs_low(self, limit: int) -> bool:
        """Say whether half of it is gone, so that it had better be renewed at once."""
        return 2 * (self.used - self._known) >= limit // BLOCKS


class Leases:
    """
    The shares of one extension, told and heard through its namespace of the store.

    `start` first and `stop` last.  `nodes` is how many are alive, this one included, as far as was heard;
    nobody dies while nothing can be heard.
    """

    _log = Logger()

    def __init__(self, storage: Any, namespace: str, clock: IReactorTime, member: bytes = b"") -> None:
        self._storage = storage
        self._namespace = namespace
        self._clock = clock
        #: A process that is started anew is another member: what its former life used stays used.
        self._member = member or secrets.token_bytes(8)
        self._roster = _Roster(clock)
        self._shares: dict[bytes, Share] = {}
        self._changed: dict[bytes, Share] = {}
        self._found: dict[bytes, Mapping[bytes, bytes]] = {}
        self._busy = self._again = False
        self._began_at: float | None = None
        self._out_of_touch = False
        self._not_before = 0.0
        self._refreshed_at = clock.seconds()
        self._looking = LoopingCall(self._look)
        self._looking.clock = clock
        self._lock = DeferredLock()

    def show_in(self, services: Any) -> None:
        """Show in the metrics whether the store answers; `services` is an `IServices`."""
        name, what = f"{self._namespace}_in_touch", f"Whether {self._namespace} hears from the store."
        services.show(name, what, lambda: self.in_touch)

    @property
    def nodes(self) -> int:
        """How many nodes are alive."""
        return 1 + len(self._roster.alive)

    def alive(self) -> set[bytes]:
        """Return the other members that are alive."""
        return self._roster.alive

    @property
    def found(self) -> list[bytes]:
        """The keys of the boards that were there at the start and that no share has joined yet."""
        return list(self._found)

    def forget_found(self, is_over: Callable[[bytes], bool]) -> None:
        """Let go of such of the `found` boards as no share will join any more."""
        self._found = {place: board for place, board in self._found.items() if not is_over(place)}

    @property
    def in_touch(self) -> bool:
        """Whether the store answered in time when it was last asked, and does not keep us waiting now."""
        if self._out_of_touch:
            return False
        return self._began_at is None or self._clock.seconds() - self._began_at < PATIENCE_SECONDS

    async def start(self) -> None:
        """Read what is there; fails if the store does."""
        self._found = dict(await self._storage.boards(self._namespace))
        self._roster.hear(self._found_of(self._roster))
        self._refreshed_at = self._clock.seconds()
        self._looking.start(INTERVAL_SECONDS)

    async def stop(self) -> None:
        """Tell what was not told yet, if the store takes it."""
        if self._looking.running:
            self._looking.stop()
        await self._exchange()
        while self._changed and not self._out_of_touch:
            await self._exchange()

    def join(self, share: Share) -> None:
        """Begin to tell and hear of a share; it hears at once what was there at the start."""
        self._shares[share.key] = share
        share.hear(self._found_of(share))
        self.changed(share, urgent=True)

    def leave(self, share: Share) -> None:
        """Tell what is untold of a share, and then say and hear no more of it."""
        self._shares.pop(share.key, None)

    def changed(self, share: Share, *, urgent: bool = False) -> None:
        """Have a share told soon; `urgent` is at once, or when the exchange is over that goes on."""
        self._changed[share.key] = share
        if urgent:
            self._hurry()

    def _found_of(self, share: Share) -> Mapping[bytes, bytes]:
        return self._others_on([self._found.pop(place, {}) for place in self._places(share)])

    def _hurry(self) -> None:
        if self._busy:
            self._again = True
        elif self._looking.running and not self._out_of_touch:
            self._busy = True
            self._clock.callLater(0, self._begin)

    # In the background.

    def _look(self) -> None:
        now = self._clock.seconds()
        if self._busy or now < self._not_before:
            return
        if now - self._refreshed_at >= REFRESH_SECONDS:
            self._tell_all()
        if self._out_of_touch or self._roster.is_due(now):
            self._changed[self._roster.key] = self._roster
        if self._changed:
            self._begin()

    def _tell_all(self) -> None:
        self._refreshed_at = self._clock.seconds()
        self._changed.update(self._shares)

    def _begin(self) -> None:
        self._busy = self._looking.running
        if self._busy:
            Deferred.fromCoroutine(self._exchange())

    async def _exchange(self) -> None:
        await self._lock.acquire()
        batch = dict(islice(self._changed.items(), MOST_NOTES))
        for key in batch:
            del self._changed[key]
        self._again = len(batch) == MOST_NOTES
        self._began_at = self._clock.seconds()
        try:
            for ttl_seconds in dict.fromkeys(share.ttl_seconds for share in batch.values()):
                await self._post([s for s in batch.values() if s.ttl_seconds == ttl_seconds], ttl_seconds)
        except Exception as error:
            self._changed = {**batch, **self._changed}
            self._failed(error)
        else:
            if batch:
                self._answered(self._clock.seconds() - self._began_at)
        finally:
            self._began_at, self._busy = None, False
            self._lock.release()
        if self._again:
            self._hurry()

    async def _post(self, shares: list[Share], ttl_seconds: float | None) -> None:
        told: list[tuple[Share, list[bytes]]] = []
        notes: dict[bytes, bytes] = {}
        for share in shares:
            with self._blamed(share):
                places = self._places(share)
                notes.update(dict.fromkeys(places, share.note()))
                told.append((share, places))
        if not notes:
            return
        boards: Boards = await self._storage.post(self._namespace, self._member, notes, ttl_seconds)
        for share, places in told:
            others = self._others_on([boards[place] for place in places])
            with self._blamed(share):
                share.hear(others)

    @contextmanager
    def _blamed(self, share: Share) -> Iterator[None]:
        """Log what a share fails with: it is no fault of the store's, and the other shares go on."""
        try:
            yield
        except Exception:
            self._log.failure(
                "{namespace}: what nodes use of {key!r} cannot be told or heard",
                namespace=self._namespace,
                key=share.key,
            )

    def _places(self, share: Share) -> list[bytes]:
        """
        Return on which boards a share is told.

        One that somebody posts on all the time never expires, and would hold the notes of the dead of
        years; so there is one a day, and two around midnight, for clocks differ.
        """
        ttl = share.ttl_seconds
        if ttl is None or ttl > SHORT_SECONDS:
            return [share.key]
        now = self._clock.seconds()
        days = {int((now + each) // _DAY_SECONDS) for each in (-ttl, ttl)}
        return [b"%d %s" % (day, share.key) for day in sorted(days)]

    def _others_on(self, boards: list[Mapping[bytes, bytes]]) -> dict[bytes, bytes]:
        """Return what the others say, on the latest board where they say something."""
        return {m: note for board in boards for m, note in board.items() if m != self._member}

    def _answered(self, waited_seconds: float) -> None:
        if waited_seconds >= PATIENCE_SECONDS:
            self._lose_touch(f"it took {waited_seconds:.1f} s to answer")
        elif self._out_of_touch:
            self._out_of_touch = False
            # It may have lost what it had.
            self._tell_all()
            self._again = True
            self._log.info("{namespace}: the store answers again", namespace=self._namespace)

    def _failed(self, error: Exception) -> None:
        self._not_before = self._clock.seconds() + RETRY_SECONDS
        self._lose_touch(str(error) or type(error).__name__)

    def _lose_touch(self, why: str) -> None:
        if not self._out_of_touch:
            self._log.error(
                "{namespace}: out of touch with the store: {why}; going on with what is known",
                namespace=self._namespace,
                why=why,
            )
        self._out_of_touch = True


class _Roster:
    """
    Which other nodes are alive: those whose heartbeat was seen to change lately.

    Lately is counted in looks at the board, one each heartbeat: while the store is gone, nobody dies.
    """

    key = b"nodes"
    ttl_seconds: float | None = 120.0

    def __init__(self, clock: IReactorTime) -> None:
        self.alive: set[bytes] = set()
        self._clock = clock
        self._beats = 0
        self._beat_at: float | None = None
        self._looked_at = clock.seconds()
        #: The last heartbeat of each, and how often nothing newer was found.
        self._seen: dict[bytes, tuple[bytes, int]] = {}

    def is_due(self, now: float) -> bool:
        return self._beat_at is None or now - self._beat_at >= HEARTBEAT_SECONDS

    def note(self) -> bytes:
        self._beats += 1
        self._beat_at = self._clock.seconds()
        return b"%d" % self._beats

    def hear(self, others: Mapping[bytes, bytes]) -> None:
        now, seen = self._clock.seconds(), {}
        look = now - self._looked_at >= HEARTBEAT_SECONDS
        if look:
            self._looked_at = now
        for member in {*self._seen, *others}:
            last, silences = self._seen.get(member, (b"", 0))
            beat = others.get(member, last)
            silences = silences + look if beat == last else 0
            # The dead are remembered while their note is there, or it would look like news.
            if member in others or silences < _MOST_SILENCES:
                seen[member] = (beat, silences)
        self._seen = seen
        self.alive = {member for member, (_, silences) in seen.items() if silences < _MOST_SILENCES}
