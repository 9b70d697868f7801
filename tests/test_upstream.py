"""The agent: where requests go, over which connection, and how failures are told."""

from __future__ import annotations

from typing import Any

import treq
from twisted.internet.defer import CancelledError, Deferred
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.iweb import IAgent, IResponse
from zope.interface.verify import verifyObject

from crabtwist.connection_pool import Origin
from crabtwist.errors import (
    ConfigurationError,
    ConnectFailed,
    ConnectionBroken,
    ConnectTimedOut,
)
from crabtwist.http_client import BytesBody, OrderedHeaders
from crabtwist.upstream import ConnectionLimits, UpstreamAgent, parse_uri
from tests.network import Network, Wire
from tests.test_http_request import Tap

HELLO = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
GOODBYE = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello"


class AgentTestCase(SynchronousTestCase):
    """An agent and the network that it talks to."""

    def setUp(self) -> None:
        """Make an agent."""
        self.use()

    def use(self, **limits: Any) -> None:
        """Make another agent."""
        self.network = Network()
        self.clock = self.network.reactor
        self.agent = UpstreamAgent(self.clock, ConnectionLimits(**limits))

    def post(self, path: bytes = b"/", body: Any = None) -> Deferred[IResponse]:
        """Send a POST."""
        body = BytesBody(b"body") if body is None else body
        return self.agent.request(b"POST", b"http://192.0.2.1:8080" + path, None, body)

    def busy(self, count: int = 1) -> list[Wire]:
        """Make requests that are not answered; return their wires."""
        wires = []
        for _ in range(count):
            self.post()
            wires.append(self.network.accept())
        return wires

    def kept(self, count: int = 1) -> list[Wire]:
        """Make connections that are kept."""
        wires = self.busy(count)
        for wire in wires:
            wire.say(HELLO)
            wire.clear()
        return wires


class TargetTests(AgentTestCase):
    """URIs and requests."""

    def test_contract(self) -> None:
        """It is an agent."""
        verifyObject(IAgent, self.agent)

    def test_request(self) -> None:
        """What is asked for goes out as it was given, with nothing of the agent's own but host and length."""
        fields = OrderedHeaders([(b"x-API-key", b"k"), (b"accept", b"*/*")])
        self.agent.request(b"POST", b"http://192.0.2.1:8080/v1//a%2Fb?q=1&q=", fields, BytesBody(b"{}"))
        sent = b"POST /v1//a%2Fb?q=1&q= HTTP/1.1\r\nHost: 192.0.2.1:8080\r\nx-API-key: k\r\naccept: */*\r\n"
        self.assertEqual(sent + b"Content-Length: 2\r\n\r\n{}", self.network.accept().heard())

    def test_treq(self) -> None:
        """treq reads the answer."""
        body = self.post().addCallback(treq.content)
        self.network.accept().say(HELLO)
        self.assertEqual(b"hello", self.successResultOf(body))

    def test_uris(self) -> None:
        """A URI is taken apart without a change to its path and query."""
        for uri, origin, host, target in (
            (b"http://h", Origin("http", "h", 80), b"h", b"/"),
            (
                b"HTTPS://API.Example.:8443/a/../b?c",
                Origin("https", "api.example.", 8443),
                b"api.example.:8443",
                b"/a/../b?c",
            ),
            (
                b"https://xn--bcher-kva.example:443?q",
                Origin("https", "xn--bcher-kva.example", 443),
                b"xn--bcher-kva.example",
                b"/?q",
            ),
            (b"http://[::1]:80/", Origin("http", "::1", 80), b"[::1]", b"/"),
            (b"http://[::1]:81/?", Origin("http", "::1", 81), b"[::1]:81", b"/?"),
        ):
            self.assertEqual((origin, target), parse_uri(uri))
            self.assertEqual(host, origin.host_field())

    def test_refused_uris(self) -> None:
        """What is no upstream's URI is refused, without being repeated in the message."""
        for uri in (
            b"secret",
            b"file:///secret",
            b"//secret/",
            b"http://",
            b"http:///secret",
            b"http://user:secret@h/",
            b"http://h:secret/",
            b"http://h:65536/secret",
            b"http://h/#secret",
            b"http://h/\r\nsecret",
            b"http://h/ secret",
            b"http://b\xc3\xbccher.secret/",
            b"http://%31secret/",
            b"http://[secret]/",
            b"http://[1.2.3.4]/secret",
            b"http://h\\@secret",
        ):
            failure = self.failureResultOf(self.agent.request(b"GET", uri), ValueError)
            self.assertNotIn("secret", failure.getErrorMessage())

    def test_refused_fields(self) -> None:
        """A field that cannot be sent fails before a connection is opened."""
        evil = OrderedHeaders([(b"a", b"b\r\nc: d")])
        self.failureResultOf(self.agent.request(b"GET", b"http://192.0.2.1/", evil), ValueError)
        self.assertEqual(([], 0), (self.network.dials(), self.agent.connections))


