"""The doors of the records: pages, receipts, and the live tail, over the real channel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, fail, maybeDeferred, succeed
from twisted.internet.error import ConnectionDone
from twisted.python.failure import Failure
from zope.interface import implementer
from zope.interface.verify import verifyObject

from crabtwist.bookkeeping import Bookkeeping
from crabtwist.discovery import Makers
from crabtwist.errors import StorageError
from crabtwist.extension import Extension
from crabtwist.interfaces import ILedger
from crabtwist.journal import Journal
from crabtwist.listener import GatewayFactory
from crabtwist.records import Page, Record, Tokens, Total
from crabtwist.settings import Secret
from crabtwist.values import AdminAction
from crabtwist.web.admin import follow
from crabtwist.web.admin.endpoint import ADMIN
from crabtwist.web.admin.follow import MOST_WAITING_BYTES, Reader, Tail
from crabtwist.web.admin.inside import Inside
from crabtwist.web.admin.requests import Filters
from crabtwist.web.admission import Admission
from crabtwist.web.app import make_app
from tests.test_pricing import OPUS
from tests.test_records import context, outcome
from tests.test_web import ALL, BODY, NOBODY, Said, Wire
from tests.test_web import WebTestCase as _WebTestCase

TOKEN = "ct-admin-secret"
AUTHORIZED = {"authorization": f"Bearer {TOKEN}"}

RECORD = Record(
    id="req_1",
    accepted_at=1_700_000_000_250_000,
    ended_at=1_700_000_001_000_000,
    principal="alice",
    operation="messages",
    model="opus",
    provider="up",
    status=200,
    reason="complete",
    usage=Tokens(input_tokens=10, output_tokens=2, raw='{"input_tokens":10}'),
    cost=100_000_000,
    price_row=attrs.asdict(OPUS),
)


@implementer(ILedger)
class Shelf:
    """A ledger that answers with what it is given, and remembers what it was asked."""

    def __init__(self) -> None:
        self.answer: Any = succeed(Page((RECORD,), "more"))
        self.asked: list[Any] = []

    def close(self) -> Deferred[None]:
        return succeed(None)

    open = close

    def append(self, records: Any) -> Deferred[int]:
        return succeed(len(records))

    def get(self, request_id: str) -> Deferred[Record | None]:
        self.asked.append(request_id)
        return succeed(RECORD if request_id == RECORD.id else None)

    def records(
        self,
        *,
        principal: str | None = None,
        model: str | None = None,
        provider: str | None = None,
        reason: str | None = None,
        since: int | None = None,
        until: int | None = None,
        before: str | None = None,
        limit: int = 100,
    ) -> Any:
        self.asked.append((principal, model, provider, reason, since, until, before, limit))
        return self.answer

    def totals(self, by: Any, *, since: Any = None, until: Any = None) -> Any:
        self.asked.append((tuple(by), since, until))
        return succeed([Total(principal="key-all", requests=2, cost=5), Total(principal="other", requests=9)])

    def prune(
        self, *, older_than: int | None = None, max_records: int | None = None, step: int = 500
    ) -> Deferred[int]:
        return succeed(0)


class InsideTestCase(_WebTestCase):
    """A gateway whose inside can be looked at, with a ledger that the test speaks for."""

    extensions: tuple[Any, ...] = ()
    has_books = True

    def setUp(self) -> None:
        super().setUp()
        self.ledger = Shelf()
        if self.has_books:
            self.gateway.books = Bookkeeping(self.ledger, self.clock, Path(self.mktemp()))
        self.tail = Tail(self.gateway)
        self.inside = self.make_inside()
        admission = Admission(self.gateway, Secret(TOKEN))
        self.factory = GatewayFactory(
            make_app(self.gateway, self.extensions, inside=self.inside).resource(),
            reactor=self.clock,
            admit=admission,
            render_refusal=admission.refuse,
        )

    def make_inside(self) -> Inside:
        """Return what the doors show."""
        return Inside(
            gateway=self.gateway,
            config=lambda: None,  # type: ignore[arg-type, return-value] # nobody asks these for it
            makers=Makers(),
            storage=None,
            tail=self.tail,
            started_at=0.0,
            extensions=self.extensions,
        )

    def admin(self, path: str, method: str = "GET") -> Said:
        """Return what an administrator is told."""
        return self.ask(method, f"{ADMIN}{path}", AUTHORIZED)


class ListTests(InsideTestCase):
    """Pages of requests."""

    def test_page(self) -> None:
        """A page has the ledger's records, money and times as texts, and what to ask for next."""
        said = self.admin("requests")
        self.assertEqual((200, "more"), (said.status, said.json["next"]))
        self.assertEqual("no-store", said.fields["cache-control"])
        [shown] = said.json["requests"]
        self.assertEqual(("req_1", "0.0001"), (shown["id"], shown["cost_dollars"]))
        self.assertEqual("2023-11-14T22:13:20.250000Z", shown["accepted_at"])
        self.assertEqual((10, 0), (shown["usage"]["input_tokens"], shown["usage"]["cache_read_tokens"]))
        self.assertFalse({"price_row", "raw_usage", "receipt"} & set(shown))
        self.assertEqual([(None,) * 7 + (100,)], self.ledger.asked)

    def test_filters(self) -> None:
        """Every filter reaches the ledger, times in microseconds."""
        query = "principal=&model=m%2F1&provider=p&reason=r&since=1970-01-01T00:00:01Z&before=c&limit=1000"
        self.assertEqual(200, self.admin(f"requests?{query}&until=1970-01-01T01:00:02%2B01:00").status)
        self.assertEqual([("", "m/1", "p", "r", 1_000_000, 2_000_000, "c", 1000)], self.ledger.asked)

    def test_wrong_query(self) -> None:
        """All that is wrong is said at once, each by its name, and the ledger is not asked."""
        said = self.admin("requests?limit=0&since=yesterday&modle=m")
        self.assertEqual((400, "invalid_query"), said.refusal)
        for word in ("limit", "since", 'did you mean "model"'):
            self.assertIn(word, said.json["error"]["message"])
        for query in ("limit=1001", "limit=1e2", "model=a&model=b", "since=2026-11-30"):
            self.assertEqual(400, self.admin(f"requests?{query}").status, query)
        self.assertEqual([], self.ledger.asked)

    def test_wrong_cursor(self) -> None:
        """A cursor that no page had is the asker's fault."""
        self.ledger.answer = fail(ValueError("no"))
        said = self.admin("requests?before=x")
        self.assertEqual((400, "invalid_query"), said.refusal)
        self.assertIn("before", said.json["error"]["message"])

    def test_away(self) -> None:
        """A ledger that does not answer is the gateway's, and can be asked again."""
        for error in (StorageError("gone"), OSError("disk")):
            self.ledger.answer = fail(error)
            said = self.admin("requests")
            self.assertEqual((503, "ledger_unavailable"), said.refusal)
            self.assertEqual("1", said.fields["retry-after"])

    def test_locked(self) -> None:
        """Keys open nothing of it."""
        for path in ("requests", "requests/req_1", "requests/follow"):
            for fields in (ALL, NOBODY):
                self.assertEqual(401, self.ask("GET", f"{ADMIN}{path}", fields).status)

    def test_shelf(self) -> None:
        """The ledger of these tests is one."""
        verifyObject(ILedger, self.ledger)


