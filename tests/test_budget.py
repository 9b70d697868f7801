"""Budgets: what is refused and in which words, what is charged, and what several nodes use together."""

from __future__ import annotations

from collections.abc import Mapping
from math import nan
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.application.service import IService
from twisted.internet.defer import Deferred, fail
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from crabtwist import settings as tables
from crabtwist.accounts import is_over
from crabtwist.errors import ConfigurationError, Refused, StorageError
from crabtwist.extensions.budget import BudgetExtension, BudgetSettings
from crabtwist.interfaces import IExtension
from crabtwist.leases import ALIVE_SECONDS, REFRESH_SECONDS, Lease
from crabtwist.money import DOLLAR
from crabtwist.pricing import ModelSettings
from crabtwist.storage.memory import MemoryStorage
from crabtwist.terms import KeyBudgetSettings, picodollars
from crabtwist.testing import FakeServices, make_context
from crabtwist.values import Attempt, Context, Outcome, Usage

#: A dollar a million tokens, in or out.
TOKEN = DOLLAR // 10**6
ROW = ModelSettings(input=1, output=1).row("model")
DEAR = ModelSettings(input=2, output=3).row("dear")

#: A hundred tokens.
HUNDRED = 0.0001

JANUARY = 1_768_000_000.0
DAY = 86400.0


class SharedStorage(MemoryStorage):
    """A store that several nodes see, and that can be out of reach."""

    between_nodes = True
    gone = False

    def post(
        self, namespace: str, member: bytes, notes: Mapping[bytes, bytes], ttl_seconds: float | None = None
    ) -> Deferred[Any]:
        """Put up notes, unless it is gone."""
        if self.gone:
            return fail(StorageError("the store is out of reach"))
        return super().post(namespace, member, notes, ttl_seconds)


def read(table: dict[str, Any]) -> BudgetSettings:
    """Return settings, as the configuration says them."""
    complaints: list[str] = []
    found = tables.read(BudgetSettings, table, "extensions.budget", complaints)
    assert found is not None, complaints
    return found


def complaint(**table: Any) -> str:
    """Return what is said against settings."""
    complaints: list[str] = []
    tables.read(BudgetSettings, table, "extensions.budget", complaints)
    [only] = complaints
    return only


def attempt(status: int | None = 200, error: str | None = None) -> Attempt:
    """Return an attempt."""
    return Attempt("p", "m", status, error, 0.0, 1.0)


def ended(
    usage: Usage | None = None,
    *attempts: Attempt,
    cost: int | None = None,
    reason: str = "complete",
    bytes_out: int = 0,
) -> Outcome:
    """Return an outcome."""
    return Outcome(
        200, "upstream", reason, None, usage, attempts, "m", 0.1, 1.0, 1, bytes_out, cost=cost, price=None
    )


def cost_of(tokens: int) -> Outcome:
    """Return the outcome of a request that was counted and priced."""
    return ended(Usage(output_tokens=tokens), attempt(), cost=tokens * TOKEN)


class Node:
    """One gateway's budget, and requests to it."""

    made = 0

    def __init__(self, table: dict[str, Any], clock: Clock, storage: Any) -> None:
        services = FakeServices(clock)
        services.storage = storage
        self.clock = clock
        self.extension = BudgetExtension(read(table), services)

    def ask(self, max_tokens: int | None = 10, **context: Any) -> Context:
        """Let a request in."""
        Node.made += 1
        made = make_context(
            **{
                "request_id": f"req_{Node.made}",
                "max_tokens": max_tokens,
                "prices": (ROW,),
                "started_at": self.clock.seconds(),
                **context,
            }
        )
        self.extension.on_request(made)
        return made

    def end(self, context: Context, outcome: Outcome) -> None:
        """End a request."""
        self.extension.on_end(context, outcome)

    def spend(self, tokens: int, **context: Any) -> None:
        """Let a request in, and end it."""
        self.end(self.ask(tokens, **context), cost_of(tokens))

    @property
    def used(self) -> tuple[int, int]:
        """The tokens that were spent, and those that are reserved, of the only key."""
        [state] = self.extension.state()
        return state.spent // TOKEN, state.reserved // TOKEN


