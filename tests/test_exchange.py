"""One request's life, from its body to its outcome."""

from __future__ import annotations

import gc
import weakref
from random import Random
from typing import Any

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from crabtwist.attempt import Patience
from crabtwist.dialects.operations import OPERATIONS
from crabtwist.errors import ConnectFailed, Refused, UpstreamError
from crabtwist.exchange import Exchange
from crabtwist.extension import Extension
from crabtwist.gateway import Gateway
from crabtwist.hooks import Hooks
from crabtwist.keys import VirtualKey
from crabtwist.pricing import ModelSettings, PriceBook
from crabtwist.routing import Deployment, Registry
from crabtwist.testing import EVENT_STREAM, JSON, FakeProvider, FakeResponse
from crabtwist.values import Answer, Context, Headers, Outcome, UsageEvent
from tests.fake_request import FakeRequest
from tests.test_relay import CHUNK, DELTA, DONE, ERROR, START, STOP, USAGE, WHOLE

MESSAGE = b'{"type":"message","model":"m-1","usage":{"input_tokens":4,"output_tokens":6}}'
OVERLOADED = b'{"type":"error","error":{"type":"overloaded_error","message":"busy"}}'


class Recorder(Extension):
    """An extension that remembers, and refuses or answers when told to."""

    name = "recorder"

    def __init__(self) -> None:
        self.ends: list[tuple[Context, Outcome]] = []
        self.errors: list[str] = []
        self.responses: list[Answer] = []
        self.cached: Answer | None = None
        self.refusal: Exception | None = None
        self.headers: dict[bytes, bytes] = {}

    def on_request(self, context: Context) -> None:
        context.answer_headers.update(self.headers)
        if self.refusal is not None:
            raise self.refusal

    def on_cache_lookup(self, context: Context, body: bytes) -> Answer | None:
        return self.cached

    def on_response(self, context: Context, body: bytes, response: Answer) -> None:
        self.responses.append(response)

    def on_error(self, context: Context, error: UpstreamError) -> None:
        self.errors.append(error.slug)

    def on_end(self, context: Context, outcome: Outcome) -> None:
        self.ends.append((context, outcome))


class ExchangeTestCase(SynchronousTestCase):
    """A gateway with fake providers, and one request at it."""

    def setUp(self) -> None:
        """Start from nothing."""
        self.clock = Clock()
        self.recorder = Recorder()
        self.events: list[UsageEvent] = []

    def gateway(self, *providers: FakeProvider, aliases: dict[str, str] | None = None, **more: Any) -> None:
        """Serve model "m" by these providers, the first of them first."""
        deployments = [
            Deployment(each, "m", "m", weight=int(index == 0), head_timeout_seconds=60, **more)
            for index, each in enumerate(providers)
        ]
        self.gateway_ = Gateway(
            clock=self.clock,
            registry=Registry(deployments, aliases or {}),
            keys=None,
            hooks=Hooks([self.recorder], self.clock),
            random=Random(1),
            patience=Patience(commit_seconds=10, ping_seconds=15),
        )
        self.gateway_.subscribe(self.events.append)

    def ask(
        self,
        operation: str = "messages",
        *,
        fields: Headers = (),
        key: VirtualKey | None = None,
        raw: bytes | None = None,
        **body: Any,
    ) -> FakeRequest:
        """Send a request; `ended` is the Deferred of its end."""
        request = FakeRequest(raw if raw is not None else {"model": "m", **body}, fields)
        self.ended: Deferred[None] = self.gateway_.serve(OPERATIONS[operation], request, key)
        # As Klein does when the client leaves.
        request.notifyFinish().addErrback(lambda _: self.ended.cancel())
        return request

    @property
    def outcome(self) -> Outcome:
        """The one outcome there is, which everybody was told."""
        self.successResultOf(self.ended)
        [(_, outcome)] = self.recorder.ends
        [event] = self.events
        self.assertEqual(outcome.status, event.status)
        self.assertEqual([], self.clock.getDelayedCalls())
        return outcome


