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
from collections.abc import Mapping
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
#: How many notes are posted in one call.
MOST_NOTES = 500
#: How often a node says that it is there, and how long it counts as there after that.
HEARTBEAT_SECONDS = 2.0
ALIVE_SECONDS = 10.0

#: A block is this part of a limit, or a single request that is larger.
BLOCKS = 10

_DAY_SECONDS = 86400

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

        Called when all have heard the latest `note` of this one, and once before the first.
        """


@attrs.define
class Lease:
    """How far one node has gone ahead of what the others know, in one amount: `used` less what was heard."""

    used: int = 0
    _said: int = 0
    _heard: int = 0

    def say(self) -> int:
        """Return what is to be told now."""
        self._said = self.used
        return self.used

    def was_heard(self) -> None:
        """Note that all know what was said last."""
        self._heard = self._said

    @property
    def ahead(self) -> int:
        """What was used since."""
        return self.used - self._heard

    def covers(self, amount: int, limit: int) -> bool:
        """Say whether an amount may be used before the others hear of it: one request, or a block."""
        return self.ahead <= 0 or self.ahead + amount <= limit // BLOCKS


class Leases:
    """
    The shares of one extension, told and heard through its namespace of the store.

    `start` first and `stop` last.  `nodes` is how many are alive, this one included, as far as was heard.
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
        self._busy = False
        self._began_at: float | None = None
        self._failing = False
        self._not_before = 0.0
        self._refreshed_at = clock.seconds()
        self._looking = LoopingCall(self._look)
        self._looking.clock = clock
        self._lock = DeferredLock()

    @property
    def nodes(self) -> int:
        """How many nodes are alive."""
        return 1 + len(self._roster.alive())

    def alive(self) -> set[bytes]:
        """Return the other members that are alive."""
        return self._roster.alive()

    @property
    def in_touch(self) -> bool:
        """Whether the store answered when it was last asked, and does not keep us waiting now."""
        waited = 0.0 if self._began_at is None else self._clock.seconds() - self._began_at
        return not self._failing and waited < PATIENCE_SECONDS

    async def start(self) -> None:
        """Read what is there; fails if the store does."""
        self._found = dict(await self._storage.boards(self._namespace))
        self._refreshed_at = self._clock.seconds()
        self._looking.start(INTERVAL_SECONDS, now=False)

    async def stop(self) -> None:
        """Tell what was not told yet, if the store takes it."""
        if self._looking.running:
            self._looking.stop()
        await self._exchange()
        while self._changed and not self._failing:
            await self._exchange()

    def join(self, share: Share) -> None:
        """Begin to tell and hear of a share; it hears at once what was there at the start."""
        self._shares[share.key] = share
        share.hear(self._found.pop(share.key, {}))
        self.changed(share, urgent=True)

    def leave(self, share: Share) -> None:
        """Say no more of a share, and hear no more."""
        self._shares.pop(share.key, None)
        self._changed.pop(share.key, None)

    def changed(self, share: Share, *, urgent: bool = False) -> None:
        """Have a share told soon; `urgent` is at once, unless the store is busy with us already."""
        self._changed[share.key] = share
        if urgent and not self._busy and not self._failing and self._looking.running:
            self._busy = True
            self._clock.callLater(0, self._begin)

    # In the background.

    def _look(self) -> None:
        now = self._clock.seconds()
        if self._busy or now < self._not_before:
            return
        if now - self._refreshed_at >= REFRESH_SECONDS:
            self._refreshed_at = now
            self._changed.update(self._shares)
        if self._roster.is_due(now):
            self._changed[self._roster.key] = self._roster
        if self._changed:
            self._begin()

    def _begin(self) -> None:
        self._busy = True
        Deferred.fromCoroutine(self._exchange())

    async def _exchange(self) -> None:
        await self._lock.acquire()
        self._began_at = self._clock.seconds()
        batch = dict(islice(self._changed.items(), MOST_NOTES))
        for key in batch:
            del self._changed[key]
        try:
            for ttl_seconds in {share.ttl_seconds for share in batch.values()}:
                await self._post([s for s in batch.values() if s.ttl_seconds == ttl_seconds], ttl_seconds)
        except Exception as error:
            self._changed = {**batch, **self._changed}
            self._failed(error)
        else:
            self._succeeded()
        finally:
            self._began_at, self._busy = None, False
            self._lock.release()

    async def _post(self, shares: list[Share], ttl_seconds: float | None) -> None:
        notes = {share.key: share.note() for share in shares}
        boards: Boards = await self._storage.post(self._namespace, self._member, notes, ttl_seconds)
        for share in shares:
            board = boards[share.key]
            share.hear({member: note for member, note in board.items() if member != self._member})

    def _succeeded(self) -> None:
        if self._failing:
            self._failing = False
            self._log.info("{namespace}: the store answers again", namespace=self._namespace)

    def _failed(self, error: Exception) -> None:
        self._not_before = self._clock.seconds() + RETRY_SECONDS
        if not self._failing:
            self._failing = True
            self._log.error(
                "{namespace}: the store does not answer: {error!r}; going on with what is known",
                namespace=self._namespace,
                error=error,
            )


class _Roster:
    """Which other nodes are alive: those whose heartbeat was seen to change lately, by this one's clock."""

    ttl_seconds: float | None = 2 * _DAY_SECONDS

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._beats = 0
        self._beat_at: float | None = None
        self._seen: dict[bytes, tuple[bytes, float]] = {}

    @property
    def key(self) -> bytes:
        # A board a day, so that the dead of years are not read for ever.
        return b"nodes %d" % (self._clock.seconds() // _DAY_SECONDS)

    def is_due(self, now: float) -> bool:
        return self._beat_at is None or now - self._beat_at >= HEARTBEAT_SECONDS

    def alive(self) -> set[bytes]:
        since = self._clock.seconds() - ALIVE_SECONDS
        return {member for member, (_, seen_at) in self._seen.items() if seen_at >= since}

    def note(self) -> bytes:
        self._beats += 1
        self._beat_at = self._clock.seconds()
        return b"%d" % self._beats

    def hear(self, others: Mapping[bytes, bytes]) -> None:
        now = self._clock.seconds()
        for member, beat in others.items():
            last, _ = self._seen.get(member, (None, 0.0))
            if beat != last:
                self._seen[member] = (beat, now)
        self._seen = {member: self._seen[member] for member in others if member in self._seen}
