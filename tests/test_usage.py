"""Totals by key, model, provider and day."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, date, datetime
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.application.service import IService
from twisted.internet.defer import Deferred, fail
from twisted.internet.task import Clock
from twisted.logger import capturedLogs
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from crabtwist.errors import Refusal, StorageError
from crabtwist.extensions import usage
from crabtwist.extensions.usage import UsageExtension, UsageSettings
from crabtwist.extensions.usage_rows import (
    SUMS,
    Days,
    Row,
    added,
    fold_oldest,
    read_note,
    read_place,
    write_note,
    write_place,
)
from crabtwist.interfaces import IExtension
from crabtwist.leases import REFRESH_SECONDS
from crabtwist.money import DOLLAR
from crabtwist.records import Total
from crabtwist.storage.memory import MemoryStorage
from crabtwist.testing import FakeServices, make_context
from crabtwist.values import Outcome, Usage

NOON = datetime(2026, 11, 1, 12, tzinfo=UTC).timestamp()
DAY_SECONDS = 86400.0
FIRST, SECOND, THIRD = date(2026, 11, 1), date(2026, 11, 2), date(2026, 11, 3)
HUGE = 10**30

USAGE = Usage(
    input_tokens=1,
    cache_read_tokens=2,
    cache_write_tokens=3,
    cache_write_1h_tokens=4,
    output_tokens=5,
    reasoning_tokens=6,
)


def outcome(cost: int | None = 7, usage: Usage | None = USAGE, *, cached: bool = False) -> Outcome:
    """Return how some request ended."""
    return Outcome(
        200, "upstream", "complete", None, usage, (), None, 0.1, 1.0, 1, 1, cache_hit=cached, cost=cost
    )


class SharedStorage(MemoryStorage):
    """A store that several nodes see; it may be gone."""

    between_nodes = True
    gone = False

    def post(
        self, namespace: str, member: bytes, notes: Mapping[bytes, bytes], ttl_seconds: float | None = None
    ) -> Deferred[dict[bytes, dict[bytes, bytes]]]:
        """Count how many notes are posted, or fail."""
        self.posted = getattr(self, "posted", 0) + len(notes)
        return (
            fail(StorageError("gone")) if self.gone else super().post(namespace, member, notes, ttl_seconds)
        )

    def boards(self, namespace: str) -> Deferred[dict[bytes, dict[bytes, bytes]]]:
        """Return them, or fail."""
        return fail(StorageError("gone")) if self.gone else super().boards(namespace)


class UsageTestCase(SynchronousTestCase):
    """Nodes that count on one store, by one clock, which stands at noon of a first of November."""

    def setUp(self) -> None:
        """Have a store."""
        self.clock = Clock()
        self.clock.advance(NOON)
        self.services = FakeServices(self.clock)
        self.storage = self.services.storage = SharedStorage(None, self.services)

    def start(self, **settings: Any) -> UsageExtension:
        """Start a node."""
        node = UsageExtension(UsageSettings(**settings), self.services)
        self.successResultOf(node.startService())
        return node

    def stop(self, node: UsageExtension) -> None:
        """Stop one, with whatever it has to say."""
        self.successResultOf(node.stopService())

    def count(self, node: UsageExtension, ended: Outcome | None = None, **context: Any) -> None:
        """Let a request end."""
        named = {"provider": "p", "model": "m", "started_at": self.clock.seconds(), **context}
        node.on_end(make_context(**named), ended or outcome())

    def pass_time(self, seconds: float) -> None:
        """Let time pass as it does."""
        for _ in range(int(seconds)):
            self.clock.advance(1)
        self.clock.advance(0.5)

    def next_day(self) -> None:
        """Let it be noon of the next day, with nobody's timers late."""
        self.clock.advance(DAY_SECONDS - 200)
        self.pass_time(200)

    def totals(self, node: UsageExtension, *by: str, **days: date) -> list[Total]:
        """Return the totals."""
        found = node.totals(by, **days)
        while not found.called:
            self.clock.advance(0)
        return self.successResultOf(found)

    def requests(self, node: UsageExtension, *by: str, **days: date) -> list[tuple[Any, ...]]:
        """Return how many requests there are, with what they are by."""
        return [
            (*(getattr(total, name) for name in by), total.requests)
            for total in self.totals(node, *by, **days)
        ]