class PlainTests(ExchangeTestCase):
    """Plain answers."""

    def test_verbatim(self) -> None:
        """The client's bytes go up, the upstream's come down, and all is counted."""
        provider = FakeProvider("p", [FakeResponse(200, (*JSON, (b"request-id", b"r1")), MESSAGE)])
        self.gateway(provider)
        request = self.ask(fields=((b"Anthropic-Beta", b"x"), (b"X-Api-Key", b"secret")))
        self.assertEqual((200, MESSAGE, True), (request.code, request.data, request.finished))
        self.assertEqual("r1", request.header("request-id"))
        self.assertEqual("verbatim", request.header("x-crabtwist-fidelity"))
        [call] = provider.calls
        self.assertIs(request.body, call.body)
        self.assertEqual(((b"Anthropic-Beta", b"x"),), call.headers)
        outcome = self.outcome
        self.assertEqual((200, "upstream", "complete"), (outcome.status, outcome.ended_by, outcome.reason))
        self.assertEqual("m-1", outcome.model_answered)
        assert outcome.usage is not None
        self.assertEqual((4, 6), (outcome.usage.prompt_tokens, outcome.usage.completion_tokens))
        self.assertEqual(MESSAGE, self.recorder.responses[0].body)

    def test_alias_is_spliced(self) -> None:
        """An alias reaches the upstream as the model that it stands for."""
        provider = FakeProvider("p", [FakeResponse(200, JSON, MESSAGE)])
        self.gateway(provider, aliases={"fast": "m"})
        request = self.ask(raw=b'{ "model" : "fast", "x":[1] }')
        self.assertEqual(b'{ "model" : "m", "x":[1] }', provider.calls[0].body)
        self.assertEqual("spliced", request.header("x-crabtwist-fidelity"))
        [(context, _)] = self.recorder.ends
        self.assertEqual(("fast", "m"), (context.model_asked, context.model))

    def test_client_error_is_passed_on(self) -> None:
        """What the upstream says of the client's own fault goes to the client; nobody else is asked."""
        body = b'{"type":"error","error":{"type":"invalid_request_error","message":"no"}}'
        second = FakeProvider("q")
        self.gateway(FakeProvider("p", [FakeResponse(400, JSON, body)]), second)
        request = self.ask()
        self.assertEqual((400, body, []), (request.code, request.data, second.calls))
        self.assertIsNone(request.header("x-crabtwist-error"))
        self.assertEqual((400, "upstream_status"), (self.outcome.status, self.outcome.reason))

    def test_broken_answer(self) -> None:
        """A small answer that breaks is a 502, and is not asked for again: it may have been billed."""
        response = FakeResponse(200, JSON)
        provider = FakeProvider("p", [response])
        self.gateway(provider)
        request = self.ask()
        response.receive(b'{"type":')
        response.break_off()
        self.assertEqual((502, "connection_broken"), (request.code, request.header("x-crabtwist-error")))
        self.assertEqual(1, len(provider.calls))
        self.assertEqual("connection_broken", self.outcome.reason)

    def test_answers_over_the_limit_are_not_shown(self) -> None:
        """Extensions see an answer up to `max_answer_copy_bytes`, which may be less than what is held."""
        for limit_bytes, shown in ((len(MESSAGE), 1), (len(MESSAGE) - 1, 0), (0, 0)):
            self.setUp()
            self.gateway(FakeProvider("p", [FakeResponse(200, JSON, MESSAGE)]))
            self.gateway_.patience = Patience(max_answer_copy_bytes=limit_bytes)
            self.ask()
            self.assertEqual((200, shown), (self.outcome.status, len(self.recorder.responses)))


