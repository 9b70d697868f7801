"""The public fakes: they keep the contracts, and tell on those who do not."""

from __future__ import annotations

from typing import Any

import treq
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IPushProducer
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.client import ResponseDone
from twisted.web.iweb import IResponse
from zope.interface.verify import verifyObject

from crabtwist.errors import ConnectFailed, ConnectionBroken
from crabtwist.interfaces import IProvider, IServices
from crabtwist.relay import Sink
from crabtwist.testing import EVENT_STREAM, FakeProvider, FakeResponse, FakeServices, FakeSink, make_context
from crabtwist.values import Call
from tests.network import Reader

CALL = Call("messages", "anthropic", "m", False, b"", (), b"{}")


class ServicesTests(SynchronousTestCase):
    """`FakeServices`."""

    def test_contract(self) -> None:
        """It lends what the gateway lends, with a clock that the test advances."""
        verifyObject(IServices, FakeServices())
        clock = Clock()
        self.assertIs(clock, FakeServices(clock).clock)
        self.assertIsInstance(FakeServices().clock, Clock)

    def test_no_network(self) -> None:
        """A plugin that wants the network in a test is told that there is none."""
        error = self.assertRaises(AssertionError, FakeServices().agent, ca_file="ca.pem")
        self.assertIn("ca.pem", str(error))


class ResponseTests(SynchronousTestCase):
    """`FakeResponse`."""

    def read(self, response: FakeResponse) -> Reader:
        """Read a response's body."""
        reader = Reader()
        response.deliverBody(reader)
        return reader

    def test_contract(self) -> None:
        """It is a response and its body's producer, with its fields in wire order and by name."""
        response = FakeResponse(201, EVENT_STREAM, length=3)
        verifyObject(IResponse, response)
        verifyObject(IPushProducer, response)
        self.assertEqual((201, 3, EVENT_STREAM), (response.code, response.length, response.raw_headers))
        self.assertEqual(["text/event-stream"], response.headers.getRawHeaders("Content-Type"))

    def test_whole_body(self) -> None:
        """With a body it is read at once, as treq reads any other."""
        self.assertEqual(b"hello", self.successResultOf(treq.content(FakeResponse(body=b"hello"))))
        self.assertEqual(b"", self.successResultOf(treq.content(FakeResponse(body=b""))))

    def test_by_hand(self) -> None:
        """Without one the test says what comes, and when it ends."""
        response = FakeResponse()
        reader = self.read(response)
        response.receive(b"a")
        response.receive(b"b")
        self.assertEqual((b"ab", None), (reader.data, reader.reason))
        response.end()
        self.assertIsInstance(reader.reason, ResponseDone)

    def test_broken(self) -> None:
        """A body that breaks fails as the gateway's own connections do, or as the test says."""
        why = ConnectionBroken("why")
        for given, expected in ((None, ConnectionBroken), (why, ConnectionBroken), (OSError(), OSError)):
            response = FakeResponse()
            reader = self.read(response)
            response.break_off(given)
            self.assertIsInstance(reader.reason, expected)

    def test_brakes(self) -> None:
        """It remembers what its reader did to it."""
        response = FakeResponse()
        producer = self.read(response).producer
        producer.pauseProducing()
        self.assertEqual((True, False), (response.paused, response.stopped))
        producer.resumeProducing()
        self.assertFalse(response.paused)

    def test_stopped(self) -> None:
        """A reader that stopped it hears nothing more, in whichever way it did."""
        for how in ("stopProducing", "loseConnection", "abortConnection"):
            response = FakeResponse()
            reader = self.read(response)
            getattr(reader.producer, how)()
            response.receive(b"late")
            response.end()
            self.assertEqual((True, b"", None), (response.stopped, reader.data, reader.reason))


class ProviderTests(SynchronousTestCase):
    """`FakeProvider`."""

    def test_contract(self) -> None:
        """It is a provider that speaks everything, unless told otherwise."""
        provider = FakeProvider("p", dialects=["openai"], operations=["embeddings"])
        verifyObject(IProvider, provider)
        self.assertEqual(({"openai"}, {"embeddings"}), (provider.dialects, provider.operations))
        self.assertEqual({"anthropic", "openai"}, FakeProvider().dialects)
        self.assertEqual([], self.successResultOf(provider.list_models()))

    def test_answers(self) -> None:
        """Its answers come in order: responses, errors, and Deferreds that the test fires."""
        response, error, later = FakeResponse(), ConnectFailed("refused"), Deferred[Any]()
        provider = FakeProvider("p", [response, error, later])
        self.assertIs(response, self.successResultOf(provider.open(CALL)))
        self.assertIs(error, self.failureResultOf(provider.open(CALL), ConnectFailed).value)
        opening = provider.open(CALL)
        self.assertNoResult(opening)
        later.callback(response)
        self.assertIs(response, self.successResultOf(opening))

    def test_calls(self) -> None:
        """It remembers what it was asked; once too often is an error of the test's."""
        provider = FakeProvider("p", [FakeResponse()])
        self.successResultOf(provider.open(CALL))
        self.assertRaises(IndexError, provider.open, CALL)
        self.assertEqual([CALL, CALL], provider.calls)


class SinkTests(SynchronousTestCase):
    """`FakeSink`."""

    def test_contract(self) -> None:
        """It is what a relay pours into, and remembers it."""
        fake = FakeSink()
        sink: Sink = fake
        producer = object()
        sink.brake(producer)
        self.assertIs(producer, fake.producer)
        sink.write(b"a")
        sink.write(b"b")
        sink.release()
        self.assertEqual((b"ab", None, False, False), (fake.data, fake.producer, fake.finished, fake.aborted))

    def test_written_to_after_its_end(self) -> None:
        """Who writes after the end is caught."""
        for how in ("finish", "abort"):
            sink = FakeSink()
            getattr(sink, how)()
            self.assertRaises(AssertionError, sink.write, b"late")
            self.assertEqual((how == "finish", how == "abort"), (sink.finished, sink.aborted))


class ContextTests(SynchronousTestCase):
    """`make_context`."""

    def test_changes(self) -> None:
        """It is some request's context, but for what is given; each is its own."""
        context = make_context(stream=True, principal=None)
        self.assertEqual((True, None, "messages"), (context.stream, context.principal, context.operation))
        self.assertIsNot(context, make_context(stream=True, principal=None))

    def test_slip(self) -> None:
        """A field that contexts do not have is an error."""
        self.assertRaises(TypeError, make_context, streams=True)
