"""Several requests for the same, at once and later, and what each of them pays."""

from __future__ import annotations

from random import Random
from typing import Any

import attrs
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from crabtwist import exchange
from crabtwist.attempt import Patience, Reply
from crabtwist.dialects.operations import OPERATIONS
from crabtwist.dispatch import Dispatch
from crabtwist.errors import ConnectFailed, UpstreamError
from crabtwist.extension import Extension
from crabtwist.extensions.cache import CacheExtension, CacheSettings
from crabtwist.gateway import Gateway
from crabtwist.hooks import Hooks
from crabtwist.plain_relay import HOLD_BYTES
from crabtwist.pricing import ModelSettings, PriceBook
from crabtwist.recording import Recording
from crabtwist.routing import Deployment, Registry
from crabtwist.sharing import share
from crabtwist.sse import Event
from crabtwist.testing import EVENT_STREAM, JSON, FakeProvider, FakeResponse, FakeServices
from crabtwist.values import Answer, Context, Headers, Outcome
from tests.fake_request import FakeRequest
from tests.test_exchange import MESSAGE, OVERLOADED
from tests.test_relay import CHUNK, DELTA, DONE, ERROR, START, STOP, USAGE, WHOLE

#: What `MESSAGE` costs at 3 and 15 dollars a million, and a stream that says all of `WHOLE`.
MESSAGE_COST = 4 * 3_000_000 + 6 * 15_000_000
WHOLE_COST = 3 * 3_000_000 + 7 * 15_000_000


class Watcher(Extension):
    """An extension that remembers who it was told of."""

    name = "watcher"

    def __init__(self) -> None:
        self.contexts: list[Context] = []
        self.outcomes: dict[str, Outcome] = {}
        self.errors: list[str] = []
        self.events: list[bytes] = []
        self.responses: list[Answer] = []

    def on_request(self, context: Context) -> None:
        self.contexts.append(context)

    def on_chunk(self, context: Context, event: Event) -> None:
        self.events.append(event.data)

    def on_response(self, context: Context, body: bytes, response: Answer) -> None:
        self.responses.append(response)

    def on_error(self, context: Context, error: UpstreamError) -> None:
        self.errors.append(error.slug)

    def on_end(self, context: Context, outcome: Outcome) -> None:
        assert context.request_id not in self.outcomes
        self.outcomes[context.request_id] = outcome


@attrs.define(eq=False)
class Asked:
    """A request, and the Deferred of its end."""

    request: FakeRequest
    ended: Deferred[None]
    watcher: Watcher
    context: Context

    @property
    def data(self) -> bytes:
        """What the client got of the body."""
        return self.request.data

    @property
    def said(self) -> str | None:
        """What the answer says of the cache."""
        return self.request.header("x-crabtwist-cache")

    @property
    def outcome(self) -> Outcome:
        """Its one outcome."""
        return self.watcher.outcomes[self.context.request_id]

    @property
    def has_ended(self) -> bool:
        """Whether there is one."""
        return self.context.request_id in self.watcher.outcomes

    def leave(self) -> None:
        """Let its client go away."""
        self.request.leave()


class SharingTestCase(SynchronousTestCase):
    """A gateway with a cache, and several who ask it."""

    stream = True

    def setUp(self) -> None:
        """Start from nothing."""
        self.clock = Clock()
        self.watcher = Watcher()
        self.cache = CacheExtension(CacheSettings(), FakeServices(self.clock))
        self.second = FakeProvider("q", [])

    def serve(self, *answers: Any, **more: Any) -> None:
        """Serve model "m" by a provider with these answers, and by one that is there for the worst."""
        self.provider = FakeProvider("p", answers)
        self.gateway = Gateway(
            clock=self.clock,
            registry=self.registry(**more),
            keys=None,
            hooks=Hooks([self.watcher, self.cache], self.clock),
            random=Random(1),
            patience=Patience(commit_seconds=10, ping_seconds=15, client_stall_seconds=50),
        )

    def registry(self, **more: Any) -> Registry:
        """Return who serves "m", and what it costs."""
        deployments = [
            Deployment(each, "m", "m", weight=int(each is self.provider), **more)
            for each in (self.provider, self.second)
        ]
        return Registry(deployments, {}, PriceBook((), {"m": ModelSettings(input=3, output=15).row("m")}))

    def ask(self, operation: str = "messages", fields: Headers = (), **body: Any) -> Asked:
        """Send a request."""
        said = {"model": "m", **({"stream": True} if self.stream else {}), **body}
        request = FakeRequest(said, fields)
        ended = self.gateway.serve(OPERATIONS[operation], request, None)
        # As Klein does when the client leaves.
        request.notifyFinish().addErrback(lambda _: ended.cancel())
        return Asked(request, ended, self.watcher, self.watcher.contexts[-1])

    def several(self, number: int = 3, **body: Any) -> list[Asked]:
        """Send requests for the same."""
        return [self.ask(**body) for _ in range(number)]

    def check_costs(self, leader: Asked, *followers: Asked, cost: int = WHOLE_COST) -> None:
        """Assert that the leader pays, and nobody else."""
        self.assertEqual((False, cost, 1), self.costs(leader))
        for follower in followers:
            self.assertEqual((True, 0, 0), self.costs(follower))
            self.assertIsNone(follower.outcome.usage)
            self.assertEqual("", follower.context.provider)
        self.assertEqual([], self.clock.getDelayedCalls())

    def costs(self, asked: Asked) -> tuple[bool, int | None, int]:
        """Return whether a request was a hit, what it cost, and how many attempts were made for it."""
        outcome = asked.outcome
        return outcome.cache_hit, outcome.cost, len(outcome.attempts)


