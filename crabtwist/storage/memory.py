"""A store in this process's memory, lost when the process ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heapify, heappop, heappush
from math import inf
from typing import Any

import attrs
from twisted.internet.defer import Deferred, succeed
from zope.interface import implementer

from crabtwist.interfaces import IStorage

_Place = tuple[str, bytes]
_Boards = dict[bytes, dict[bytes, bytes]]


@attrs.define
class _Entry:
    value: Any
    expires_at: float


class _Shelf:
    """
    Entries by namespace and key, each gone at its time.

    Expired entries are dropped at every visit, also those that nobody asks for again: clients make up
    keys, and memory must not grow with everything that they ever made up.
    """

    def __init__(self) -> None:
        self._entries: dict[_Place, _Entry] = {}
        self._expiries: list[tuple[float, _Place]] = []

    def forget_expired(self, now: float) -> None:
        while self._expiries and self._expiries[0][0] <= now:
            _, place = heappop(self._expiries)
            entry = self._entries.get(place)
            if entry is not None and entry.expires_at <= now:
                del self._entries[place]

    def get(self, place: _Place) -> _Entry | None:
        return self._entries.get(place)

    def put(self, place: _Place, value: object, expires_at: float) -> None:
        self._entries[place] = _Entry(value, expires_at)
        if expires_at < inf:
            heappush(self._expiries, (expires_at, place))
            self._forget_replaced()

    def drop(self, place: _Place) -> None:
        self._entries.pop(place, None)

    def items(self, namespace: str, prefix: bytes) -> list[tuple[bytes, Any]]:
        return sorted(
            (key, entry.value)
            for (where, key), entry in self._entries.items()
            if where == namespace and key.startswith(prefix)
        )

    def clear(self) -> None:
        self._entries.clear()
        self._expiries.clear()

    def _forget_replaced(self) -> None:
        # A key that is set again and again leaves an old expiry each time; half may be such, no more.
        if len(self._expiries) > 2 * len(self._entries) + 64:
            self._expiries = [(e.expires_at, p) for p, e in self._entries.items() if e.expires_at < inf]
            heapify(self._expiries)


@implementer(IStorage)
class MemoryStorage:
    """
    See `IStorage`.

    Values, counters and boards are kept apart: one of each may have the same key.  A `ttl_seconds` of 0 or
    less has passed at once.  What was kept is gone after `close`.
    """

    between_nodes = False

    def __init__(self, _settings: object, services: Any) -> None:
        self._clock = services.clock
        self._values = _Shelf()
        self._counters = _Shelf()
        self._boards = _Shelf()
        self._shelves = (self._values, self._counters, self._boards)

    def open(self) -> Deferred[None]:
        """Fire at once."""
        return succeed(None)

    def close(self) -> Deferred[None]:
        """Forget everything."""
        for shelf in self._shelves:
            shelf.clear()
        return succeed(None)

    def get(self, namespace: str, key: bytes) -> Deferred[bytes | None]:
        """Return the value, None if there is none or its time has passed."""
        self._forget_expired()
        entry = self._values.get((namespace, key))
        return succeed(None if entry is None else entry.value)

    def set(
        self, namespace: str, key: bytes, value: bytes, ttl_seconds: float | None = None
    ) -> Deferred[None]:
        """Store a value, in place of the old one and of its time."""
        self._values.put((namespace, key), value, self._expires_at(ttl_seconds))
        self._forget_expired()
        return succeed(None)

    def increment(
        self, namespace: str, key: bytes, delta: int, ttl_seconds: float | None = None
    ) -> Deferred[int]:
        """Add to a counter; its time runs from its first increment and is not extended."""
        self._forget_expired()
        entry = self._counters.get((namespace, key))
        if entry is None:
            self._counters.put((namespace, key), delta, self._expires_at(ttl_seconds))
            return succeed(delta)
        entry.value += delta
        return succeed(entry.value)

    def list(self, namespace: str, prefix: bytes = b"") -> Deferred[Sequence[tuple[bytes, bytes]]]:
        """Return the values whose keys begin so, sorted by key."""
        self._forget_expired()
        return succeed(self._values.items(namespace, prefix))

    def delete(self, namespace: str, key: bytes) -> Deferred[None]:
        """Forget the value, the counter and the board of a key."""
        for shelf in self._shelves:
            shelf.drop((namespace, key))
        return succeed(None)

    def post(
        self, namespace: str, member: bytes, notes: Mapping[bytes, bytes], ttl_seconds: float | None = None
    ) -> Deferred[_Boards]:
        """Put up a member's notes, and return the boards that they are on."""
        self._forget_expired()
        expires_at = self._expires_at(ttl_seconds)
        found = {}
        for key, note in notes.items():
            entry = self._boards.get((namespace, key))
            board = {**({} if entry is None else entry.value), member: note}
            self._boards.put((namespace, key), board, expires_at)
            found[key] = dict(board)
        return succeed(found)

    def boards(self, namespace: str) -> Deferred[_Boards]:
        """Return all boards of a namespace."""
        self._forget_expired()
        return succeed({key: dict(board) for key, board in self._boards.items(namespace, b"")})

    def _expires_at(self, ttl_seconds: float | None) -> float:
        return inf if ttl_seconds is None else self._clock.seconds() + ttl_seconds

    def _forget_expired(self) -> None:
        now = self._clock.seconds()
        for shelf in self._shelves:
            shelf.forget_expired(now)
