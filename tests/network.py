"""A network in memory: connections that are accepted, refused, spoken on and cut by hand."""

from __future__ import annotations

from typing import Any

from twisted.internet import error
from twisted.internet.address import IPv4Address
from twisted.internet.interfaces import IReactorTime
from twisted.internet.protocol import Protocol, connectionDone
from twisted.internet.testing import MemoryReactorClock, StringTransport
from twisted.python.failure import Failure


class Wire(StringTransport):
    """A transport whose end comes one turn of the clock after it was asked for, as a socket's does."""

    def __init__(self, protocol: Any, clock: IReactorTime) -> None:
        super().__init__()
        self.protocol = protocol
        self.clock = clock
        self.cut = False

    def loseConnection(self) -> None:
        if not self.disconnecting:
            self.disconnecting = True
            self.clock.callLater(0, self.end, error.ConnectionDone())

    def abortConnection(self) -> None:
        self.disconnected = True
        if not self.disconnecting:
            self.disconnecting = True
            self.clock.callLater(0, self.end, error.ConnectionAborted())

    def say(self, data: bytes) -> None:
        """Let the peer send something."""
        if data:
            self.protocol.dataReceived(data)

    def end(self, why: Exception | None = None) -> None:
        """Let the connection end: a FIN, unless `why` is given."""
        if not self.cut:
            self.cut = self.disconnecting = True
            self.protocol.connectionLost(Failure(why or error.ConnectionDone()))

    def heard(self) -> bytes:
        """Return what the peer was sent since it was last asked."""
        data: bytes = self.value()
        self.clear()
        return data


class Network:
    """Every peer there is; `reactor` connects to it."""

    def __init__(self) -> None:
        self.reactor = MemoryReactorClock()
        self.wires: list[Wire] = []
        self._seen = 0

    def dials(self) -> list[tuple[Any, Any]]:
        """Return the connections that are being opened, as (factory, connector)."""
        clients = self.reactor.tcpClients[self._seen :]
        pairs = zip([client[2] for client in clients], self.reactor.connectors[self._seen :], strict=True)
        return [pair for pair in pairs if not pair[1].stoppedConnecting]

    def _next(self) -> tuple[Any, Any]:
        while self.reactor.connectors[self._seen].stoppedConnecting:
            self._seen += 1
        self._seen += 1
        return self.reactor.tcpClients[self._seen - 1][2], self.reactor.connectors[self._seen - 1]

    def accept(self) -> Wire:
        """Let the oldest connection that is being opened be there."""
        factory, _ = self._next()
        protocol = factory.buildProtocol(IPv4Address("TCP", "192.0.2.1", 80))
        wire = Wire(protocol, self.reactor)
        self.wires.append(wire)
        protocol.makeConnection(wire)
        return wire

    def refuse(self, why: Exception | None = None) -> None:
        """Let the oldest connection that is being opened fail."""
        factory, connector = self._next()
        factory.clientConnectionFailed(connector, Failure(why or error.ConnectionRefusedError()))


class Reader(Protocol):
    """Reads a body; pauses when `thirst` bytes have come."""

    def __init__(self, thirst: float = float("inf")) -> None:
        self.data = b""
        self.reason: Any = None
        self.thirst = thirst

    @property
    def producer(self) -> Any:
        """The body's producer."""
        return self.transport

    def dataReceived(self, data: bytes) -> None:
        assert self.reason is None
        self.data += data
        if len(self.data) >= self.thirst:
            self.producer.pauseProducing()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        assert self.reason is None
        self.reason = reason.value