class BudgetCase(SynchronousTestCase):
    """Nodes on one store."""

    def setUp(self) -> None:
        """Have a clock and a store."""
        self.clock = Clock()
        self.clock.advance(JANUARY)
        self.storage: Any = MemoryStorage(None, FakeServices(self.clock))

    def node(self, **table: Any) -> Node:
        """Start a node."""
        node = Node({"dollars": HUNDRED, **table}, self.clock, self.storage)
        self.successResultOf(node.extension.startService())
        return node

    def stop(self, node: Node) -> None:
        """Stop it in order."""
        self.successResultOf(node.extension.stopService())

    def refused(self, node: Node, max_tokens: int | None = 10, **context: Any) -> Refused:
        """Return the refusal of a request."""
        refusal: Refused = self.assertRaises(Refused, node.ask, max_tokens, **context)
        return refusal

    def slug(self, node: Node, max_tokens: int | None = 10, **context: Any) -> str:
        """Return in which way a request is refused."""
        return self.refused(node, max_tokens, **context).slug


class RefusalTests(BudgetCase):
    """What is refused, and in which words."""

    def test_contract(self) -> None:
        """It is an extension and a service."""
        node = self.node()
        verifyObject(IExtension, node.extension)
        verifyObject(IService, node.extension)

    def test_spent(self) -> None:
        """Who has spent it all is told whose, how much of how much and until when; clients then stop."""
        node = self.node(time_zone="Asia/Tokyo")
        node.spend(100)
        refusal = self.refused(node, 1)
        self.assertEqual((429, "budget_spent"), (refusal.status, refusal.slug))
        self.assertEqual({"x-should-retry": "false"}, refusal.headers)
        self.assertEqual(
            "key 'default' has spent its budget: $0.0001 of $0.0001 for the month,"
            " which ends 2026-02-01 00:00 Asia/Tokyo",
            refusal.message,
        )

    def test_spent_for_ever(self) -> None:
        """A total has no end, so the words say whom to ask."""
        node = self.node(per="total")
        node.spend(100)
        self.clock.advance(4000 * DAY)
        refusal = self.refused(node, 1)
        self.assertIn("in all; ask whoever runs this gateway for more", refusal.message)

    def test_reserved(self) -> None:
        """What only requests that run hold back may be there in a moment."""
        node = self.node()
        running = node.ask(60)
        refusal = self.refused(node, 60)
        self.assertEqual((429, "budget_reserved"), (refusal.status, refusal.slug))
        self.assertEqual({"retry-after": "1"}, refusal.headers)
        self.assertIn("requests that still run ($0.00006)", refusal.message)
        node.end(running, cost_of(40))
        node.ask(60)

    def test_too_dear(self) -> None:
        """What may cost more than is left is refused for good, and said to be smaller."""
        node = self.node()
        node.spend(40)
        refusal = self.refused(node, 61)
        self.assertEqual((429, "budget_too_small"), (refusal.status, refusal.slug))
        self.assertEqual({"x-should-retry": "false"}, refusal.headers)
        self.assertIn("may cost $0.000061", refusal.message)
        self.assertIn("has $0.00006 left of its $0.0001 for the month", refusal.message)
        self.assertIn("lower max_tokens", refusal.message)
        node.ask(60)

    def test_refused_costs_nothing(self) -> None:
        """Who is refused has used nothing, also after the request's end."""
        node = self.node()
        refused = make_context(max_tokens=101, prices=(ROW,), started_at=JANUARY)
        self.assertRaises(Refused, node.extension.on_request, refused)
        node.end(refused, ended(reason="budget_too_small", cost=0))
        self.assertEqual((0, 0), node.used)

    def test_unknown_price(self) -> None:
        """A model of unknown price is refused with a status that clients do not retry, and what to do."""
        node = self.node()
        for prices in ((), (None,), (ROW, None)):
            refusal = self.refused(node, prices=prices, model="my model")
            self.assertEqual((403, "price_unknown"), (refusal.status, refusal.slug))
            self.assertEqual({"x-should-retry": "false"}, refusal.headers)
            self.assertIn('[models."my model"]', refusal.message)

    def test_unknown_is_free(self) -> None:
        """It may cost nothing; then it is let through when all is spent, and the known price counts."""
        node = self.node(unknown_price="free")
        self.assertEqual("budget_too_small", self.slug(node, 101, prices=(None, ROW)))
        node.spend(100)
        running = node.ask(10_000, prices=(None,))
        node.end(running, ended(Usage(output_tokens=10_000), attempt()))
        self.assertEqual((100, 0), node.used)

    def test_unknown_has_a_fallback(self) -> None:
        """It may cost what the settings say, before and after."""
        node = self.node(unknown_price="fallback", fallback={"input": 0.0, "output": 2.0})
        self.assertEqual("budget_too_small", self.slug(node, 51, prices=(None, ROW)))
        running = node.ask(50, prices=(None,))
        self.assertEqual((0, 100), node.used)
        node.end(running, ended(Usage(output_tokens=10), attempt()))
        self.assertEqual((20, 0), node.used)

    def test_whose(self) -> None:
        """Each key has its own; one that is named has another, and may inherit the rest."""
        node = self.node(keys={"rich": {"dollars": 10 * HUNDRED}, "daily": {"per": "day"}})
        node.spend(100)
        self.assertEqual("budget_spent", self.slug(node))
        node.spend(1000, principal="rich")
        node.spend(100, principal="daily")
        self.assertIn("key 'daily'", self.refused(node, principal="daily").message)
        self.clock.advance(DAY)
        node.ask(100, principal="daily")
        self.assertIn("key 'rich' has spent", self.refused(node, principal="rich").message)

    def test_named_only(self) -> None:
        """Without dollars for all only those that are named have a budget."""
        node = Node({"keys": {"poor": {"dollars": 0}}}, self.clock, self.storage)
        node.ask(10**9)
        node.ask(10**9, prices=(None,))
        self.assertEqual("budget_spent", self.slug(node, principal="poor"))

    def test_anybody(self) -> None:
        """Those without a key have one together."""
        node = self.node()
        node.spend(100, principal=None)
        self.assertIn("key 'anybody'", self.refused(node, principal=None).message)

    def test_counting_is_free(self) -> None:
        """What no vendor bills is let through, and costs nothing."""
        node = self.node()
        node.spend(100)
        node.end(node.ask(None, operation="messages.count_tokens"), ended(None, attempt()))
        self.assertEqual((100, 0), node.used)


