"""
What was made through the admin API: kept in the store, answered from memory, the same on all nodes.

Whoever changes something writes it, and then raises a counter that every node looks at; a node that sees
it raised reads everything again.  While the store is gone, what is known goes on to hold.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from twisted.internet.defer import Deferred, DeferredLock
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

#: How often a node looks whether another has changed something: changes hold everywhere within a second.
POLL_SECONDS = 0.4

T = TypeVar("T")

#: How long a name is somebody's who makes an entry: until all nodes know that it is there.
CLAIM_SECONDS = 10.0

_VERSION = b"version"

Entries = Mapping[str, bytes]


class Directory:
    """
    Named entries of several sorts; a sort is the namespace that they have in the store.

    `start` first, `stop` last.  `changed` is called after every change, here or on another node, with the
    sorts that changed.
    """

    _log = Logger()

    def __init__(self, storage: Any, clock: IReactorTime, sorts: tuple[str, ...]) -> None:
        self.changed: Callable[[frozenset[str]], object] = lambda _: None
        self._storage = storage
        self._entries: dict[str, dict[str, bytes]] = {sort: {} for sort in sorts}
        self._version = -1
        self._failing = False
        self._lock = DeferredLock()
        self._changing = {sort: DeferredLock() for sort in sorts}
        self._polling = LoopingCall(self._poll)
        self._polling.clock = clock

    def entries(self, sort: str) -> Entries:
        """Return the entries of a sort, by name."""
        return MappingProxyType(self._entries[sort])

    async def start(self) -> None:
        """Read everything; fails if the store does."""
        await self._look()
        if self._storage.between_nodes:
            self._polling.start(POLL_SECONDS, now=False)

    def stop(self) -> None:
        """Look no more."""
        if self._polling.running:
            self._polling.stop()

    async def change(self, sort: str, work: Callable[[], Awaitable[T]]) -> T:
        """
        Do what reads entries of a sort and then puts or deletes some, as the only one on this node.

        It finds them as they are now.  Fails as `work` does, and with `StorageError`.
        """
        await self._changing[sort].acquire()
        try:
            await self._look()
            return await work()
        finally:
            self._changing[sort].release()

    async def make(self, sort: str, name: str, value: bytes) -> bool:
        """Make an entry, unless another node is making one of that name; returns whether it was made."""
        claims = f"{_namespace(sort)}.claims"
        if await self._storage.increment(claims, name.encode(), 1, CLAIM_SECONDS) > 1:
            return False
        await self.put(sort, name, value)
        return True

    async def put(self, sort: str, name: str, value: bytes) -> None:
        """Make or replace an entry.  Fails with `StorageError`, and then it may have been made or not."""
        await self._storage.set(_namespace(sort), name.encode(), value)
        await self._raise_version((sort, name))

    async def delete(self, sort: str, name: str) -> None:
        """Forget an entry; as `put`."""
        await self._storage.delete(_namespace(sort), name.encode())
        await self._storage.delete(f"{_namespace(sort)}.claims", name.encode())
        await self._raise_version((sort, name))

    async def _raise_version(self, touched: tuple[str, str]) -> None:
        await self._storage.increment(_namespace("directory"), _VERSION, 1)
        await self._look(touched)

    def _poll(self) -> Deferred[None]:
        looking = Deferred.fromCoroutine(self._look())
        return looking.addCallbacks(lambda _: self._answered(), self._failed)

    async def _look(self, touched: tuple[str, str] | None = None) -> None:
        """Read everything again if something was changed; `touched` is what this node just has."""
        await self._lock.acquire()
        try:
            version = await self._storage.increment(_namespace("directory"), _VERSION, 0)
            if version == self._version:
                return
            found = {sort: await self._read(sort) for sort in self._entries}
            if version < self._version:
                version = await self._mend(version, found, touched)
            # Only now: a change while it was read has raised the version once more.
            self._version = version
        finally:
            self._lock.release()
        differing = frozenset(sort for sort in found if found[sort] != self._entries[sort])
        self._entries = found
        if differing:
            self.changed(differing)

    async def _mend(
        self, version: int, found: dict[str, dict[str, bytes]], touched: tuple[str, str] | None
    ) -> int:
        """
        Bring a store that has lost its latest up to date, and return its version then.

        It may be empty, or as it was some time ago: then what is known here is newer, and what was deleted
        since must not be there again.
        """
        self._log.warn("the store has forgotten keys or providers; they are written to it again")
        for sort, known in self._entries.items():
            there = found[sort]
            for name in known.keys() | there.keys():
                if (sort, name) == touched or known.get(name) == there.get(name):
                    continue
                if name in known:
                    there[name] = known[name]
                    await self._storage.set(_namespace(sort), name.encode(), known[name])
                else:
                    del there[name]
                    await self._storage.delete(_namespace(sort), name.encode())
        above = self._version + 1 - version
        raised: int = await self._storage.increment(_namespace("directory"), _VERSION, above)
        return raised

    async def _read(self, sort: str) -> dict[str, bytes]:
        return {key.decode(): value for key, value in await self._storage.list(_namespace(sort))}

    def _answered(self) -> None:
        if self._failing:
            self._failing = False
            self._log.info("the store answers again")

    def _failed(self, failure: Any) -> None:
        if not self._failing:
            self._failing = True
            self._log.failure("the store does not answer; keys and providers stay as they are", failure)


def _namespace(sort: str) -> str:
    return f"admin.{sort}"