class CountingTests(UsageTestCase):
    """What one node counts."""

    def test_contract(self) -> None:
        """It is an extension, and a service."""
        node = self.start()
        verifyObject(IExtension, node)
        verifyObject(IService, node)

    def test_sums(self) -> None:
        """Everything is summed up, and what has no price is counted as such."""
        node = self.start()
        self.count(node)
        self.count(node, outcome(cost=None))
        self.count(node, outcome(cost=None, usage=None))
        [total] = self.totals(node)
        self.assertEqual(Total(None, None, None, None, 3, 2, 0, 2, 4, 6, 8, 10, 12, 7), total)

    def test_nothing(self) -> None:
        """Where nothing was asked there is no total."""
        self.assertEqual([], self.totals(self.start()))

    def test_groups(self) -> None:
        """Totals are by what is asked for, in the order of that."""
        node = self.start()
        for principal, model, provider in (
            ("b", "m", "p"),
            ("a", "m", "p"),
            ("a", "n", "q"),
            ("a", "m", "p"),
        ):
            self.count(node, principal=principal, model=model, provider=provider)
        self.assertEqual([("a", 3), ("b", 1)], self.requests(node, "principal"))
        self.assertEqual([("m", "p", 3), ("n", "q", 1)], self.requests(node, "model", "provider"))
        self.assertEqual(
            [("a", "m", 2), ("a", "n", 1), ("b", "m", 1)], self.requests(node, "principal", "model")
        )
        self.assertEqual([(FIRST, 4)], self.requests(node, "day"))
        error = self.failureResultOf(node.totals(["colour"]), ValueError)
        self.assertIn("principal, model, provider, day", error.getErrorMessage())

    def test_days(self) -> None:
        """A request counts on the day when it came, and days can be chosen."""
        node = self.start()
        self.count(node)
        came_at = self.clock.seconds()
        self.next_day()
        self.count(node)
        self.count(node, started_at=came_at)
        self.assertEqual([(FIRST, 2), (SECOND, 1)], self.requests(node, "day"))
        self.assertEqual([(2,)], self.requests(node, until=SECOND))
        self.assertEqual([(1,)], self.requests(node, since=SECOND, until=THIRD))

    def test_made_up_names(self) -> None:
        """A model that nobody was asked for has no row, for clients make up names; a cache's has."""
        node = self.start()
        for number in range(9):
            self.count(node, provider="", model=f"made-up-{number}")
        self.count(node, outcome(cached=True), provider="", model="cached")
        self.count(node, principal=None)
        self.assertEqual([("", 9), ("cached", 1), ("m", 1)], self.requests(node, "model"))
        self.assertEqual([("", 1), ("default", 10)], self.requests(node, "principal"))

    def test_exact(self) -> None:
        """Sums beyond what machines count in are exact, in memory and from the store."""
        node = self.start()
        for _ in range(3):
            self.count(node, outcome(HUGE + 1, Usage(input_tokens=2**64 + 1)))
        self.stop(node)
        for each in (node, self.start()):
            [total] = self.totals(each)
            self.assertEqual((3 * HUGE + 3, 3 * 2**64 + 3), (total.cost, total.input_tokens))


class SharingTests(UsageTestCase):
    """What several nodes count, and former lives of one."""

    def test_restart(self) -> None:
        """A stop takes nothing away, nor does another start."""
        for life in range(1, 4):
            node = self.start()
            self.count(node)
            self.count(node, principal="other")
            self.assertEqual([("default", life), ("other", life)], self.requests(node, "principal"))
            self.stop(node)
        self.assertEqual([(6,)], self.requests(self.start()))

    def test_kill(self) -> None:
        """A crash takes away what was not told in the last moment, and no more."""
        node = self.start()
        self.count(node)
        self.clock.advance(0.1)
        self.clock.advance(0.1)
        self.count(node)
        self.assertEqual([(1,)], self.requests(self.start()))

    def test_two_nodes(self) -> None:
        """Each knows the sums of both, also of rows that it has none of itself."""
        one, other = self.start(), self.start()
        for _ in range(3):
            self.count(one)
        self.count(other)
        self.count(other, principal="other")
        self.pass_time(1)
        for node in (one, other):
            self.assertEqual([("default", 4), ("other", 1)], self.requests(node, "principal"))

    def test_alone(self) -> None:
        """A store of one node's own is read at the start, and not again."""
        self.storage.between_nodes = False
        self.count(node := self.start())
        self.stop(node)
        node = self.start()
        self.storage.gone = True
        self.assertEqual([(1,)], self.requests(node))

    def test_store_gone(self) -> None:
        """Without the store a node goes on counting, shows what it knows, and tells when it is back."""
        one, other = self.start(), self.start()
        self.count(one)
        self.pass_time(1)
        self.storage.gone = True
        self.count(one)
        self.pass_time(5)
        self.assertEqual([(2,)], self.requests(one))
        self.assertEqual([], self.requests(other))
        self.storage.gone = False
        self.pass_time(5)
        self.assertEqual([(2,)], self.requests(other))

    def test_store_empty(self) -> None:
        """A store that lost everything is told today's rows again."""
        one, other = self.start(), self.start()
        self.count(one)
        self.pass_time(2 * REFRESH_SECONDS + 5)
        self.successResultOf(self.storage.close())
        self.pass_time(REFRESH_SECONDS + 5)
        self.assertEqual([(1,)], self.requests(other))

    def test_unreadable(self) -> None:
        """What is no row and no note is passed over, and the log knows of the note."""
        self.storage.post("usage", b"x", {b"nodes 7": b"1", write_place(FIRST, ("k", "m", "p")): b"nonsense"})
        with capturedLogs() as logged:
            node = self.start()
        self.count(node)
        self.assertEqual([("default", 1)], self.requests(node, "principal"))
        self.assertTrue(any(event.get("note") == b"nonsense" for event in logged))


