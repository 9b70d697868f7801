"""What the `cache` extension takes for the same, and what it keeps."""

from __future__ import annotations

from inspect import iscoroutine
from typing import Any, cast

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from crabtwist.errors import ConnectFailed, StorageError, Truncated
from crabtwist.extensions.cache import CACHE, ENTRY_BYTES, CacheExtension, CacheSettings
from crabtwist.extensions.cache_store import REST_SECONDS
from crabtwist.interfaces import IExtension
from crabtwist.recording import Recording
from crabtwist.settings import read as read_settings
from crabtwist.storage.memory import MemoryStorage
from crabtwist.testing import JSON, FakeServices, make_context
from crabtwist.values import Answer, Context

BODY = b'{"model":"m","messages":[{"role":"user","content":"hi"}]}'


class Collector:
    """Reads a body."""

    def __init__(self) -> None:
        self.data = b""
        self.transport: Any = None

    def makeConnection(self, transport: Any) -> None:
        """As a protocol's."""
        self.transport = transport

    def dataReceived(self, data: bytes) -> None:
        """As a protocol's."""
        self.data += data

    def connectionLost(self, reason: object) -> None:
        """As a protocol's."""


class CacheTestCase(SynchronousTestCase):
    """A cache, and those who look into it."""

    def setUp(self) -> None:
        """Start from nothing."""
        self.clock = Clock()
        self.make()

    def make(self, **options: Any) -> None:
        """Have a cache with these settings."""
        self.cache = CacheExtension(CacheSettings(**options), FakeServices(self.clock))

    def look(self, body: bytes = BODY, *cache_control: bytes, **context: Any) -> tuple[str, Any]:
        """Return what the answer's header would say, and what was found."""
        headers = (
            *context.pop("headers", ()),
            *((b"Cache-Control", value) for value in cache_control),
        )
        self.context: Context = make_context(headers=headers, **context)
        found = self.cache.on_cache_lookup(self.context, body)
        return self.context.answer_headers[CACHE].decode(), found

    def begin(self, recording: Recording | None) -> Collector:
        """Lead a recording, as one who reads it."""
        assert recording is not None and not recording.led
        following: Deferred[Any] = recording.follow()
        recording.lead(lambda: None)
        recording.begin(200, JSON, None, streamed=False)
        reader = Collector()
        self.successResultOf(following).deliverBody(reader)
        return reader

    def keep(self, body: bytes = BODY, answer: bytes = b"answer", **context: Any) -> None:
        """Have something answered, completely."""
        _, recording = self.look(body, **context)
        self.begin(recording)
        assert recording is not None
        recording.write(answer)
        recording.finish()
        recording.settle(complete=True)

    def answer_in(self, recording: Recording | None) -> bytes:
        """Return what a complete recording gives."""
        assert recording is not None and recording.led
        reader, following = Collector(), cast("Deferred[Any]", recording.follow())
        self.successResultOf(following).deliverBody(reader)
        return reader.data

    def said(self, *arguments: Any, **context: Any) -> str:
        """Return what the answer's header would say."""
        return self.look(*arguments, **context)[0]


