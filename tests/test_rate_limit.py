"""Limits on requests and tokens."""

from __future__ import annotations

from collections import Counter
from typing import Any

import attrs
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from twisted.application.service import IService
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from crabtwist import settings
from crabtwist.errors import Refused
from crabtwist.extensions.rate_limit import RateLimitExtension, RateLimitSettings
from crabtwist.interfaces import IExtension
from crabtwist.leases import ALIVE_SECONDS, BLOCKS, HEARTBEAT_SECONDS
from crabtwist.meters import IDLE_SECONDS
from crabtwist.storage.memory import MemoryStorage
from crabtwist.terms import LimitSettings
from crabtwist.testing import FakeServices, make_context
from crabtwist.values import Attempt, Context, Outcome, Usage
from tests.test_leases import NOON, Line

LEFT = b"anthropic-ratelimit-output-tokens-remaining"
ASKED = (Attempt("p", "m", 200, None, 0.0, 1.0),)


def extension(services: FakeServices, **table: Any) -> RateLimitExtension:
    """Return an extension with limits, as the configuration says them."""
    complaints: list[str] = []
    read = settings.read(RateLimitSettings, table, "extensions.rate_limit", complaints)
    assert read is not None, complaints
    return RateLimitExtension(read, services)


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
        self.extension = extension(FakeServices(self.clock), **table)
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
        """It is an extension, and a service."""
        self.limit()
        verifyObject(IExtension, self.extension)
        verifyObject(IService, self.extension)

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

    def test_own(self) -> None:
        """What a key brings with it stands in the place of what the configuration says of it."""
        self.limit(requests_per_minute=100)
        own = LimitSettings(requests_per_minute=1)
        self.ask(limits=own)
        self.refused(limits=own)
        self.ask(principal="other")

    def test_changed(self) -> None:
        """Other limits for a key hold at once, and what it has used stays used."""
        self.limit()
        for limit in (2, 3):
            own = LimitSettings(requests_per_minute=limit)
            self.ask(limits=own)
        last = self.ask(limits=own)
        self.refused(limits=own)
        self.extension.on_request(
            make_context(request_id="free", limits=LimitSettings(concurrent_requests=5))
        )
        self.extension.on_end(last, ended(Usage()))
        self.refused(limits=LimitSettings(concurrent_requests=3))

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

    def test_refused_upstream(self) -> None:
        """What every upstream refused is a request and uses no tokens, however many it asked for."""
        self.limit(requests_per_minute=2, output_tokens_per_minute=1000)
        refusals = (
            Attempt("p", "m", 529, "upstream_status", 0.0, 1.0),
            Attempt("q", "m", 400, None, 1.0, 1.0),
        )
        self.extension.on_end(self.ask(max_tokens=10**9), ended(None, attempts=refusals))
        self.ask(max_tokens=1000)
        self.assertIn("2 requests", self.refused(max_tokens=0).message)

    def test_left_before_the_end(self) -> None:
        """An answer that was cut short uses what was sent of it, where that is more than was counted."""
        self.limit(output_tokens_per_minute=1000)
        counted = Usage(output_tokens=1, complete=False)
        for sent in (2000, 10**6):
            first = self.ask(max_tokens=500)
            self.extension.on_end(first, attrs.evolve(ended(counted), bytes_out=sent))
        self.refused(max_tokens=1)

    def test_tokenless(self) -> None:
        """Counting tokens uses none."""
        self.limit(requests_per_minute=2, input_tokens_per_minute=1, output_tokens_per_minute=1)
        for _ in range(2):
            self.extension.on_end(self.ask(operation="messages.count_tokens", body_bytes=400), ended(None))
        self.assertIn("2 requests", self.refused(operation="messages.count_tokens").message)

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
            b"1", self.ask_later(61, principal="b").answer_headers[b"anthropic-ratelimit-requests-remaining"]
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
            (b"10", b"9"),
            (said[b"anthropic-ratelimit-requests-limit"], said[b"anthropic-ratelimit-requests-remaining"]),
        )
        self.assertEqual(b"900", said[b"anthropic-ratelimit-input-tokens-remaining"])
        self.assertEqual(b"1970-01-01T00:01:01Z", said[b"anthropic-ratelimit-requests-reset"])
        said = self.ask(dialect="openai").answer_headers
        self.assertEqual(
            (b"8", b"61s"), (said[b"x-ratelimit-remaining-requests"], said[b"x-ratelimit-reset-requests"])
        )
        self.assertEqual(b"1000", said[b"x-ratelimit-limit-tokens"])

    def test_idle(self) -> None:
        """Whom nobody asks for any more is forgotten, unless something still runs."""
        self.limit(requests_per_minute=10)
        for number in range(100):
            self.extension.on_end(self.ask(principal=f"key-{number}"), ended())
        long = self.ask(principal="long")
        self.clock.advance(2 * IDLE_SECONDS)
        self.extension.on_end(self.ask(), ended())
        self.assertEqual(2, len(self.extension._meters))
        self.extension.on_end(long, ended())
        self.ask_later(2 * int(IDLE_SECONDS), principal="other")
        self.assertEqual(1, len(self.extension._meters))

    def test_unlimited(self) -> None:
        """Of keys without limits nothing is remembered."""
        self.limit(keys={"one": {"requests_per_minute": 1}})
        self.ask(principal="other")
        self.ask(principal="one")
        self.assertEqual([("key", "one")], list(self.extension._meters))

    def test_alone(self) -> None:
        """A node with a store of its own tells it nothing and starts no timers."""
        self.clock = Clock()
        services = FakeServices(self.clock)
        services.storage = MemoryStorage(None, services)
        node = extension(services, requests_per_minute=10)
        self.successResultOf(node.startService())
        node.on_request(make_context())
        self.clock.advance(1)
        self.assertEqual([], self.clock.getDelayedCalls())
        self.assertEqual({}, self.successResultOf(services.storage.boards("rate_limit")))
        self.successResultOf(node.stopService())


