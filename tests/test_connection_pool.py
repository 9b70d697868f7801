"""Connections kept, shared out, waited for and given back."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet import error
from twisted.internet.defer import CancelledError, Deferred
from twisted.web.iweb import IResponse

from crabtwist.errors import ConnectFailed, ConnectionBroken, ConnectTimedOut, NoConnectionFree
from tests.network import Reader
from tests.test_upstream import GOODBYE, HELLO, AgentTestCase

EVENTS = ["ask", "ask", "accept", "answer", "dismiss", "babble", "refuse", "cut", "cancel", "wait"]


class KeepingTests(AgentTestCase):
    """Connections between two requests."""

    def test_reuse(self) -> None:
        """A connection serves one request after the other; the one used last comes first."""
        _, last = self.kept(2)
        self.post(b"/next")
        self.assertEqual(
            (2, [], True), (self.agent.connections, self.network.dials(), b"/next" in last.heard())
        )

    def test_per_origin(self) -> None:
        """Hosts, ports and schemes do not share connections."""
        self.kept()
        for uri in (b"http://192.0.2.1:8081/", b"http://192.0.2.2:8080/", b"https://192.0.2.1:8080/"):
            self.agent.request(b"GET", uri)
        self.assertEqual((4, 3), (self.agent.connections, len(self.network.dials())))

    def test_idle_time(self) -> None:
        """A connection is kept for `idle_seconds`, counted anew after each answer."""
        (wire,) = self.kept()
        self.clock.advance(3)
        self.post()
        wire.say(HELLO)
        self.clock.advance(3)
        self.assertEqual((1, False), (self.agent.connections, wire.disconnecting))
        self.clock.advance(1)
        self.assertEqual((0, True), (self.agent.connections, wire.disconnecting))

    def test_idle_times(self) -> None:
        """Each connection is kept for its own time, however long the others have been."""
        wires = self.busy(3)
        for wire in wires:
            wire.say(HELLO)
            self.clock.advance(1)
        gone = []
        for _ in range(3):
            self.clock.advance(0.99)
            before = [wire.disconnecting for wire in wires]
            self.clock.advance(0.01)
            gone.append((before.count(True), [wire.disconnecting for wire in wires]))
        self.assertEqual([(0, [True, False, False]), (1, [True, True, False]), (2, [True, True, True])], gone)

    def test_max_idle(self) -> None:
        """Of too many kept connections, the one that has waited longest goes."""
        self.use(max_idle=2)
        wires = self.kept(3)
        self.assertEqual([True, False, False], [wire.disconnecting for wire in wires])
        self.use(max_idle=0)
        self.assertTrue(self.kept()[0].disconnecting)

    def test_connection_close(self) -> None:
        """A connection that the upstream wants to close is not kept."""
        self.busy()[0].say(GOODBYE)
        self.assertEqual(0, self.agent.connections)

    def test_body_not_read(self) -> None:
        """A connection is kept only once its answer is read to the end."""
        reader = Reader()
        self.post().addCallback(lambda response: response.deliverBody(reader))
        wire = self.network.accept()
        wire.say(HELLO[:-1])
        self.post()
        self.assertEqual((2, 1), (self.agent.connections, len(self.network.dials())))
        wire.say(HELLO[-1:])
        self.post(b"/next")
        self.assertIn(b"/next", wire.heard())

    def test_end_while_kept(self) -> None:
        """A kept connection that ends, or says something, is dropped."""
        for end in (lambda wire: wire.end(), lambda wire: wire.say(b"?")):
            self.use()
            end(self.kept()[0])
            self.assertEqual(0, self.agent.connections)
            self.post()
            self.assertEqual(1, len(self.network.dials()))

    def test_close(self) -> None:
        """A closed agent drops what it kept, takes no request, and lets answers under way end."""
        busy, kept = self.busy(), self.kept()
        closed = self.agent.close()
        self.assertNoResult(closed)
        self.clock.advance(0)
        self.successResultOf(closed)
        self.assertEqual((1, True, False), (self.agent.connections, kept[0].cut, busy[0].cut))
        self.assertEqual([], self.clock.getDelayedCalls())
        self.failureResultOf(self.post(), NoConnectionFree)
        busy[0].say(HELLO)
        self.assertEqual((0, True), (self.agent.connections, busy[0].disconnecting))


class WaitingTests(AgentTestCase):
    """More requests than connections."""

    def setUp(self) -> None:
        """Allow two connections, and use them."""
        self.use(max_connections=2, connection_wait_seconds=5)
        self.wires = self.busy(2)

    def test_first_come(self) -> None:
        """Who waited longest gets the connection that comes free first."""
        self.post(b"/third")
        self.post(b"/fourth")
        for wire, path in zip(reversed(self.wires), (b"/third", b"/fourth"), strict=True):
            wire.clear()
            wire.say(HELLO)
            self.assertIn(path, wire.heard())
        self.assertEqual((2, []), (self.agent.connections, self.network.dials()))

    def test_slot(self) -> None:
        """A connection that goes makes room for a new one."""
        self.post(b"/third")
        self.wires[0].say(GOODBYE)
        self.assertIn(b"/third", self.network.accept().heard())
        self.assertEqual(2, self.agent.connections)

    def test_too_long(self) -> None:
        """Who waits too long is told; the others go on waiting."""
        third = self.post()
        self.clock.advance(3)
        fourth = self.post()
        self.clock.advance(2)
        self.assertIn(
            "all 2 connections to 192.0.2.1:8080", str(self.failureResultOf(third, NoConnectionFree).value)
        )
        self.wires[0].say(HELLO)
        self.wires[0].say(HELLO)
        self.assertEqual(200, self.successResultOf(fourth).code)

    def test_turned_away(self) -> None:
        """Closing the agent ends the wait."""
        third = self.post()
        self.successResultOf(self.agent.close())
        self.failureResultOf(third, NoConnectionFree)

    def test_cancel(self) -> None:
        """Who gives up is not given a connection."""
        third, _ = self.post(b"/third"), self.post(b"/fourth")
        third.cancel()
        self.failureResultOf(third, CancelledError)
        self.wires[0].clear()
        self.wires[0].say(HELLO)
        self.assertIn(b"/fourth", self.wires[0].heard())


class ConnectingTests(AgentTestCase):
    """Connections that do not come to be."""

    def test_causes(self) -> None:
        """Every cause is a `ConnectFailed` in words that name the peer, and gives the slot back."""
        for cause, words in (
            (error.ConnectionRefusedError(), "cannot connect to 192.0.2.1:8080: connection refused"),
            (error.NoRouteError(), "no route"),
            (error.TimeoutError(), "took too long"),
            (error.ConnectError(), "failed"),
            (ZeroDivisionError(), "ZeroDivisionError"),
        ):
            answer = self.post(b"/?key=secret")
            self.network.refuse(cause)
            failure = self.failureResultOf(answer, ConnectFailed)
            self.assertIn(words, failure.value.message)
            self.assertEqual((False, 0), ("secret" in str(failure), self.agent.connections))

    def test_too_long(self) -> None:
        """A connection that takes too long is given up."""
        answer = self.post()
        self.clock.advance(10)
        self.failureResultOf(answer, ConnectTimedOut)
        self.assertEqual(([], 0), (self.network.dials(), self.agent.connections))

    def test_handshake_too_long(self) -> None:
        """The time for TLS counts too."""
        answer = self.agent.request(b"GET", b"https://192.0.2.1/")
        wire = self.network.accept()
        self.clock.advance(10)
        self.failureResultOf(answer, ConnectTimedOut)
        self.assertEqual((0, True), (self.agent.connections, wire.disconnected))

    def test_handshake_cut(self) -> None:
        """A peer that leaves during TLS did not connect."""
        answer = self.agent.request(b"GET", b"https://192.0.2.1/")
        self.network.accept().end()
        self.assertIn("closed", str(self.failureResultOf(answer, ConnectFailed).value))

    def test_cancel(self) -> None:
        """A request that is given up while it connects, or in TLS, leaves nothing behind."""
        answer = self.post()
        answer.cancel()
        self.failureResultOf(answer, CancelledError)
        self.assertEqual(([], 0), (self.network.dials(), self.agent.connections))
        answer = self.agent.request(b"GET", b"https://192.0.2.1/")
        wire = self.network.accept()
        answer.cancel()
        self.failureResultOf(answer, CancelledError)
        self.assertEqual((0, True), (self.agent.connections, wire.disconnected))

    def test_cancel_before_the_head(self) -> None:
        """A request that is given up before its answer frees its slot at once."""
        answer = self.post()
        wire = self.network.accept()
        answer.cancel()
        self.failureResultOf(answer, CancelledError)
        self.assertEqual((0, True), (self.agent.connections, wire.disconnected))

    def test_stop_inside_the_body(self) -> None:
        """So does one that is given up inside its answer."""
        reader = Reader()
        self.post().addCallback(lambda response: response.deliverBody(reader))
        wire = self.network.accept()
        wire.say(HELLO[:-1])
        reader.producer.stopProducing()
        self.assertEqual((0, True), (self.agent.connections, wire.disconnected))

    def test_fresh_and_dead(self) -> None:
        """A new connection that dies before its answer is the request's failure."""
        for last_words in (b"", b"GARBAGE"):
            answer = self.post()
            wire = self.network.accept()
            wire.say(last_words)
            wire.end()
            self.failureResultOf(answer, ConnectionBroken)
            self.assertEqual((0, 0), (self.agent.connections, self.agent.stale_retries))


