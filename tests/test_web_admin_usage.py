"""The doors of sums: everybody's for administrators, one's own for keys."""

from __future__ import annotations

from datetime import date
from typing import Any

from twisted.internet.defer import Deferred, succeed

from crabtwist.extension import Extension
from crabtwist.extensions.budget import BudgetExtension, BudgetSettings
from crabtwist.keys import KeyRing, KeySettings
from crabtwist.records import Total
from crabtwist.settings import Secret
from crabtwist.storage.memory import MemoryStorage
from crabtwist.terms import KeyBudgetSettings
from crabtwist.testing import FakeServices
from tests.test_web import ALL, NOBODY, SOME
from tests.test_web_admin_requests import AUTHORIZED, InsideTestCase


class TotalsTests(InsideTestCase):
    """Everybody's sums."""

    def test_totals(self) -> None:
        """They are the ledger's, by what was asked for."""
        said = self.admin("usage?by=day,principal&since=2026-11-01&until=2026-12-01")
        self.assertEqual([(("day", "principal"), date(2026, 11, 1), date(2026, 12, 1))], self.ledger.asked)
        self.assertEqual(["day", "principal"], said.json["by"])
        first = said.json["totals"][0]
        self.assertEqual(
            ("key-all", 2, "0.000000000005"),
            tuple(first[name] for name in ("principal", "requests", "cost_dollars")),
        )
        self.assertIsNone(first["model"])

    def test_wrong(self) -> None:
        """What is no sum is refused by name."""
        for query, word in (("by=colour", "by"), ("since=yesterday", "since"), ("until=2026-13-01", "until")):
            said = self.admin(f"usage?{query}")
            self.assertEqual((400, "invalid_query"), said.refusal)
            self.assertIn(word, said.json["error"]["message"])


class Counting(Extension):
    """Counts without a ledger."""

    name = "usage"

    def totals(self, by: Any, since: Any = None, until: Any = None) -> Deferred[list[Total]]:
        """Return one total that says what it was asked."""
        return succeed([Total(principal="key-some", requests=len(by))])


class WithoutLedgerTests(InsideTestCase):
    """A gateway without a ledger whose usage is counted by the extension."""

    has_books = False
    extensions = (Counting(),)

    def test_totals(self) -> None:
        """The extension is asked in place of the ledger."""
        self.assertEqual(2, self.admin("usage?by=model,day").json["totals"][0]["requests"])
        self.assertEqual(1, self.ask("GET", "/v1/usage", SOME).json["totals"][0]["requests"])


class OwnTests(InsideTestCase):
    """A key's own sums."""

    def test_own(self) -> None:
        """A key sees what it used, and nothing of another."""
        said = self.ask("GET", "/v1/usage?by=model,day&since=2026-11-01", ALL)
        self.assertEqual([(("principal", "model", "day"), date(2026, 11, 1), None)], self.ledger.asked)
        self.assertEqual(("key-all", ["model", "day"]), (said.json["principal"], said.json["by"]))
        self.assertEqual([2], [total["requests"] for total in said.json["totals"]])
        self.assertNotIn(b"other", said.body)
        self.assertEqual([], self.ask("GET", "/v1/usage", SOME).json["totals"])

    def test_no_way_around(self) -> None:
        """It cannot ask by key, nor for a key."""
        for query in ("by=principal", "principal=other", "by=provider"):
            self.assertEqual(
                (400, "invalid_query"), self.ask("GET", f"/v1/usage?{query}", ALL).refusal, query
            )
        self.assertEqual(401, self.ask("GET", "/v1/usage", NOBODY).status)
        self.assertEqual(401, self.ask("GET", "/v1/usage", AUTHORIZED).status)

    def test_no_budget(self) -> None:
        """Where there is no budget it says so."""
        self.assertIsNone(self.ask("GET", "/v1/usage", ALL).json["budget"])
        self.assertEqual([], self.admin("budgets").json["budgets"])


class OpenTests(InsideTestCase):
    """A gateway that serves anybody."""

    keys = ()

    def test_nobody(self) -> None:
        """Nobody's use is told apart there, so it is not told to anybody."""
        self.assertEqual((404, "no_keys"), self.ask("GET", "/v1/usage", NOBODY).refusal)


class BudgetTests(InsideTestCase):
    """Budgets."""

    def setUp(self) -> None:
        services = FakeServices()
        services.storage = MemoryStorage(None, services)
        own = {"key-all": KeyBudgetSettings(dollars=1.5)}
        self.budget = BudgetExtension(BudgetSettings(keys=own), services)
        self.extensions = (self.budget,)
        super().setUp()
        self.successResultOf(self.budget.startService())
        self.addCleanup(lambda: self.successResultOf(self.budget.stopService()))

    def test_budgets(self) -> None:
        """Administrators see all, in exact dollars."""
        [shown] = self.admin("budgets").json["budgets"]
        self.assertEqual(
            ("key-all", "1.50", "1.50"),
            tuple(shown[name] for name in ("principal", "budget_dollars", "left_dollars")),
        )
        self.assertEqual(("0.00", "0.00"), (shown["spent_dollars"], shown["reserved_dollars"]))

    def test_brought(self) -> None:
        """A budget that a key brings with it is told before the key has asked for anything."""
        brought = KeySettings(name="ann", key=Secret("sk-ann"), budget=KeyBudgetSettings(dollars=2.0))
        self.gateway.keys = KeyRing([brought])
        told = [(each["principal"], each["left_dollars"]) for each in self.admin("budgets").json["budgets"]]
        self.assertEqual([("ann", "2.00"), ("key-all", "1.50")], told)

    def test_own(self) -> None:
        """A key sees its own, also before it has used it."""
        self.assertEqual("1.50", self.ask("GET", "/v1/usage", ALL).json["budget"]["left_dollars"])
        self.assertIsNone(self.ask("GET", "/v1/usage", SOME).json["budget"])