class ReservationTests(BudgetCase):
    """What is reserved."""

    def test_the_dearest(self) -> None:
        """It is the dearest of the deployments that may answer, the prompt included."""
        node = self.node()
        node.ask(10, prices=(ROW, DEAR, ROW), body_bytes=40)
        self.assertEqual((0, 2 * 10 + 3 * 10), node.used)

    def test_dear_classes(self) -> None:
        """The prompt may all go into a cache, and the answer may all be thought."""
        row = ModelSettings(input=1, output=1, cache_write_1h=2, reasoning=3).row("model")
        node = self.node()
        node.ask(10, prices=(row,), body_bytes=40)
        self.assertEqual((0, 2 * 10 + 3 * 10), node.used)

    def test_no_bound(self) -> None:
        """Where the client sets no bound the settings do."""
        node = self.node(output_tokens=70)
        node.ask(None)
        self.assertEqual((0, 70), node.used)

    def test_zero(self) -> None:
        """A bound of zero is one."""
        node = self.node()
        node.ask(0, body_bytes=20)
        self.assertEqual((0, 5), node.used)

    @settings(deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 60), st.floats(0, 1), st.booleans()), max_size=60))
    def test_never_more(self, steps: list[tuple[int, float, bool]]) -> None:
        """Whatever is asked in whatever order, no more is ever spent or promised than there is."""
        clock = Clock()
        node = Node({"dollars": HUNDRED}, clock, MemoryStorage(None, FakeServices(clock)))
        running: list[Context] = []
        for tokens, part, end in steps:
            if end and running:
                context = running.pop(int(part * (len(running) - 1)))
                node.end(context, cost_of(int(part * (context.max_tokens or 0))))
            else:
                try:
                    running.append(node.ask(tokens))
                except Refused:
                    self.assertGreater(sum(node.used) + tokens, 100)
            if node.extension.state():
                self.assertLessEqual(sum(node.used), 100)
        self.assertEqual(len(running), len(node.extension._reservations))


