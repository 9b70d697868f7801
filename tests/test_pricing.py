"""Usage into money: the sums that others got wrong, and no rounding anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from crabtwist.dialects import anthropic, openai
from crabtwist.money import DOLLAR, PriceRow, in_dollars
from crabtwist.pricing import MOST_FOUND, ModelSettings, PriceBook, published, receipt, row_from
from crabtwist.values import NOTHING, Usage

#: Dollars per million tokens, as a vendor publishes them.
OPUS = row_from(
    "anthropic",
    "opus",
    {
        "input": Decimal(5),
        "output": Decimal(25),
        "cache_read": Decimal("0.5"),
        "cache_write_5m": Decimal("6.25"),
        "cache_write_1h": Decimal(10),
        "web_search_per_call": Decimal("0.01"),
    },
)
HAIKU = row_from("anthropic", "haiku", {"input": Decimal(1), "output": Decimal(5)})
LONG = row_from(
    "gemini",
    "long",
    {
        "input": Decimal("1.25"),
        "output": Decimal(10),
        "cache_read": Decimal("0.125"),
        "tier_above": 200_000,
        "tier_input": Decimal("2.5"),
        "tier_output": Decimal(15),
    },
)
BOOK = PriceBook([OPUS, HAIKU, LONG])


def dollars(usage: Usage, row: PriceRow | None = OPUS) -> Decimal:
    """Return what a usage costs, exactly."""
    return Decimal(receipt(usage, row, BOOK, "anthropic").total) / DOLLAR


def claude(**counts: Any) -> Usage:
    """Return Anthropic's counts as usage."""
    return anthropic.usage_from(counts, complete=True)


class SumsTests(SynchronousTestCase):
    """Sums that other gateways got wrong."""

    def test_cache_is_not_input(self) -> None:
        """Anthropic's input excludes what the cache gave and took; each has its own price, once."""
        usage = claude(
            input_tokens=100,
            cache_read_input_tokens=1_000_000,
            cache_creation_input_tokens=300,
            cache_creation={"ephemeral_5m_input_tokens": 100, "ephemeral_1h_input_tokens": 200},
            output_tokens=10,
        )
        expected = (
            Decimal("0.0005") + Decimal("0.5") + Decimal("0.000625") + Decimal("0.002") + Decimal("0.00025")
        )
        self.assertEqual(expected, dollars(usage))

    def test_cached_is_part_of_openais_input(self) -> None:
        """OpenAI's input includes the cached tokens: they are charged once, at the cache's price."""
        usage = openai.usage_from(
            {
                "prompt_tokens": 1000,
                "prompt_tokens_details": {"cached_tokens": 900},
                "completion_tokens": 100,
                "completion_tokens_details": {"reasoning_tokens": 60},
            }
        )
        row = row_from(
            "openai", "o", {"input": Decimal(2), "cache_read": Decimal("0.2"), "output": Decimal(8)}
        )
        self.assertEqual(Decimal("0.0002") + Decimal("0.00018") + Decimal("0.0008"), dollars(usage, row))

    def test_writes_that_do_not_add_up(self) -> None:
        """Where the parts fall short of the total (server tools), the rest is five minutes' writes."""
        usage = claude(cache_creation_input_tokens=1000, cache_creation={"ephemeral_1h_input_tokens": 400})
        self.assertEqual(Decimal("0.00375") + Decimal("0.004"), dollars(usage))

    def test_server_tools(self) -> None:
        """Searches are charged by the call; fetched pages are free."""
        usage = claude(input_tokens=1, server_tool_use={"web_search_requests": 3, "web_fetch_requests": 9})
        self.assertEqual(Decimal("0.000005") + Decimal("0.03"), dollars(usage))

    def test_iterations(self) -> None:
        """Each iteration is priced by the model that answered it."""
        usage = claude(
            input_tokens=30,
            output_tokens=30,
            iterations=[
                {"type": "message", "model": "opus", "input_tokens": 10, "output_tokens": 10},
                {"type": "fallback_message", "model": "haiku", "input_tokens": 20, "output_tokens": 20},
            ],
        )
        self.assertEqual(Decimal("0.0003") + Decimal("0.00012"), dollars(usage))

    def test_iteration_without_model(self) -> None:
        """One that names no model was the answer's own."""
        usage = claude(input_tokens=1, iterations=[{"type": "compaction", "input_tokens": 10}])
        self.assertEqual(Decimal("0.00005"), dollars(usage))

    def test_tiers(self) -> None:
        """Beyond the tier's size the whole request costs more, cached or not; up to it nothing does."""
        below = Usage(input_tokens=100_000, cache_read_tokens=100_000, output_tokens=1)
        above = Usage(input_tokens=100_000, cache_read_tokens=100_001, output_tokens=1)
        self.assertEqual(Decimal("0.125") + Decimal("0.0125") + Decimal("0.00001"), dollars(below, LONG))
        self.assertEqual(Decimal("0.25") + Decimal("0.012500125") + Decimal("0.000015"), dollars(above, LONG))

    def test_missing_classes(self) -> None:
        """A class without a price of its own costs what it is a kind of: never nothing."""
        usage = Usage(cache_read_tokens=1, cache_write_tokens=1, cache_write_1h_tokens=1, reasoning_tokens=1)
        self.assertEqual(Decimal("0.000008"), dollars(usage, HAIKU))

    def test_cheapest_token(self) -> None:
        """A cached token of a cheap model is a whole number of the unit."""
        row = row_from("v", "m", {"input": Decimal("0.035"), "output": 1, "cache_read": Decimal("0.00875")})
        self.assertEqual(8750, receipt(Usage(cache_read_tokens=1), row, BOOK, "v").total)