class CostTests(ExchangeTestCase):
    """What requests cost."""

    def cost_of(self, answer: FakeResponse, **prices: Any) -> int | None:
        """Return the cost of a request that `answer` answers."""
        self.gateway(FakeProvider("p", [answer]), max_retries=0)
        own = {"m": ModelSettings(**prices).row("m")} if prices else {}
        self.gateway_.registry = attrs.evolve(
            self.gateway_.registry,
            models=[each for several in self.gateway_.registry.models.values() for each in several],
            prices=PriceBook((), own),
        )
        self.ask()
        return self.outcome.cost

    def test_known(self) -> None:
        """The usage of the answer at the price of its model, in picodollars; the row is kept with it."""
        self.assertEqual(
            4 * 3_000_000 + 6 * 15_000_000, self.cost_of(FakeResponse(200, JSON, MESSAGE), input=3, output=15)
        )
        assert self.outcome.price is not None
        self.assertEqual("m", self.outcome.price.model)

    def test_unknown_price(self) -> None:
        """Without a price nothing is made up."""
        self.assertIsNone(self.cost_of(FakeResponse(200, JSON, MESSAGE)))

    def test_unknown_usage(self) -> None:
        """Of what was asked and never counted nobody can tell."""
        self.assertIsNone(self.cost_of(FakeResponse(200, JSON, b"{}"), input=3, output=15))

    def test_nobody_asked(self) -> None:
        """What reached no upstream is free."""
        self.gateway(FakeProvider())
        self.ask(model="x")
        self.assertEqual(0, self.outcome.cost)


class RefusalTests(ExchangeTestCase):
    """What never reaches an upstream."""

    def refused(self, request: FakeRequest, status: int, slug: str) -> None:
        """Assert the refusal, in the dialect, told to everybody."""
        self.assertEqual((status, slug), (request.code, request.header("x-crabtwist-error")))
        self.assertEqual("error", request.answer["type"])
        self.assertEqual(request.header("x-crabtwist-request-id"), request.answer["request_id"])
        outcome = self.outcome
        self.assertEqual((status, "gateway", slug), (outcome.status, outcome.ended_by, outcome.reason))

    def test_bad_body(self) -> None:
        """What is no JSON is refused."""
        self.gateway(FakeProvider())
        self.refused(self.ask(raw=b"{"), 400, "invalid_body")

    def test_unknown_model(self) -> None:
        """A model that nobody serves is a 404; its name is no metric's label."""
        self.gateway(FakeProvider())
        self.refused(self.ask(model="x"), 404, "model_not_found")
        exposed = self.gateway_.metrics.exposition()
        self.assertIn(b'model="other"', exposed)
        self.assertNotIn(b'model="x"', exposed)

    def test_wrong_dialect(self) -> None:
        """A model that nobody serves in the caller's dialect is a 404 that says so."""
        self.gateway(FakeProvider(dialects=["openai"]))
        self.refused(self.ask(), 404, "operation_not_served")

    def test_key_may_not(self) -> None:
        """A key's list of models is kept."""
        self.gateway(FakeProvider())
        self.refused(self.ask(key=VirtualKey("k", frozenset({"n"}))), 403, "model_not_allowed")

    def test_guard(self) -> None:
        """A guard's refusal goes to the client with its headers."""
        self.gateway(FakeProvider())
        self.recorder.refusal = Refused(429, "rate_limit_error", "slow down", {"retry-after": "7"})
        request = self.ask()
        self.refused(request, 429, "refused")
        self.assertEqual("7", request.header("retry-after"))

    def test_malformed_refusal(self) -> None:
        """A refusal that cannot be sent is the gateway's failure, told and settled as that."""
        for headers in ({"retry-after": 5}, {"not a name": "x"}):
            self.setUp()
            self.gateway(FakeProvider())
            self.recorder.refusal = Refused(429, None, "no", headers)  # type: ignore[arg-type] # an extension's slip
            self.assertEqual(500, self.ask().code)
            self.assertEqual((500, "internal_error"), (self.outcome.status, self.outcome.reason))
            self.assertEqual(1, len(self.flushLoggedErrors()))

    def test_headers_of_extensions(self) -> None:
        """What an extension puts into the answer's head is there, whoever made the answer."""
        self.gateway(FakeProvider("p", [FakeResponse(200, (*JSON, (b"X-Left", b"99")), MESSAGE)]))
        self.recorder.headers = {b"x-left": b"5"}
        self.assertEqual("5", self.ask().header("x-left"))
        self.recorder.refusal = Refused(429, None, "enough")
        self.assertEqual("5", self.ask().header("x-left"))

    def test_crashed_guard(self) -> None:
        """A guard that crashes has not said yes."""
        self.gateway(FakeProvider())
        self.recorder.refusal = ZeroDivisionError()
        self.refused(self.ask(), 500, "guard_failed")
        self.flushLoggedErrors(ZeroDivisionError)

    def test_cache(self) -> None:
        """A cached answer is given, costs nothing, and is said to be one."""
        self.gateway(FakeProvider())
        self.recorder.cached = Answer(200, JSON, MESSAGE)
        request = self.ask()
        self.assertEqual((200, MESSAGE), (request.code, request.data))
        self.assertTrue(self.outcome.cache_hit)
        self.assertIsNone(self.outcome.usage)