class SettlementTests(BudgetCase):
    """What a request is charged in the end."""

    def charged(self, outcome: Outcome, reserved: int = 50, **context: Any) -> int:
        """Return the tokens that a request is charged for."""
        node = self.node()
        running = node.ask(reserved - 10, body_bytes=40, **context)
        self.assertEqual((0, reserved), node.used)
        node.end(running, outcome)
        node.end(running, outcome)
        spent, left = node.used
        self.assertEqual(0, left)
        return spent

    def test_counted(self) -> None:
        """What was counted is charged, once, also when it is more than was reserved."""
        self.assertEqual(7, self.charged(cost_of(7)))
        self.assertEqual(700, self.charged(cost_of(700)))

    def test_client_left_a_counted_stream(self) -> None:
        """A client that leaves after the last word on usage changes nothing."""
        counted = ended(
            Usage(output_tokens=3), attempt(), cost=3 * TOKEN, reason="client_left", bytes_out=999
        )
        self.assertEqual(3, self.charged(counted, stream=True))

    def test_broken_stream(self) -> None:
        """A stream that nobody counted is charged by the prompt and what was sent, within the reservation."""
        for bytes_out, tokens in ((0, 10), (40, 20), (4000, 50)):
            broken = ended(None, attempt(), reason="truncated", bytes_out=bytes_out)
            self.assertEqual(tokens, self.charged(broken, stream=True))

    def test_half_counted(self) -> None:
        """What is known of a stream that broke is charged, if it is more than the estimate."""
        partial = Usage(input_tokens=30, output_tokens=1, complete=False)
        for bytes_out, tokens in ((0, 31), (120, 40)):
            left = ended(partial, attempt(), cost=31 * TOKEN, reason="client_left", bytes_out=bytes_out)
            self.assertEqual(tokens, self.charged(left, stream=True))

    def test_given_up(self) -> None:
        """A plain request that was given up has been worked on in full, for all that is known."""
        for reason, error in (
            ("client_left", "cancelled"),
            ("head_timeout", "head_timeout"),
            ("connection_broken", "connection_broken"),
        ):
            self.assertEqual(50, self.charged(ended(None, attempt(None, error), reason=reason)))
        self.assertEqual(50, self.charged(ended(None, attempt(), reason="client_left", bytes_out=4)))

    def test_nobody_counts(self) -> None:
        """A whole plain answer of an upstream that counts nothing is charged by its length."""
        self.assertEqual(20, self.charged(ended(None, attempt(), bytes_out=40)))

    def test_not_billed(self) -> None:
        """Who was never asked, or did not want to, bills nothing."""
        for each in (
            attempt(529, "upstream_status"),
            attempt(400),
            attempt(200, "upstream_status"),
            attempt(None, "connect_failed"),
            attempt(None, "connect_timeout"),
            attempt(None, "no_connection_free"),
            attempt(401, "upstream_credential_rejected"),
        ):
            for stream in (True, False):
                self.assertEqual(
                    0, self.charged(ended(None, each, reason="x", bytes_out=400), stream=stream), each
                )

    def test_one_of_several(self) -> None:
        """It is enough that one of the attempts may have been billed."""
        several = (attempt(None, "head_timeout"), attempt(None, "connect_failed"))
        self.assertEqual(50, self.charged(ended(None, *several, reason="connect_failed")))

    def test_nothing_was_asked(self) -> None:
        """Another guard's refusal and a cached answer cost nothing."""
        self.assertEqual(0, self.charged(ended(cost=0, reason="rate_limited")))
        self.assertEqual(0, self.charged(ended(cost=0, bytes_out=4000)))

    def test_unknown_answerer(self) -> None:
        """A model that answered and has no price is charged as the dearest that might have."""
        usage = Usage(
            output_tokens=4, server_tool_calls={"dowsing": 1}, raw=b'{"iterations": [{"model": "x"}]}'
        )
        self.assertEqual(4, self.charged(ended(usage, attempt())))