class StreamTests(SharingTestCase):
    """Streams."""

    def setUp(self) -> None:
        """Have one upstream answer."""
        super().setUp()
        self.response = FakeResponse(200, EVENT_STREAM)
        self.serve(self.response)

    def test_one_call(self) -> None:
        """All who ask at once share one call, and get the same bytes; the first one pays."""
        leader, *followers = self.several()
        self.response.receive(WHOLE)
        self.response.end()
        self.assertEqual(1, len(self.provider.calls))
        for each in (leader, *followers):
            self.assertEqual((200, WHOLE, True), (each.request.code, each.data, each.request.finished))
            self.assertEqual("complete", each.outcome.reason)
            self.assertEqual("m", each.outcome.model_answered)
            self.assertEqual("verbatim", each.request.header("x-crabtwist-fidelity"))
        self.assertEqual(["miss", "hit", "hit"], [each.said for each in (leader, *followers)])
        self.check_costs(leader, *followers)

    def test_late(self) -> None:
        """A late one gets at once what has come, and then what comes."""
        leader = self.ask()
        self.response.receive(START + DELTA)
        late = self.ask()
        self.assertEqual(START + DELTA, late.data)
        self.response.receive(WHOLE[len(START) :])
        self.response.end()
        self.assertEqual(leader.data, late.data)

    def test_later(self) -> None:
        """Later ones are given the stream as a stream, without any upstream."""
        self.ask()
        self.response.receive(WHOLE)
        self.response.end()
        later = self.ask()
        self.assertEqual((WHOLE, "hit", True), (later.data, later.said, later.request.finished))
        self.assertEqual("text/event-stream", later.request.header("content-type"))
        self.assertIsNone(later.request.header("content-length"))
        self.assertEqual(later.context.request_id, later.request.header("x-crabtwist-request-id"))
        self.assertEqual((True, 0, 0), self.costs(later))
        self.assertEqual(1, len(self.provider.calls))

    def test_watchers_see_it_once(self) -> None:
        """Extensions are shown each event once, whoever reads the stream."""
        self.several()
        self.response.receive(WHOLE)
        self.response.end()
        self.ask()
        self.assertEqual(5, len(self.watcher.events))

    def test_metrics(self) -> None:
        """Hits are counted, tokens and dollars once."""
        self.several()
        self.response.receive(WHOLE)
        self.response.end()
        shown = self.gateway.metrics.exposition()
        self.assertIn(b'crabtwist_cache_hits_total{model="m"} 2.0', shown)
        self.assertIn(b'direction="prompt",model="m",provider="p"} 3.0', shown)
        self.assertIn(b"crabtwist_open_streams 0.0", shown)
        self.assertIn(b"crabtwist_active_connections 0.0", shown)

    def test_leader_leaves_before_the_head(self) -> None:
        """The first one's leaving before there is a head does not end the others; it pays all the same."""
        leader, follower = self.several(2)
        leader.leave()
        self.assertFalse(self.response.stopped)
        self.assertFalse(leader.has_ended)
        self.response.receive(WHOLE)
        self.response.end()
        self.assertEqual(WHOLE, follower.data)
        self.assertEqual((499, "client_left", 0), self.ending(leader))
        self.check_costs(leader, follower)

    def test_leader_leaves_and_asking_fails(self) -> None:
        """Nor does its leaving make it anybody's that nothing comes of it: it has left, the other is told."""
        opening: Deferred[Any] = Deferred()
        self.second = FakeProvider("q", [ConnectFailed("no")])
        self.serve(opening, max_retries=0)
        leader, follower = self.several(2)
        leader.leave()
        opening.errback(ConnectFailed("no"))
        self.assertEqual((499, "client_left", 0), self.ending(leader))
        self.assertEqual((502, "connect_failed"), (follower.request.code, follower.outcome.reason))
        self.assertEqual((0, []), (len(self.cache), self.clock.getDelayedCalls()))

    def test_leader_leaves_in_the_middle(self) -> None:
        """Nor does its leaving in the middle."""
        leader, follower = self.several(2)
        self.response.receive(START)
        leader.leave()
        self.assertFalse(self.response.stopped)
        self.response.receive(WHOLE[len(START) :])
        self.assertEqual((START, WHOLE), (leader.data, follower.data))
        self.response.end()
        self.assertEqual((499, "client_left", len(START)), self.ending(leader))
        self.check_costs(leader, follower)
        self.assertEqual("hit", self.ask().said)

    def ending(self, asked: Asked) -> tuple[int, str, int]:
        """Return how a request ended."""
        self.successResultOf(asked.ended)
        outcome = asked.outcome
        return outcome.status, outcome.reason, outcome.bytes_out

    def test_nobody_stays(self) -> None:
        """When the last one leaves the upstream is closed at once; what was used is known, nothing kept."""
        leader, follower = self.several(2)
        self.response.receive(START)
        leader.leave()
        follower.leave()
        self.assertTrue(self.response.stopped)
        self.assertEqual((499, "client_left", len(START)), self.ending(leader))
        assert leader.outcome.usage is not None
        self.assertEqual((3, False), (leader.outcome.usage.prompt_tokens, leader.outcome.usage.complete))
        self.assertEqual((True, 0, 0), self.costs(follower))
        self.assertEqual((0, 0), (len(self.cache), self.cache.size_bytes))
        self.assertEqual([], self.watcher.errors)

    def test_leader_alone_leaves(self) -> None:
        """So it is when the first one was alone, with a head or without."""
        for begun in (False, True):
            self.setUp()
            leader = self.ask()
            if begun:
                self.response.receive(START)
            leader.leave()
            self.assertTrue(self.response.stopped)
            self.assertEqual((499, "client_left"), self.ending(leader)[:2])
            self.assertEqual([], self.clock.getDelayedCalls())
            self.assertEqual(0, self.cache.size_bytes)

    def test_leaving_after_the_last_event(self) -> None:
        """A stream is whole after its last event, though its upstream is slow to end it: it is kept."""
        leader = self.ask()
        self.response.receive(WHOLE)
        leader.leave()
        self.assertTrue(self.response.stopped)
        self.assertEqual(WHOLE, self.ask().data)
        self.assertEqual(WHOLE_COST, leader.outcome.cost)

    def test_upstream_that_does_not_end(self) -> None:
        """So it is when the gateway ends it, a moment after its last event."""
        leader, follower = self.several(2)
        self.response.receive(WHOLE)
        self.clock.advance(1)
        self.assertTrue(self.response.stopped)
        for each in (leader, follower):
            self.assertEqual(("complete", True), (each.outcome.reason, each.request.finished))
        self.assertEqual(WHOLE, self.ask().data)

    def test_truncated(self) -> None:
        """One that breaks is told as that to each in words of its own, is kept for nobody, and noted once."""
        asked = self.several()
        self.response.receive(START + DELTA)
        self.response.end()
        for each in asked:
            self.assertEqual(1, each.data.count(b"event: error"))
            self.assertIn(each.context.request_id.encode(), each.data)
            outcome = each.outcome
            self.assertEqual((0, "upstream", "truncated"), (outcome.status, outcome.ended_by, outcome.reason))
        self.assertEqual((["truncated"], 0), (self.watcher.errors, len(self.cache)))
        self.assertEqual((True, 0, 0), self.costs(asked[1]))

    def test_reset(self) -> None:
        """Likewise one that is reset."""
        asked = self.several(2)
        self.response.receive(START)
        self.response.break_off()
        messages = {each.outcome.message for each in asked}
        self.assertEqual({"connection_broken"}, {each.outcome.reason for each in asked})
        self.assertEqual(1, len(messages))

    def test_silent(self) -> None:
        """One that falls silent is ended for all by the gateway, in its time."""
        asked = self.several(2)
        self.response.receive(START)
        for _ in range(30):
            self.clock.advance(10)
        for each in asked:
            outcome = each.outcome
            self.assertEqual(("gateway", "idle_timeout"), (outcome.ended_by, outcome.reason))
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_error_event(self) -> None:
        """The upstream's own error goes to all as it stands, without another word."""
        asked = self.several(2)
        self.response.receive(START + ERROR)
        self.response.end()
        for each in asked:
            self.assertEqual(START + ERROR, each.data)
            self.assertEqual((0, "upstream_error_event"), (each.outcome.status, each.outcome.reason))
        self.assertEqual(0, len(self.cache))

    def test_pings(self) -> None:
        """Each is kept alive by itself; what is recorded has no pings but the upstream's."""
        leader, follower = self.several(2)
        self.response.receive(START)
        self.clock.advance(8)
        late = self.ask()
        self.clock.advance(8)
        self.assertEqual([1, 1, 0], [each.data.count(b"event: ping") for each in (leader, follower, late)])
        self.response.receive(WHOLE[len(START) :])
        self.response.end()
        self.assertEqual(
            [2, 2, 1, 1], [x.data.count(b"event: ping") for x in (leader, follower, late, self.ask())]
        )

    def test_commit(self) -> None:
        """A head does not wait for the first event for longer than it would for one alone."""
        leader, follower = self.several(2)
        self.clock.advance(9.9)
        self.assertFalse(follower.request.head_sent)
        self.clock.advance(0.1)
        self.assertEqual((True, True), (leader.request.head_sent, follower.request.head_sent))
        late = self.ask()
        self.assertTrue(late.request.head_sent)
        self.response.receive(WHOLE)
        self.response.end()
        self.assertEqual(WHOLE, late.data)

    def test_brakes(self) -> None:
        """The upstream waits when no client reads, and goes on when one does."""
        leader, follower = self.several(2)
        self.response.receive(START)
        leader.request.producer.pauseProducing()
        self.assertFalse(self.response.paused)
        follower.request.producer.pauseProducing()
        self.assertTrue(self.response.paused)
        late = self.ask()
        self.assertFalse(self.response.paused)
        late.request.producer.pauseProducing()
        leader.request.producer.resumeProducing()
        self.assertFalse(self.response.paused)
        for each in (leader, follower, late):
            each.leave()

    def test_stalled(self) -> None:
        """A client that reads nothing is cut in its time, and no other."""
        leader, follower = self.several(2)
        self.response.receive(START)
        leader.request.producer.pauseProducing()
        self.clock.advance(49)
        self.response.receive(DELTA)
        self.clock.advance(1)
        self.assertEqual((True, "client_stalled"), (leader.request.aborted, self.reason_of(leader)))
        self.response.receive(WHOLE[len(START) :])
        self.response.end()
        self.assertEqual((True, START), (follower.request.finished, leader.data))
        self.assertEqual("client_stalled", leader.outcome.reason)

    def reason_of(self, asked: Asked) -> str:
        """Return how the client's part of a request ended, though others go on."""
        [exchange] = [each for each in self.gateway._running if each.context is asked.context]
        assert exchange._reply is not None and exchange._reply.relay.end is not None
        return exchange._reply.relay.end.reason

    def test_all_stall(self) -> None:
        """When all stall, at different times, each is cut in its own; then the upstream is closed."""
        leader, follower = self.several(2)
        self.response.receive(START)
        leader.request.producer.pauseProducing()
        self.clock.advance(30)
        follower.request.producer.pauseProducing()
        self.clock.advance(49)
        self.assertEqual((True, False), (leader.request.aborted, follower.request.aborted))
        self.clock.advance(1)
        self.assertEqual((True, True), (follower.request.aborted, self.response.stopped))
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_shutdown(self) -> None:
        """A gateway that is stopped tells each of them so, and all are settled."""
        asked = self.several()
        self.response.receive(START)
        self.gateway.interrupt_all("the gateway is being stopped")
        for each in asked:
            self.successResultOf(each.ended)
            self.assertEqual((1, True), (each.data.count(b"event: error"), each.request.finished))
            self.assertEqual(("gateway", "shutting_down"), (each.outcome.ended_by, each.outcome.reason))
        self.assertTrue(self.response.stopped)
        self.assertEqual((0, []), (len(self.cache), self.clock.getDelayedCalls()))

    def test_shutdown_before_the_head(self) -> None:
        """Before the head a plain 503 says it, also where the first one has left."""
        for leaves in (False, True):
            self.setUp()
            leader, *followers = self.several()
            if leaves:
                leader.leave()
            self.gateway.interrupt_all("the gateway is being stopped")
            for each in followers:
                self.assertEqual((503, "shutting_down"), (each.request.code, each.outcome.reason))
            self.assertEqual("client_left" if leaves else "shutting_down", leader.outcome.reason)
            self.assertEqual(None if leaves else 503, leader.request.code)
            self.assertEqual((True, []), (self.response.stopped, self.clock.getDelayedCalls()))

    def test_reload(self) -> None:
        """Who follows across a reload gets the answer of the old registry, which is kept for that long."""
        leader = self.ask()
        old = self.gateway.registry
        self.gateway.registry = self.registry()
        unused = self.gateway.when_unused(old)
        follower = self.ask()
        leader.leave()
        self.assertNoResult(unused)
        self.response.receive(WHOLE)
        self.response.end()
        self.assertEqual(WHOLE, follower.data)
        self.successResultOf(unused)
        self.check_costs(leader, follower)

    def test_fault_of_one(self) -> None:
        """A fault in answering the first one is told to it at once, and is nobody else's."""

        def falter(*arguments: Any) -> Reply:
            if arguments[-1] is leader.context:
                raise ZeroDivisionError
            return share(*arguments)

        self.patch(exchange, "share", falter)
        leader, follower = self.several(2)
        self.response.receive(START)
        self.assertEqual(500, leader.request.code)
        follower.request.producer.pauseProducing()
        self.assertTrue(self.response.paused)
        follower.request.producer.resumeProducing()
        self.response.receive(WHOLE[len(START) :])
        self.response.end()
        self.assertEqual((WHOLE, "internal_error"), (follower.data, leader.outcome.reason))
        self.assertEqual(
            (WHOLE_COST, 1), (leader.outcome.cost, len(self.flushLoggedErrors(ZeroDivisionError)))
        )

    def test_no_store(self) -> None:
        """Who does not want to be kept asks alone, and says so."""
        self.serve(self.response, FakeResponse(200, EVENT_STREAM, WHOLE))
        shared = self.ask()
        alone = self.ask(fields=((b"cache-control", b"no-store"),))
        self.assertEqual(("bypass", WHOLE, 2), (alone.said, alone.data, len(self.provider.calls)))
        self.assertFalse(alone.outcome.cache_hit)
        shared.leave()

    def test_large(self) -> None:
        """One that is too large to keep arrives whole everywhere, and the upstream is asked again for it."""
        self.cache = CacheExtension(CacheSettings(max_entry_bytes=1000), FakeServices(self.clock))
        self.serve(self.response, FakeResponse(200, EVENT_STREAM, WHOLE))
        asked = self.several(2)
        self.response.receive(START + DELTA * 50)
        self.response.receive(STOP)
        self.response.end()
        for each in asked:
            self.assertEqual(START + DELTA * 50 + STOP, each.data)
        self.assertEqual("miss", self.ask().said)