class SameTests(CacheTestCase):
    """What is the same."""

    def test_contract(self) -> None:
        """It is an extension."""
        verifyObject(IExtension, self.cache)

    def test_hit(self) -> None:
        """Who asks what was asked before is given the answer that was given then."""
        self.assertEqual("miss", self.said())
        self.keep()
        said, found = self.look()
        self.assertEqual(("hit", b"answer"), (said, self.answer_in(found)))

    def test_small(self) -> None:
        """A plain answer that came whole is kept as no more than that."""
        _, recording = self.look()
        answer = Answer(200, JSON, b"answer")
        recording.lead(lambda: None)
        recording.take(answer)
        self.assertIs(recording, self.look()[1])
        recording.settle(complete=True)
        self.assertEqual(("hit", answer), self.look())
        self.assertEqual((1, ENTRY_BYTES + 6), (len(self.cache), self.cache.size_bytes))

    def test_in_flight(self) -> None:
        """Who asks what is being asked shares the answer that comes."""
        _, first = self.look()
        self.begin(first)
        said, second = self.look()
        self.assertEqual("hit", said)
        self.assertIs(first, second)

    def test_every_part_matters(self) -> None:
        """Key, operation, dialect, model, kind, query and every byte of the body have to be the same."""
        self.keep()
        for changed in (
            {"principal": "other"},
            {"principal": None},
            {"operation": "messages.count_tokens"},
            {"dialect": "openai"},
            {"model": "other"},
            {"stream": True},
            {"query": b"beta=true"},
        ):
            self.assertEqual("miss", self.said(**changed), changed)
        self.assertEqual("miss", self.said(BODY + b" "))
        self.assertEqual("hit", self.said())

    def test_what_does_not_matter(self) -> None:
        """What a client says of itself, and when, does not."""
        self.keep()
        other = ((b"User-Agent", b"x"), (b"X-Stainless-Lang", b"python"))
        self.assertEqual("hit", self.said(headers=other, request_id="req_2", started_at=5.0, model_asked="a"))

    def test_decisive_headers(self) -> None:
        """Fields that change what the vendor does have to be the same, in whatever order and spelling."""
        beta, version = (b"Anthropic-Beta", b"a"), (b"anthropic-version", b"2023-06-01")
        self.keep(headers=(beta, version))
        self.assertEqual("hit", self.said(headers=(version, (b"anthropic-beta", b"a"))))
        for headers in (
            (),
            (beta,),
            (version,),
            ((b"Anthropic-Beta", b"b"), version),
            (beta, version, (b"OpenAI-Beta", b"assistants=v2")),
        ):
            self.assertEqual("miss", self.said(headers=headers), headers)

    def test_parts_are_kept_apart(self) -> None:
        """What one part ends with is not what the next begins with."""
        self.keep(model="mo", query=b"del")
        self.assertEqual("miss", self.said(model="mod", query=b"el"))
        self.keep(b"y", headers=((b"anthropic-x", b"z"),))
        self.assertEqual("miss", self.said(b"zy", headers=((b"anthropic-x", b""),)))

    def test_shared(self) -> None:
        """With the scope "shared" all keys have one cache."""
        self.make(scope="shared")
        self.keep()
        self.assertEqual("hit", self.said(principal="other"))


class MeaningTests(CacheTestCase):
    """Bodies that say the same in other bytes."""

    def same(self, first: bytes, second: bytes, **options: Any) -> bool:
        """Tell whether two bodies are the same."""
        self.make(match="meaning", **options)
        self.keep(first)
        return self.said(second) == "hit"

    def test_spelling(self) -> None:
        """Order, white space and escapes do not matter; any value does."""
        first = b'{"a":[1,2],"b":{"x":"\xc3\xa9","y":0.10}}'
        self.assertTrue(self.same(first, b'{ "b": {"y":0.1, "x":"\\u00e9"}, "a": [1, 2] }'))
        self.assertFalse(self.same(first, first.replace(b"[1,2]", b"[2,1]")))
        self.assertFalse(self.same(first, first.replace(b"0.10", b"0.11")))

    def test_alias(self) -> None:
        """Nor does the name that the model was asked for by: the one that it leads to is looked at."""
        self.assertTrue(self.same(b'{"model":"m","x":1}', b'{"model":"fast","x":1}'))
        self.assertEqual("miss", self.said(b'{"model":"m","x":1}', model="other"))

    def test_ignored(self) -> None:
        """Members that are to be ignored are, at the top; the kind of answer cannot be."""
        first, second = b'{"x":1,"user":"a"}', b'{"x":1,"user":"b"}'
        self.assertFalse(self.same(first, second))
        self.assertTrue(self.same(first, second, ignore=("user", "stream")))
        self.assertTrue(self.same(first, b'{"x":1}', ignore=("user", "stream")))
        self.assertFalse(self.same(b'{"x":{"user":1}}', b'{"x":{"user":2}}', ignore=("user",)))
        self.keep(first)
        self.assertEqual("miss", self.said(first, stream=True))

    def test_what_cannot_be_read(self) -> None:
        """What Python cannot read is the same if its bytes are."""
        deep = b'{"x":' + b"[" * 50_000 + b"]" * 50_000 + b"}"
        for body in (b'{"x":1e999}', deep):
            self.assertTrue(self.same(body, body))
            self.assertFalse(self.same(body, body + b" "))

    def test_large_numbers(self) -> None:
        """Numbers beyond 64 bits are told apart."""
        self.assertFalse(self.same(b'{"seed":18446744073709551617}', b'{"seed":18446744073709551618}'))