class DaysTests(UsageTestCase):
    """What becomes of days that are over."""

    def test_left(self) -> None:
        """Rows of a day that is over are told no more, so the work is that of today's."""
        node = self.start()
        for number in range(20):
            self.count(node, principal=f"k{number}")
        self.next_day()
        posted = self.storage.posted
        self.pass_time(3 * REFRESH_SECONDS)
        # Heartbeats go on.
        self.assertLess(self.storage.posted - posted, 20 + 90)
        self.assertEqual(20, len(self.requests(node, "principal")))

    def test_late(self) -> None:
        """A request that ends on the next day adds to the row that was left, and all hear of it."""
        one, other = self.start(), self.start()
        came_at = self.clock.seconds()
        self.count(one)
        self.count(other)
        self.next_day()
        self.count(one, started_at=came_at)
        self.pass_time(1)
        for node in (one, other, self.start()):
            self.assertEqual([(FIRST, 3)], self.requests(node, "day"))

    def test_closed(self) -> None:
        """Days long over are kept as sums, once; what is late beyond reason counts on the first open day."""
        one, other = self.start(), self.start()
        came_at = self.clock.seconds()
        for _ in range(4):
            self.count(one)
            self.count(other)
            self.next_day()
        self.count(one, started_at=came_at)
        expected = [2, 2, 3, 2]
        self.pass_time(1)
        for node in (one, other, self.start()):
            for _ in range(2):
                self.assertEqual(expected, [total.requests for total in self.totals(node, "day")])
        self.assertLessEqual(len(one._own), 2)

    def test_closed_alone(self) -> None:
        """Likewise where the store is not read again."""
        self.storage.between_nodes = False
        self.count(former := self.start())
        self.stop(former)
        node = self.start()
        for _ in range(4):
            self.count(node)
            self.next_day()
        self.count(node)
        self.assertEqual([2, 1, 1, 1, 1], [total.requests for total in self.totals(node, "day")])

    def test_closed_meanwhile(self) -> None:
        """A day that is closed while the store is read is counted once all the same."""
        self.patch(usage, "ROWS_AT_ONCE", 1)
        node = self.start()
        for _ in range(2):
            self.count(node)
            self.next_day()
        self.assertIn(FIRST, node._own)
        reading = node.totals(["day"])
        self.count(node)
        self.assertNotIn(FIRST, node._own)
        self.clock.pump([0] * 99)
        self.assertEqual([1] * 3, [total.requests for total in self.successResultOf(reading)])

    def test_untold(self) -> None:
        """A day that the store was not told stays this node's own until it is."""
        node = self.start()
        self.count(node)
        self.storage.gone = True
        for _ in range(3):
            self.count(node, principal="later")
            self.next_day()
        self.storage.gone = False
        self.count(node)
        self.pass_time(REFRESH_SECONDS * 3)
        self.assertEqual([2, 1, 1, 1], [total.requests for total in self.totals(node, "day")])
        self.assertEqual([2, 1, 1, 1], [total.requests for total in self.totals(self.start(), "day")])

    def test_keep_days(self) -> None:
        """What is older is not shown, nor remembered, nor kept by the store."""
        node = self.start(keep_days=2)
        for _ in range(6):
            self.count(node)
            self.next_day()
        self.count(node)
        self.pass_time(1)
        for each in (node, self.start(keep_days=2)):
            self.assertEqual(3, len(self.totals(each, "day")))
            self.assertLessEqual(len(each._heard), 3)
        boards = self.successResultOf(self.storage.boards("usage"))
        self.assertLessEqual(len([key for key in boards if read_place(key)]), 4)


