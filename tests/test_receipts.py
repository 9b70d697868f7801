"""Receipts from records alone: what they say adds up to what was charged."""

from __future__ import annotations

import json
from typing import Any

import attrs
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from crabtwist.pricing import receipt, reserve_cost
from crabtwist.receipts import NOT_ITEMISED, receipt_of
from crabtwist.records import (
    LONGEST_RAW_USAGE,
    MOST_OTHER_MODELS,
    Record,
    Reservation,
    decode_record,
    encode,
    record_of,
)
from crabtwist.values import Usage
from tests.test_pricing import BOOK, HAIKU, LONG, OPUS, claude
from tests.test_records import context, outcome

COUNTS = st.integers(0, 300_000)
TOKENS = st.fixed_dictionaries(
    {},
    optional={
        "input_tokens": COUNTS,
        "cache_read_input_tokens": COUNTS,
        "cache_creation_input_tokens": COUNTS,
        "cache_creation": st.fixed_dictionaries(
            {}, optional={"ephemeral_5m_input_tokens": COUNTS, "ephemeral_1h_input_tokens": COUNTS}
        ),
        "output_tokens": COUNTS,
        "output_tokens_details": st.fixed_dictionaries({"thinking_tokens": COUNTS}),
    },
)
MODELS = st.sampled_from(["opus", "haiku", "haiku-20251001", "long", "sphinx", "", "\0"])
USAGES = st.builds(
    lambda tokens, iterations, tools: claude(
        **tokens,
        **({} if iterations is None else {"iterations": iterations}),
        server_tool_use=tools,
    ),
    TOKENS,
    st.none()
    | st.lists(st.builds(lambda tokens, model: {**tokens, "model": model}, TOKENS, MODELS), max_size=4),
    st.dictionaries(st.sampled_from(["web_search_requests", "web_fetch_requests", "dig"]), COUNTS),
)


def record(usage: Usage, served: str = "m", model: str = "opus") -> Record:
    """Return the record of a request that was answered with this usage, as a ledger gives it back."""
    price, cost = BOOK.cost(usage, "anthropic", model, served)
    ended = attrs.evolve(
        outcome(), usage=usage, price=price, cost=cost, other_prices=BOOK.named_in(usage, "anthropic")
    )
    return decode_record(encode(record_of(context(), ended)))


class ReceiptTests(SynchronousTestCase):
    """The arithmetic of a cost."""

    @settings(deadline=None)
    @given(USAGES, st.sampled_from(["opus", "haiku", "long", "sphinx"]))
    def test_adds_up(self, usage: Usage, model: str) -> None:
        """Whatever was used, the lines are those of the pricing, and the total is the cost of the record."""
        kept = record(usage, model=model)
        made = receipt_of(kept)
        self.assertEqual(receipt(usage, BOOK.find("anthropic", model), BOOK, "anthropic"), made)
        self.assertEqual(kept.cost, None if made.unpriced else made.total)

    def test_iterations(self) -> None:
        """Each iteration is priced by its own model, though no price list is asked."""
        parts: list[dict[str, Any]] = [
            {"model": "opus", "input_tokens": 10},
            {"model": "haiku", "input_tokens": 20},
            {"input_tokens": 30},
        ]
        made = receipt_of(record(claude(iterations=parts)))
        rates = [OPUS.rates.input, HAIKU.rates.input, OPUS.rates.input]
        self.assertEqual(
            list(zip(("opus", "haiku", "opus"), (10, 20, 30), rates, strict=True)),
            [(line.model, line.count, line.price) for line in made.lines],
        )

    def test_unpriced(self) -> None:
        """What has no price is named, and the rest has its lines."""
        made = receipt_of(record(claude(input_tokens=1, server_tool_use={"dig": 2})))
        self.assertEqual((("dig",), 5_000_000), (made.unpriced, made.total))
        self.assertEqual(("model",), receipt_of(record(claude(input_tokens=1), model="sphinx")).unpriced)

    def test_nothing_used(self) -> None:
        """Where nothing is known, or was used, there are no lines."""
        for cost in (None, 0):
            made = receipt_of(Record(id="1", cost=cost))
            self.assertEqual(((), (), 0), (made.lines, made.unpriced, made.total))

    def test_estimate(self) -> None:
        """An interrupted request's estimate is itemised as it was made: at the dearest rates."""
        for row, prompt, output in ((OPUS, 100, 50), (LONG, 200_001, 0), (HAIKU, 0, 7)):
            reservation = Reservation(
                id="1",
                prompt_tokens=prompt,
                max_completion_tokens=output,
                estimated_cost=reserve_cost(row, prompt, output),
                price_row=attrs.asdict(row),
            )
            kept = reservation.interrupted(5)
            made = receipt_of(kept)
            self.assertEqual((kept.cost, ()), (made.total, made.unpriced))
            self.assertEqual(prompt + output, sum(line.count for line in made.lines))
        self.assertEqual(("model",), receipt_of(Reservation(id="1", prompt_tokens=1).interrupted(5)).unpriced)


class NoRoomTests(SynchronousTestCase):
    """Records that have lost something."""

    def assert_not_itemised(self, kept: Record) -> None:
        """Check that the receipt says so, and still says what it cost."""
        assert kept.cost
        [line] = receipt_of(kept).lines
        self.assertEqual((NOT_ITEMISED, kept.cost), (line.what, line.amount))

    def test_raw_too_long(self) -> None:
        """Without the vendor's own usage a receipt does not make up its iterations."""
        parts: list[dict[str, Any]] = [
            {"model": "haiku", "input_tokens": 20, "x": "x" * LONGEST_RAW_USAGE},
        ]
        self.assert_not_itemised(record(claude(input_tokens=1, iterations=parts)))

    def test_too_many_models(self) -> None:
        """A record keeps the prices of so many models and no more."""
        names = [f"haiku-{number:08}" for number in range(MOST_OTHER_MODELS + 1)]
        kept = record(claude(iterations=[{"model": name, "input_tokens": 1} for name in names]))
        self.assertEqual(MOST_OTHER_MODELS, len(kept.other_price_rows))
        self.assert_not_itemised(kept)
        self.assertLess(len(encode(kept)), 10_000)

    def test_unreadable_row(self) -> None:
        """Nor does a row that is none break it."""
        data = json.loads(encode(record(claude(input_tokens=1))))
        self.assert_not_itemised(decode_record(json.dumps({**data, "price_row": {"vendor": 7}}).encode()))