class ReceiptTests(InsideTestCase):
    """One request, in full."""

    def test_receipt(self) -> None:
        """Its receipt has the lines that add up to its cost."""
        shown = self.admin("requests/req_1").json
        lines = [tuple(line.values()) for line in shown["receipt"]["lines"]]
        self.assertEqual(
            [
                ("opus", "input", 10, "0.000005", "0.00005"),
                ("opus", "output", 2, "0.000025", "0.00005"),
            ],
            lines,
        )
        self.assertEqual(("0.0001", []), (shown["receipt"]["total_dollars"], shown["receipt"]["unpriced"]))
        self.assertEqual(shown["cost_dollars"], shown["receipt"]["total_dollars"])
        self.assertEqual(('{"input_tokens":10}', "opus"), (shown["raw_usage"], shown["price_row"]["model"]))

    def test_undelivered(self) -> None:
        """A request that the ledger was not told of yet is found in the journal."""
        assert self.gateway.books is not None
        journal = self.gateway.books.journal = Journal(Path(self.mktemp()), self.clock, maybeDeferred)
        journal.open()
        self.addCleanup(journal.close)
        self.gateway.books.settle(context(), outcome())
        shown = self.admin(f"requests/{context().request_id}").json
        self.assertEqual(context().request_id, shown["id"])
        self.assertEqual([], self.ledger.asked)

    def test_unknown(self) -> None:
        """What there is no record of is not there."""
        self.assertEqual((404, "request_not_found"), self.admin("requests/nope").refusal)


class NoLedgerTests(InsideTestCase):
    """A gateway without a ledger."""

    has_books = False

    def test_said(self) -> None:
        """It says that it keeps no records, and which table would make it."""
        for path in ("requests", "requests/req_1", "usage"):
            said = self.admin(path)
            self.assertEqual((404, "no_ledger"), said.refusal)
            self.assertIn("[ledger]", said.json["error"]["message"])