class NodesCase(SynchronousTestCase):
    """Nodes with one limit and one store."""

    def begin(self, nodes: int = 2, **table: Any) -> None:
        """Start nodes, and let them hear of each other."""
        self.clock = Clock()
        self.clock.advance(NOON)
        self.store = MemoryStorage(None, FakeServices(self.clock))
        self.lines = [Line(self.store) for _ in range(nodes)]
        self.nodes = [self.start(line, **table) for line in self.lines]
        self.count = 0
        self.pass_time(HEARTBEAT_SECONDS + 0.5)

    def start(self, line: Line, **table: Any) -> RateLimitExtension:
        """Return a node that runs."""
        services = FakeServices(self.clock)
        services.storage = line
        node = extension(services, **table)
        self.successResultOf(node.startService())
        return node

    def ask(self, node: int, **context: Any) -> Context:
        """Let a request through a node."""
        self.count += 1
        made = make_context(request_id=f"req_{self.count}", **context)
        self.nodes[node].on_request(made)
        return made

    def refused(self, node: int, status: int = 429, **context: Any) -> Refused:
        """Return a node's refusal of a request."""
        refusal: Refused = self.assertRaises(Refused, self.ask, node, **context)
        self.assertEqual(status, refusal.status, refusal.message)
        return refusal

    def admitted(self, node: int, most: int = 1000) -> int:
        """Return how many requests a node lets through, when each is heard of before the next."""
        for number in range(most):
            try:
                self.ask(node)
            except Refused:
                return number
            self.pass_time(0.2)
        return most

    def pass_time(self, seconds: float) -> None:
        """Let time pass, smoothly."""
        self.clock.pump([0.1] * round(seconds / 0.1))