class PeriodTests(BudgetCase):
    """Days and months."""

    def test_new_day(self) -> None:
        """A new day has its own; a request belongs to the day in which it began."""
        node = self.node(per="day")
        late = node.ask(100)
        self.clock.advance(DAY)
        node.ask(60)
        node.end(late, cost_of(90))
        self.assertEqual((0, 60), node.used)
        self.assertEqual(1, len(node.extension._leases._shares))

    def test_forgotten(self) -> None:
        """What ended is dropped, once nothing of it runs, also of keys that never ask again."""
        node = self.node(per="day")
        late = node.ask(100, principal="late")
        for name in "abc":
            node.spend(1, principal=name)
        self.clock.advance(DAY)
        node.spend(1, principal="new")
        self.assertEqual(["new"], [state.principal for state in node.extension.state()])
        self.assertEqual(2, len(node.extension._leases._shares))
        node.end(late, cost_of(1))
        self.assertEqual(1, len(node.extension._leases._shares))

    def test_state(self) -> None:
        """How budgets stand is told in whole numbers."""
        node = self.node(keys={"ever": {"per": "total"}})
        node.spend(30)
        node.ask(20)
        default, ever = node.extension.state()
        self.assertEqual(("default", "month", "2026-01", "UTC"), (default.principal, *default_words(default)))
        self.assertEqual(
            (100 * TOKEN, 30 * TOKEN, 20 * TOKEN, 50 * TOKEN),
            (default.budget, default.spent, default.reserved, default.left),
        )
        self.assertEqual((1_767_225_600, 1_769_904_000), (default.begins_at, default.ends_at))
        self.assertEqual(("ever", None, None), (ever.principal, ever.begins_at, ever.ends_at))


def default_words(state: Any) -> tuple[str, str, str]:
    """Return the words about a state's period."""
    return state.per, state.label, state.time_zone


class EndedTests(SynchronousTestCase):
    """Which boards nobody will ask for any more."""

    def test_is_over(self) -> None:
        """Those of days and months that have ended everywhere, and those that are no account's."""
        day = 20_000 * DAY  # 2024-10-04
        boards = {
            b"total - - a b": False,
            b"day 2024-10-04 UTC a": False,
            b"day 2024-10-03 UTC a": False,
            b"day 2024-10-02 UTC a": True,
            b"month 2024-10 UTC a": False,
            b"month 2024-09 UTC a": True,
            b"20000 nodes": True,
        }
        self.assertEqual(boards, {key: is_over(key, day) for key in boards})
        self.assertFalse(is_over(b"month 2024-09 UTC a", day - 3 * DAY))