class FollowTestCase(InsideTestCase):
    """Readers of the live tail."""

    def follow(self, query: str = "", method: str = "GET") -> Wire:
        """Begin to follow; returns the wire that the events come over."""
        wire, channel = Wire(), self.factory.buildProtocol(None)
        channel.makeConnection(wire)
        head = f"{method} {ADMIN}requests/follow{query} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {TOKEN}"
        channel.dataReceived(f"{head}\r\n\r\n".encode())
        self.channel = channel
        return wire

    def events(self, wire: Wire) -> list[tuple[str, Any]]:
        """Return the events that have come, by name."""
        body, chunks = wire.value().partition(b"\r\n\r\n")[2], b""
        while body:
            size, _, rest = body.partition(b"\r\n")
            chunks, body = chunks + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
        blocks = [block.split("\n") for block in chunks.decode().split("\n\n") if block.startswith("event")]
        return [
            (name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks
        ]

    def end_request(self, **changes: Any) -> None:
        """Have a request end."""
        for watcher in tuple(self.gateway.watchers):
            watcher(attrs.evolve(context(), **changes), outcome())

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.clock.advance(seconds)

    def producer(self, wire: Wire) -> Any:
        """Return what a wire would brake."""
        return wire.producer


class FollowTests(FollowTestCase):
    """Following."""

    def test_head(self) -> None:
        """A reader is told at once that it is told from now on."""
        wire = self.follow()
        self.assertTrue(wire.value().startswith(b"HTTP/1.1 200 OK\r\n"))
        self.assertIn(b"content-type: text/event-stream\r\n", wire.value().lower())
        self.assertIn(b": following\n\n", wire.value())

    def test_real_request(self) -> None:
        """A request that the gateway serves is told when it has ended, also if it was refused."""
        wire = self.follow()
        self.ask("POST", "/v1/messages", ALL, BODY)
        self.ask("POST", "/v1/messages", ALL, b'{"model":"nope"}')
        told = [(name, data["principal"], data["status"]) for name, data in self.events(wire)]
        self.assertEqual([("request", "key-all", 200), ("request", "key-all", 404)], told)

    def test_same_as_listed(self) -> None:
        """It is told as the list has it."""
        wire = self.follow()
        self.end_request()
        [(_, told)] = self.events(wire)
        self.assertEqual(set(self.admin("requests").json["requests"][0]), set(told))
        self.assertEqual("1000000000000000000.00", told["cost_dollars"])

    def test_filters(self) -> None:
        """Only those are told that are wanted."""
        wire = self.follow("?principal=bob&until=2030-01-01T00:00:00Z")
        nobody = self.follow("?principal=")
        for principal in ("alice", "bob", None):
            self.end_request(principal=principal)
        self.assertEqual(["bob"], [told["principal"] for _, told in self.events(wire)])
        self.assertEqual([None], [told["principal"] for _, told in self.events(nobody)])

    def test_kept_alive(self) -> None:
        """While nothing happens there are comments."""
        wire = self.follow()
        self.advance(self.gateway.patience.ping_seconds)
        self.assertIn(b": still here\n\n", wire.value())
        self.assertEqual([], self.events(wire))

    def test_costs_nothing(self) -> None:
        """Nobody watches the gateway while there is no reader, and each leaves when its client does."""
        self.assertEqual([], self.gateway.watchers)
        self.follow()
        one = self.channel
        self.follow()
        self.assertEqual(1, len(self.gateway.watchers))
        for channel in (one, self.channel):
            channel.connectionLost(Failure(ConnectionDone()))
        self.assertEqual([], self.gateway.watchers)
        self.end_request()
        self.assertEqual([], [call for call in self.clock.getDelayedCalls() if call.getTime() < 1e3])

    def test_stopping(self) -> None:
        """When the gateway is being stopped, each reader is told so, and its answer ends."""
        wires = [self.follow(), self.follow()]
        self.tail.end()
        for wire in wires:
            [(name, said)] = self.events(wire)
            self.assertEqual(("end", "stopping"), (name, said["reason"]))
            self.assertTrue(wire.value().endswith(b"0\r\n\r\n"))
        self.assertEqual([], self.gateway.watchers)

    def test_too_many(self) -> None:
        """Not more follow than there is room for; one that leaves makes room."""
        self.patch(follow, "MOST_READERS", 1)
        self.follow()
        first = self.channel
        self.assertEqual((429, "too_many_readers"), self.admin("requests/follow").refusal)
        first.connectionLost(Failure(ConnectionDone()))
        self.assertIn(b"200 OK", self.follow().value())

    def test_head_request(self) -> None:
        """HEAD is answered without a stream."""
        wire = self.follow(method="HEAD")
        self.assertIn(b"text/event-stream", wire.value())
        self.assertEqual(([], b""), (self.gateway.watchers, wire.value().partition(b"\r\n\r\n")[2]))

    def test_a_crash_is_logged(self) -> None:
        """A watcher that fails stops nobody else."""
        self.gateway.watchers.append(lambda _context, _outcome: next(iter(())))
        wire = self.follow()
        self.assertEqual(200, self.ask("POST", "/v1/messages", ALL, BODY).status)
        self.assertEqual(1, len(self.events(wire)))
        self.assertEqual(1, len(self.flushLoggedErrors(StopIteration)))


class SlowTests(FollowTestCase):
    """Readers that do not keep up."""

    def test_waits(self) -> None:
        """What a reader has no room for waits, in order, and comes when there is."""
        wire = self.follow()
        self.producer(wire).pauseProducing()
        for number in range(3):
            self.end_request(request_id=f"r{number}")
        self.advance(self.gateway.patience.ping_seconds)
        self.assertEqual([], self.events(wire))
        self.producer(wire).resumeProducing()
        self.assertEqual(["r0", "r1", "r2"], [told["id"] for _, told in self.events(wire)])

    def test_cut_off(self) -> None:
        """One that is too far behind is told so last, and holds nothing any more."""
        wire = self.follow()
        self.producer(wire).pauseProducing()
        number = 0
        while self.gateway.watchers:
            number += 1
            self.end_request()
        self.assertGreater(number * 2000, MOST_WAITING_BYTES)
        [(name, said)] = self.events(wire)
        self.assertEqual(("end", "too_slow"), (name, said["reason"]))
        self.assertIn(f"missed {number} requests", said["message"])
        self.assertTrue(wire.value().endswith(b"0\r\n\r\n"))

    def test_others_go_on(self) -> None:
        """A slow reader costs the others nothing."""
        slow, quick = self.follow(), self.follow()
        self.producer(slow).pauseProducing()
        for _ in range(1000):
            self.end_request()
        self.assertEqual(1000, len(self.events(quick)))

    def test_stalled(self) -> None:
        """One that reads nothing at all for too long is hung up on."""
        wire = self.follow()
        self.producer(wire).pauseProducing()
        self.advance(self.gateway.patience.client_stall_seconds - 1)
        self.assertFalse(wire.disconnected)
        for _ in range(3):
            self.advance(self.gateway.patience.ping_seconds)
        self.assertTrue(wire.disconnected)

    def test_pauses_again(self) -> None:
        """One that pauses again while it is given what has waited is given the rest later."""
        wire = self.follow()
        reader = next(iter(self.tail._readers))
        self.assertIsInstance(reader, Reader)
        self.producer(wire).pauseProducing()
        for _ in range(2):
            self.end_request()
        written: list[bytes] = []

        def write(data: bytes) -> None:
            written.append(data)
            reader.pauseProducing()

        self.patch(reader._request, "write", write)
        for expected in (1, 2, 2):
            reader.resumeProducing()
            self.assertEqual(expected, len(written))


class FiltersTests(InsideTestCase):
    """Which records are wanted."""

    @settings(deadline=None)
    @given(st.lists(st.none() | st.sampled_from(["", "a", "b"]), min_size=4, max_size=4))
    def test_names(self, names: list[str | None]) -> None:
        """A record is wanted if it is what each filter says, and "" stands for none."""
        wanted = Filters(**dict(zip(("principal", "model", "provider", "reason"), names, strict=True)))
        for record in (Record(id="1", model="a", provider="b"), Record(id="2", principal="a", reason="b")):
            values = (record.principal or "", record.model, record.provider, record.reason)
            expected = all(name in (None, value) for name, value in zip(names, values, strict=True))
            self.assertEqual(expected, wanted.wanted()(record))

    def test_bounds(self) -> None:
        """`since` is counted in, `until` is not."""
        wanted = Filters(since="1970-01-01T00:00:01Z", until="1970-01-01T00:00:02Z").wanted()
        found = [
            at for at in (999_999, 1_000_000, 1_999_999, 2_000_000) if wanted(Record(id="", accepted_at=at))
        ]
        self.assertEqual([1_000_000, 1_999_999], found)


class Watching(Extension):
    """Remembers what administrators did."""

    name = "watching"

    def __init__(self) -> None:
        self.actions: list[AdminAction] = []

    def on_admin_action(self, action: AdminAction) -> None:
        self.actions.append(action)


class NothingChangedTests(InsideTestCase):
    """Reading is no action."""

    extensions = (Watching(),)

    def test_no_action(self) -> None:
        """Nobody is told of who only looks."""
        for path in ("requests", "requests/req_1", "usage", "budgets", "models", "plugins"):
            self.assertEqual(200, self.admin(path).status, path)
        self.assertEqual([], self.extensions[0].actions)