class SharedLimitTests(NodesCase):
    """One limit on several nodes."""

    def test_common(self) -> None:
        """What one node has used another has not; the refusal's wait is true for both."""
        self.begin(requests_per_minute=5)
        self.assertEqual(3, self.admitted(0, 3))
        self.assertEqual(2, self.admitted(1))
        refusal = self.refused(1)
        self.assertIn("5 requests a minute, and has", refusal.message)
        self.pass_time(int(refusal.headers["retry-after"]))
        self.ask(1)

    def test_headers(self) -> None:
        """Answers say what is left of the common limit."""
        self.begin(requests_per_minute=10)
        for _ in range(4):
            self.ask(0)
            self.pass_time(0.2)
        self.ask(1)
        self.pass_time(0.2)
        said = self.ask(1, dialect="openai").answer_headers
        self.assertEqual(b"4", said[b"x-ratelimit-remaining-requests"])

    def test_scopes(self) -> None:
        """All limits are common, each for itself."""
        self.begin(
            requests_per_minute=5, all={"requests_per_minute": 6}, models={"m": {"requests_per_minute": 2}}
        )
        for node in (0, 1):
            self.ask(node, model="m", principal="a")
            self.pass_time(0.2)
        self.assertIn("with model 'm'", self.refused(1, model="m", principal="a").message)
        self.assertEqual(4, self.admitted(1))
        self.assertIn("everybody together", self.refused(1).message)

    def test_a_block(self) -> None:
        """A node that was not heard goes a block ahead and no further, and says why."""
        self.begin(requests_per_minute=100)
        for _ in range(10):
            self.ask(0)
        refusal = self.refused(0)
        self.assertEqual("1", refusal.headers["retry-after"])
        self.assertIn("waits to hear how much of the limits of key 'default'", refusal.message)
        self.clock.advance(0)
        self.ask(0)

    def test_alone_on_a_common_store(self) -> None:
        """A node that is alone waits for nobody."""
        self.begin(nodes=1, requests_per_minute=100)
        for _ in range(100):
            self.ask(0)
        self.assertIn("100 requests a minute, and has", self.refused(0).message)

    def test_given_back_elsewhere(self) -> None:
        """What another node gives back can be used here as soon as it was heard."""
        self.begin(output_tokens_per_minute=100)
        big = self.ask(0, max_tokens=100)
        self.pass_time(0.2)
        self.ask(1, max_tokens=1)
        self.pass_time(0.2)
        self.refused(1, max_tokens=50)
        self.nodes[0].on_end(big, ended(Usage(output_tokens=1)))
        self.pass_time(0.2)
        self.ask(1, max_tokens=50)

    def test_given_back_here(self) -> None:
        """What is given back is not had again before the others heard of it."""
        self.begin(output_tokens_per_minute=100)
        big = self.ask(0, max_tokens=50)
        self.pass_time(0.2)
        self.nodes[0].on_end(big, ended(Usage(output_tokens=0)))
        self.ask(0, max_tokens=10)
        self.assertIn("waits to hear", self.refused(0, max_tokens=1).message)
        self.pass_time(0.2)
        self.assertEqual(b"89", self.ask(0, max_tokens=1).answer_headers[LEFT])

    def test_news_of_one(self) -> None:
        """What one node says anew does not make another's word forgotten."""
        self.begin(nodes=3, requests_per_minute=10)
        for node in (2, 1, 0, 1, 0):
            self.ask(node)
            self.pass_time(0.2)
        self.assertEqual(b"4", self.ask(0).answer_headers[b"anthropic-ratelimit-requests-remaining"])

    def test_concurrent(self) -> None:
        """Requests at once are counted on all nodes."""
        self.begin(concurrent_requests=2)
        running = self.ask(0)
        self.pass_time(0.2)
        self.ask(1)
        self.pass_time(0.2)
        self.refused(1)
        self.nodes[0].on_end(running, ended())
        self.pass_time(0.2)
        self.ask(1)

    def test_the_dead_run_nothing(self) -> None:
        """What a node ran that died is not counted any more; what it used still is."""
        self.begin(concurrent_requests=2, requests_per_minute=3)
        for _ in range(2):
            self.ask(1)
            self.pass_time(0.2)
        self.lines[1].is_cut = True
        self.ask(0)
        self.pass_time(0.2)
        self.assertIn("at once", self.refused(0).message)
        self.pass_time(ALIVE_SECONDS + 1)
        self.assertIn("3 requests a minute", self.refused(0).message)

    def test_tells_at_the_end(self) -> None:
        """A node that is stopped tells what it used; one that starts knows it."""
        self.begin(requests_per_minute=5)
        for _ in range(3):
            self.ask(0)
            self.clock.advance(0)
        self.successResultOf(self.nodes[0].stopService())
        self.nodes[0] = self.start(Line(self.store), requests_per_minute=5)
        self.assertEqual(2, self.admitted(0))

    def test_store_that_lost_everything(self) -> None:
        """What a store loses is still used by those who told it."""
        self.begin(requests_per_minute=6)
        for node in (1, 0, 1, 0):
            self.ask(node)
            self.pass_time(0.2)
        self.store.close()
        self.assertEqual(2, self.admitted(0))
        # One, for it has not heard of the last ones; but not as many as it was told again.
        self.assertEqual(1, self.admitted(1))

    def test_unreadable(self) -> None:
        """What another version says that nobody here can read is passed over."""
        self.begin(requests_per_minute=5)
        self.ask(0)
        self.pass_time(0.2)
        [board] = [key for key in self.successResultOf(self.store.boards("rate_limit")) if b"default" in key]
        self.store.post("rate_limit", b"other", {board: b"{"})
        self.assertEqual(4, self.admitted(0))

    def test_ahead_of_time(self) -> None:
        """What a node says whose clock is ahead counts as used when it was heard."""
        self.begin(requests_per_minute=5)
        self.ask(0)
        self.pass_time(0.2)
        [board] = [key for key in self.successResultOf(self.store.boards("rate_limit")) if b"default" in key]
        self.store.post("rate_limit", b"other", {board: b'[0,{"requests":[[%d,4]]}]' % (NOON + 9999)})
        self.ask(0)
        self.pass_time(0.2)
        self.refused(0)
        self.pass_time(66)
        self.ask(0)

    def test_idle(self) -> None:
        """Whom nobody asks for is forgotten, and told no more; what others used meanwhile is heard again."""
        self.begin(requests_per_minute=3)
        self.nodes[0].on_end(self.ask(0), ended())
        self.pass_time(IDLE_SECONDS + 60)
        self.ask(0, principal="other")
        self.assertEqual([("key", "other")], list(self.nodes[0]._meters))
        self.assertEqual(2, self.admitted(1, 2))
        self.assertEqual(1, self.admitted(0))