class RestartTests(BudgetCase):
    """What a store remembers."""

    def test_stopped(self) -> None:
        """What was spent before a stop in order stays spent, and is known before anybody asks."""
        first = self.node()
        first.spend(70)
        self.stop(first)
        again = self.node()
        self.assertEqual((70, 0), again.used)
        self.assertEqual("budget_too_small", self.slug(again, 31))
        again.ask(30)

    def test_killed(self) -> None:
        """So does what was told, reservations included, before an end without a word."""
        killed = self.node()
        killed.spend(40)
        killed.ask(30)
        self.clock.advance(0.1)
        again = self.node()
        self.assertEqual((70, 0), again.used)
        again.spend(30)
        self.assertEqual("budget_spent", self.slug(again))

    def test_told_at_once(self) -> None:
        """What is more than half a block is told before the next beat."""
        killed = self.node()
        killed.ask(6)
        self.clock.advance(0)
        self.assertEqual((6, 0), self.node().used)

    def test_other_settings(self) -> None:
        """A budget by other clocks begins anew; the same one that is larger does not."""
        first = self.node()
        first.spend(70)
        self.stop(first)
        self.assertEqual([], self.node(time_zone="Asia/Tokyo").extension.state()[1:])
        self.assertEqual((0, 0), self.node(time_zone="Asia/Tokyo").used)
        self.assertEqual((70, 0), self.node(dollars=2 * HUNDRED).used)

    def test_odd_names(self) -> None:
        """Whatever a key is called, its account is its own."""
        first = self.node(per="day")
        for name in ("a b", "day 2026-01-09 UTC a", "\u00e9 "):
            first.spend(100, principal=name)
        self.stop(first)
        again = self.node(per="day")
        known = {state.principal for state in again.extension.state()}
        self.assertEqual({"a b", "day 2026-01-09 UTC a", "\u00e9 "}, known)
        again.spend(100, principal="a")

    def test_no_store(self) -> None:
        """Without a store there is no budget."""
        error = self.assertRaises(ConfigurationError, Node, {"dollars": 1}, self.clock, None)
        self.assertIn("needs a store", str(error))


