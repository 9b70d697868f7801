"""Where clients come in: endpoints, the connections that are open, and how they are brought to an end."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from ipaddress import ip_address
from types import MappingProxyType
from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred, DeferredList, maybeDeferred
from twisted.internet.endpoints import TCP4ServerEndpoint, TCP6ServerEndpoint, serverFromString
from twisted.internet.interfaces import (
    IAddress,
    IListeningPort,
    IReactorTime,
    IStreamServerEndpoint,
    IStreamServerEndpointStringParser,
)
from twisted.plugin import getPlugins
from twisted.web.resource import IResource
from twisted.web.server import Site

from crabtwist import gateway_request
from crabtwist.channel import GatewayChannel
from crabtwist.errors import Refusal
from crabtwist.gateway_request import GatewayRequest
from crabtwist.http_reader import HTTPLimits
from crabtwist.values import Headers

#: Connections that the system keeps waiting until they are accepted.
BACKLOG = 1024

_HOST_AND_PORT = re.compile(r"(?:\[(?P<v6>[^\[\]]+)\]|(?P<host>[^:\[\]]*)):(?P<port>[0-9]{1,5})")
#: The endpoint types that are built into Twisted; the others are plugins.
_BUILT_IN_TYPES = frozenset({"tcp", "unix", "ssl"})


def admit_all(_request: GatewayRequest) -> Refusal | None:
    """Refuse nobody."""
    return None


NO_SHORTCUTS: Mapping[tuple[bytes, bytes], Callable[[GatewayRequest], object]] = MappingProxyType({})


class GatewayFactory(Site):
    """
    A site whose connections are `GatewayChannel`s, counted, with no access log of its own.

    `resource` is usually a Klein app's.  The others are as `ChannelOwner` says.
    """

    protocol = GatewayChannel  # type: ignore[assignment]  # Twisted's makes an HTTP/2 switch
    displayTracebacks = False
    #: What is served, and where, the node says better.
    noisy = False

    def __init__(
        self,
        resource: IResource,
        *,
        reactor: IReactorTime,
        limits: HTTPLimits | None = None,
        admit: Callable[[GatewayRequest], Refusal | None] = admit_all,
        refuse: Callable[[int, str, str, bytes], tuple[Headers, bytes]] = gateway_request.refuse,
        render_refusal: Callable[[GatewayRequest, Refusal], None] = gateway_request.render_refusal,
        shortcuts: Mapping[tuple[bytes, bytes], Callable[[GatewayRequest], object]] = NO_SHORTCUTS,
    ) -> None:
        # The channel has deadlines of its own, and its requests never parse a body.
        super().__init__(
            resource,
            requestFactory=GatewayRequest,
            timeout=None,
            reactor=reactor,
            parsePOSTFormSubmission=False,
        )
        self.limits = limits or HTTPLimits()
        self.admit = admit
        self.refuse = refuse
        self.render_refusal = render_refusal
        self.shortcuts = shortcuts
        self.draining = False
        self._channels: set[GatewayChannel] = set()
        self._drains: list[Deferred[int]] = []

    # Twisted's site.

    def startFactory(self) -> None:
        """Open no access log, and keep no clock for one."""

    def stopFactory(self) -> None:
        """Close none."""

    def log(self, request: object) -> None:
        """Write no line: what is worth knowing of a request is known to those who handle it."""

    def acceptableProtocols(self) -> list[bytes]:
        """HTTP/1.1 alone, also where Twisted could speak HTTP/2."""
        return [b"http/1.1"]

    def buildProtocol(self, addr: IAddress | None) -> GatewayChannel:  # type: ignore[override]  # no HTTP/2
        """Make the channel of a new connection."""
        channel = super().buildProtocol(addr)
        assert isinstance(channel, GatewayChannel)
        channel.owner = self
        return channel

    # Connections.

    def channel_opened(self, channel: GatewayChannel) -> None:
        """Count a channel."""
        self._channels.add(channel)

    def channel_closed(self, channel: GatewayChannel) -> None:
        """Count it no more."""
        self._channels.discard(channel)
        self._tell_drained()

    @property
    def open_connections(self) -> int:
        """How many connections are open."""
        return len(self._channels)

    @property
    def busy_connections(self) -> int:
        """How many have a request, its answer's last bytes or their own ending in hand."""
        return sum(not channel.is_idle for channel in self._channels)

    def drain(self, timeout_seconds: float) -> Deferred[int]:
        """
        Let every answer from now on be its connection's last, and close the idle connections.

        New connections are served meanwhile.  Returns a Deferred of 0 when the last busy connection has
        closed, with all that was written to it, or of the number of those still busy after
        `timeout_seconds`.
        """
        self.draining = True
        for channel in list(self._channels):
            # Whoever has just connected has a request on the way, and deserves its answer.
            if channel.is_idle and not channel.is_fresh:
                channel.loseConnection()
        drained: Deferred[int] = Deferred(self._drains.remove)
        self._drains.append(drained)
        drained.addTimeout(timeout_seconds, self.reactor, lambda _reason, _seconds: self.busy_connections)
        self._tell_drained()
        return drained

    def _tell_drained(self) -> None:
        if self._drains and all(channel.is_idle for channel in self._channels):
            while self._drains:
                self._drains.pop().callback(0)

    def abort_all(self) -> None:
        """End every connection at once; an answer that is not whole will not look so."""
        for channel in list(self._channels):
            channel.abort()