class FreshTests(CacheTestCase):
    """How long an answer is given, and to whom not."""

    def test_ttl(self) -> None:
        """An answer is given for `ttl_seconds` from when it was complete."""
        self.make(ttl_seconds=10)
        _, recording = self.look()
        self.begin(recording)
        assert recording is not None
        self.clock.advance(100)
        self.assertEqual("hit", self.said())
        recording.finish()
        recording.settle(complete=True)
        self.clock.advance(9.9)
        self.assertEqual("hit", self.said())
        self.clock.advance(0.1)
        self.assertEqual("miss", self.said())

    def test_max_age(self) -> None:
        """A client that wants none older than so many seconds is not given one; then there is a new one."""
        self.keep()
        self.clock.advance(30)
        self.assertEqual("hit", self.said(BODY, b"max-age=30"))
        self.assertEqual("hit", self.said(BODY, b"max-age=x, max-stale=5, max-age="))
        said, found = self.look(BODY, b"private", b"Max-Age=29")
        self.assertEqual("miss", said)
        self.assertIs(found, self.look()[1])

    def test_in_flight_is_fresh(self) -> None:
        """What is on its way is as fresh as can be."""
        self.begin(self.look()[1])
        self.assertEqual("hit", self.said(BODY, b"max-age=0"))

    def test_no_cache(self) -> None:
        """With `no-cache` a client gets a new answer, which replaces the old one."""
        self.keep()
        said, fresh = self.look(BODY, b"max-age=5, No-Cache")
        self.assertEqual("bypass", said)
        assert fresh is not None
        self.assertFalse(fresh.led)
        self.assertIs(fresh, self.look()[1])
        self.assertEqual(1, len(self.cache))

    def test_no_store(self) -> None:
        """With `no-store` it gets a new one that is not kept, nor shared; the old one stays."""
        self.keep()
        self.assertEqual(("bypass", None), self.look(BODY, b"no-store, no-cache"))
        self.assertEqual("hit", self.said())