class NodesTests(BudgetCase):
    """Several nodes on one store."""

    def setUp(self) -> None:
        """Have a store that is shared."""
        super().setUp()
        self.storage = SharedStorage(None, FakeServices(self.clock))

    def test_one_budget(self) -> None:
        """What one has spent the other cannot, when it has heard: with its first request, or in time."""
        one, other = self.node(keys={"named": {}}), self.node(keys={"named": {}})
        one.spend(100)
        one.spend(100, principal="named")
        self.clock.pump([0, REFRESH_SECONDS, 0.1])
        self.assertEqual("budget_spent", self.slug(other, principal="named"))
        other.ask(10)
        self.clock.advance(0)
        self.assertEqual("budget_spent", self.slug(other))

    def test_block(self) -> None:
        """One goes ahead of what the other has heard by a block, and then waits for the store, not long."""
        node = self.node()
        self.clock.advance(0.1)
        for _ in range(5):
            node.ask(2)
        refusal = self.refused(node, 2)
        self.assertEqual(("budget_reserved", {"retry-after": "1"}), (refusal.slug, refusal.headers))
        self.assertIn("the nodes of this gateway are telling each other", refusal.message)
        self.clock.advance(0.1)
        node.ask(2)

    def test_larger_than_a_block(self) -> None:
        """A single request may be larger than a block."""
        self.node().ask(90)

    def test_anothers_reservation(self) -> None:
        """What runs on another node is in the way for a moment only; on a dead one it counts as spent."""
        one, other = self.node(), self.node()
        self.clock.advance(0.2)
        one.ask(100)
        other.ask(0)
        self.clock.pump([0.1] * 3)
        self.assertEqual("budget_reserved", self.slug(other))
        one.extension._leases._looking.stop()
        self.clock.pump([1] * int(ALIVE_SECONDS + 2))
        self.assertEqual("budget_spent", self.slug(other))

    def test_given_back_elsewhere(self) -> None:
        """A node that only refuses hears of what another gives back."""
        one, other = self.node(), self.node()
        other.ask(0)
        self.clock.advance(0.2)
        running = one.ask(100)
        other.spend(0)
        self.clock.pump([0.1] * 3)
        self.assertEqual("budget_reserved", self.slug(other))
        self.clock.pump([0.1] * 3)
        one.end(running, cost_of(0))
        self.clock.pump([0.1] * 3)
        self.assertEqual("budget_reserved", self.slug(other))
        self.clock.pump([0.1] * 3)
        other.ask(10)

    def test_without_store(self) -> None:
        """While the store is gone each node goes on with its part of what is left, however long that is."""
        one, other = self.node(), self.node()
        one.spend(20)
        other.ask(0)
        self.clock.pump([0.1] * 30)
        self.storage.gone = True
        one.ask(5)
        self.clock.pump([0.5] * 60)
        self.assertEqual([], self.flushLoggedErrors())
        for node, part in ((one, 35), (other, 40)):
            self.assertEqual("store_unreachable", self.slug(node, part + 1))
            node.ask(part)
        self.storage.gone = False
        self.clock.pump([0.5] * 80)
        self.assertEqual("budget_reserved", self.slug(one, 1))

    def test_refuse_without_store(self) -> None:
        """Or it refuses, in clear words, and says when to ask again."""
        node = self.node(without_store="refuse")
        node.ask(1)
        self.storage.gone = True
        self.clock.pump([0.1] * 3)
        refusal = self.refused(node, 1)
        self.assertEqual((503, "store_unreachable"), (refusal.status, refusal.slug))
        self.assertEqual({"retry-after": "5"}, refusal.headers)
        self.assertIn("cannot reach its store", refusal.message)
        self.storage.gone = False
        self.clock.pump([0.5] * 3)
        node.ask(1)

    def test_lost(self) -> None:
        """A store that lost everything is told again, and nobody forgets what the others had used."""
        one, other = self.node(), self.node()
        one.spend(60)
        self.clock.pump([0.1] * 3)
        other.ask(0)
        self.clock.pump([0.1] * 3)
        self.successResultOf(self.storage.close())
        other.ask(1)
        self.clock.pump([0.1] * 3)
        self.assertEqual("budget_too_small", self.slug(other, 41))
        self.clock.advance(REFRESH_SECONDS)
        self.assertEqual((60, 1), self.node().used)

    @settings(deadline=None, max_examples=200)
    @given(
        st.integers(2, 3),
        st.lists(st.tuples(st.integers(0, 2), st.sampled_from("aaaet"), st.integers(0, 40)), max_size=80),
    )
    def test_bound(self, count: int, steps: list[tuple[int, str, int]]) -> None:
        """Together they never use more than the budget and, of all but one, a block or one larger request."""
        clock = Clock()
        storage = SharedStorage(None, FakeServices(clock))
        nodes = [Node({"dollars": HUNDRED}, clock, storage) for _ in range(count)]
        for node in nodes:
            self.successResultOf(node.extension.startService())
        running: list[tuple[Node, Context]] = []
        largest = 10
        for index, step, number in steps:
            node = nodes[index % count]
            if step == "a" and (context := admitted(node, number)):
                running.append((node, context))
                largest = max(largest, number)
            elif step == "e" and running:
                node, context = running.pop(number % len(running))
                node.end(context, cost_of(min(number, context.max_tokens or 0)))
            elif step == "t":
                clock.advance(number / 100)
            used = sum(a.lease.used for n in nodes for a in n.extension._accounts.values()) // TOKEN
            self.assertLessEqual(used, 100 + (count - 1) * largest)


def admitted(node: Node, tokens: int) -> Context | None:
    """Return the context of a request, None if it was refused."""
    try:
        return node.ask(tokens)
    except Refused:
        return None


class LeaseTests(SynchronousTestCase):
    """What a node takes for granted that the others know."""

    def test_less(self) -> None:
        """They may have heard of less as soon as it was said, whether or not that is known here."""
        lease = Lease()
        lease.used = 100
        lease.say()
        lease.was_heard()
        lease.used = 40
        lease.say()
        lease.used = 100
        self.assertEqual(60, lease.ahead)