class StaleTests(AgentTestCase):
    """Kept connections that turn out to be dead."""

    def test_sent_again(self) -> None:
        """The request goes out once more, on a new connection, and is counted."""
        retries: list[None] = []
        self.agent = UpstreamAgent(self.clock, on_stale_retry=lambda: retries.append(None))
        (stale,) = self.kept()
        answer = self.post(b"/again").addCallback(treq.content)
        stale.end()
        fresh = self.network.accept()
        self.assertEqual(stale.heard(), fresh.heard())
        fresh.say(HELLO)
        self.assertEqual(b"hello", self.successResultOf(answer))
        self.assertEqual((1, 1, 1), (self.agent.stale_retries, len(retries), self.agent.connections))

    def test_not_after_a_while(self) -> None:
        """Not if the upstream had time to work: it may bill what it worked on."""
        (stale,) = self.kept()
        answer = self.post()
        self.clock.advance(2.1)
        stale.end()
        self.failureResultOf(answer, ConnectionBroken)
        self.assertEqual((0, 0), (self.agent.stale_retries, self.agent.connections))

    def test_only_once(self) -> None:
        """The new connection's failure is the request's."""
        self.use(max_connections=2)
        stale, _ = self.kept(2)[1], None
        answer = self.post()
        stale.end()
        self.network.accept().end()
        self.assertIn("192.0.2.1:8080", str(self.failureResultOf(answer, ConnectionBroken).value))
        self.assertEqual((1, 1), (self.agent.stale_retries, self.agent.connections))

    def test_not_after_an_answer(self) -> None:
        """Not if a single byte of an answer has come: the request was read."""
        (stale,) = self.kept()
        answer = self.post()
        stale.say(b"H")
        stale.end()
        self.failureResultOf(answer, ConnectionBroken)
        self.assertEqual((0, 0), (self.agent.stale_retries, self.agent.connections))

    def test_not_without_the_body(self) -> None:
        """Not if the body is not in hand any more."""
        (stale,) = self.kept()
        answer = self.post(body=Tap(5))
        stale.end()
        self.failureResultOf(answer, ConnectionBroken)
        self.assertEqual(0, self.agent.stale_retries)

    def test_keeps_its_place(self) -> None:
        """The new connection takes the dead one's slot, before those who wait."""
        self.use(max_connections=1)
        (stale,) = self.kept()
        first, second = self.post(b"/first"), self.post(b"/second")
        stale.end()
        self.assertEqual(1, self.agent.connections)
        fresh = self.network.accept()
        self.assertIn(b"/first", fresh.heard())
        fresh.say(HELLO)
        self.assertIn(b"/second", fresh.heard())
        fresh.say(HELLO)
        self.assertEqual([200, 200], [self.successResultOf(each).code for each in (first, second)])


class NameTests(AgentTestCase):
    """Names that must be looked up."""

    def setUp(self) -> None:
        """Look names up by hand."""
        super().setUp()
        self.receivers: list[Any] = []
        resolver = self

        class ByHand:
            def resolveHostName(self, receiver: Any, *args: Any, **kwargs: Any) -> Any:
                receiver.resolutionBegan(None)
                resolver.receivers.append(receiver)

        self.clock.nameResolver = ByHand()  # type: ignore[assignment]  # as much of a resolver as is asked for
        self.answer = self.agent.request(b"GET", b"http://name.test/")

    def test_unknown(self) -> None:
        """A name that nobody knows is the reason."""
        self.receivers[0].resolutionComplete()
        words = "cannot connect to name.test:80: its name is not known"
        self.assertEqual(words, str(self.failureResultOf(self.answer, ConnectFailed).value))

    def test_cancel(self) -> None:
        """Giving up during the look-up is not the peer's fault."""
        self.answer.cancel()
        self.failureResultOf(self.answer, CancelledError)
        self.receivers[0].resolutionComplete()
        self.assertEqual(0, self.agent.connections)

    def test_too_long(self) -> None:
        """The time for the look-up counts too."""
        self.clock.advance(10)
        self.failureResultOf(self.answer, ConnectTimedOut)


class TrustTests(SynchronousTestCase):
    """Files of certificates."""

    def test_unreadable(self) -> None:
        """A file that is not there, or holds no certificate, is a fault of the configuration."""
        empty = self.mktemp()
        with open(empty, "w"):
            pass
        for path in (empty, self.mktemp()):
            failure = self.assertRaises(ConfigurationError, UpstreamAgent, Network().reactor, ca_file=path)
            self.assertIn(path, str(failure))