class RoomTests(CacheTestCase):
    """What is kept, and for want of room not."""

    def test_entries(self) -> None:
        """The least recently used one leaves when there are too many."""
        self.make(max_entries=2)
        for body in (b"1", b"2", b"1", b"3"):
            if self.said(body) == "miss":
                self.keep(body)
        self.assertEqual(2, len(self.cache))
        self.assertEqual(["hit", "hit", "miss"], [self.said(body) for body in (b"3", b"1", b"2")])

    def test_bytes(self) -> None:
        """Also when they are too large together: bodies, and what an entry takes beside."""
        self.make(max_bytes=2 * ENTRY_BYTES + 1000)
        self.keep(b"1", b"x" * 400)
        self.keep(b"2", b"x" * 600)
        self.assertEqual((2, 2 * ENTRY_BYTES + 1000), (len(self.cache), self.cache.size_bytes))
        self.said(b"1")
        self.keep(b"3", b"x")
        self.assertEqual(["hit", "hit", "miss"], [self.said(body) for body in (b"1", b"3", b"2")])

    def test_too_large(self) -> None:
        """An answer that is too large is not kept, and from there on not shared."""
        self.make(max_entry_bytes=1000)
        _, recording = self.look()
        reader = self.begin(recording)
        assert recording is not None
        recording.write(bytes(1000))
        self.assertEqual("hit", self.said())
        recording.write(b"x")
        said, other = self.look()
        self.assertEqual("miss", said)
        self.assertIsNot(recording, other)
        recording.finish()
        recording.settle(complete=True)
        self.assertEqual(1001, len(reader.data))
        self.assertIs(other, self.look()[1])

    def test_too_large_alone(self) -> None:
        """Nobody new asks for it: then nothing of it stays."""
        self.make(max_entry_bytes=1000)
        self.keep(BODY, bytes(1001))
        self.assertEqual((0, 0), (len(self.cache), self.cache.size_bytes))

    def test_not_kept(self) -> None:
        """What failed, broke or is not all of an answer is not kept."""

        def refused(recording: Recording) -> None:
            recording.fail(ConnectFailed("no"))

        def broken(recording: Recording) -> None:
            self.begin(recording)
            recording.write(b"half")
            recording.finish(Truncated("x"))
            recording.settle(complete=False)

        def cut(recording: Recording) -> None:
            self.begin(recording)
            recording.write(b"half")
            recording.abort()
            recording.settle(complete=True)

        def another_status(recording: Recording) -> None:
            self.begin(recording)
            recording.finish()
            recording.settle(complete=False)

        for end in (refused, broken, cut, another_status):
            _, recording = self.look()
            assert recording is not None
            end(recording)
            self.assertEqual((0, 0), (len(self.cache), self.cache.size_bytes), end.__name__)
            self.assertEqual("miss", self.said())

    def test_evicted_in_flight(self) -> None:
        """One that has to leave while it comes still arrives where it is awaited."""
        self.make(max_entries=1)
        _, recording = self.look(b"1")
        reader = self.begin(recording)
        assert recording is not None
        recording.write(b"one ")
        self.keep(b"2")
        recording.write(b"two")
        recording.finish()
        recording.settle(complete=True)
        self.assertEqual((b"one two", 0), (reader.data, recording.size_bytes))
        self.assertEqual(["hit", "miss"], [self.said(b"2"), self.said(b"1")])

    def test_grows_out_of_the_room(self) -> None:
        """One that is alone too large for the cache arrives all the same."""
        self.make(max_bytes=ENTRY_BYTES + 10)
        _, recording = self.look()
        reader = self.begin(recording)
        assert recording is not None
        recording.write(bytes(11))
        self.assertEqual((0, 0, 11), (len(self.cache), self.cache.size_bytes, len(reader.data)))
        self.make(max_bytes=1)
        self.begin(self.look()[1])
        self.assertEqual((0, 0), (len(self.cache), self.cache.size_bytes))

    def test_clear(self) -> None:
        """Clearing forgets all; what is on its way arrives."""
        self.keep(b"1")
        _, recording = self.look(b"2")
        reader = self.begin(recording)
        assert recording is not None
        recording.write(b"x")
        self.cache.clear()
        recording.write(b"y")
        self.assertEqual((0, 0, b"xy"), (len(self.cache), self.cache.size_bytes, reader.data))

    def test_follower_that_lags(self) -> None:
        """What was let go for want of room, and is still to be read, is no part of the cache."""
        _, recording = self.look()
        reader = self.begin(recording)
        assert recording is not None
        reader.transport.pauseProducing()
        recording.write(b"x" * 50)
        self.cache.clear()
        self.assertEqual((0, 50), (self.cache.size_bytes, recording.size_bytes))
        reader.transport.resumeProducing()
        self.assertEqual((0, 0, 50), (self.cache.size_bytes, recording.size_bytes, len(reader.data)))

    @given(
        st.lists(
            st.tuples(
                st.sampled_from(["look", "write", "finish", "abort", "fail", "leave", "pause", "clear"]),
                st.integers(0, 5),
                st.integers(0, 700),
            ),
            max_size=40,
        )
    )
    @settings(deadline=None)
    def test_accounts(self, happenings: list[tuple[str, int, int]]) -> None:
        """Whatever happens, the cache knows exactly what it holds, within its bounds; in the end nothing."""
        self.make(max_entries=4, max_bytes=4 * ENTRY_BYTES, max_entry_bytes=1000)
        self.flights: dict[Recording, Collector] = {}
        for what, which, size in happenings:
            self.happen(what, which, size)
            held = self.cache._entries.values()
            self.assertEqual(
                sum(ENTRY_BYTES + (each.recording.size_bytes if each.recording else 0) for each in held),
                self.cache.size_bytes,
            )
            self.assertLessEqual(len(self.cache), 4)
            self.assertLessEqual(self.cache.size_bytes, 4 * ENTRY_BYTES)
        self.cache.clear()
        self.assertEqual(0, self.cache.size_bytes)

    def happen(self, what: str, which: int, size: int) -> None:
        """Let one thing happen to the cache, or to an answer on its way."""
        if what == "clear":
            self.cache.clear()
        elif what == "look":
            _, found = self.look(b"%d" % which)
            assert found is not None
            if not found.led:
                self.flights[found] = self.begin(found)
        elif self.flights:
            recording = list(self.flights)[which % len(self.flights)]
            self.change(what, recording, size)

    def change(self, what: str, recording: Recording, size: int) -> None:
        """Let something happen to an answer on its way."""
        if what == "write":
            recording.write(bytes(size))
            return
        if what == "pause":
            self.flights[recording].transport.pauseProducing()
            return
        reader = self.flights.pop(recording)
        if what == "leave":
            reader.transport.stopProducing()
        if what in ("leave", "fail"):
            recording.fail(ConnectFailed("nobody"))
        else:
            getattr(recording, what)()
            recording.settle(complete=what == "finish")


class SettingsTests(SynchronousTestCase):
    """The table."""

    def complaints(self, **table: Any) -> list[str]:
        """Return what is said against a table."""
        complaints: list[str] = []
        read_settings(CacheSettings, table, "extensions.cache", complaints)
        return complaints

    def test_bounds(self) -> None:
        """Nothing may be unbounded or senseless."""
        for name in ("ttl_seconds", "max_entries", "max_bytes", "max_entry_bytes"):
            self.assertIn("greater than 0", self.complaints(**{name: 0})[0])
        self.assertEqual(1, len(self.complaints(scope="everybody")))

    def test_ignoring_exact_bytes(self) -> None:
        """To ignore members and want exact bytes is a contradiction, and said to be one."""
        self.assertEqual([], self.complaints(match="meaning", ignore=["user"]))
        [complaint] = self.complaints(ignore=["user"])
        self.assertIn('match = "meaning"', complaint)


