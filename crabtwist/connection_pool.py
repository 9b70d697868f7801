"""
The connections to one origin: opened, kept, shared out and counted.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import Any, NamedTuple

import attrs
from OpenSSL import SSL
from service_identity import VerificationError
from twisted.internet import error
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IDelayedCall, IStreamClientEndpoint
from twisted.internet.protocol import Factory

from crabtwist.errors import ConnectFailed, ConnectTimedOut, NoConnectionFree, UpstreamError
from crabtwist.http_client import HTTP1ClientProtocol

DEFAULT_PORTS = {"http": 80, "https": 443}


@attrs.frozen
class ConnectionLimits:
    """
    Bounds on the connections to one origin; times in seconds.

    `connect_timeout_seconds` covers the look-up of the name, TCP and TLS.  `max_connections` counts those
    in use, kept and being opened; a request that finds them all in use waits `connection_wait_seconds`,
    first come, first served.  `idle_seconds` is how long a connection is kept for the next request: less
    than the shortest patience that servers are known for (5 s).  `max_idle` are kept at most.
    """

    connect_timeout_seconds: float = 10.0
    max_connections: int = 1000
    connection_wait_seconds: float = 10.0
    idle_seconds: float = 4.0
    max_idle: int = 64


class Origin(NamedTuple):
    """Where connections go (RFC 6454): two requests may share one if their origins are equal."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self._bracketed()}:{self.port}"

    def host_field(self) -> bytes:
        """Return the value of the `Host` field (RFC 9110, 7.2)."""
        if self.port == DEFAULT_PORTS[self.scheme]:
            return self._bracketed().encode()
        return str(self).encode()

    def _bracketed(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host


_CAUSES: tuple[tuple[type[BaseException], str], ...] = (
    (error.DNSLookupError, "its name is not known"),
    (error.UnknownHostError, "its name is not known"),
    (error.ConnectionRefusedError, "connection refused"),
    (error.NoRouteError, "there is no route to it"),
    (VerificationError, "its TLS certificate is for another name"),
    (error.ConnectionDone, "it closed the connection at once"),
    (error.ConnectionLost, "it closed the connection at once"),
    (error.ConnectError, "the connection failed"),
)


def connect_error(origin: Origin, cause: BaseException) -> ConnectFailed:
    """Put why there is no connection into our words."""
    if isinstance(cause, error.TimeoutError):
        return ConnectTimedOut(f"connecting to {origin} took too long")
    if isinstance(cause, SSL.Error):
        return ConnectFailed(f"cannot connect to {origin}: TLS: {_tls_reason(cause)}")
    for type_, words in _CAUSES:
        if isinstance(cause, type_):
            return ConnectFailed(f"cannot connect to {origin}: {words}")
    return ConnectFailed(f"cannot connect to {origin}: {type(cause).__name__}")


def _tls_reason(cause: SSL.Error) -> str:
    # OpenSSL's queue of errors: (library, function, reason) each.
    queue = cause.args[0] if cause.args and isinstance(cause.args[0], list) else []
    return "; ".join(str(entry[-1]) for entry in queue) or "the handshake failed"


def _abandonable(connecting: Deferred[Any]) -> Deferred[Any]:
    """
    Follow an endpoint's Deferred, but answer a cancel with CancelledError.

    Endpoints answer it in three ways, one of them `DNSLookupError`, which would look like the peer's fault.
    """
    wanted = True

    def abandon(_: object) -> None:
        nonlocal wanted
        wanted = False
        connecting.cancel()

    def pass_on(result: Any) -> None:
        if wanted:
            following.callback(result)
        elif isinstance(result, HTTP1ClientProtocol):
            result.abort()

    following: Deferred[Any] = Deferred(abandon)
    connecting.addBoth(pass_on)
    return following


class ConnectionPool:
    """
    The connections to one origin, each in a slot; there are `max_connections` slots.

    A slot is taken by whoever opens a connection, passes to the connection, and is given back once, when
    that is gone.  Nobody waits while a connection is kept or a slot is free.
    """

    def __init__(
        self, reactor: Any, origin: Origin, limits: ConnectionLimits, endpoint: IStreamClientEndpoint
    ) -> None:
        self.host_field = origin.host_field()
        self.taken = 0
        self._clock = reactor
        self._origin = origin
        self._limits = limits
        self._endpoint = endpoint
        self._holders: set[HTTP1ClientProtocol] = set()
        #: Since when, the longest first.
        self._idle: dict[HTTP1ClientProtocol, float] = {}
        self._expiry: IDelayedCall | None = None
        self._waiting: deque[Deferred[HTTP1ClientProtocol | None]] = deque()
        self._closed = False

    def kept(self) -> HTTP1ClientProtocol | None:
        """Return a kept connection, the one used last, or None if there is none."""
        while self._idle:
            connection, _ = self._idle.popitem()
            if connection.quiet:
                return connection
            connection.abort()
        return None

    async def lease(self) -> HTTP1ClientProtocol | None:
        """
        Return None, with a slot taken to `open` a connection in, or a connection if one came free before.

        For whoever finds none `kept`.  Raises NoConnectionFree if neither came free in time.
        """
        if self.taken < self._limits.max_connections:
            self.taken += 1
            return None
        return await self._turn()

    async def open(self) -> HTTP1ClientProtocol:
        """Return a new connection for the slot that the caller has taken."""
        try:
            connection = await self._dial_in_time()
        except BaseException:
            self._give_back()
            raise
        self._holders.add(connection)
        return connection

    def inherit(self, connection: HTTP1ClientProtocol) -> bool:
        """Take over the slot of a connection that is just dying; False if it has been given back."""
        had_slot = connection in self._holders
        self._holders.discard(connection)
        return had_slot

    def close(self) -> list[Deferred[None]]:
        """Close what is kept and turn away who waits; what is in use is closed after its answer."""
        self._closed = True
        for waiter in list(self._waiting):
            self._waiting.remove(waiter)
            waiter.errback(NoConnectionFree("the gateway is stopping"))
        kept = list(self._idle)
        for connection in kept:
            connection.close()
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        return [connection.when_lost() for connection in kept]

    def _turn(self) -> Deferred[HTTP1ClientProtocol | None]:
        turn: Deferred[HTTP1ClientProtocol | None] = Deferred(self._waiting.remove)
        self._waiting.append(turn)
        seconds = self._limits.connection_wait_seconds
        return turn.addTimeout(seconds, self._clock, onTimeoutCancel=self._waited_too_long)

    def _waited_too_long(self, _: object, seconds: float) -> Any:
        count = self._limits.max_connections
        raise NoConnectionFree(f"all {count} connections to {self._origin} were busy for {seconds:g} seconds")

    async def _dial_in_time(self) -> HTTP1ClientProtocol:
        dialling = Deferred.fromCoroutine(self._dial())
        seconds = self._limits.connect_timeout_seconds
        try:
            return await dialling.addTimeout(seconds, self._clock, onTimeoutCancel=self._dialled_too_long)
        except (CancelledError, UpstreamError):
            raise
        except Exception as cause:
            raise connect_error(self._origin, cause) from cause

    def _dialled_too_long(self, _: object, seconds: float) -> Any:
        raise ConnectTimedOut(f"no connection to {self._origin} within {seconds:g} seconds")

    async def _dial(self) -> HTTP1ClientProtocol:
        factory = Factory.forProtocol(
            partial(HTTP1ClientProtocol, str(self._origin), self._keep, self._forget)
        )
        factory.noisy = False
        connection: HTTP1ClientProtocol = await _abandonable(self._endpoint.connect(factory))
        await connection.established()
        return connection

    def _keep(self, connection: HTTP1ClientProtocol) -> None:
        if self._closed or not self._limits.max_idle:
            connection.close()
        elif self._waiting:
            self._waiting.popleft().callback(connection)
        else:
            if len(self._idle) >= self._limits.max_idle:
                next(iter(self._idle)).close()
            self._idle[connection] = self._clock.seconds()
            if self._expiry is None:
                self._expiry = self._clock.callLater(self._limits.idle_seconds, self._expire)

    def _expire(self) -> None:
        # One timer for all, which looks who is due and whom to wait for next: most are used long before.
        self._expiry = None
        due = self._clock.seconds() - self._limits.idle_seconds
        for connection, since in list(self._idle.items()):
            if since > due:
                self._expiry = self._clock.callLater(since - due, self._expire)
                return
            connection.close()

    def _forget(self, connection: HTTP1ClientProtocol) -> None:
        self._idle.pop(connection, None)
        if connection in self._holders:
            self._holders.discard(connection)
            self._give_back()

    def _give_back(self) -> None:
        if self._waiting:
            self._waiting.popleft().callback(None)
        else:
            self.taken -= 1