class ExactTests(SynchronousTestCase):
    """No rounding."""

    @given(st.lists(st.integers(0, 10**12), min_size=6, max_size=6))
    def test_no_rounding(self, counts: list[int]) -> None:
        """However large the counts, the total is the exact sum, in decimals, of the published prices."""
        names = ("input", "cache_read", "cache_write", "cache_write_1h", "output", "reasoning")
        usage = Usage(**dict(zip((f"{name}_tokens" for name in names), counts, strict=True)))  # type: ignore[arg-type] # counts only
        published_prices = map(Decimal, ("5", "0.5", "6.25", "10", "25", "25"))
        exact = sum(count * price / 10**6 for count, price in zip(counts, published_prices, strict=True))
        self.assertEqual(exact, dollars(usage))

    @given(st.lists(st.integers(0, 10**6), min_size=6, max_size=6), st.sampled_from([OPUS, HAIKU, LONG]))
    def test_cost_is_the_receipts(self, counts: list[int], row: PriceRow) -> None:
        """A cost that is worked out without a receipt is the receipt's total, tool calls or not."""
        calls: Mapping[str, int]
        for calls in (NOTHING, {"web_fetch_requests": 1}, {"web_search_requests": 2}):
            given_in, read, written, written_1h, out, thought = counts
            usage = Usage(given_in, read, written, written_1h, out, thought, calls)
            found, cost = BOOK.cost(usage, row.vendor, row.model, "")
            priced = receipt(usage, row, BOOK, row.vendor)
            self.assertIs(row, found)
            self.assertEqual(None if priced.unpriced else priced.total, cost)

    def test_lines(self) -> None:
        """A receipt shows each class that was used, at its price."""
        lines = receipt(claude(input_tokens=2, output_tokens=3), OPUS, BOOK, "anthropic").lines
        shown = [(line.what, line.count, line.price) for line in lines]
        self.assertEqual([("input", 2, 5_000_000), ("output", 3, 25_000_000)], shown)

    def test_shown(self) -> None:
        """Dollars are shown exactly, with two decimals at least."""
        for amount, shown in (
            (0, "$0.00"),
            (DOLLAR, "$1.00"),
            (1, "$0.000000000001"),
            (-DOLLAR // 2, "-$0.50"),
        ):
            self.assertEqual(shown, in_dollars(amount))


class UnknownTests(SynchronousTestCase):
    """Prices that nobody knows."""

    def test_unknown_model(self) -> None:
        """It is named, and nothing is made up."""
        priced = receipt(claude(input_tokens=1), None, BOOK, "anthropic")
        self.assertEqual((0, ("model",)), (priced.total, priced.unpriced))

    def test_unknown_tool(self) -> None:
        """So is a tool; the tokens beside it keep their price."""
        priced = receipt(claude(input_tokens=1, server_tool_use={"dig": 2}), OPUS, BOOK, "anthropic")
        self.assertEqual((5_000_000, ("dig",)), (priced.total, priced.unpriced))

    def test_unknown_iteration(self) -> None:
        """So is the model of an iteration."""
        usage = claude(iterations=[{"model": "sphinx", "input_tokens": 1}])
        self.assertEqual(("sphinx",), receipt(usage, OPUS, BOOK, "anthropic").unpriced)


class BookTests(SynchronousTestCase):
    """Which row is whose."""

    def test_published(self) -> None:
        """The shipped list has the vendors' models, none of them twice, every price whole."""
        rows = published()
        self.assertGreater(len(rows), 700)
        self.assertEqual(len(rows), len({(row.vendor, row.model) for row in rows}))
        book = PriceBook(rows)
        self.assertIsNotNone(book.find("anthropic", "claude-opus-4-8"))

    def test_dated(self) -> None:
        """A model's dated name is the same model."""
        for date in ("20251001", "2025-10-01"):
            self.assertIs(HAIKU, BOOK.find("anthropic", f"haiku-{date}"))
        for other in ("latest", "2025-10", "20251001-v1"):
            self.assertIsNone(BOOK.find("anthropic", f"haiku-{other}"))

    def test_asked_again(self) -> None:
        """An answer is the same each time, and a book remembers only names that may be real, and so many."""
        for _ in range(2):
            self.assertIs(HAIKU, BOOK.find("anthropic", "haiku-20251001"))
            self.assertIsNone(BOOK.find("anthropic", "sphinx"))
        book = PriceBook([OPUS])
        for number in range(MOST_FOUND * 2):
            book.find("anthropic", f"opus {number}")
        self.assertEqual(MOST_FOUND, book._found.cache_info().currsize)
        before = book._found.cache_info()
        self.assertIsNone(book.find("anthropic", "x" * 1000))
        self.assertEqual(before, book._found.cache_info())

    def test_other_vendors(self) -> None:
        """A vendor without a row of its own takes that of the others, if they agree."""
        dear = row_from("b", "shared", {"input": 2, "output": 2})
        cheap = row_from("a", "shared", {"input": 1, "output": 1})
        self.assertIs(cheap, PriceBook([cheap]).find("c", "shared"))
        self.assertIsNone(PriceBook([cheap, dear]).find("c", "shared"))
        self.assertIs(dear, PriceBook([cheap, dear]).find("b", "shared"))

    def test_overrides(self) -> None:
        """The configuration's own row wins, by the name that is served."""
        own = ModelSettings(input=0.1, output=0.2).row("mine")
        self.assertIs(own, PriceBook([OPUS], {"mine": own}).find("anthropic", "opus", "mine"))

    def test_too_fine(self) -> None:
        """A price that is no whole number of the unit is refused, in words."""
        self.assertEqual([], ModelSettings(input=0.000001, output=1).faults("m"))
        [fault] = ModelSettings(input=0.0000001, output=1).faults("m")
        self.assertIn("decimals", fault)

    def test_tier_of_no_size(self) -> None:
        """A price for long prompts is refused where nothing says what is long: it would never be charged."""
        [fault] = ModelSettings(input=1, output=1, tier_input=2).faults("m")
        self.assertIn("`tier_input` means nothing without `tier_above`", fault)

    def test_as_written(self) -> None:
        """What stands in the file is what is charged, binary fractions notwithstanding."""
        self.assertEqual(8750, ModelSettings(input=0.00875, output=1).row("m").rates.input)

    def test_raw_usage_is_enough(self) -> None:
        """A record's raw usage gives the same receipt again."""
        usage = claude(input_tokens=7, output_tokens=9, cache_read_input_tokens=11)
        again = claude(**json.loads(usage.raw))
        self.assertEqual(receipt(usage, OPUS, BOOK, "a"), receipt(again, OPUS, BOOK, "a"))