class AttemptTests(ExchangeTestCase):
    """Trying again, and elsewhere."""

    def test_retry(self) -> None:
        """An overloaded upstream is asked again after a moment."""
        provider = FakeProvider("p", [FakeResponse(529, JSON, OVERLOADED), FakeResponse(200, JSON, MESSAGE)])
        self.gateway(provider)
        request = self.ask()
        self.assertIsNone(request.code)
        self.clock.advance(1)
        self.assertEqual((200, MESSAGE), (request.code, request.data))
        statuses = [(attempt.status, attempt.error) for attempt in self.outcome.attempts]
        self.assertEqual([(529, "upstream_status"), (200, None)], statuses)
        self.assertEqual(["upstream_status"], self.recorder.errors)

    def test_retry_after(self) -> None:
        """An upstream that says when to come back is not asked sooner."""
        busy = FakeResponse(429, (*JSON, (b"retry-after", b"5")), OVERLOADED)
        provider = FakeProvider("p", [busy, FakeResponse(200, JSON, MESSAGE)])
        self.gateway(provider)
        request = self.ask()
        self.clock.advance(4.9)
        self.assertEqual(1, len(provider.calls))
        self.clock.advance(0.2)
        self.assertEqual(200, request.code)

    def test_should_not_retry(self) -> None:
        """`x-should-retry: false` is believed: the answer goes to the client with it."""
        spent = FakeResponse(429, (*JSON, (b"x-should-retry", b"false")), OVERLOADED)
        provider = FakeProvider("p", [spent])
        self.gateway(provider)
        request = self.ask()
        self.assertEqual((429, "false"), (request.code, request.header("x-should-retry")))

    def test_fallback(self) -> None:
        """When a deployment gives up the next one is asked; the outcome names who answered."""
        second = FakeProvider("q", [FakeResponse(200, JSON, MESSAGE)])
        self.gateway(FakeProvider("p", [ConnectFailed("no")]), second, max_retries=0)
        self.assertEqual(200, self.ask().code)
        [(context, outcome)] = self.recorder.ends
        self.assertEqual("q", context.provider)
        self.assertEqual(["p", "q"], [attempt.provider for attempt in outcome.attempts])

    def test_all_fail(self) -> None:
        """At last the client gets the upstream's own answer, unchanged."""
        first = FakeProvider("p", [FakeResponse(529, (*JSON, (b"request-id", b"r")), OVERLOADED)])
        self.gateway(first, FakeProvider("q", [ConnectFailed("no route")]), max_retries=0)
        request = self.ask()
        self.assertEqual((529, OVERLOADED, "r"), (request.code, request.data, request.header("request-id")))
        self.assertEqual("verbatim", request.header("x-crabtwist-fidelity"))
        self.assertEqual((529, "upstream"), (self.outcome.status, self.outcome.ended_by))

    def test_nobody_there(self) -> None:
        """Where no upstream said anything, the gateway says what is wrong."""
        self.gateway(FakeProvider("p", [ConnectFailed("no route")]), max_retries=0)
        request = self.ask()
        self.assertEqual((502, "connect_failed"), (request.code, request.header("x-crabtwist-error")))
        self.assertEqual("no route", request.answer["error"]["message"])

    def test_credential_rejected(self) -> None:
        """The gateway's own bad credential is no fault of the client's: the next deployment, or a 502."""
        body = b'{"type":"error","error":{"type":"authentication_error","message":"bad x-api-key"}}'
        self.gateway(FakeProvider("p", [FakeResponse(401, JSON, body)]))
        request = self.ask()
        self.assertEqual(502, request.code)
        self.assertEqual("upstream_credential_rejected", request.header("x-crabtwist-error"))

    def test_redirect(self) -> None:
        """A redirect is neither followed nor passed on."""
        self.gateway(FakeProvider("p", [FakeResponse(307, ((b"location", b"http://x"),), b"")]))
        request = self.ask()
        self.assertEqual((502, None), (request.code, request.header("location")))

    def test_head_timeout(self) -> None:
        """An upstream that sends no head is given up, and its attempt cancelled."""
        cancelled: list[object] = []
        opening: Deferred[Any] = Deferred(cancelled.append)
        self.gateway(FakeProvider("p", [opening]), max_retries=0)
        request = self.ask()
        self.clock.advance(60)
        self.assertEqual((504, 1), (request.code, len(cancelled)))
        self.assertEqual("head_timeout", self.outcome.reason)

    def test_crashing_provider(self) -> None:
        """What a provider raises by mistake is logged, and is one more failed attempt."""
        opening: Deferred[Any] = Deferred()
        opening.errback(ZeroDivisionError())
        self.gateway(FakeProvider("p", [opening]), max_retries=0)
        self.assertEqual(502, self.ask().code)
        self.assertEqual(1, len(self.flushLoggedErrors(ZeroDivisionError)))

    def test_client_leaves_before_the_head(self) -> None:
        """A client that leaves cancels the attempt; its outcome is settled all the same."""
        cancelled: list[object] = []
        self.gateway(FakeProvider("p", [Deferred(cancelled.append)]))
        self.ask().leave()
        self.assertEqual(1, len(cancelled))
        outcome = self.outcome
        self.assertEqual((499, "client", "client_left"), (outcome.status, outcome.ended_by, outcome.reason))

    def test_client_leaves_a_careless_guard(self) -> None:
        """No upstream is asked for a client that left, though the guard swallowed that it did."""
        waiting: Deferred[None] = Deferred()
        waiting.addErrback(lambda _: None)
        self.patch(Recorder, "on_request", lambda *_: waiting)
        provider = FakeProvider("p", [FakeResponse(200, JSON, MESSAGE)])
        self.gateway(provider)
        self.ask().leave()
        self.assertEqual((0, "client_left"), (len(provider.calls), self.outcome.reason))

    def test_client_leaves_a_careless_provider(self) -> None:
        """An answer that comes in spite of having been cancelled is not read."""
        opening: Deferred[Any] = Deferred()
        opening.addErrback(lambda _: FakeResponse(200, EVENT_STREAM, WHOLE))
        self.gateway(FakeProvider("p", [opening]))
        self.ask(stream=True).leave()
        self.assertEqual((499, "client_left"), (self.outcome.status, self.outcome.reason))

    def test_broken_error_body(self) -> None:
        """Half of an upstream's error is not passed on as if it were whole."""
        response = FakeResponse(529, (*JSON, (b"content-encoding", b"gzip"), (b"retry-after", b"9")))
        self.gateway(FakeProvider("p", [response]), max_retries=0)
        request = self.ask()
        response.receive(OVERLOADED[:20])
        response.break_off()
        self.assertEqual((529, "overloaded_error"), (request.code, request.answer["error"]["type"]))
        self.assertEqual(("9", None), (request.header("retry-after"), request.header("content-encoding")))

    def test_client_leaves_while_waiting(self) -> None:
        """Nobody is asked again for a client that has left."""
        provider = FakeProvider("p", [FakeResponse(529, JSON, OVERLOADED)])
        self.gateway(provider)
        self.ask().leave()
        self.assertEqual((1, 499), (len(provider.calls), self.outcome.status))