class Listener(Service):
    """
    The ports that a factory's connections come in by.

    Started once, it binds all of its endpoints, or none; `listening` fires with the ports, or with the
    first failure.  `ports` are those that are open now.  Stopping it closes the ports and leaves the
    connections alone: to end well, `drain`, then `abort_all`, then `stop_listening`.
    """

    def __init__(self, endpoints: Sequence[IStreamServerEndpoint], factory: GatewayFactory) -> None:
        self.listening: Deferred[list[IListeningPort]] = Deferred()
        self.ports: list[IListeningPort] = []
        self._endpoints = endpoints
        self._factory = factory

    def startService(self) -> None:
        """Bind."""
        super().startService()
        Deferred.fromCoroutine(self._bind()).chainDeferred(self.listening)

    async def _bind(self) -> list[IListeningPort]:
        binding = [maybeDeferred(endpoint.listen, self._factory) for endpoint in self._endpoints]
        results: list[tuple[bool, Any]] = await DeferredList(binding, consumeErrors=True)
        self.ports = [port for is_bound, port in results if is_bound]
        failures = [failure for is_bound, failure in results if not is_bound]
        if failures or not self.running:
            await self.stop_listening()
            raise failures[0].value if failures else CancelledError
        return list(self.ports)

    def stopService(self) -> Deferred[None]:
        """Close the ports."""
        super().stopService()
        return self.stop_listening()

    def stop_listening(self) -> Deferred[None]:
        """Close the ports; fires when they are closed.  Harmless when they are."""
        ports, self.ports = self.ports, []
        closing = DeferredList([maybeDeferred(port.stopListening) for port in ports], consumeErrors=True)
        return closing.addCallback(lambda _results: None)

    def drain(self, timeout_seconds: float) -> Deferred[int]:
        """As `GatewayFactory.drain`."""
        return self._factory.drain(timeout_seconds)

    def abort_all(self) -> None:
        """As `GatewayFactory.abort_all`."""
        self._factory.abort_all()


def parse_listen(text: str, reactor: object) -> IStreamServerEndpoint:
    """
    Return the endpoint that an entry of `listen` names.

    Either an endpoint string as Twisted and its plugins know them ("tcp:8080:interface=127.0.0.1",
    "unix:/run/x.sock", "systemd:domain=INET:name=web") or an address and a port ("127.0.0.1:8080",
    "localhost:8080", "[::1]:8080"); port 0 takes any.  A port alone is refused: it would leave open who
    may connect.  Raises ValueError with a sentence for whoever wrote the entry.
    """
    if text.partition(":")[0].lower() in _endpoint_types():
        return _parse_endpoint(text, reactor)
    match = _HOST_AND_PORT.fullmatch(text)
    if match is None:
        raise ValueError(f'{text!r} is neither "address:port" nor an endpoint such as "unix:/run/x.sock".')
    port = int(match["port"])
    if port > 65535:
        raise ValueError(f"{text!r} names port {port}; ports end at 65535.")
    return _address_endpoint(text, match["v6"] or match["host"], port, reactor)


def _endpoint_types() -> frozenset[str]:
    return _BUILT_IN_TYPES | {
        parser.prefix.lower() for parser in getPlugins(IStreamServerEndpointStringParser)
    }


def _parse_endpoint(text: str, reactor: object) -> IStreamServerEndpoint:
    try:
        endpoint: IStreamServerEndpoint = serverFromString(reactor, text)
    except Exception as error:
        # Parsers raise whatever their arguments lead them to.
        raise ValueError(f"{text!r} is not an endpoint that can be listened on: {error}") from error
    return endpoint


def _address_endpoint(text: str, host: str, port: int, reactor: object) -> IStreamServerEndpoint:
    if not host:
        raise ValueError(
            f'{text!r} names no address: "127.0.0.1:{port}" is for this machine alone, '
            f'"0.0.0.0:{port}" for whoever can reach it.'
        )
    try:
        address = ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError as error:
        raise ValueError(f'{text!r} names no address of this machine ("localhost" or numbers).') from error
    endpoint = TCP4ServerEndpoint if address.version == 4 else TCP6ServerEndpoint
    return endpoint(reactor, port, BACKLOG, str(address))
