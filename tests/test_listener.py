"""Connections from beginning to end: ports, what closes a connection, and how all of them are drained."""

from __future__ import annotations

import socket
from typing import Any

from twisted.internet.abstract import FileDescriptor
from twisted.internet.address import IPv4Address
from twisted.internet.defer import CancelledError, Deferred, fail, succeed
from twisted.internet.endpoints import UNIXServerEndpoint
from twisted.internet.error import CannotListenError, ConnectionAborted, ConnectionDone
from twisted.internet.interfaces import IListeningPort, IReactorTime, IStreamServerEndpoint
from twisted.internet.protocol import Factory
from twisted.internet.testing import MemoryReactorClock, StringTransport
from twisted.internet.threads import deferToThread
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase, TestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from crabtwist.channel import RESPONSE_BUFFER_BYTES
from crabtwist.http_reader import HTTPLimits
from crabtwist.listener import GatewayFactory, Listener, parse_listen
from tests.test_channel import GET, POST, ChannelTestCase, Desk, Wire


class EndTests(ChannelTestCase):
    """How connections end."""

    def test_kept(self) -> None:
        """HTTP/1.1 connections are kept."""
        self.send(GET)
        self.assertNotIn(b"Connection:", self.wire.value())
        self.assertTrue(self.channel.is_idle)

    def test_not_kept(self) -> None:
        """They are not in HTTP/1.0, nor if the client says so, and the answer says it."""
        closing = POST + b"Connection: x\r\nConnection: TE, Close\r\nContent-Length: 2\r\n\r\nhi"
        for request in (b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", closing):
            self.connect()
            self.send(request)
            self.assertIn(b"\r\nConnection: close\r\n", self.wire.value())
            self.assertEqual((self.wire.disconnecting, self.channel.is_idle), (True, False))

    def test_answer_closes(self) -> None:
        """They are not if the answer says so."""
        self.desk.holds = True
        self.send(GET)
        self.desk.requests[0].setHeader("connection", "close")
        self.desk.requests[0].finish()
        self.assertTrue(self.wire.disconnecting)

    def test_client_leaves(self) -> None:
        """Who works on the request of a client that leaves is told."""
        self.desk.holds = True
        self.send(GET)
        left = self.desk.requests[0].notifyFinish()
        self.hang_up()
        self.failureResultOf(left, ConnectionDone)
        self.desk.requests[0].abort()

    def test_client_leaves_in_its_body(self) -> None:
        """Whoever admitted a request is told, too."""
        ends: list[Any] = []
        self.connect(admit=lambda request: request.notifyFinish().addErrback(ends.append) and None)
        self.send(POST + b"Content-Length: 2\r\n\r\nh")
        self.hang_up()
        self.assertEqual((len(ends), self.factory.open_connections), (1, 0))

    def test_abort(self) -> None:
        """An aborted answer never looks whole, even to who finishes it."""
        self.desk.holds = True
        self.send(GET + GET)
        request = self.desk.requests[0]
        request.write(b"part")
        request.abort()
        request.finish()
        self.assertTrue(self.wire.disconnected)
        self.assertTrue(self.wire.value().endswith(b"4\r\npart\r\n"))
        self.hang_up()
        self.assertEqual((self.answers(), len(self.desk.requests)), ([200], 1))

    def test_abort_after_the_end(self) -> None:
        """Aborting what has ended harms nobody."""
        self.send(GET)
        self.desk.requests[0].abort()
        self.send(GET)
        self.assertEqual((self.answers(), self.wire.disconnected), ([200, 200], False))

    def test_brakes(self) -> None:
        """A client that does not read pauses the answer's producer, but its leaving is still noticed."""
        self.desk.holds = True
        self.send(GET)
        producer = StringTransport()
        self.desk.requests[0].registerProducer(producer, True)
        self.channel.pauseProducing()
        self.assertEqual((producer.producerState, self.wire.producerState), ("paused", "producing"))
        self.channel.resumeProducing()
        self.assertEqual(producer.producerState, "producing")


class DrainTests(ChannelTestCase):
    """How a factory's connections are brought to an end."""

    def open(self) -> tuple[Any, Wire]:
        """Open another connection to the factory."""
        wire, channel = Wire(), self.factory.buildProtocol(None)
        channel.makeConnection(wire)
        return channel, wire

    def test_counts(self) -> None:
        """The factory knows how many connections are open, and how many of them are at work."""
        self.desk.holds = True
        self.send(GET)
        other, _ = self.open()
        self.assertEqual((self.factory.open_connections, self.factory.busy_connections), (2, 1))
        other.dataReceived(b"G")
        self.assertEqual(self.factory.busy_connections, 2)
        other.connectionLost(Failure(ConnectionDone()))
        self.assertEqual((self.factory.open_connections, self.factory.busy_connections), (1, 1))

    def test_nothing_to_drain(self) -> None:
        """Where no connection is open, draining is done at once."""
        self.hang_up()
        self.assertEqual(self.successResultOf(self.factory.drain(10)), 0)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_idle(self) -> None:
        """Idle connections close at once, and are waited for."""
        self.send(GET)
        drained = self.factory.drain(10)
        self.assertTrue(self.wire.disconnecting)
        self.assertNoResult(drained)
        self.hang_up()
        self.assertEqual(self.successResultOf(drained), 0)

    def test_fresh(self) -> None:
        """Who has just connected may still send a request, gets its answer, and is not waited for."""
        self.assertEqual(self.successResultOf(self.factory.drain(10)), 0)
        self.assertFalse(self.wire.disconnecting)
        self.send(GET)
        self.assertEqual(self.answers(), [200])
        self.assertTrue(self.wire.disconnecting)

    def test_busy(self) -> None:
        """Busy connections end with their answer, which says so, and are waited for."""
        self.desk.holds = True
        self.send(GET)
        drained = self.factory.drain(10)
        self.assertFalse(self.wire.disconnecting)
        self.desk.requests[0].finish()
        self.assertIn(b"\r\nConnection: close\r\n", self.wire.value())
        self.assertTrue(self.wire.disconnecting)
        self.assertNoResult(drained)
        self.hang_up()
        self.assertEqual(self.successResultOf(drained), 0)

    def test_answer_that_has_begun(self) -> None:
        """An answer that has begun before ends its connection, too."""
        self.desk.holds = True
        self.send(GET)
        self.desk.requests[0].write(b"")
        self.factory.drain(10).addErrback(lambda _: None)
        self.desk.requests[0].finish()
        self.assertTrue(self.wire.disconnecting)

    def test_new_connections(self) -> None:
        """Connections that come meanwhile get one answer, and are not waited for while they are silent."""
        self.hang_up()
        self.successResultOf(self.factory.drain(10))
        channel, wire = self.open()
        self.assertFalse(wire.disconnecting)
        channel.dataReceived(GET + GET)
        self.assertEqual(wire.value().count(b"HTTP/1.1 200"), 1)
        self.assertTrue(wire.half_closed)

    def test_silent_connections(self) -> None:
        """A connection that came meanwhile and says nothing does not delay the end."""
        drained = self.factory.drain(10)
        self.open()
        self.hang_up()
        self.assertEqual(self.successResultOf(drained), 0)

    def test_timeout(self) -> None:
        """After its time, draining says how many connections are still busy; they can be aborted."""
        self.desk.holds = True
        self.send(GET)
        drained = self.factory.drain(10)
        self.clock.advance(9)
        self.assertNoResult(drained)
        self.clock.advance(1)
        self.assertEqual(self.successResultOf(drained), 1)
        self.factory.abort_all()
        self.hang_up()
        self.assertTrue(self.wire.disconnected)

    def test_no_log(self) -> None:
        """The factory writes no line per request, and keeps no clock for it."""
        self.hang_up()
        self.factory.doStart()
        self.factory.log(self)
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertEqual(self.factory.acceptableProtocols(), [b"http/1.1"])


@implementer(IListeningPort)
class Port:
    """A port that knows whether it is open."""

    is_open = True

    def startListening(self) -> None:
        self.is_open = True

    def stopListening(self) -> None:
        self.is_open = False

    def getHost(self) -> Any:
        return IPv4Address("TCP", "127.0.0.1", 1)


@implementer(IStreamServerEndpoint)
class Endpoint:
    """Listens when told."""

    def __init__(self, result: Deferred[Any]) -> None:
        self.result = result

    def listen(self, protocolFactory: Any) -> Deferred[Any]:
        return self.result


class ListenerTests(SynchronousTestCase):
    """Ports."""

    def setUp(self) -> None:
        self.clock = MemoryReactorClock()
        self.factory = GatewayFactory(Desk(), reactor=self.clock)

    def listener(self, *results: Deferred[Any]) -> Listener:
        listener = Listener([Endpoint(result) for result in results], self.factory)
        listener.startService()
        return listener

    def test_fakes(self) -> None:
        """The fakes of these tests keep the contracts."""
        self.assertTrue(verifyObject(IListeningPort, Port()))
        self.assertTrue(verifyObject(IStreamServerEndpoint, Endpoint(Deferred())))

    def test_all(self) -> None:
        """All endpoints are bound; their ports are closed together."""
        ports, late = [Port(), Port()], Deferred[Any]()
        listener = self.listener(succeed(ports[0]), late)
        self.assertNoResult(listener.listening)
        late.callback(ports[1])
        self.assertEqual(self.successResultOf(listener.listening), ports)
        self.successResultOf(listener.stop_listening())
        self.successResultOf(listener.stopService())
        self.assertEqual([port.is_open for port in ports], [False, False])
        self.assertEqual(listener.ports, [])

    def test_none(self) -> None:
        """If one cannot be bound, none is."""
        port, error = Port(), CannotListenError("", 1, OSError("taken"))
        listener = self.listener(succeed(port), fail(error), fail(KeyError()))
        self.assertIs(self.failureResultOf(listener.listening).value, error)
        self.assertEqual((port.is_open, listener.ports), (False, []))

    def test_stopped_while_binding(self) -> None:
        """A port that opens after the service was stopped is closed again."""
        port, late = Port(), Deferred[Any]()
        listener = self.listener(late)
        self.successResultOf(listener.stopService())
        late.callback(port)
        self.failureResultOf(listener.listening, CancelledError)
        self.assertFalse(port.is_open)

    def test_drain(self) -> None:
        """A listener drains and aborts its factory's connections; its ports stay open meanwhile."""
        port, wire = Port(), Wire()
        listener = self.listener(succeed(port))
        channel = self.factory.buildProtocol(None)
        channel.makeConnection(wire)
        channel.dataReceived(GET)
        drained = listener.drain(1)
        self.assertTrue(wire.disconnecting and port.is_open)
        self.clock.advance(1)
        self.assertEqual(self.successResultOf(drained), 1)
        listener.abort_all()
        self.assertTrue(wire.disconnected)


class ParseListenTests(SynchronousTestCase):
    """What `listen` may say."""

    def bound(self, text: str) -> tuple[int, str]:
        reactor = MemoryReactorClock()
        self.successResultOf(parse_listen(text, reactor).listen(Factory()))
        [(port, _, _, interface)] = reactor.tcpServers
        return port, interface

    def test_addresses(self) -> None:
        """An address and a port are enough."""
        self.assertEqual(self.bound("127.0.0.1:8080"), (8080, "127.0.0.1"))
        self.assertEqual(self.bound("localhost:0"), (0, "127.0.0.1"))
        self.assertEqual(self.bound("0.0.0.0:1"), (1, "0.0.0.0"))
        self.assertEqual(self.bound("[::1]:65535"), (65535, "::1"))

    def test_endpoints(self) -> None:
        """Twisted's endpoint strings are understood, those of plugins too."""
        self.assertEqual(self.bound("tcp:8080:interface=127.0.0.1"), (8080, "127.0.0.1"))
        self.assertEqual(self.bound(r"tcp6:8080:interface=\:\:1"), (8080, "::1"))
        self.assertEqual(self.bound("haproxy:tcp:8080:interface=127.0.0.2"), (8080, "127.0.0.2"))
        self.assertIsInstance(parse_listen("unix:/run/x.sock", MemoryReactorClock()), UNIXServerEndpoint)

    def test_nonsense(self) -> None:
        """What is neither is refused, in a sentence that quotes it."""
        entries = [
            "",
            "8080",
            ":8080",
            "a.example:80",
            "::1:80",
            "[1.2.3:80",
            "127.0.0.1:65536",
            "127.0.0.1:",
        ]
        for text in [*entries, "tcp:", "tcp:x", "tcp:80:who=me", "systemd:domain=INET", "nowhere:1:2"]:
            error = self.assertRaises(ValueError, parse_listen, text, MemoryReactorClock())
            self.assertTrue(str(error).startswith(repr(text)), str(error))


class SocketTests(TestCase):
    """What only real sockets show."""

    timeout = 30

    async def listen(self, **how: Any) -> None:
        """Serve on a port of this machine."""
        from twisted.internet import reactor

        self.desk = Desk()
        self.desk.holds = True
        self.factory = GatewayFactory(self.desk, reactor=IReactorTime(reactor), **how)
        self.listener = Listener([parse_listen("127.0.0.1:0", reactor)], self.factory)
        self.listener.startService()
        self.port: Any = (await self.listener.listening)[0]
        self.addCleanup(self.listener.stopService)
        self.addCleanup(self.factory.abort_all)

    def converse(self, request: bytes) -> Deferred[bytes]:
        """Send all of a request before reading any of the answer; a reset fails."""
        return deferToThread(self._converse, request)

    def _converse(self, request: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", self.port.getHost().port), timeout=20) as connection:
            connection.sendall(request)
            return b"".join(iter(lambda: connection.recv(65536), b""))

    async def test_lingering(self) -> None:
        """A client that sends a huge body and only then reads still finds out why it was refused."""
        await self.listen(limits=HTTPLimits(max_body_bytes=10))
        size = 8 * 1024 * 1024
        answer = await self.converse(POST + b"Content-Length: %d\r\n\r\n" % size + bytes(size))
        self.assertTrue(answer.startswith(b"HTTP/1.1 413 "))
        self.assertIn(b"body_too_large", answer)

    async def test_drain(self) -> None:
        """Draining ends when the last byte of the last answer has left the process."""
        await self.listen()
        answered = self.converse(GET)
        request = await self.desk.came
        drained = self.listener.drain(20)
        request.setHeader(b"content-length", b"8000000")
        request.write(bytes(8_000_000))
        request.finish()
        self.assertEqual(self.factory.busy_connections, 1)
        self.assertEqual((await drained, self.factory.open_connections), (0, 0))
        self.assertEqual(len((await answered).partition(b"\r\n\r\n")[2]), 8_000_000)

    async def test_abort(self) -> None:
        """An aborted answer ends in a reset, which no client takes for its end."""
        await self.listen()
        answered = self.converse(b"GET / HTTP/1.0\r\n\r\n")
        request = await self.desk.came
        request.write(b"part")
        left = request.notifyFinish()
        request.abort()
        await self.assertFailure(left, ConnectionAborted)
        await self.assertFailure(answered, ConnectionResetError)

    async def test_half_close(self) -> None:
        """A client that closes its half counts as gone."""
        await self.listen()
        with socket.create_connection(("127.0.0.1", self.port.getHost().port)) as client:
            client.sendall(GET)
            request = await self.desk.came
            client.shutdown(socket.SHUT_WR)
            await self.assertFailure(request.notifyFinish(), ConnectionDone)

    async def test_buffers(self) -> None:
        """While an answer is written little is buffered; nothing waits to fill a packet."""
        await self.listen()
        answered = self.converse(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        request = await self.desk.came
        wire: Any = request.channel.transport
        self.assertEqual((wire.bufferSize, wire.getTcpNoDelay()), (RESPONSE_BUFFER_BYTES, True))
        request.finish()
        self.assertEqual(wire.bufferSize, FileDescriptor.bufferSize)
        self.assertTrue((await answered).endswith(b"0\r\n\r\n"))
