"""The books: journal, ledger, and how long the one keeps what the other brought."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from crabtwist.bookkeeping import MOST_OUTPUT_TOKENS, Bookkeeping
from crabtwist.errors import ConfigurationError
from crabtwist.records import Record
from crabtwist.retention import FIRST_AFTER_SECONDS, INTERVAL_SECONDS
from crabtwist.tables import LEAST_JOURNAL_BYTES
from crabtwist.tap import Options, make_node
from crabtwist.testing import make_context

NOW = 1_800_000_000
NOBODY = 65534


class Ledger:
    """Remembers what it has and how often it counted each; forgets all whenever it is told to forget."""

    def __init__(self) -> None:
        self.is_open = False
        self.told: list[int | None] = []
        self.there: set[str] = set()
        self.latest: Record | None = None
        self.counted: list[str] = []
        self.answer: Callable[[], Any] = lambda: succeed(0)
        self.append_answer: Callable[[], Any] = lambda: succeed(0)

    def open(self) -> Deferred[None]:
        self.is_open = True
        return succeed(None)

    def close(self) -> Deferred[None]:
        self.is_open = False
        return succeed(None)

    def append(self, records: Sequence[Record]) -> Any:
        new = [record.id for record in records if record.id not in self.there]
        self.there.update(new)
        self.counted += new
        self.latest = records[-1]
        return self.append_answer()

    def prune(self, *, older_than: int | None, max_records: int | None, step: int) -> Any:
        self.told.append(older_than)
        self.there.clear()
        return self.answer()


class ThreadPool:
    """Does at once what it is to do in a thread."""

    def callInThreadWithCallback(self, done: Callable[[bool, Any], None], work: Callable[[], Any]) -> None:
        done(True, work())


class Reactor(Clock):
    """As much of a reactor as the books need."""

    def getThreadPool(self) -> ThreadPool:
        return ThreadPool()

    def callFromThread(self, call: Callable[..., None], *arguments: Any) -> None:
        call(*arguments)


@contextmanager
def without_privileges() -> Iterator[None]:
    """Be somebody who may not write everywhere, as the superuser may."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(before)


class BooksTests(SynchronousTestCase):
    """Books with a ledger that remembers."""

    def setUp(self) -> None:
        self.reactor, self.ledger = Reactor(), Ledger()
        self.reactor.advance(NOW)
        self.folder = Path(self.mktemp())
        self.books = self.started(self.folder, keep_days=1)

    def started(self, folder: Path, **settings: int) -> Bookkeeping:
        books = Bookkeeping(self.ledger, self.reactor, folder, **settings)
        self.successResultOf(Deferred.fromCoroutine(books.start()))
        self.addCleanup(lambda: self.successResultOf(Deferred.fromCoroutine(books.stop())))
        return books

    def why_not(self, folder: Path) -> str:
        """Return why books with a journal in this folder cannot be started."""
        books = Bookkeeping(self.ledger, self.reactor, folder)
        failure = self.failureResultOf(Deferred.fromCoroutine(books.start()), ConfigurationError)
        return str(failure.value)

    def pass_seconds(self, seconds: float) -> None:
        for _ in range(int(seconds * 4)):
            self.reactor.advance(0.25)

    def test_advice(self) -> None:
        """A journal that cannot be opened says why, and which setting to change."""
        folder = Path(self.mktemp())
        folder.mkdir(mode=0o500)
        with without_privileges():
            why = self.why_not(folder / "journal")
        self.assertIn("Permission denied", why)
        self.assertIn("`journal` in [ledger]", why)
        self.assertIn("another process has this journal", self.why_not(self.folder))

    def test_closed_again(self) -> None:
        """Where there is no journal the ledger is let go of."""
        self.ledger.is_open = False
        self.why_not(self.folder)
        self.assertFalse(self.ledger.is_open)

    def test_small_journal(self) -> None:
        """A journal of the least size does not fill up with what was delivered."""
        books = self.started(self.folder / "small", journal_max_bytes=LEAST_JOURNAL_BYTES)
        for number in range(3000):
            books.journal.settle(Record(id=str(number), reason="complete", message="x" * 1000))
            if number % 50 == 0:
                self.pass_seconds(1)
        self.assertEqual(books.dropped, 0)

    def test_counted_once(self) -> None:
        """A record that the ledger took and never confirmed is confirmed before it can be forgotten."""
        self.ledger.append_answer = lambda: fail(OSError("the answer was lost"))
        self.books.journal.settle(Record(id="old", reason="complete"))
        self.pass_seconds(FIRST_AFTER_SECONDS + INTERVAL_SECONDS)
        self.assertEqual((self.ledger.there, self.ledger.told), ({"old"}, []))
        self.ledger.append_answer = lambda: succeed(0)
        self.pass_seconds(INTERVAL_SECONDS)
        self.assertEqual((self.ledger.there, len(self.ledger.told)), (set(), 1))
        self.pass_seconds(INTERVAL_SECONDS)
        self.assertEqual(self.ledger.counted, ["old"])

    def test_delivered_first(self) -> None:
        """What ended just before a look is delivered by it, not left for after it."""
        self.reactor.advance(FIRST_AFTER_SECONDS - 0.01)
        self.books.journal.settle(Record(id="new", reason="complete"))
        confirmed: list[int] = []
        self.ledger.answer = lambda: confirmed.append(self.books.journal.undelivered)
        self.reactor.advance(0.01)
        self.assertEqual((self.ledger.counted, confirmed), (["new"], [0]))

    def test_endless_answer(self) -> None:
        """What a crash interrupted is not estimated by a bound that no answer ever reaches."""
        self.books.reserve(make_context(max_tokens=2**53 - 1), None)
        self.successResultOf(self.books.journal.close())
        self.started(self.folder)
        self.pass_seconds(1)
        assert self.ledger.latest is not None
        assert self.ledger.latest.usage is not None
        self.assertEqual(MOST_OUTPUT_TOKENS, self.ledger.latest.usage.output_tokens)


class SettingsTests(SynchronousTestCase):
    """What `[ledger]` says, in the books of a node."""

    def test_settings(self) -> None:
        """Every setting that all ledgers have reaches whom it is for."""
        path = Path(self.mktemp()).absolute()
        path.write_text(
            'allow_anonymous = true\n[providers.echo]\nmodels = ["echo"]\n[ledger]\n'
            'journal = "notes"\njournal_max_bytes = 2000000\nkeep_days = 3\nkeep_records = 4\n'
        )
        options = Options()
        options.parseOptions(["-c", str(path)])
        books = make_node(options, Clock(), {}).gateway.books
        assert books is not None
        self.assertEqual(books.journal._folder, path.parent / "notes")
        self.assertEqual(books.journal._max_bytes, 2_000_000)
        self.assertEqual((books._retention._keep_days, books._retention._keep_records), (3, 4))