PIECES = [WHOLE[start : start + 30] for start in range(0, len(WHOLE), 30)]


class InterleavingTests(SharingTestCase):
    """Everything, in any order."""

    @given(
        st.lists(
            st.tuples(
                st.sampled_from(["ask", "ask", "piece", "piece", "leave", "pause", "resume", "wait"]),
                st.integers(0, 9),
            ),
            max_size=40,
        )
    )
    @settings(deadline=None)
    def test_any_order(self, happenings: list[tuple[str, int]]) -> None:
        """Who stays gets it all; each request ends once; of those that share a call exactly one pays."""
        self.setUp()
        self.responses = [FakeResponse(200, EVENT_STREAM) for _ in range(50)]
        self.serve(*self.responses)
        self.asked, self.left, self.sent = [self.ask()], set[Asked](), [0] * 50
        for what, which in happenings:
            self.happen(what, self.asked[which % len(self.asked)])
        for asked in self.asked:
            self.happen("resume", asked)
        while self.flight.stopped is False and self.sent[self.number] <= len(PIECES):
            self.happen("piece", self.asked[0])
        self.check()

    @property
    def number(self) -> int:
        """Which call to the upstream was the last one."""
        return len(self.provider.calls) - 1

    @property
    def flight(self) -> FakeResponse:
        """What answers it."""
        return self.responses[self.number]

    def happen(self, what: str, asked: Asked) -> None:
        """Let one thing happen, if it can."""
        if what == "ask":
            self.asked.append(self.ask())
        elif what == "wait":
            self.clock.advance(1)
        elif what == "piece":
            self.come()
        elif not asked.request.finished and asked not in self.left:
            self.change(what, asked)

    def come(self) -> None:
        """Let the upstream send its next piece, or its end."""
        at = self.sent[self.number]
        self.sent[self.number] += 1
        if at < len(PIECES):
            self.flight.receive(PIECES[at])
        elif at == len(PIECES):
            self.flight.end()

    def change(self, what: str, asked: Asked) -> None:
        """Let a client do something."""
        if what == "leave":
            self.left.add(asked)
            asked.leave()
        elif asked.request.producer is not None:
            getattr(asked.request.producer, what + "Producing")()

    def check(self) -> None:
        """Assert that all came to the right end."""
        ping = b'event: ping\ndata: {"type": "ping"}\n\n'
        for asked in self.asked:
            data = asked.data.replace(ping, b"")
            self.assertEqual(WHOLE[: len(data)] if asked in self.left else WHOLE, data)
            self.successResultOf(asked.ended)
        outcomes = [asked.outcome for asked in self.asked]
        self.assertEqual(len(self.provider.calls), sum(len(outcome.attempts) for outcome in outcomes))
        self.assertEqual(len(self.provider.calls), sum(not outcome.cache_hit for outcome in outcomes))
        self.assertEqual({0}, {outcome.cost for outcome in outcomes if outcome.cache_hit} | {0})
        self.assertEqual([], self.clock.getDelayedCalls())