class AnyOrderTests(UsageTestCase):
    """Whatever happens, in whatever order."""

    steps = st.lists(
        st.tuples(
            st.sampled_from(["count", "late", "moment", "day", "restart", "read", "gone", "back"]),
            st.integers(0, 2),
        ),
        max_size=60,
    )

    @given(steps)
    @settings(deadline=None, max_examples=60)
    def test_exact(self, steps: list[tuple[str, int]]) -> None:
        """Nodes that restart, days that pass and a store that comes and goes: every request counts once."""
        self.setUp()
        nodes, asked = [self.start() for _ in range(3)], 0
        for what, number in steps:
            if what in ("count", "late"):
                late_seconds = DAY_SECONDS * 0.7 * (what == "late")
                self.count(nodes[number], started_at=self.clock.seconds() - late_seconds)
                asked += 1
            elif what == "restart" and not self.storage.gone:
                self.stop(nodes[number])
                nodes[number] = self.start()
            else:
                self.happen(what, nodes[number])
        self.storage.gone = False
        self.pass_time(REFRESH_SECONDS + 5)
        for node in (*nodes, self.start()):
            self.assertEqual(asked, sum(count for (count,) in self.requests(node)))

    def happen(self, what: str, node: UsageExtension) -> None:
        """Let something happen that takes nothing away."""
        if what == "moment":
            self.pass_time(1)
        elif what == "day":
            self.clock.advance(DAY_SECONDS - 70)
            self.pass_time(70)
        elif what in ("gone", "back"):
            self.storage.gone = what == "gone"
        elif what == "read":
            self.totals(node)


class BoundTests(UsageTestCase):
    """How much is kept at most."""

    def test_max_rows(self) -> None:
        """What needs a row too many is counted under (other), with its provider; known rows go on."""
        node = self.start(max_rows=3)
        for _ in range(2):
            for number in range(6):
                self.count(node, principal=f"k{number}", provider=f"p{number % 2}")
        rows = self.requests(node, "principal", "model", "provider")
        others = [("(other)", "(other)", "p0", 2), ("(other)", "(other)", "p1", 4)]
        self.assertEqual([*others, *((f"k{n}", "m", f"p{n % 2}", 2) for n in range(3))], rows)
        self.assertEqual([("p0", 6), ("p1", 6)], self.requests(node, "provider"))

    def test_new_day(self) -> None:
        """Another day has room again once the rows of the days before are told."""
        node = self.start(max_rows=2)
        for principal in ("a", "b", "c"):
            self.count(node, principal=principal)
        for _ in range(2):
            self.next_day()
        self.count(node, principal="c")
        self.assertEqual([("c", 1)], self.requests(node, "principal", since=SECOND))

    def test_fold(self) -> None:
        """Of the oldest days beyond it the sums by provider stay, and the store keeps the rest."""
        node = self.start(max_rows=5)
        for _ in range(4):
            for principal in ("a", "b"):
                self.count(node, principal=principal)
            self.next_day()
        self.assertEqual(
            [("(other)", 4), ("a", 2), ("b", 2)], self.requests(self.start(max_rows=6), "principal")
        )
        self.assertEqual([(day, 2) for day in (FIRST, SECOND, THIRD)], self.requests(node, "day")[:3])
        self.assertEqual([("a", 4), ("b", 4)], self.requests(self.start(), "principal"))

    def test_logged(self) -> None:
        """The log says so, once a day."""
        node = self.start(max_rows=1)
        with capturedLogs() as logged:
            for principal in ("a", "b", "c"):
                self.count(node, principal=principal)
        self.assertEqual(["2026-11-01"], [event["day"] for event in logged if "max_rows" in event])

    def test_many_rows(self) -> None:
        """Whoever else waits for the reactor has a turn while many rows are read and summed up."""
        notes = {write_place(FIRST, (f"k{n}", "m", "p")): write_note([1] * len(SUMS)) for n in range(3000)}
        self.storage.post("usage", b"x", notes)
        node = UsageExtension(UsageSettings(), self.services)
        starting = node.startService()
        self.assertNoResult(starting)
        self.clock.pump([0] * 4)
        self.successResultOf(starting)
        totals = node.totals(["day"])
        self.assertNoResult(totals)
        self.clock.pump([0] * 9)
        self.assertEqual(3000, self.successResultOf(totals)[0].requests)