class StreamTests(ExchangeTestCase):
    """Streams."""

    def stream(self, *answers: FakeResponse, operation: str = "messages", **body: Any) -> FakeRequest:
        """Ask for a stream that one provider answers."""
        self.provider = FakeProvider("p", answers)
        self.gateway(self.provider, max_retries=1)
        return self.ask(operation, stream=True, **body)

    def test_whole(self) -> None:
        """The head goes with the first event; the bytes are the upstream's; all is counted at the end."""
        response = FakeResponse(200, EVENT_STREAM)
        request = self.stream(response)
        self.assertIsNone(request.code)
        response.receive(START)
        self.assertEqual((200, START), (request.code, request.data))
        response.receive(WHOLE[len(START) :])
        response.end()
        self.assertEqual((WHOLE, True), (request.data, request.finished))
        outcome = self.outcome
        self.assertEqual((200, "complete", len(WHOLE)), (outcome.status, outcome.reason, outcome.bytes_out))
        assert outcome.usage is not None
        self.assertEqual(7, outcome.usage.completion_tokens)

    def test_commit(self) -> None:
        """The head does not wait for the first event for ever; pings follow."""
        response = FakeResponse(200, EVENT_STREAM)
        request = self.stream(response)
        self.clock.advance(9)
        self.assertFalse(request.head_sent)
        self.clock.advance(1)
        self.assertTrue(request.head_sent)
        self.clock.advance(15)
        self.assertIn(b"event: ping", request.data)
        response.receive(WHOLE)
        response.end()
        self.assertEqual("complete", self.outcome.reason)

    def test_first_event_is_an_error(self) -> None:
        """A 200 whose first event is an error is an attempt that failed."""
        failing, good = FakeResponse(200, EVENT_STREAM), FakeResponse(200, EVENT_STREAM)
        request = self.stream(failing, good)
        failing.receive(ERROR)
        self.assertTrue(failing.stopped)
        self.clock.advance(1)
        good.receive(WHOLE)
        good.end()
        self.assertEqual((200, WHOLE), (request.code, request.data))
        self.assertEqual(["upstream_status", None], [each.error for each in self.outcome.attempts])

    def test_error_after_the_beginning(self) -> None:
        """An error after a beginning is passed on, also when both came at once: the work had begun."""
        response = FakeResponse(200, EVENT_STREAM)
        request = self.stream(response)
        response.receive(START + ERROR)
        response.end()
        self.assertEqual((1, START + ERROR), (len(self.provider.calls), request.data))
        self.assertEqual((0, "upstream_error_event"), (self.outcome.status, self.outcome.reason))

    def test_only_errors(self) -> None:
        """When every attempt began with an error the client gets it as the status that it amounts to."""
        responses = [FakeResponse(200, EVENT_STREAM), FakeResponse(200, EVENT_STREAM)]
        request = self.stream(*responses)
        for response in responses:
            response.receive(ERROR)
            self.clock.advance(1)
        self.assertEqual((529, "overloaded_error"), (request.code, request.answer["error"]["type"]))

    def test_broken_before_the_first_event(self) -> None:
        """A stream that breaks before its first event is tried again."""
        broken, good = FakeResponse(200, EVENT_STREAM), FakeResponse(200, EVENT_STREAM)
        request = self.stream(broken, good)
        broken.break_off()
        self.clock.advance(1)
        good.receive(WHOLE)
        good.end()
        self.assertEqual(WHOLE, request.data)

    def test_no_stream(self) -> None:
        """A 200 that is no event stream is a failed attempt, at last a 502."""
        html = ((b"content-type", b"text/html"),)
        request = self.stream(FakeResponse(200, html, b"<p>"), FakeResponse(200, html, b"<p>"))
        self.clock.advance(1)
        self.assertEqual((502, "not_an_event_stream"), (request.code, request.header("x-crabtwist-error")))

    def test_plain_answer_to_a_stream(self) -> None:
        """Who answered a stream's request with a whole answer is not asked again; what it used is known."""
        self.stream(FakeResponse(200, JSON, MESSAGE))
        assert self.outcome.usage is not None
        self.assertEqual((1, 6), (len(self.provider.calls), self.outcome.usage.completion_tokens))

    def test_truncated(self) -> None:
        """A stream without its last event ends with an error event, status 0 and what usage there was."""
        response = FakeResponse(200, EVENT_STREAM)
        request = self.stream(response)
        response.receive(START + DELTA)
        response.end()
        self.assertEqual(1, request.data.count(b"event: error"))
        outcome = self.outcome
        self.assertEqual((0, "upstream", "truncated"), (outcome.status, outcome.ended_by, outcome.reason))
        assert outcome.usage is not None
        self.assertFalse(outcome.usage.complete)
        self.assertEqual(["truncated"], self.recorder.errors)

    def test_client_leaves(self) -> None:
        """A client that leaves in the middle closes the upstream; what was used is still known."""
        response = FakeResponse(200, EVENT_STREAM)
        request = self.stream(response)
        response.receive(START + DELTA)
        request.leave()
        self.assertTrue(response.stopped)
        outcome = self.outcome
        self.assertEqual((499, "client"), (outcome.status, outcome.ended_by))
        assert outcome.usage is not None
        self.assertEqual(3, outcome.usage.prompt_tokens)

    def test_client_leaves_before_the_first_event(self) -> None:
        """So does one that leaves while the head waits for the first event."""
        response = FakeResponse(200, EVENT_STREAM)
        self.stream(response).leave()
        self.assertTrue(response.stopped)
        self.assertEqual(499, self.outcome.status)

    def test_brakes(self) -> None:
        """The client's connection can pause the upstream."""
        response = FakeResponse(200, EVENT_STREAM)
        request = self.stream(response)
        response.receive(START)
        request.producer.pauseProducing()
        self.assertTrue(response.paused)
        request.leave()

    def test_shutdown(self) -> None:
        """A gateway that is stopped tells the client in mid-stream, and settles."""
        response = FakeResponse(200, EVENT_STREAM)
        request = self.stream(response)
        response.receive(START)
        self.gateway_.interrupt_all("the gateway is being stopped")
        self.assertEqual((1, True), (request.data.count(b"event: error"), request.finished))
        self.assertTrue(response.stopped)
        outcome = self.outcome
        self.assertEqual((0, "gateway", "shutting_down"), (outcome.status, outcome.ended_by, outcome.reason))

    def test_shutdown_before_the_head(self) -> None:
        """Before the head a plain 503 says it."""
        request = self.stream(FakeResponse(200, EVENT_STREAM))
        self.gateway_.interrupt_all("the gateway is being stopped")
        self.assertEqual((503, "shutting_down"), (request.code, request.header("x-crabtwist-error")))
        self.assertEqual("gateway", self.outcome.ended_by)

    def test_usage_is_asked_for(self) -> None:
        """Where an OpenAI client did not ask for usage the gateway does, and keeps the extra chunk."""
        response = FakeResponse(200, EVENT_STREAM)
        request = self.stream(response, operation="chat.completions")
        self.assertIn(b'"stream_options":{"include_usage":true}', self.provider.calls[0].body)
        response.receive(CHUNK + USAGE + DONE)
        response.end()
        self.assertEqual((CHUNK + DONE, "spliced"), (request.data, request.header("x-crabtwist-fidelity")))
        assert self.outcome.usage is not None
        self.assertEqual(5, self.outcome.usage.prompt_tokens)

    def test_usage_that_was_asked_for(self) -> None:
        """A client that asked for usage gets it, and its body is not touched."""
        response = FakeResponse(200, EVENT_STREAM)
        request = self.stream(response, operation="chat.completions", stream_options={"include_usage": True})
        response.receive(CHUNK + USAGE + DONE)
        response.end()
        self.assertEqual(CHUNK + USAGE + DONE, request.data)
        self.assertEqual("verbatim", request.header("x-crabtwist-fidelity"))

    def test_open_streams_gauge(self) -> None:
        """Streams are counted while they are open."""
        response = FakeResponse(200, EVENT_STREAM)
        self.stream(response)
        response.receive(START)
        self.assertIn(b"crabtwist_open_streams 1.0", self.gateway_.metrics.exposition())
        response.receive(STOP)
        response.end()
        self.assertIn(b"crabtwist_open_streams 0.0", self.gateway_.metrics.exposition())