class OpenAITests(SharingTestCase):
    """OpenAI's streams, of which a part may be kept from the client."""

    def test_usage_is_kept_from_all(self) -> None:
        """Usage that no client asked for is seen by none, now or later, and paid for by the first."""
        response = FakeResponse(200, EVENT_STREAM)
        self.serve(response)
        leader, follower = self.several(2, operation="chat.completions")
        response.receive(CHUNK + USAGE + DONE)
        response.end()
        later = self.ask("chat.completions")
        for each in (leader, follower, later):
            self.assertEqual(CHUNK + DONE, each.data)
            self.assertEqual("spliced", each.request.header("x-crabtwist-fidelity"))
        assert leader.outcome.usage is not None
        self.assertEqual(5, leader.outcome.usage.prompt_tokens)
        self.assertIsNone(follower.outcome.usage)

    def test_truncated(self) -> None:
        """A stream without its end is told as that in this dialect, too."""
        response = FakeResponse(200, EVENT_STREAM)
        self.serve(response)
        asked = self.several(2, operation="chat.completions")
        response.receive(CHUNK)
        response.end()
        for each in asked:
            self.assertEqual("truncated", each.outcome.reason)
            self.assertIn(b'"error"', each.data)


class FailingTests(SharingTestCase):
    """Upstreams that do not answer at once, or not at all."""

    def test_retry(self) -> None:
        """While the first one's request is tried again the others wait, and none asks by itself."""
        good = FakeResponse(200, EVENT_STREAM, WHOLE)
        self.serve(FakeResponse(529, JSON, OVERLOADED), good)
        leader, *followers = self.several()
        self.clock.advance(1)
        late = self.ask()
        self.assertEqual([WHOLE] * 4, [each.data for each in (leader, *followers, late)])
        self.assertEqual(2, len(self.provider.calls))
        self.assertEqual((2, 0), (len(leader.outcome.attempts), len(late.outcome.attempts)))

    def test_fallback_after_leaving(self) -> None:
        """Attempts go on, at other deployments too, though the one that they began for has left."""
        opening: Deferred[Any] = Deferred()
        self.second = FakeProvider("q", [FakeResponse(200, EVENT_STREAM, WHOLE)])
        self.serve(opening, max_retries=0)
        leader, follower = self.several(2)
        leader.leave()
        opening.errback(ConnectFailed("no"))
        self.assertEqual(WHOLE, follower.data)
        self.assertEqual(["p", "q"], [attempt.provider for attempt in leader.outcome.attempts])
        self.assertEqual(WHOLE_COST, leader.outcome.cost)

    def test_error_for_all(self) -> None:
        """When there is no answer all get the same error; it is not kept."""
        self.second = FakeProvider("q", [FakeResponse(529, JSON, OVERLOADED)])
        opening: Deferred[Any] = Deferred()
        self.serve(opening, max_retries=0)
        asked = self.several()
        opening.errback(ConnectFailed("no"))
        for each in asked:
            self.assertEqual((529, OVERLOADED), (each.request.code, each.data))
            outcome = each.outcome
            self.assertEqual(
                (529, "upstream", "upstream_status"), (outcome.status, outcome.ended_by, outcome.reason)
            )
        self.assertEqual([False, True, True], [each.outcome.cache_hit for each in asked])
        self.assertEqual(["connect_failed", "upstream_status"], self.watcher.errors)
        self.assertEqual((0, 0), (len(self.cache), self.cache.size_bytes))

    def test_own_words(self) -> None:
        """The gateway's words for it have each request's own id."""
        opening: Deferred[Any] = Deferred()
        self.second = FakeProvider("q", [ConnectFailed("neither")])
        self.serve(opening, max_retries=0)
        asked = self.several(2)
        opening.errback(ConnectFailed("no"))
        for each in asked:
            self.assertEqual(
                (502, each.context.request_id), (each.request.code, each.request.answer["request_id"])
            )

    def test_first_event_is_an_error(self) -> None:
        """A stream that begins with an error is tried again for all."""
        failing, good = FakeResponse(200, EVENT_STREAM), FakeResponse(200, EVENT_STREAM, WHOLE)
        self.serve(failing, good)
        asked = self.several(2)
        failing.receive(ERROR)
        self.clock.advance(1)
        self.assertEqual([WHOLE] * 2, [each.data for each in asked])

    def test_leaving_while_waiting(self) -> None:
        """Nobody is asked again when all have left."""
        self.serve(FakeResponse(529, JSON, OVERLOADED))
        for each in self.several(2):
            each.leave()
        self.assertEqual((1, []), (len(self.provider.calls), self.clock.getDelayedCalls()))
        self.assertEqual(0, len(self.cache))

    def test_crash(self) -> None:
        """A fault of the gateway's own is a 500 for all, and they are settled."""
        opening: Deferred[Any] = Deferred()
        self.serve(opening, max_retries=0)
        asked = self.several()
        self.patch(Dispatch, "_note_attempt", lambda *_: 1 // 0)
        opening.callback(FakeResponse(200, EVENT_STREAM, WHOLE))
        for each in asked:
            self.assertEqual((500, "internal_error"), (each.request.code, each.outcome.reason))
        self.assertEqual((3, 0), (len(self.flushLoggedErrors(ZeroDivisionError)), len(self.cache)))

    def test_crash_in_the_middle(self) -> None:
        """So is one that comes later; then it is told by an end that is not whole."""
        self.stream = False
        response = FakeResponse(200, JSON, length=HOLD_BYTES + 10)
        self.serve(response)
        asked = self.several(2)
        response.receive(bytes(HOLD_BYTES + 1))
        self.patch(Dispatch, "ended", lambda *_: 1 // 0)
        response.receive(bytes(9))
        response.end()
        self.assertEqual(2, sum(each.has_ended for each in asked))
        self.assertEqual((1, 0), (len(self.flushLoggedErrors(ZeroDivisionError)), len(self.cache)))

    def test_careless_provider(self) -> None:
        """An answer that comes though all have left is closed, and not kept."""
        opening: Deferred[Any] = Deferred()
        response = FakeResponse(200, EVENT_STREAM)
        opening.addErrback(lambda _: response)
        self.serve(opening)
        asked = self.several(2)
        for each in asked:
            each.leave()
        self.clock.advance(10)
        self.assertEqual((True, 0), (response.stopped, len(self.cache)))
        self.assertEqual([499, 499], [each.outcome.status for each in asked])

    def test_careless_guard(self) -> None:
        """No upstream is asked for a client that left while a guard looked at its request."""
        waiting: Deferred[None] = Deferred()
        waiting.addErrback(lambda _: None)
        self.patch(CacheExtension, "on_request", lambda *_: waiting)
        self.serve(FakeResponse(200, EVENT_STREAM, WHOLE))
        asked = self.ask()
        asked.leave()
        self.assertEqual((0, "client_left"), (len(self.provider.calls), asked.outcome.reason))

    def test_slow_cache(self) -> None:
        """A cache that gives what can no longer be followed is gone on without."""
        stale = Recording(10)
        stale.lead(lambda: None)
        stale.begin(200, EVENT_STREAM, None, streamed=True)
        stale.write(WHOLE)
        self.patch(CacheExtension, "on_cache_lookup", lambda *_: stale)
        self.serve(FakeResponse(200, EVENT_STREAM, WHOLE))
        asked = self.ask()
        self.assertEqual(
            (WHOLE, False, 1), (asked.data, asked.outcome.cache_hit, len(asked.outcome.attempts))
        )


class PlainTests(SharingTestCase):
    """Plain answers."""

    stream = False

    def test_one_call(self) -> None:
        """All share one call, with its status, fields and length; the first one pays."""
        response = FakeResponse(200, (*JSON, (b"request-id", b"r1")))
        self.serve(response)
        leader, *followers = self.several()
        response.receive(MESSAGE)
        response.end()
        later = self.ask()
        for each in (leader, *followers, later):
            self.assertEqual((200, MESSAGE, True), (each.request.code, each.data, each.request.finished))
            self.assertEqual(str(len(MESSAGE)), each.request.header("content-length"))
            self.assertEqual("r1", each.request.header("request-id"))
            self.assertEqual("m-1", each.outcome.model_answered)
        self.check_costs(leader, *followers, later, cost=MESSAGE_COST)
        self.assertEqual([MESSAGE], [each.body for each in self.watcher.responses])

    def test_answers_at_once(self) -> None:
        """An upstream that answers at once is recorded all the same."""
        self.serve(FakeResponse(200, JSON, MESSAGE))
        self.assertEqual(["miss", "hit"], [each.said for each in self.several(2)])

    def test_large(self) -> None:
        """A large one flows as it comes, with its announced length, to late ones too, and is kept."""
        size = 3 * HOLD_BYTES
        response = FakeResponse(200, JSON, length=size)
        self.serve(response)
        leader = self.ask()
        response.receive(bytes(HOLD_BYTES + 1))
        late = self.ask()
        self.assertEqual(HOLD_BYTES + 1, len(late.data))
        response.receive(bytes(size - HOLD_BYTES - 1))
        response.end()
        for each in (leader, late, self.ask()):
            self.assertEqual((str(size), size), (each.request.header("content-length"), len(each.data)))
            self.assertTrue(each.request.finished)

    def test_large_at_once(self) -> None:
        """So does one that is here before anybody could read it, though it is too large to keep."""
        self.cache = CacheExtension(CacheSettings(max_entry_bytes=1000), FakeServices(self.clock))
        self.serve(FakeResponse(200, JSON, bytes(5 * HOLD_BYTES)))
        asked = self.ask()
        self.assertEqual((5 * HOLD_BYTES, "complete"), (len(asked.data), asked.outcome.reason))
        self.assertEqual((0, 0), (len(self.cache), self.cache.size_bytes))

    def test_large_and_broken(self) -> None:
        """A large one that breaks is cut for all, and not kept."""
        response = FakeResponse(200, JSON, length=3 * HOLD_BYTES)
        self.serve(response)
        asked = self.several(2)
        response.receive(bytes(HOLD_BYTES + 1))
        response.break_off()
        for each in asked:
            self.assertEqual((True, False), (each.request.aborted, each.request.finished))
            self.assertEqual((0, "connection_broken"), (each.outcome.status, each.outcome.reason))
        self.assertEqual(0, len(self.cache))

    def test_large_and_silent(self) -> None:
        """One that falls silent is cut for all, for that reason."""
        response = FakeResponse(200, JSON, length=3 * HOLD_BYTES)
        self.serve(response)
        asked = self.several(2)
        response.receive(bytes(HOLD_BYTES + 1))
        self.clock.advance(300)
        for each in asked:
            self.assertTrue(each.request.aborted)
            self.assertEqual(("gateway", "idle_timeout"), (each.outcome.ended_by, each.outcome.reason))

    def test_small_and_broken(self) -> None:
        """A small one that breaks is a 502 for all."""
        response = FakeResponse(200, JSON)
        self.serve(response)
        asked = self.several(2)
        response.receive(b'{"type":')
        response.break_off()
        self.assertEqual([502, 502], [each.request.code for each in asked])

    def test_client_error(self) -> None:
        """What the upstream says of the clients' own fault goes to all who wait, and to nobody later."""
        body = b'{"type":"error","error":{"type":"invalid_request_error","message":"no"}}'
        response = FakeResponse(400, JSON)
        self.serve(response, FakeResponse(200, JSON, MESSAGE))
        asked = self.several(2)
        response.receive(body)
        response.end()
        for each in asked:
            self.assertEqual((400, body), (each.request.code, each.data))
            self.assertEqual((400, "upstream_status"), (each.outcome.status, each.outcome.reason))
        self.assertEqual(("miss", 0), (self.ask().said, asked[1].outcome.cost))

    def test_client_error_to_a_stream(self) -> None:
        """Also where a stream was asked for: the answer is plain."""
        body = b'{"type":"error","error":{"type":"invalid_request_error","message":"no"}}'
        self.serve(FakeResponse(400, JSON, body))
        asked = self.ask(stream=True)
        self.assertEqual((400, body), (asked.request.code, asked.data))

    def test_empty(self) -> None:
        """An empty answer is kept, and read to its end by each."""
        self.serve(FakeResponse(200, JSON, b""))
        for _ in range(3):
            each = self.ask()
            self.assertEqual(("0", True), (each.request.header("content-length"), each.request.finished))
        [entry] = self.cache._entries.values()
        assert entry.answer is not None
        self.assertEqual(b"", entry.answer.body)

    def test_not_counted(self) -> None:
        """What costs nothing anyway is shared, too."""
        self.serve(FakeResponse(200, JSON, b'{"input_tokens":3}'))
        first, second = (self.ask("messages.count_tokens") for _ in range(2))
        self.assertEqual((b'{"input_tokens":3}', "hit"), (second.data, second.said))
        self.assertIsNone(first.outcome.usage)

    def test_slow_reader(self) -> None:
        """A client that reads slowly is given what it reads, a slice at a time, and the others all."""
        response = FakeResponse(200, JSON, length=300_000)
        self.serve(response)
        leader, follower = self.several(2)
        response.receive(bytes(HOLD_BYTES + 1))
        follower.request.producer.pauseProducing()
        response.receive(bytes(300_000 - HOLD_BYTES - 1))
        response.end()
        self.assertEqual((300_000, HOLD_BYTES + 1), (len(leader.data), len(follower.data)))
        self.assertTrue(leader.request.finished)
        follower.request.producer.resumeProducing()
        self.assertEqual((300_000, True), (len(follower.data), follower.request.finished))

    def test_very_slow_reader(self) -> None:
        """One that lags so far that the upstream has to wait may take its time as long as it reads."""
        self.cache = CacheExtension(CacheSettings(max_entry_bytes=1000), FakeServices(self.clock))
        response = FakeResponse(200, JSON, length=300_000)
        self.serve(response)
        leader, follower = self.several(2)
        response.receive(bytes(HOLD_BYTES + 1))
        follower.request.producer.pauseProducing()
        response.receive(bytes(250_000))
        self.assertTrue(response.paused)
        self.clock.advance(40)
        write = follower.request.write
        self.patch(
            follower.request, "write", lambda data: (write(data), follower.request.producer.pauseProducing())
        )
        follower.request.producer.resumeProducing()
        self.clock.advance(40)
        self.assertEqual((True, False, False), (response.paused, leader.has_ended, follower.has_ended))
        self.patch(follower.request, "write", write)
        follower.request.producer.resumeProducing()
        self.assertFalse(response.paused)
        response.receive(bytes(300_000 - 250_000 - HOLD_BYTES - 1))
        response.end()
        self.assertEqual([300_000] * 2, [len(each.data) for each in (leader, follower)])