class ShownTests(UsageTestCase):
    """What an administrator sees."""

    def show(self, node: UsageExtension, **query: str) -> Any:
        """Return what is shown."""
        return self.successResultOf(Deferred.fromCoroutine(node.admin_routes()["totals"](query)))

    def test_shown(self) -> None:
        """Dollars are exact, names and days are texts, and what is not asked for is not there."""
        node = self.start()
        self.count(node, outcome(2 * DOLLAR + 12_500_000))
        shown = self.show(node, by="day,principal", since="2026-11-01", until="2026-11-02")
        [total] = shown["totals"]
        self.assertEqual(("2.0000125", "2026-11-01"), (total["cost_dollars"], total["day"]))
        self.assertEqual(
            ("default", 1, 6), (total["principal"], total["requests"], total["reasoning_tokens"])
        )
        self.assertFalse({"cost", "model", "provider"} & set(total))
        self.assertEqual([], self.show(node, until="2026-11-01")["totals"])

    def test_current(self) -> None:
        """It says whether the other nodes could be asked."""
        node = self.start()
        self.assertTrue(self.show(node)["current"])
        self.storage.gone = True
        self.assertFalse(self.show(node)["current"])

    def test_wrong(self) -> None:
        """A query that makes no sense is told why."""
        node = self.start()
        for query in (
            {"by": "colour"},
            {"since": "yesterday"},
            {"until": "2026-13-01"},
            {"untill": "2026-11-01"},
        ):
            refusal = self.failureResultOf(
                Deferred.fromCoroutine(node.admin_routes()["totals"](query)), Refusal
            ).value
            self.assertEqual((400, "invalid_query"), (refusal.status, refusal.slug), query)


class RowTests(SynchronousTestCase):
    """Rows, as they are written down."""

    @given(st.lists(st.integers(0, HUGE), min_size=len(SUMS), max_size=len(SUMS)))
    @settings(deadline=None)
    def test_notes(self, sums: list[int]) -> None:
        """A note says all sums, exactly."""
        self.assertEqual(sums, read_note(write_note(sums)))

    def test_unknown_members(self) -> None:
        """What a later version says besides is passed over, and what it does not say is nothing."""
        self.assertEqual(1, sum(read_note(b'{"requests":1,"colours":2}')))
        for note in (b"", b"[]", b'{"requests":"1"}', b'{"requests":1.5}', b"\xff", b'{"\xff":1}'):
            self.assertRaises(ValueError, read_note, note)

    @given(st.tuples(*[st.text(max_size=9)] * 3))
    @settings(deadline=None)
    def test_places(self, who: tuple[str, str, str]) -> None:
        """Each row has a board of its own, whatever its names are."""
        self.assertEqual((FIRST, who), read_place(write_place(FIRST, who)))

    def test_other_boards(self) -> None:
        """What is no row's board is known as such."""
        for key in (
            b"nodes",
            b"20000 nodes",
            b"[]",
            b'["x","a","b","c"]',
            b"7",
            b"\xff",
            b'["\xff","a","b","c"]',
        ):
            self.assertIsNone(read_place(key))

    def test_fold(self) -> None:
        """The oldest days are folded as far as need be, never those still open, and nothing is lost."""
        ones = [1] * len(SUMS)
        for most, left in ((6, [2, 2, 2]), (5, [1, 2, 2]), (3, [1, 1, 2]), (0, [1, 1, 2])):
            rows = {("a", "m", "p"): ones, ("b", "m", "p"): ones}
            days: Days = {day: dict(rows) for day in (THIRD, FIRST, SECOND)}
            self.assertEqual(most < 6, fold_oldest(days, THIRD, most))
            self.assertEqual(left, [len(days[day]) for day in (FIRST, SECOND, THIRD)])
            self.assertEqual([6] * len(SUMS), added(sums for each in days.values() for sums in each.values()))
            self.assertFalse(fold_oldest(days, THIRD, most))

    def test_settled(self) -> None:
        """A row is settled when the same was heard twice and nothing came since; joining begins that anew."""
        settled: list[bool] = []
        row = Row(FIRST, ("k", "m", "p"), 1.0, lambda row, _others: settled.append(row.is_settled))
        for _ in range(2):
            row.begin()
            row.hear({})
            for _ in range(3):
                row.note()
                row.hear({})
            row.sums[0] += 1
            row.hear({})
        self.assertEqual([False, True, True, False] * 2, settled)
