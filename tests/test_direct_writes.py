"""Writing at once: what leaves, in which order, and what is left to the transport."""

from __future__ import annotations

import socket
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionLost
from twisted.internet.interfaces import IPushProducer, IReactorTCP
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.trial.unittest import SynchronousTestCase, TestCase
from zope.interface import implementer

from crabtwist.direct_writes import PEACE_SECONDS, DirectWriter

#: More than a loopback's two buffers take.
MUCH = bytes(range(256)) * 64 * 1024


class OtherTransportTests(SynchronousTestCase):
    """What is no plain socket, such as TLS, is written to as ever."""

    def test_all_passes(self) -> None:
        """Every byte reaches the transport, in order."""
        wire = StringTransport()
        writer = DirectWriter(wire, Clock())
        writer.write(b"a")
        writer.write_now(b"b")
        writer.write(b"c")
        self.assertEqual(wire.value(), b"abc")

    def test_held(self) -> None:
        """What is held leaves once, with what is written next, be it nothing."""
        wire = StringTransport()
        writer = DirectWriter(wire, Clock())
        for write in (writer.write, writer.write, writer.write_now):
            writer.hold(b"held ")
            self.assertEqual(wire.value(), b"")
            write(b"next")
            self.assertTrue(wire.value().startswith(b"held "))
            writer.write_now(b"")
            self.assertEqual(wire.value().count(b"held "), 1)
            wire.clear()


@implementer(IPushProducer)
class Brake:
    """Counts how often it is paused and let go."""

    pauses = resumes = 0

    def pauseProducing(self) -> None:
        self.pauses += 1

    def resumeProducing(self) -> None:
        self.resumes += 1

    def stopProducing(self) -> None:
        """The connection is gone."""


class Served(Protocol):
    """The server's end of one connection."""

    def __init__(self, made: Deferred[Any], lost: Deferred[Any]) -> None:
        self._made, self._lost = made, lost

    def connectionMade(self) -> None:
        self._made.callback(self.transport)

    def connectionLost(self, reason: Any = None) -> None:
        self._lost.callback(reason.type)


class SocketTests(TestCase):
    """Real sockets, both ends of which are here."""

    async def connect(self) -> None:
        """Make a connection, its client's end blocking, its server's end with a writer."""
        from twisted.internet import reactor

        made: Deferred[Any] = Deferred()
        self.lost: Deferred[Any] = Deferred()
        factory: Any = Factory.forProtocol(lambda: Served(made, self.lost))
        port: Any = IReactorTCP(reactor).listenTCP(0, factory, interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        self.client = socket.create_connection(("127.0.0.1", port.getHost().port), timeout=20)
        self.addCleanup(self.client.close)
        self.wire = await made
        self.clock = Clock()
        self.writer = DirectWriter(self.wire, self.clock)
        self.addCleanup(self._hang_up)

    async def _hang_up(self) -> None:
        self.wire.abortConnection()
        await self.lost

    async def read(self, size: int) -> bytes:
        """Return so many bytes that came to the client, while the reactor turns."""
        from twisted.internet.threads import deferToThread

        return await deferToThread(self._read, size)

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            data += self.client.recv(min(1 << 20, size - len(data)))
        return bytes(data)

    async def test_at_once(self) -> None:
        """What is written in peace has left when the call returns; the reactor is asked for nothing."""
        await self.connect()
        self.writer.write(b"hello")
        self.assertEqual(self.client.recv(9), b"hello")
        self.clock.advance(PEACE_SECONDS)
        self.writer.write(b"again")
        self.assertEqual(self.client.recv(9), b"again")
        self.assertNotIn(self.wire, self.wire.reactor.getWriters())

    async def test_held(self) -> None:
        """What is held leaves in one piece with what follows it."""
        await self.connect()
        self.writer.hold(b"head ")
        self.writer.write_now(b"body")
        self.assertEqual(self.client.recv(99), b"head body")

    async def test_in_a_hurry(self) -> None:
        """What follows soon waits for more, and leaves with it."""
        await self.connect()
        for word in (b"one ", b"two ", b"three"):
            self.writer.write(word)
            self.clock.advance(PEACE_SECONDS / 2)
        self.assertEqual(self.client.recv(99), b"one ")
        self.assertIn(self.wire, self.wire.reactor.getWriters())
        self.assertEqual(await self.read(9), b"two three")

    async def test_last(self) -> None:
        """The end of an answer waits for nothing, however soon it follows."""
        await self.connect()
        self.writer.write(b"one ")
        self.writer.write_now(b"two")
        self.assertEqual(self.client.recv(99), b"one two")

    async def test_order(self) -> None:
        """Nothing overtakes what the transport still holds."""
        await self.connect()
        self.wire.write(b"one ")
        self.writer.write_now(b"two ")
        self.wire.writeSequence([b"three ", b"four "])
        self.writer.write(b"five")
        self.assertEqual(await self.read(23), b"one two three four five")

    async def test_in_part(self) -> None:
        """What the socket does not take waits in the transport, whose producer waits with it."""
        await self.connect()
        brake = Brake()
        self.wire.registerProducer(brake, True)
        self.writer.write_now(MUCH)
        self.writer.write_now(b"end")
        self.assertEqual((brake.pauses > 0, brake.resumes), (True, 0))
        self.assertEqual(await self.read(len(MUCH) + 3), MUCH + b"end")
        self.assertEqual((brake.resumes, self.wire.dataBuffer), (1, b""))
        self.wire.unregisterProducer()

    async def test_gone(self) -> None:
        """A socket that fails is lost in the transport's own time, not in the writer's."""
        await self.connect()
        self.wire.pauseProducing()
        self.wire.socket.shutdown(socket.SHUT_RDWR)
        self.writer.write_now(b"lost")
        self.assertFalse(self.lost.called)
        self.assertEqual(await self.lost, ConnectionLost)
        self.writer.write_now(b"lost too")

    async def test_aborted(self) -> None:
        """After an abort nothing leaves any more."""
        await self.connect()
        self.wire.abortConnection()
        self.writer.write_now(b"late")
        await self.lost
        self.assertRaises(ConnectionResetError, self.client.recv, 9)

    async def test_closing(self) -> None:
        """A connection that is about to close says first what it was given."""
        await self.connect()
        self.wire.loseConnection()
        self.writer.write_now(b"bye")
        await self.lost
        self.assertEqual((self.client.recv(9), self.client.recv(9)), (b"bye", b""))

    async def test_half_closed(self) -> None:
        """What is written after the end of what is written goes nowhere, and harms nobody."""
        await self.connect()
        self.writer.write_now(b"bye")
        self.wire.loseWriteConnection()
        self.wire.doWrite()
        self.writer.write_now(b"late")
        self.assertEqual((self.client.recv(9), self.client.recv(9)), (b"bye", b""))