class HealthTests(ExchangeTestCase):
    """Deployments that keep failing."""

    def test_cool_down(self) -> None:
        """One that failed three times in a row is asked last until it had time to recover."""
        second = FakeProvider("q", [FakeResponse(200, JSON, MESSAGE) for _ in range(5)])
        first = FakeProvider("p", [ConnectFailed("no")] * 3 + [FakeResponse(200, JSON, MESSAGE)])
        self.gateway(first, second, max_retries=0)
        for _ in range(4):
            self.ask()
        self.assertEqual((3, 4), (len(first.calls), len(second.calls)))
        self.clock.advance(31)
        self.ask()
        self.assertEqual(4, len(first.calls))

    def test_streams_that_break(self) -> None:
        """One that begins well and breaks every time is no better."""
        streams = [FakeResponse(200, EVENT_STREAM) for _ in range(3)]
        second = FakeProvider("q", [FakeResponse(200, EVENT_STREAM)])
        first = FakeProvider("p", streams)
        self.gateway(first, second, max_retries=0)
        for stream in streams:
            self.ask(stream=True)
            stream.receive(START)
            stream.break_off()
        self.ask(stream=True).leave()
        self.assertEqual((3, 1), (len(first.calls), len(second.calls)))

    def test_clients_that_leave(self) -> None:
        """That a client left says nothing of a deployment: neither that it is ill, nor that it is well."""
        left = FakeResponse(200, EVENT_STREAM)
        first = FakeProvider("p", [ConnectFailed("no"), ConnectFailed("no"), left, ConnectFailed("no")])
        second = FakeProvider("q", [FakeResponse(200, JSON, MESSAGE) for _ in range(4)])
        self.gateway(first, second, max_retries=0)
        self.ask()
        self.ask()
        request = self.ask(stream=True)
        left.receive(START)
        request.leave()
        self.ask()
        self.ask()
        self.assertEqual((4, 4), (len(first.calls), len(second.calls)))

    def test_provider_that_gives_up(self) -> None:
        """A provider that cancels its own work has failed one attempt, no more."""
        opening: Deferred[Any] = Deferred()
        opening.cancel()
        second = FakeProvider("q", [FakeResponse(200, JSON, MESSAGE)])
        self.gateway(FakeProvider("p", [opening]), second, max_retries=0)
        self.assertEqual(200, self.ask().code)