class WithoutStoreTests(NodesCase):
    """What is done while the store is gone."""

    def test_local(self) -> None:
        """A node goes on with its part, which it has together with what it knows of the others."""
        self.begin(requests_per_minute=10)
        for line in self.lines:
            line.is_cut = True
        self.assertEqual([5, 5], [self.admitted(0), self.admitted(1)])
        self.assertIn("5 of them by this node while it cannot reach the store", self.refused(0).message)
        self.pass_time(int(self.refused(0).headers["retry-after"]))
        self.ask(0)

    def test_what_was_heard(self) -> None:
        """What the others had used before still counts."""
        self.begin(requests_per_minute=10)
        self.assertEqual(8, self.admitted(0, 8))
        self.ask(1)
        self.pass_time(0.2)
        self.lines[0].is_cut = self.lines[1].is_cut = True
        self.pass_time(HEARTBEAT_SECONDS + 0.2)
        self.assertEqual([0, 1], [self.admitted(0), self.admitted(1)])

    def test_part_of_the_concurrent(self) -> None:
        """Of requests at once, too, a node has its part, and one at the least."""
        self.begin(nodes=3, concurrent_requests=2)
        for line in self.lines:
            line.is_cut = True
        self.pass_time(3)
        self.ask(0)
        self.assertIn("2 requests at once, 1 of them by this node", self.refused(0).message)

    def test_more_than_a_part(self) -> None:
        """A request larger than the part is let through when the node has used nothing else."""
        self.begin(output_tokens_per_minute=100)
        for line in self.lines:
            line.is_cut = True
        self.pass_time(3)
        self.ask(0, max_tokens=80)
        self.refused(0, max_tokens=1)

    def test_refuse(self) -> None:
        """Where it is set so, requests are refused until the store is back."""
        self.begin(requests_per_minute=10, without_store="refuse")
        self.ask(0)
        self.pass_time(0.2)
        self.lines[0].is_cut = True
        self.pass_time(3)
        refusal = self.refused(0, 503)
        self.assertEqual(("store_unreachable", "5"), (refusal.slug, refusal.headers["retry-after"]))
        self.lines[0].is_cut = False
        self.pass_time(1)
        self.assertEqual(b"8", self.ask(0).answer_headers[b"anthropic-ratelimit-requests-remaining"])

    def test_refuse_what_is_limited(self) -> None:
        """Whoever has no limits is let through also then."""
        self.begin(keys={"one": {"requests_per_minute": 9}}, without_store="refuse")
        self.lines[0].is_cut = True
        self.pass_time(3)
        self.refused(0, 503, principal="one")
        self.ask(0, principal="other")

    def test_hung(self) -> None:
        """A store that does not answer is as good as gone, and no request waits for it."""
        self.begin(requests_per_minute=10)
        self.lines[0].is_held = self.lines[1].is_held = True
        self.pass_time(3)
        self.assertEqual([5, 5], [self.admitted(0), self.admitted(1)])

    def test_recovery(self) -> None:
        """When the store is back, the limit is held in common again."""
        self.begin(requests_per_minute=10)
        for line in self.lines:
            line.is_cut = True
        self.assertEqual([5, 2], [self.admitted(0), self.admitted(1, 2)])
        for line in self.lines:
            line.is_cut = False
        self.pass_time(1)
        self.assertEqual([3, 1], [self.admitted(0), self.admitted(1)])


#: What may happen: a burst of requests on a node, the end of one, a post arriving, its reply, and time.
events = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(0, 2), st.integers(1, 25)),
        st.tuples(st.sampled_from(["end", "arrive", "reply", "cut"]), st.integers(0, 2), st.just(0)),
        st.tuples(st.sampled_from(["tick", "tick", "jump"]), st.integers(1, 20), st.just(0)),
    ),
    max_size=60,
)

