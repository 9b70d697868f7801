"""The agent against servers on real sockets, with and without TLS."""

from __future__ import annotations

import datetime
import ipaddress
import socket
from collections.abc import Callable
from typing import Any

import treq
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from twisted.internet import ssl
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.python.failure import Failure
from twisted.trial.unittest import TestCase
from twisted.web.iweb import IResponse

from crabtwist.errors import ConnectFailed
from crabtwist.http_client import READ_BYTES, BytesBody
from crabtwist.upstream import UpstreamAgent

HELLO = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


def certificate(
    subject: str, names: list[x509.GeneralName], issuer: Any = None
) -> tuple[x509.Certificate, Any]:
    """Make a certificate and its key: an authority's, or one signed by `issuer`."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
    now = datetime.datetime.now(datetime.UTC)
    signed_by, signing_key = (issuer[0].subject, issuer[1]) if issuer else (name, key)
    draft = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(signed_by)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    )
    if names:
        draft = draft.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return draft.sign(signing_key, hashes.SHA256()), key


def pem(made: x509.Certificate) -> bytes:
    """Return a certificate as it is written in files."""
    return made.public_bytes(serialization.Encoding.PEM)


class Server(Protocol):
    """Answers every request whose body is `body` by the factory's `answer`."""

    factory: Any
    buffer = b""

    def connectionMade(self) -> None:
        self.factory.connections.append(self)

    def dataReceived(self, data: bytes) -> None:
        self.buffer += data
        if self.buffer.endswith(b"body"):
            self.buffer = b""
            self.factory.answer(self.transport)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.factory.lost.callback(None)
        self.factory.lost = Deferred()


def answer_and_stay(transport: Any) -> None:
    """Answer, and keep the connection."""
    transport.write(HELLO)


def answer_and_leave(transport: Any) -> None:
    """Answer, and close the connection without having said so."""
    transport.write(HELLO)
    transport.loseConnection()