class ReloadTests(ExchangeTestCase):
    """Registries that are replaced."""

    def test_keeps_what_it_began_with(self) -> None:
        """A running request keeps its registry; when it has ended, nobody uses it any more."""
        response = FakeResponse(200, EVENT_STREAM)
        self.gateway(FakeProvider("p", [response]))
        self.ask(stream=True)
        old, self.gateway_.registry = self.gateway_.registry, Registry([])
        unused = self.gateway_.when_unused(old)
        self.assertNoResult(unused)
        response.receive(WHOLE)
        response.end()
        self.successResultOf(unused)


class GarbageTests(ExchangeTestCase):
    """What is left of a request that has ended: nothing, and at once."""

    def setUp(self) -> None:
        """Have nobody look for what refers to itself."""
        super().setUp()
        gc.disable()
        self.addCleanup(gc.enable)

    def running(self) -> weakref.ref[Exchange]:
        """Return the one request that is being answered."""
        [exchange] = self.gateway_._running
        return weakref.ref(exchange)

    def test_plain(self) -> None:
        """A plain answer's exchange goes with its end: bodies may be large, and there are many."""
        response = FakeResponse(200, JSON)
        self.gateway(FakeProvider("p", [response]))
        self.ask()
        exchange = self.running()
        response.receive(MESSAGE)
        response.end()
        self.assertEqual(("complete", None), (self.outcome.reason, exchange()))

    def test_stream(self) -> None:
        """So does a stream's."""
        response = FakeResponse(200, EVENT_STREAM)
        self.gateway(FakeProvider("p", [response]))
        self.ask(stream=True)
        response.receive(WHOLE)
        exchange = self.running()
        response.end()
        self.assertEqual(("complete", None), (self.outcome.reason, exchange()))
