"""
A store in Redis, shared by several nodes, through txredisapi.

One connection carries all calls, one behind the other without waiting for replies.  It is made when a
call needs it and made again when it was lost.  txredisapi's own pool is not used: its calls wait without
end for a server that is gone, and one reply too late while it logs in makes it give up for ever.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from math import ceil
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urlsplit

import attrs
import txredisapi  # type: ignore[import-untyped] # it has no types
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.defer import TimeoutError as DeferredTimeoutError
from twisted.internet.endpoints import HostnameEndpoint
from twisted.internet.protocol import Factory
from twisted.python.failure import Failure
from zope.interface import implementer

from crabtwist.errors import StorageError
from crabtwist.interfaces import IStorage
from crabtwist.settings import Secret, not_blank, positive
from crabtwist.storage import redis_boards
from crabtwist.storage.migrations import MOST_WAITING, Boards, closed, overloaded

#: How long a server that could not be reached is left alone; calls fail at once in that time.
RETRY_SECONDS = 0.2
#: How many keys one step of `list` and `boards` looks at.
SCAN_KEYS = 500
#: Beyond that a time to live is no different from none.
LONGEST_TTL_MILLISECONDS = 100 * 365 * 86400 * 1000

# The total is returned as text: Lua's numbers are floats, exact to 53 bits only.
_INCREMENT = """
local fresh = redis.call('EXISTS', KEYS[1]) == 0
redis.call('INCRBY', KEYS[1], ARGV[1])
local total = redis.call('GET', KEYS[1])
if fresh and ARGV[2] ~= '' then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return total
"""

_GLOB = re.compile(rb"[*?\[\]\\^-]")


def _usable_url(_instance: object, _attribute: object, value: Secret) -> None:
    # What is wrong is not told in detail: it may be a part of the password.
    try:
        url = urlsplit(value.reveal())
        fits = url.scheme == "redis" and url.hostname and url.port != 0
    except ValueError:
        fits = False
        url = urlsplit("")
    if not fits or "@" in url.path or not re.fullmatch(r"/?[0-9]*", url.path) or url.query or url.fragment:
        raise ValueError(
            "must be redis://[[USER]:PASSWORD@]HOST[:PORT][/NUMBER], with / ? # @ written %2F ..."
        )


@attrs.frozen
class RedisSettings:
    """
    `url` says where, as whom, and which numbered database; what is special in its parts is %-encoded.

    All keys begin with `prefix`.  A connection is made within `connect_timeout`, logging in included, and
    a reply comes within `reply_timeout`; else calls fail.
    """

    url: Secret = attrs.field(default=Secret("redis://127.0.0.1:6379/0"), validator=_usable_url)
    prefix: str = attrs.field(default="crabtwist:", validator=not_blank)
    connect_timeout: float = attrs.field(default=2.0, validator=positive)
    reply_timeout: float = attrs.field(default=2.0, validator=positive)


class _ProtocolFactory(Factory):
    """Makes connections that speak in bytes, and by our clock."""

    noisy = False

    def __init__(self, reactor: Any, reply_timeout_seconds: float) -> None:
        self._reactor = reactor
        self._reply_timeout_seconds = reply_timeout_seconds

    def buildProtocol(self, _address: object) -> Any:
        protocol = txredisapi.RedisProtocol(
            charset=None, convertNumbers=False, replyTimeout=self._reply_timeout_seconds
        )
        protocol.callLater = self._reactor.callLater
        protocol.factory = self
        return protocol


class _Line:
    """The connection: `ready` returns it, made anew if need be, one attempt for all who ask meanwhile."""

    def __init__(self, reactor: Any, settings: RedisSettings) -> None:
        url: SplitResult = urlsplit(settings.url.reveal())
        self.where = f"Redis at {url.hostname}:{url.port or 6379}"
        self._url = url
        self._reactor = reactor
        self._settings = settings
        self._protocol: Any = None
        self._attempt: Deferred[None] | None = None
        self._waiting: list[Deferred[Any]] = []
        self._why = ""
        self._retry_at = 0.0

    def ready(self) -> Deferred[Any]:
        """Return a Deferred of the protocol; fails with `StorageError`."""
        if self._protocol is not None and self._protocol.connected:
            return succeed(self._protocol)
        if self._attempt is None and self._reactor.seconds() < self._retry_at:
            return fail(StorageError(self._why))
        waiter: Deferred[Any] = Deferred()
        self._waiting.append(waiter)
        if self._attempt is None:
            self._attempt = Deferred.fromCoroutine(self._connect())
            self._attempt.addTimeout(self._settings.connect_timeout, self._reactor)
            self._attempt.addBoth(self._attempted)
        return waiter

    async def close(self) -> None:
        """Let the connection go."""
        if self._attempt is not None:
            self._attempt.cancel()
        if self._protocol is not None and self._protocol.connected:
            gone = self._protocol.whenDisconnected()
            self._protocol.transport.loseConnection()
            await gone

    async def _connect(self) -> None:
        endpoint = HostnameEndpoint(self._reactor, self._url.hostname or "", self._url.port or 6379)
        protocol: Any = await endpoint.connect(_ProtocolFactory(self._reactor, self._settings.reply_timeout))
        try:
            if self._url.password:
                await protocol.auth(unquote(self._url.password), unquote(self._url.username or ""))
            await protocol.select(int(self._url.path[1:] or 0))
        except BaseException:
            # Cancelled for its time is over, too.
            protocol.transport.abortConnection()
            raise
        self._protocol = protocol

    def _attempted(self, outcome: Any) -> None:
        self._attempt = None
        waiting, self._waiting = self._waiting, []
        failed = isinstance(outcome, Failure)
        if failed:
            words = outcome.getErrorMessage() or type(outcome.value).__name__
            if outcome.check(DeferredTimeoutError):
                words = f"no answer within {self._settings.connect_timeout:g} s"
            self._why = f"{self.where} cannot be used: {words}"
            self._retry_at = self._reactor.seconds() + RETRY_SECONDS
        for waiter in waiting:
            waiter.callback(Failure(StorageError(self._why)) if failed else self._protocol)


Talk = Callable[[Any], Awaitable[Any]]


@implementer(IStorage)
class RedisStorage:
    """
    See `IStorage`; calls fail with `StorageError`, within `connect_timeout` and `reply_timeout` together.

    Values, counters and boards are kept apart, as in memory.  Counters are 64-bit; one that would not fit
    keeps its total, and the increment fails.  Time is the server's.  `list` and `boards` look at every key
    of the database, in steps, each of which may take `reply_timeout`; what is set or deleted meanwhile may
    be in it or not.  `services.clock` has to be a reactor that can connect.
    """

    Settings = RedisSettings
    between_nodes = True

    def __init__(self, settings: RedisSettings, services: Any) -> None:
        self._settings = settings
        self._line = _Line(services.clock, settings)
        self._is_open = False
        self._calls: set[Deferred[Any]] = set()
        self._idle: Deferred[None] | None = None

    def open(self) -> Deferred[None]:
        """Connect and log in.  Fails with `StorageError`."""
        return Deferred.fromCoroutine(self._open())

    async def _open(self) -> None:
        await self._line.ready()
        self._is_open = True

    def close(self) -> Deferred[None]:
        """Wait for the replies to what was asked, and let the connection go; closing again is fine."""
        return Deferred.fromCoroutine(self._close())

    async def _close(self) -> None:
        self._is_open = False
        if self._calls and self._idle is None:
            self._idle = Deferred()
            await self._idle
        await self._line.close()

    def get(self, namespace: str, key: bytes) -> Deferred[bytes | None]:
        """Return the value, None if there is none or its time has passed."""
        return self._ask(lambda redis: redis.get(self._place(b"v", namespace, key)))

    def set(
        self, namespace: str, key: bytes, value: bytes, ttl_seconds: float | None = None
    ) -> Deferred[None]:
        """Store a value, in place of the old one and of its time."""
        place, milliseconds = self._place(b"v", namespace, key), _milliseconds(ttl_seconds)

        async def talk(redis: Any) -> None:
            if milliseconds is None:
                await redis.execute_command("SET", place, value)
            elif milliseconds > 0:
                await redis.execute_command("SET", place, value, "PX", milliseconds)
            else:
                await redis.execute_command("DEL", place)

        return self._ask(talk)

    def increment(
        self, namespace: str, key: bytes, delta: int, ttl_seconds: float | None = None
    ) -> Deferred[int]:
        """Add to a counter; its time runs from its first increment and is not extended."""
        milliseconds = _milliseconds(ttl_seconds)
        arguments = [str(delta), "" if milliseconds is None else str(milliseconds)]
        place = self._place(b"c", namespace, key)

        async def talk(redis: Any) -> int:
            return int(await redis.eval(_INCREMENT, [place], arguments))

        return self._ask(talk)

    def list(self, namespace: str, prefix: bytes = b"") -> Deferred[Sequence[tuple[bytes, bytes]]]:
        """Return the values whose keys begin so, sorted by key."""
        begin = len(self._place(b"v", namespace, b""))
        first = self._place(b"v", namespace, prefix)

        async def talk(redis: Any) -> Sequence[tuple[bytes, bytes]]:
            found: dict[bytes, bytes] = {}
            async for places in _scan(redis, first):
                values = await redis.execute_command("MGET", *places)
                found.update(
                    (p[begin:], value) for p, value in zip(places, values, strict=True) if value is not None
                )
            return sorted(found.items())

        return self._ask(talk)

    def delete(self, namespace: str, key: bytes) -> Deferred[None]:
        """Forget the value, the counter and the board of a key."""
        places = [self._place(kind, namespace, key) for kind in (b"v", b"c", b"b")]

        async def talk(redis: Any) -> None:
            await redis.execute_command("DEL", *places)

        return self._ask(talk)

    def post(
        self, namespace: str, member: bytes, notes: Mapping[bytes, bytes], ttl_seconds: float | None = None
    ) -> Deferred[Boards]:
        """Put up a member's notes, and return the boards that they are on; all at once."""
        milliseconds = _milliseconds(ttl_seconds)
        arguments = [member, "" if milliseconds is None else str(milliseconds), *notes.values()]
        stem, keys = self._place(b"b", namespace, b""), tuple(notes)

        async def talk(redis: Any) -> Boards:
            reply = await redis.eval(redis_boards.POST, [stem + key for key in keys], arguments)
            return redis_boards.told(keys, reply)

        return self._ask(talk)

    def boards(self, namespace: str) -> Deferred[Boards]:
        """Return all boards of a namespace."""
        stem = self._place(b"b", namespace, b"")

        async def talk(redis: Any) -> Boards:
            found: Boards = {}
            async for places in _scan(redis, stem):
                reply = await redis.eval(redis_boards.READ, places)
                found.update(redis_boards.told([place[len(stem) :] for place in places], reply))
            # One that has gone since it was found has no notes.
            return {key: board for key, board in found.items() if board}

        return self._ask(talk)

    def _place(self, kind: bytes, namespace: str, key: bytes) -> bytes:
        # An escaped namespace has no colon, so the first one after it is where the key begins.
        return b"%s%s:%s:%s" % (self._settings.prefix.encode(), kind, quote(namespace, safe="").encode(), key)

    def _ask(self, talk: Talk) -> Deferred[Any]:
        if not self._is_open:
            return fail(closed(self._line.where))
        if len(self._calls) >= MOST_WAITING:
            return fail(overloaded(self._line.where))
        call = Deferred.fromCoroutine(self._talk(talk))
        self._calls.add(call)
        return call.addBoth(self._answered, call)

    async def _talk(self, talk: Talk) -> Any:
        redis = await self._line.ready()
        try:
            return await talk(redis)
        except txredisapi.RedisError as error:
            raise StorageError(f"{self._line.where} failed: {error}") from error

    def _answered(self, outcome: Any, call: Deferred[Any]) -> Any:
        self._calls.discard(call)
        if not self._calls and self._idle is not None:
            idle, self._idle = self._idle, None
            idle.callback(None)
        return outcome


async def _scan(redis: Any, first: bytes) -> AsyncIterator[Sequence[bytes]]:
    """Yield the keys that begin so, some at a time; a key may come more than once."""
    pattern = _GLOB.sub(rb"\\\g<0>", first) + b"*"
    cursor = 0
    while True:
        reply = await redis.execute_command("SCAN", cursor, "MATCH", pattern, "COUNT", SCAN_KEYS)
        cursor, places = int(reply[0]), reply[1]
        if places:
            yield places
        if cursor == 0:
            return


def _milliseconds(ttl_seconds: float | None) -> int | None:
    return None if ttl_seconds is None else ceil(min(ttl_seconds * 1000, LONGEST_TTL_MILLISECONDS))
