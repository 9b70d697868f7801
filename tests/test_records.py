"""What is kept of a request, and what becomes of it as JSON."""

from __future__ import annotations

import attrs
import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from crabtwist.money import PriceRow, Rates
from crabtwist.records import (
    LONGEST_RAW_USAGE,
    LONGEST_TEXT,
    MOST_TOOLS,
    Record,
    decode_record,
    decode_reservation,
    encode,
    record_of,
    reservation_of,
)
from crabtwist.values import Attempt, Context, Outcome, Usage

PRICE = PriceRow(
    "acme", "large-1", Rates(3, 1, 4, 6, 15, 15), 200_000, Rates(6, 2, 8, 12, 30, 30), {"search": 7}
)
USAGE = Usage(1, 2, 3, 4, 5, 6, {"search": 2}, b'{"input_tokens": 1}', complete=False)


def context() -> Context:
    return Context(
        request_id="req_1",
        operation="messages",
        dialect="anthropic",
        model_asked="fast",
        model="large",
        principal="alice",
        stream=True,
        started_at=1_700_000_000.25,
        provider="acme",
        upstream_model="large-1",
    )


def outcome() -> Outcome:
    return Outcome(
        status=200,
        ended_by="upstream",
        reason="complete",
        message=None,
        usage=USAGE,
        attempts=(
            Attempt("other", "large-0", 529, "upstream_status", 0.001, 0.2),
            Attempt("acme", "large-1", 200, None, 0.3, 0.125),
        ),
        model_answered="large-1-20260101",
        first_byte_seconds=0.5,
        duration_seconds=2.000001,
        bytes_in=100,
        bytes_out=2000,
        cost=10**30,
        price=PRICE,
    )


class TestRecord(SynchronousTestCase):
    def test_context(self) -> None:
        """Everything that the context knows is in the record."""
        record, known = record_of(context(), outcome()), attrs.asdict(context())
        for theirs, ours in {
            "request_id": "id",
            "started_at": "",
            "max_tokens": "",
            "choices": "",
            "body_bytes": "",
            "answer_headers": "",
            "query": "",
            "headers": "",
            "prices": "",
            "limits": "",
            "budget": "",
        }.items():
            value = known.pop(theirs)
            if ours:
                self.assertEqual(getattr(record, ours), value)
        for name, value in known.items():
            self.assertEqual(getattr(record, name), value, name)

    def test_outcome(self) -> None:
        """Everything that the outcome knows is in the record, under its own name."""
        record, known = record_of(context(), outcome()), attrs.asdict(outcome(), recurse=False)
        for other in ("usage", "attempts", "first_byte_seconds", "duration_seconds", "price"):
            known.pop(other)
        for name, value in known.items():
            self.assertEqual(getattr(record, name), value, name)
        attempts = tuple(Attempt(**msgspec.structs.asdict(attempt)) for attempt in record.attempts)
        self.assertEqual(attempts, outcome().attempts)

    def test_times(self) -> None:
        """Times are Unix time in whole microseconds."""
        record = record_of(context(), outcome())
        self.assertEqual(record.accepted_at, 1_700_000_000_250_000)
        self.assertEqual(record.first_byte_at, 1_700_000_000_750_000)
        self.assertEqual(record.ended_at, 1_700_000_002_250_001)

    def test_no_first_byte(self) -> None:
        """A request without a body, usage or price has none in its record either."""
        bare = attrs.evolve(outcome(), first_byte_seconds=None, usage=None, cost=None, price=None)
        record = record_of(context(), bare)
        self.assertEqual(
            [record.first_byte_at, record.usage, record.cost, record.price_row, record.price], [None] * 5
        )

    def test_receipt(self) -> None:
        """Usage and price come back from JSON as the values that a receipt is made from."""
        record = decode_record(encode(record_of(context(), outcome())))
        assert record.usage is not None
        self.assertEqual((record.usage.values, record.price), (USAGE, PRICE))

    def test_peers_texts(self) -> None:
        """What a peer makes long is cut, and what no store can hold is replaced."""
        asked = attrs.evolve(context(), model_asked="m" * 9999, model="a\0b\ud800")
        calls = {f"tool {number}": 1 for number in range(1000)}
        usage = attrs.evolve(USAGE, raw=b"1" * (LONGEST_RAW_USAGE + 1), server_tool_calls=calls)
        record = record_of(asked, attrs.evolve(outcome(), message="\0" * 9999, usage=usage))
        assert record.usage is not None
        self.assertEqual((record.model_asked, record.model), ("m" * LONGEST_TEXT, "a\ufffdb?"))
        self.assertEqual(record.message, "\ufffd" * LONGEST_TEXT)
        self.assertEqual((record.usage.raw, len(record.usage.server_tool_calls)), ("", MOST_TOOLS))


class TestReservation(SynchronousTestCase):
    def reserved(self) -> bytes:
        reservation = reservation_of(
            context(), prompt_tokens=70, max_completion_tokens=80, estimated_cost=90, price=PRICE
        )
        self.assertEqual(decode_reservation(encode(reservation)), reservation)
        return encode(reservation)

    def test_interrupted(self) -> None:
        """A request that was never settled has a record that says so, with the estimate for a cost."""
        record = decode_reservation(self.reserved()).interrupted(ended_at=1_800_000_000_000_000)
        assert record.usage is not None
        self.assertEqual((record.status, record.reason, record.estimated), (0, "interrupted", True))
        self.assertEqual((record.usage.input_tokens, record.usage.output_tokens), (70, 80))
        self.assertFalse(record.usage.complete)
        self.assertEqual((record.cost, record.price), (90, PRICE))
        self.assertEqual(record.ended_at, 1_800_000_000_000_000)

    def test_same_request(self) -> None:
        """Whoever asked for what is the same in the record of an interrupted request and of a settled one."""
        record = decode_reservation(self.reserved()).interrupted(ended_at=0)
        settled = record_of(context(), outcome())
        for name in ("id", "principal", "operation", "dialect", "model_asked", "model", "provider", "stream"):
            self.assertEqual(getattr(record, name), getattr(settled, name), name)
        self.assertEqual((record.accepted_at, record.ended_at), (settled.accepted_at, settled.accepted_at))


class TestVersions(SynchronousTestCase):
    def test_newer(self) -> None:
        """Members that a newer version wrote are passed over, inside of other members too."""
        data = b'{"id": "a", "weather": [1], "usage": {"input_tokens": 3, "mood": "low"}, "ended_by": "moon"}'
        record = decode_record(data)
        assert record.usage is not None
        self.assertEqual((record.id, record.usage.input_tokens, record.ended_by), ("a", 3, "moon"))

    def test_older(self) -> None:
        """Members that an older version did not write have their defaults."""
        self.assertEqual(decode_record(b'{"id": "a"}'), Record(id="a"))

    def test_nonsense(self) -> None:
        """What is no record is an error."""
        for data in (b"", b"{}", b"[]", b'{"id": 1}', b'{"id": "a"', b'{"id": "a", "status": "x"}'):
            self.assertRaises(msgspec.MsgspecError, decode_record, data)

    @given(
        st.text(st.characters(codec="utf-8")), st.integers(min_value=0), st.none() | st.integers(min_value=0)
    )
    @settings(deadline=None)
    def test_round_trip(self, text: str, number: int, cost: int | None) -> None:
        """Whatever is in a record comes back, in one line, however large the number."""
        record = Record(id=text, message=text, bytes_in=number, cost=cost)
        self.assertEqual(decode_record(encode(record)), record)
        self.assertNotIn(b"\n", encode(record))