class SocketTestCase(TestCase):
    """A server on loopback and an agent."""

    def serve(self, answer: Callable[[Any], None], options: Any = None) -> int:
        """Start a server; return its port."""
        from twisted.internet import reactor

        factory: Any = Factory.forProtocol(Server)
        factory.answer, factory.connections, factory.lost = answer, [], Deferred()
        self.server = factory
        real: Any = reactor
        listen = real.listenTCP if options is None else lambda *a, **k: real.listenSSL(*a, options, **k)
        port = listen(0, factory, interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        return int(port.getHost().port)

    def agent(self, ca_file: str | None = None) -> UpstreamAgent:
        """Make an agent."""
        from twisted.internet import reactor

        agent = UpstreamAgent(reactor, ca_file=ca_file)
        self.addCleanup(agent.close)
        return agent


class PlainTests(SocketTestCase):
    """Without TLS."""

    async def posts(self, agent: UpstreamAgent, port: int, count: int) -> list[bytes]:
        """Send POSTs, one after the other without a pause."""
        bodies = []
        for _ in range(count):
            url = b"http://127.0.0.1:%d/" % port
            bodies.append(await treq.content(await agent.request(b"POST", url, None, BytesBody(b"body"))))
        return bodies

    async def test_leaving_server(self) -> None:
        """Against a server that closes each connection after its answer, no POST is lost."""
        port = self.serve(answer_and_leave)
        self.assertEqual([b"hello"] * 40, await self.posts(self.agent(), port, 40))

    async def test_staying_server(self) -> None:
        """Against one that does not, all take the same connection."""
        port = self.serve(answer_and_stay)
        agent = self.agent()
        self.assertEqual([b"hello"] * 40, await self.posts(agent, port, 40))
        self.assertEqual((1, 1, 0), (len(self.server.connections), agent.connections, agent.stale_retries))

    async def test_unread_end(self) -> None:
        """An end that the reactor has not read of yet is noticed before a kept connection is used."""
        port = self.serve(answer_and_stay)
        agent = self.agent()
        await self.posts(agent, port, 1)
        self.server.connections[0].transport.socket.shutdown(socket.SHUT_WR)
        self.assertEqual([b"hello"], await self.posts(agent, port, 1))
        self.assertEqual((2, 0), (len(self.server.connections), agent.stale_retries))

    async def test_refused(self) -> None:
        """A port that nobody listens on is a connection refused."""
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            posts = Deferred.fromCoroutine(self.posts(self.agent(), unused.getsockname()[1], 1))
            failure = await self.assertFailure(posts, ConnectFailed)
        self.assertIn("connection refused", str(failure))

    async def test_socket(self) -> None:
        """Small packets are not held back, and little is read at once."""
        port = self.serve(lambda transport: transport.write(HELLO[:-1]))
        url = b"http://127.0.0.1:%d/" % port
        response: Any = await self.agent().request(b"POST", url, None, BytesBody(b"body"))
        reader = Protocol()
        response.deliverBody(reader)
        transport = response.body._source.transport
        self.assertEqual((True, READ_BYTES), (transport.getTcpNoDelay(), transport.bufferSize))
        lost = self.server.lost
        response.body.stopProducing()
        await lost


class TLSTests(SocketTestCase):
    """With TLS, under an authority that nobody else trusts."""

    def setUp(self) -> None:
        """Make the authority and the server's certificate, which is for 127.0.0.1 alone."""
        authority = certificate("Private CA", [])
        made, key = certificate("server", [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))], authority)
        secret = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        self.options = ssl.PrivateCertificate.loadPEM(secret + pem(made)).options()
        self.ca_file = self.mktemp()
        with open(self.ca_file, "wb") as file:
            file.write(pem(certificate("Another CA", [])[0]) + pem(authority[0]))

    def ask(self, agent: UpstreamAgent, host: bytes, port: int) -> Deferred[IResponse]:
        """Send a POST."""
        return agent.request(b"POST", b"https://%b:%d/" % (host, port), None, BytesBody(b"body"))

    async def test_trusted(self) -> None:
        """A server under the authority in `ca_file` is believed, and its connection kept."""
        port = self.serve(answer_and_stay, self.options)
        agent = self.agent(self.ca_file)
        for _ in range(3):
            self.assertEqual(b"hello", await treq.content(await self.ask(agent, b"127.0.0.1", port)))
        self.assertEqual((1, 1), (len(self.server.connections), agent.connections))

    async def test_deaf_server(self) -> None:
        """A kept connection is closed also if the server never answers the goodbye."""
        port = self.serve(answer_and_stay, self.options)
        agent = self.agent(self.ca_file)
        await treq.content(await self.ask(agent, b"127.0.0.1", port))
        deaf = self.server.connections[0].transport
        deaf.pauseProducing()
        await agent.close()
        deaf.resumeProducing()
        await self.server.lost

    async def test_leaving_server(self) -> None:
        """No POST is lost when the server closes each connection after its answer."""
        port = self.serve(answer_and_leave, self.options)
        agent = self.agent(self.ca_file)
        for _ in range(10):
            self.assertEqual(b"hello", await treq.content(await self.ask(agent, b"127.0.0.1", port)))

    async def test_unknown_authority(self) -> None:
        """A server under any other authority is not spoken to."""
        port = self.serve(answer_and_stay, self.options)
        failure = await self.assertFailure(self.ask(self.agent(), b"127.0.0.1", port), ConnectFailed)
        self.assertIn("certificate verify failed", str(failure))

    async def test_wrong_name(self) -> None:
        """A certificate for another name will not do, and nothing is sent."""
        port = self.serve(answer_and_stay, self.options)
        failure = await self.assertFailure(
            self.ask(self.agent(self.ca_file), b"localhost", port), ConnectFailed
        )
        self.assertIn(f"cannot connect to localhost:{port}", str(failure))
        self.assertIn("for another name", str(failure))

    async def test_not_tls(self) -> None:
        """A server that does not speak TLS is a failed connection."""
        port = self.serve(answer_and_stay)
        self.server.protocol = Rude
        failure = await self.assertFailure(
            self.ask(self.agent(self.ca_file), b"127.0.0.1", port), ConnectFailed
        )
        self.assertIn("TLS", str(failure))

    async def test_stop(self) -> None:
        """Stopping an answer under TLS closes the socket at once, without waiting for the peer's goodbye."""
        port = self.serve(lambda transport: transport.write(HELLO[:-1]), self.options)
        agent = self.agent(self.ca_file)
        response: Any = await self.ask(agent, b"127.0.0.1", port)
        reader = Protocol()
        response.deliverBody(reader)
        self.assertEqual(READ_BYTES, response.body._source.transport.transport.bufferSize)
        lost = self.server.lost
        reader.transport.stopProducing()  # type: ignore[union-attr]  # a body's transport is a producer
        self.assertEqual(0, agent.connections)
        await lost


class Rude(Server):
    """Speaks first, and no TLS."""

    def connectionMade(self) -> None:
        assert self.transport is not None
        self.transport.write(HELLO)
