"""Limits on requests and tokens."""

from __future__ import annotations

from typing import Any

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from crabtwist import settings
from crabtwist.errors import Refused
from crabtwist.extensions.rate_limit import RateLimitExtension, RateLimitSettings
from crabtwist.interfaces import IExtension
from crabtwist.testing import FakeServices, make_context
from crabtwist.values import Attempt, Context, Outcome, Usage

ASKED = (Attempt("p", "m", 200, None, 0.0, 1.0),)


def ended(
    usage: Usage | None = None, *, attempts: tuple[Attempt, ...] = ASKED, cached: bool = False
) -> Outcome:
    """Return an outcome."""
    return Outcome(200, "upstream", "complete", None, usage, attempts, "m", 0.1, 1.0, 1, 1, cache_hit=cached)


class RateLimitTests(SynchronousTestCase):
    """What is refused, and what is charged."""

    def limit(self, **table: Any) -> None:
        """Set limits, as the configuration says them."""
        self.clock = Clock()
        complaints: list[str] = []
        read = settings.read(RateLimitSettings, table, "extensions.rate_limit", complaints)
        assert read is not None, complaints
        self.extension = RateLimitExtension(read, FakeServices(self.clock))
        self.count = 0

    def ask(self, **context: Any) -> Context:
        """Let a request through."""
        self.count += 1
        made = make_context(request_id=f"req_{self.count}", **context)
        self.extension.on_request(made)
        return made

    def refused(self, **context: Any) -> Refused:
        """Return the refusal of a request."""
        refusal: Refused = self.assertRaises(Refused, self.ask, **context)
        self.assertEqual((429, "rate_limited"), (refusal.status, refusal.slug))
        return refusal

    def test_contract(self) -> None:
        """It is an extension."""
        self.limit()
        verifyObject(IExtension, self.extension)

    def test_requests(self) -> None:
        """Each key has its own; the refusal says when to ask again, and that is true."""
        self.limit(requests_per_minute=2)
        self.ask()
        self.clock.advance(10)
        self.ask()
        refusal = self.refused()
        self.assertIn("key 'default' may use 2 requests a minute", refusal.message)
        self.ask(principal="other")
        self.clock.advance(int(refusal.headers["retry-after"]))
        self.ask()

    def test_no_double_burst(self) -> None:
        """A full minute's worth before a minute's edge leaves nothing for after it."""
        self.limit(requests_per_minute=5)
        self.clock.advance(59)
        for _ in range(5):
            self.ask()
        self.clock.advance(2)
        self.refused()

    def test_refused_is_not_charged(self) -> None:
        """Asking in vain does not put the next chance off."""
        self.limit(requests_per_minute=1)
        self.ask()
        for _ in range(100):
            self.refused()
        self.clock.advance(61)
        self.ask()

    def test_tokens_at_once(self) -> None:
        """Requests that run at once share what one might have used alone."""
        self.limit(output_tokens_per_minute=1000)
        for _ in range(4):
            self.ask(max_tokens=250)
        self.assertIn("1000 output tokens a minute", self.refused(max_tokens=1).message)

    def test_correction(self) -> None:
        """What was reserved and not used is given back at the end; what was used beyond it is charged."""
        self.limit(output_tokens_per_minute=1000, input_tokens_per_minute=1000)
        first = self.ask(max_tokens=1000, body_bytes=400)
        self.refused(max_tokens=1)
        used = Usage(output_tokens=10, input_tokens=999, cache_read_tokens=5000)
        self.extension.on_end(first, ended(used))
        self.ask(max_tokens=990)
        self.assertIn("input tokens", self.refused(max_tokens=0, body_bytes=8).message)

    def test_larger_than_the_limit(self) -> None:
        """Whoever asks for more than all gets it when nothing else is used."""
        self.limit(output_tokens_per_minute=1000)
        self.ask(max_tokens=64_000)
        self.refused(max_tokens=1)

    def test_nobody_counted(self) -> None:
        """Where an upstream was asked and nobody counted, the estimate stands."""
        self.limit(output_tokens_per_minute=1000)
        self.extension.on_end(self.ask(max_tokens=1000), ended(None))
        self.refused(max_tokens=1)

    def test_given_back(self) -> None:
        """What another guard refused costs nothing; a cached answer is one request and no tokens."""
        self.limit(requests_per_minute=1, output_tokens_per_minute=10)
        self.extension.on_end(self.ask(max_tokens=10), ended(attempts=()))
        self.extension.on_end(self.ask(max_tokens=10), ended(attempts=(), cached=True))
        self.assertIn("1 requests", self.refused(max_tokens=10).message)

    def test_concurrent(self) -> None:
        """A slot is given back with every end."""
        self.limit(concurrent_requests=2)
        running = [self.ask(), self.ask()]
        self.assertEqual("1", self.refused().headers["retry-after"])
        self.extension.on_end(running[0], ended(attempts=()))
        self.ask()
        self.refused()

    def test_end_of_the_refused(self) -> None:
        """The end of a request that it refused itself gives nothing back twice."""
        self.limit(concurrent_requests=1)
        self.ask()
        self.refused()
        self.extension.on_end(make_context(request_id="req_2"), ended(attempts=()))
        self.refused()

    def test_all(self) -> None:
        """Everybody together has a limit of their own; whom one limit refuses is charged by none."""
        self.limit(requests_per_minute=2, all={"requests_per_minute": 3})
        self.ask(principal="a")
        self.ask(principal="a")
        self.ask(principal="b")
        self.assertIn("everybody together", self.refused(principal="b").message)
        self.assertEqual(
            "1", self.ask_later(61, principal="b").answer_headers["anthropic-ratelimit-requests-remaining"]
        )

    def ask_later(self, seconds: int, **context: Any) -> Context:
        """Let a request through after a while."""
        self.clock.advance(seconds)
        return self.ask(**context)

    def test_exceptions(self) -> None:
        """A key may have its own limits, and a model limits beside them."""
        self.limit(
            requests_per_minute=1,
            keys={"big": {"requests_per_minute": 3}},
            models={"dear": {"requests_per_minute": 1}},
        )
        self.ask(principal="big", model="dear")
        self.assertIn("with model 'dear'", self.refused(principal="big", model="dear").message)
        self.ask(principal="big")

    def test_headers(self) -> None:
        """Every answer says the limit, what is left of it and when it is whole again, in its dialect."""
        self.limit(requests_per_minute=10, input_tokens_per_minute=1000)
        said = self.ask(body_bytes=400).answer_headers
        self.assertEqual(
            ("10", "9"),
            (said["anthropic-ratelimit-requests-limit"], said["anthropic-ratelimit-requests-remaining"]),
        )
        self.assertEqual("900", said["anthropic-ratelimit-input-tokens-remaining"])
        self.assertEqual("1970-01-01T00:01:01Z", said["anthropic-ratelimit-requests-reset"])
        said = self.ask(dialect="openai").answer_headers
        self.assertEqual(
            ("8", "61s"), (said["x-ratelimit-remaining-requests"], said["x-ratelimit-reset-requests"])
        )
        self.assertEqual("1000", said["x-ratelimit-limit-tokens"])