class HeldStorage(MemoryStorage):
    """A store whose replies the test may hold back, or refuse."""

    held: Deferred[bytes | None] | None = None
    asked = 0

    def get(self, namespace: str, key: bytes) -> Deferred[bytes | None]:
        """Answer, unless it is held."""
        self.asked += 1
        return super().get(namespace, key) if self.held is None else self.held


class InStoreTests(CacheTestCase):
    """Two nodes with their answers in one store."""

    def setUp(self) -> None:
        """Have something answered by one node; look on another."""
        super().setUp()
        self.storage = HeldStorage(None, FakeServices(self.clock))
        self.node()
        self.looking_here()
        self.keep_here()
        self.node()

    def node(self, **options: Any) -> None:
        """Go to a new node."""
        services = FakeServices(self.clock)
        services.storage = self.storage
        self.cache = CacheExtension(CacheSettings(in_store=True, **options), services)

    def looking_here(self, *arguments: Any) -> Deferred[Recording]:
        """Return what is being looked for."""
        _, found = self.look(*arguments)
        return Deferred.fromCoroutine(found) if iscoroutine(found) else succeed(found)

    def keep_here(self) -> None:
        """Have it answered, completely."""
        recording = self.successResultOf(self.looking_here())
        self.begin(recording)
        recording.write(b"answer")
        recording.finish()
        recording.settle(complete=True)

    def test_found(self) -> None:
        """What one node was answered another is given, and keeps for itself."""
        recording = self.successResultOf(self.looking_here())
        self.assertEqual(b"hit", self.context.answer_headers[CACHE])
        self.assertEqual(Answer(200, JSON, b"answer"), self.successResultOf(recording.follow()))
        asked = self.storage.asked
        self.assertEqual("hit", self.said())
        self.assertEqual(asked, self.storage.asked)

    def test_other_question(self) -> None:
        """What nobody was answered is a miss, to be led."""
        recording = self.successResultOf(self.looking_here(b"another"))
        self.assertEqual((b"miss", False), (self.context.answer_headers[CACHE], recording.led))

    def test_slow(self) -> None:
        """A request waits for the store only so long; then the store is left alone for a while."""
        self.storage.held = Deferred()
        looking = self.looking_here()
        self.clock.advance(0.049)
        self.assertNoResult(looking)
        self.clock.advance(0.002)
        self.assertFalse(self.successResultOf(looking).led)
        asked = self.storage.asked
        self.successResultOf(self.looking_here(b"another"))
        self.assertEqual(asked, self.storage.asked)
        self.clock.advance(REST_SECONDS)
        self.storage.held = None
        self.cache.clear()
        self.assertTrue(self.successResultOf(self.looking_here()).led)

    def test_failing(self) -> None:
        """A store that fails is as one that has nothing."""
        self.storage.held = fail(StorageError("gone"))
        self.assertFalse(self.successResultOf(self.looking_here()).led)

    def test_damaged(self) -> None:
        """What cannot be read is as nothing."""
        self.storage.held = succeed(b"damaged")
        self.assertFalse(self.successResultOf(self.looking_here()).led)

    def test_too_old(self) -> None:
        """An answer is no younger for having been kept elsewhere."""
        self.clock.advance(100)
        self.assertFalse(self.successResultOf(self.looking_here(BODY, b"max-age=99")).led)
        self.cache.clear()
        self.assertTrue(self.successResultOf(self.looking_here()).led)
        self.clock.advance(3500)
        self.assertEqual("miss", self.said())

    def test_led_meanwhile(self) -> None:
        """Of two who look in the store at once, whoever is told first asks upstream; both are given that."""
        held = self.storage.held = Deferred()
        first, one = self.looking_here(), self.context
        self.storage.held = Deferred()
        second, other = self.looking_here(), self.context
        self.storage.held.callback(None)
        recording = self.successResultOf(second)
        self.begin(recording)
        held.callback(None)
        self.assertIs(recording, self.successResultOf(first))
        self.assertEqual((b"hit", b"miss"), (one.answer_headers[CACHE], other.answer_headers[CACHE]))
        self.assertEqual(0, recording.size_bytes)