class StormTests(AgentTestCase):
    """Whatever happens in whatever order."""

    @settings(deadline=None)
    @given(st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 7)), max_size=60))
    def test_slots(self, events: list[tuple[str, int]]) -> None:
        """Every slot stands for one connection, every request ends once, and at last all slots are free."""
        self.use(max_connections=3, max_idle=2, connection_wait_seconds=2, connect_timeout_seconds=3)
        self.requests: list[Deferred[IResponse]] = []
        self.ends: list[int] = []
        for event, which in events:
            getattr(self, event)(which)
            open_wires = [wire for wire in self.network.wires if not wire.disconnecting]
            self.assertEqual(len(open_wires) + len(self.network.dials()), self.agent.connections)
            self.assertLessEqual(self.agent.connections, 3)
        for _ in range(20):
            self.clock.advance(1)
            self.cut_all()
        self.assertEqual(0, self.agent.connections)
        self.assertFalse(any(pool._holders for pool in self.agent._pools.values()))
        self.assertEqual(list(range(len(self.requests))), sorted(self.ends))

    def ask(self, _: int) -> None:
        number = len(self.requests)
        self.requests.append(self.post())
        self.requests[-1].addBoth(lambda _: self.ends.append(number))

    def cancel(self, which: int) -> None:
        if self.requests:
            self.requests[which % len(self.requests)].cancel()

    def accept(self, _: int) -> None:
        if self.network.dials():
            self.network.accept()

    def refuse(self, _: int) -> None:
        if self.network.dials():
            self.network.refuse()

    def answer(self, which: int, words: bytes = HELLO) -> None:
        wires = [wire for wire in self.network.wires if not wire.disconnecting]
        if wires:
            wires[which % len(wires)].say(words)

    def dismiss(self, which: int) -> None:
        self.answer(which, GOODBYE)

    def babble(self, which: int) -> None:
        self.answer(which, b"GARBAGE")

    def cut(self, which: int) -> None:
        wires = [wire for wire in self.network.wires if not wire.cut]
        if wires:
            wires[which % len(wires)].end()

    def wait(self, seconds: int) -> None:
        self.clock.advance(seconds / 2)

    def cut_all(self) -> None:
        for wire in self.network.wires:
            wire.end()