LIMIT = 100
#: Each of a burst's requests is refused or not; together they ask for this much.
BURST = 60


class Traffic(NodesCase):
    """Three nodes, whose requests and posts happen in any order."""

    def runTest(self) -> None:
        """Nothing: others play with it."""

    def __init__(self, **table: Any) -> None:
        super().__init__()
        self.begin(3, **table)
        for line in self.lines:
            line.is_held = True
        self.used: list[list[float]] = []
        self.running: list[tuple[int, Context, list[float]]] = []
        self.replies: dict[int, Any] = {}
        self.cut_for: Counter[int] = Counter()

    def happen(self, event: str, number: int, amount: int) -> None:
        """Let something happen."""
        getattr(self, f"_{event}")(number, amount)

    def most_used(self) -> float:
        """Return how many tokens were used within the last minute."""
        return sum(amount for at, amount in self.used if at > self.clock.seconds() - 60)

    def _ask(self, node: int, amount: int) -> None:
        for _ in range(BURST // amount):
            try:
                context = self.ask(node, max_tokens=amount)
            except Refused:
                return
            self.used.append([self.clock.seconds(), amount])
            self.running.append((node, context, self.used[-1]))

    def _end(self, number: int, _amount: int) -> None:
        if self.running:
            node, context, used = self.running.pop(number % len(self.running))
            used[1] //= 2
            self.nodes[node].on_end(context, ended(Usage(output_tokens=int(used[1]))))

    def _arrive(self, node: int, _amount: int) -> None:
        if node not in self.replies and self.lines[node].waiting:
            self.replies[node] = self.lines[node].arrive()

    def _reply(self, node: int, _amount: int) -> None:
        self._arrive(node, 0)
        if node in self.replies:
            self.replies.pop(node).unpause()

    def _cut(self, node: int, _amount: int) -> None:
        self.lines[node].is_cut = not self.lines[node].is_cut

    def _tick(self, tenths: int, _amount: int) -> None:
        for _ in range(tenths):
            self.clock.advance(0.1)
            for node, line in enumerate(self.lines):
                self.cut_for[node] = self.cut_for[node] + 1 if line.is_cut else 0
                if self.cut_for[node] > 50:
                    line.is_cut = False
                # Nobody waits for as long as half a second.
                if self.clock.seconds() * 10 % 4 < 1:
                    self._reply(node, 0)

    def _jump(self, seconds: int, _amount: int) -> None:
        for line in self.lines:
            line.is_cut = line.is_held = False
        for node in (0, 1, 2):
            self._reply(node, 0)
        self.clock.pump([0.1] * 3)
        self.clock.advance(seconds)
        for line in self.lines:
            line.is_held = True


class BoundTests(SynchronousTestCase):
    """By how much nodes together may use more than a limit."""

    @hypothesis_settings(deadline=None)
    @given(events)
    def test_in_touch(self, events: list[tuple[str, int, int]]) -> None:
        """In any minute no more than a block, or a request, for each node but one."""
        traffic = Traffic(output_tokens_per_minute=LIMIT)
        largest = max((amount for event, _, amount in events if event == "ask"), default=0)
        for event in events:
            if event[0] != "cut":
                traffic.happen(*event)
            self.assertLessEqual(traffic.most_used(), LIMIT + 2 * max(LIMIT // BLOCKS, largest))
            self.assertTrue(all(node._leases.in_touch for node in traffic.nodes if node._leases))

    @hypothesis_settings(deadline=None)
    @given(events)
    def test_at_once(self, events: list[tuple[str, int, int]]) -> None:
        """At no time more than a block for each node but one."""
        traffic = Traffic(concurrent_requests=20)
        for event in events:
            if event[0] != "cut":
                traffic.happen(*event)
            self.assertLessEqual(len(traffic.running), 20 + 2 * 2)

    @hypothesis_settings(deadline=None)
    @given(events)
    def test_cut_off(self, events: list[tuple[str, int, int]]) -> None:
        """Those who are cut off use no more than their parts besides."""
        traffic = Traffic(output_tokens_per_minute=LIMIT)
        largest = max((amount for event, _, amount in events if event == "ask"), default=0)
        bound = LIMIT + 2 * max(LIMIT // BLOCKS, largest) + 2 * max(LIMIT // 3, largest)
        for event in events:
            traffic.happen(*event)
            self.assertLessEqual(traffic.most_used(), bound)