class ChoicesTests(SynchronousTestCase):
    """Requests for several answers."""

    def test_each(self) -> None:
        """Each answer may be as long as the client's bound, so all of them are reserved."""
        clock = Clock()
        node = Node({"dollars": 20 * TOKEN / DOLLAR}, clock, MemoryStorage(None, FakeServices(clock)))
        node.ask(6, choices=3)
        self.assertEqual((0, 18), node.used)
        self.assertRaises(Refused, node.ask, 2, choices=2)


class OwnBudgetTests(SynchronousTestCase):
    """Keys that bring a budget of their own."""

    def setUp(self) -> None:
        """Have a node whose configuration gives nobody a budget."""
        self.clock = Clock()
        self.clock.advance(1_800_000_000)
        self.node = Node({}, self.clock, MemoryStorage(None, FakeServices(self.clock)))

    def test_own(self) -> None:
        """It holds although the configuration has none for all; a key without any is not bounded."""
        own = KeyBudgetSettings(dollars=20 * TOKEN / DOLLAR)
        self.node.spend(15, budget=own)
        self.assertRaises(Refused, self.node.ask, 15, budget=own)
        self.node.spend(1000, principal="other")

    def test_changed(self) -> None:
        """More money for a key counts at once, and what it has spent stays spent."""
        self.node.spend(15, budget=KeyBudgetSettings(dollars=20 * TOKEN / DOLLAR))
        more = KeyBudgetSettings(dollars=40 * TOKEN / DOLLAR)
        self.node.spend(15, budget=more)
        self.assertEqual((30, 0), self.node.used)
        self.assertRaises(Refused, self.node.ask, 15, budget=more)

    def test_another_period(self) -> None:
        """A budget by another period begins anew."""
        self.node.spend(15, budget=KeyBudgetSettings(dollars=20 * TOKEN / DOLLAR))
        self.node.spend(15, budget=KeyBudgetSettings(dollars=20 * TOKEN / DOLLAR, per="day"))
        self.assertEqual((15, 0), self.node.used)


class SettingsTests(SynchronousTestCase):
    """What the configuration may say."""

    def test_exact(self) -> None:
        """Dollars are what was written, to the last decimal."""
        for dollars, exact in (
            (0.07, 70_000_000_000),
            (1e-12, 1),
            (50.0, 50 * DOLLAR),
            (1e15, 10**15 * DOLLAR),
            (123456789.123456, 123_456_789_123_456_000_000),
        ):
            self.assertEqual(exact, picodollars(dollars))

    def test_complaints(self) -> None:
        """What cannot be is complained of, by its key."""
        for table, where, what in (
            ({"dollars": 1e-13}, "extensions.budget.dollars", "more decimals"),
            ({"dollars": -1.0}, "extensions.budget.dollars", "0 or more"),
            ({"dollars": nan}, "extensions.budget.dollars", "finite"),
            ({"dollars": 1, "time_zone": "Mars/Olympus"}, "extensions.budget.time_zone", "time zone"),
            ({"dollars": 1, "per": "week"}, "extensions.budget.per", "must be one of"),
            ({"dollars": 1, "output_tokens": 0}, "extensions.budget.output_tokens", "greater than 0"),
            ({"dollars": 1, "unknown_price": "fallback"}, "extensions.budget:", "need each other"),
            ({"dollars": 1, "fallback": {"input": 1, "output": 1}}, "extensions.budget:", "need each other"),
            ({"keys": {"a b": {"per": "day"}}}, "extensions.budget:", 'keys."a b" has no `dollars`'),
            ({"keys": {"a": {"dollars": 1e-13}}}, "extensions.budget.keys.a.dollars", "more decimals"),
            (
                {"dollars": 1, "unknown_price": "fallback", "fallback": {"input": 1e-9, "output": 1}},
                "extensions.budget:",
                "fallback: 1E-9 has more decimals",
            ),
        ):
            said = complaint(**table)
            self.assertTrue(said.startswith(where), said)
            self.assertIn(what, said)
