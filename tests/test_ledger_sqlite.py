"""The ledger in SQLite, by its contract."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from datetime import date, timedelta
from itertools import combinations
from pathlib import Path
from random import Random
from threading import active_count
from typing import Any

import attrs
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase, TestCase
from zope.interface.verify import verifyObject

from crabtwist.errors import ConfigurationError
from crabtwist.interfaces import ILedger
from crabtwist.ledger.schema import MIGRATIONS, upgrade
from crabtwist.ledger.sqlite import LARGEST_PAGE, LARGEST_SUM, SQLiteLedger, SQLiteLedgerSettings, _File
from crabtwist.money import DOLLAR
from crabtwist.records import Page, Record, Tokens, Total

DAY = 86_400_000_000
TOKENS = Tokens(
    input_tokens=1,
    cache_read_tokens=2,
    cache_write_tokens=3,
    cache_write_1h_tokens=4,
    output_tokens=5,
    reasoning_tokens=6,
)


@attrs.frozen
class Services:
    clock: Any
    directory: Path


def services(directory: Path) -> Services:
    from twisted.internet import reactor

    return Services(reactor, directory)


def new_path(case: TestCase) -> Path:
    return Path(case.mktemp()).absolute()


def record(number: int, **fields: Any) -> Record:
    known = {"accepted_at": number, "principal": "alice", "model": "large", "provider": "acme", "cost": 7}
    return Record(**{"id": f"req_{number}", "reason": "complete", "usage": TOKENS, **known, **fields})


#: A cursor with nothing after it.
NO_MORE = "LTEuLTE"


def mixed(number: int) -> list[Record]:
    """Return records of few principals, models, providers, reasons and times, ids in their order."""
    random = Random(1)
    return [
        record(
            random.randrange(5 * DAY) // 10**9 * 10**9,
            id=str(n),
            principal=random.choice(["alice", "bob"]),
            model=random.choice(["large", "small", "tiny"]),
            provider=random.choice(["acme", "other"]),
            reason=random.choice(["complete", "complete", "truncated"]),
            cost=random.randrange(10**9),
        )
        for n in range(number)
    ]


def names(page: Page) -> list[str]:
    return [each.id for each in page.records]


class Case(TestCase):
    async def opened(self, path: Path | None = None) -> SQLiteLedger:
        self.path = path or new_path(self)
        place = SQLiteLedgerSettings(self.path.name)
        ledger = SQLiteLedger(place, services(self.path.parent))
        await ledger.open()
        self.addCleanup(ledger.close)
        return ledger

    async def filled(self, records: Sequence[Record]) -> SQLiteLedger:
        ledger = await self.opened()
        await ledger.append(records)
        return ledger

    async def assertFails(self, error: type[Exception], deferred: Any) -> Exception:
        return await self.assertFailure(deferred, error)


class TestFile(Case):
    async def test_is_a_ledger(self) -> None:
        """It provides the whole contract."""
        self.assertTrue(verifyObject(ILedger, await self.opened()))

    async def test_kept(self) -> None:
        """What was appended is there when the file is opened again, and the thread is gone in between."""
        threads = active_count()
        ledger = await self.opened()
        await ledger.append([record(1)])
        await ledger.close()
        self.assertEqual(active_count(), threads)
        again = await self.opened(self.path)
        self.assertEqual(await again.get("req_1"), record(1))

    async def test_durable(self) -> None:
        """A commit is on the disk before it is confirmed, and the file is its owner's alone."""
        ledger = await self.opened()
        assert ledger._file is not None
        pragma = ledger._file._database.execute
        modes = await ledger._do(lambda _: [pragma(f"PRAGMA {name}").fetchone()[0] for name in PRAGMAS])
        self.assertEqual(modes, ["wal", FULL])
        self.assertEqual(self.path.stat().st_mode & 0o777, 0o600)

    async def test_not_open(self) -> None:
        """Before it is opened and after it was closed nothing works, and closing it again does."""
        ledger = SQLiteLedger(SQLiteLedgerSettings(), services(Path()))
        await ledger.close()
        ledger = await self.opened()
        await ledger.close()
        await ledger.close()
        await self.assertFails(RuntimeError, ledger.get("a"))

    async def test_unusable(self) -> None:
        """A file that cannot be opened, or is none of SQLite's, is named; no thread stays behind."""
        threads, path = active_count(), new_path(self)
        path.write_text("dear diary, " * 1000)
        for unusable in (path, path.parent, path / "below"):
            error = await self.assertFails(ConfigurationError, self.opened_deferred(unusable))
            self.assertIn(str(unusable), str(error))
        self.assertEqual((active_count(), path.read_text()[:10]), (threads, "dear diary"))

    def opened_deferred(self, path: Path) -> Any:
        return SQLiteLedger(SQLiteLedgerSettings(path.name), services(path.parent)).open()

    async def test_newer(self) -> None:
        """A file of a newer version is refused and left alone."""
        ledger = await self.opened()
        await ledger.close()
        with closing(sqlite3.connect(self.path)) as database:
            database.execute("PRAGMA user_version = 99")
        error = await self.assertFails(ConfigurationError, self.opened_deferred(self.path))
        self.assertIn("newer", str(error))
        with closing(sqlite3.connect(self.path)) as database:
            self.assertEqual(database.execute("PRAGMA user_version").fetchone(), (99,))


PRAGMAS, FULL = ("journal_mode", "synchronous"), 2


class TestMigrations(SynchronousTestCase):
    MORE = ("ALTER TABLE record ADD COLUMN mood TEXT", "UPDATE record SET mood = 'fine'")

    def setUp(self) -> None:
        self.database = sqlite3.connect(":memory:", isolation_level=None)
        self.addCleanup(self.database.close)
        upgrade(self.database, "a.db")
        self.database.execute("INSERT INTO record VALUES (1, 'a', 2, 'p', 'm', 'v', 'r', '{}')")

    def rows(self) -> list[Any]:
        return self.database.execute("SELECT * FROM record").fetchall()

    def version(self) -> int:
        return int(self.database.execute("PRAGMA user_version").fetchone()[0])

    def test_older(self) -> None:
        """An older file takes the steps that it lacks, once, and keeps what it has."""
        for _ in range(2):
            upgrade(self.database, "a.db", [*MIGRATIONS, self.MORE])
            self.assertEqual(self.rows(), [(1, "a", 2, "p", "m", "v", "r", "{}", "fine")])
            self.assertEqual(self.version(), len(MIGRATIONS) + 1)

    def test_failed_step(self) -> None:
        """A step that fails leaves nothing of itself behind."""
        broken = (*self.MORE, "SELECT nonsense")
        self.assertRaises(sqlite3.Error, upgrade, self.database, "a.db", [*MIGRATIONS, broken])
        self.assertEqual(self.rows(), [(1, "a", 2, "p", "m", "v", "r", "{}")])
        self.assertEqual(self.version(), len(MIGRATIONS))

    def test_strangers(self) -> None:
        """Another program's file is refused, whether it has an owner or not."""
        for statement in ("PRAGMA application_id = 5", "CREATE TABLE theirs (a)"):
            with closing(sqlite3.connect(":memory:", isolation_level=None)) as database:
                database.execute(statement)
                self.assertRaises(ConfigurationError, upgrade, database, "a.db")
                self.assertEqual(database.execute("PRAGMA user_version").fetchone(), (0,))


class TestAppend(Case):
    async def test_once(self) -> None:
        """A record that is there already changes nothing, in the same list or later, whatever is in it."""
        ledger = await self.opened()
        self.assertEqual(await ledger.append([record(1), record(2), record(1)]), 2)
        self.assertEqual(await ledger.append([record(2, cost=1000), record(3)]), 1)
        self.assertEqual(names(await ledger.records()), ["req_3", "req_2", "req_1"])
        (total,) = await ledger.totals(())
        self.assertEqual((total.requests, total.cost), (3, 21))

    async def test_all_or_none(self) -> None:
        """When one of a list cannot be written, none is, and the totals do not count any."""
        ledger = await self.opened()
        await self.assertFails(OverflowError, ledger.append([record(1), record(2**70)]))
        self.assertEqual(names(await ledger.records()), [])
        self.assertEqual(await ledger.totals(()), [])
        self.assertEqual(await ledger.append([record(1)]), 1)

    async def test_get(self) -> None:
        """A record comes back as it was, and None for an id that there is not."""
        odd = record(1, principal=None, message="a\nb\u2028\x07", price_row={"model": "m"}, cost=10**40)
        ledger = await self.filled([odd])
        self.assertEqual((await ledger.get("req_1"), await ledger.get("req_2")), (odd, None))


class TestRecords(Case):
    async def test_pages(self) -> None:
        """Pages follow each other without gap or repetition, newest first, also within a microsecond."""
        expected = [record(number, accepted_at=number // 4) for number in range(50)]
        ledger = await self.filled(expected)
        found, before = [], None
        while True:
            page = await ledger.records(before=before, limit=7)
            found += names(page)
            if (before := page.before) is None:
                break
            await ledger.append([record(1000 + len(found))])
        self.assertEqual(found, [each.id for each in reversed(expected)])

    async def test_filters(self) -> None:
        """Each filter, and all of them together, leave only what fits."""
        fields = {"principal": "bob", "model": "small", "provider": "other", "reason": "truncated"}
        odd = [record(number, **{name: value}) for number, (name, value) in enumerate(fields.items())]
        ledger = await self.filled([*odd, record(8, **fields), record(9)])
        for number, (name, value) in enumerate(fields.items()):
            page = await ledger.records(**{name: value})  # type: ignore[arg-type] # their names are its own
            self.assertEqual(names(page), ["req_8", f"req_{number}"])
        self.assertEqual(names(await ledger.records(**fields)), ["req_8"])  # type: ignore[arg-type] # likewise

    async def test_any_filters(self) -> None:
        """Whatever filters come together, pages hold what fits all of them, newest first."""
        records = mixed(300)
        ledger = await self.filled(records)
        for length in range(5):
            for chosen in combinations(("principal", "model", "provider", "reason"), length):
                wanted = {name: getattr(records[7], name) for name in chosen}
                fit = [each for each in records if all(getattr(each, n) == v for n, v in wanted.items())]
                first = await ledger.records(**wanted, limit=5)
                rest = await ledger.records(**wanted, limit=500, before=first.before or NO_MORE)
                expected = sorted(fit, key=lambda each: (each.accepted_at, int(each.id)), reverse=True)
                self.assertEqual([*first.records, *rest.records], expected)

    async def test_without_a_key(self) -> None:
        """Requests without a key are found by the empty name."""
        ledger = await self.filled([record(1), record(2, principal=None)])
        self.assertEqual(names(await ledger.records(principal="")), ["req_2"])

    async def test_times(self) -> None:
        """`since` is included, `until` is not, and both bound the pages that follow too."""
        ledger = await self.filled([record(number) for number in range(10)])
        page = await ledger.records(since=3, until=7, limit=2)
        self.assertEqual(names(page), ["req_6", "req_5"])
        page = await ledger.records(since=3, until=7, limit=2, before=page.before)
        self.assertEqual((names(page), page.before), (["req_4", "req_3"], None))

    async def test_limits(self) -> None:
        """A page has at least one record and at most a thousand."""
        ledger = await self.filled([record(number) for number in range(LARGEST_PAGE + 1)])
        for limit, length in ((0, 1), (-5, 1), (10**9, LARGEST_PAGE)):
            self.assertEqual(len((await ledger.records(limit=limit)).records), length)

    async def test_foreign_cursors(self) -> None:
        """A cursor that no page had is refused; none of them is SQL."""
        ledger = await self.filled([record(1)])
        for cursor in ("", "x", "1.2", "é", "MQ", "MS54", "MS4yLjM", "' OR 1"):
            await self.assertFails(ValueError, ledger.records(before=cursor))


class TestTotals(Case):
    async def test_classes(self) -> None:
        """Requests, every class of tokens and costs are summed; the unpriced and guessed are counted."""
        odd = [record(3, cost=None), record(4, usage=None), record(5, estimated=True)]
        ledger = await self.filled([record(1), record(2), *odd])
        (total,) = await ledger.totals(())
        sums = Total(None, None, None, None, 5, 1, 1, 4, 8, 12, 16, 20, 24, 28)
        self.assertEqual(total, sums)

    async def test_by(self) -> None:
        """Totals are by any of key, model, provider and day, sorted."""
        others = [record(DAY, principal="bob"), record(DAY + 1, model="small"), record(3, provider="other")]
        ledger = await self.filled([record(DAY - 1), *others])
        found = await ledger.totals(("day", "principal"))
        self.assertEqual(
            [(each.principal, each.day, each.requests) for each in found],
            [("alice", date(1970, 1, 1), 2), ("alice", date(1970, 1, 2), 1), ("bob", date(1970, 1, 2), 1)],
        )
        for by, expected in {"model": ["large", "small"], "provider": ["acme", "other"]}.items():
            self.assertEqual([getattr(each, by) for each in await ledger.totals((by,))], expected)

    async def test_by_anything(self) -> None:
        """By whatever totals are, they are the sums of the records."""
        records = mixed(300)
        ledger = await self.filled(records)
        for length in range(5):
            for by in combinations(("principal", "model", "provider", "day"), length):
                sums: Counter[tuple[Any, ...]] = Counter()
                for each in records:
                    day = date(1970, 1, 1) + timedelta(days=each.accepted_at // DAY)
                    sums[tuple(day if name == "day" else getattr(each, name) for name in by)] += (
                        each.cost or 0
                    )
                found = await ledger.totals(by)
                self.assertEqual(
                    {tuple(getattr(each, name) for name in by): each.cost for each in found}, sums
                )

    async def test_days(self) -> None:
        """`since` is included, `until` is not; without records there is no total."""
        ledger = await self.filled([record(number * DAY) for number in range(10)])
        for since, until, days in (
            (None, None, 10),
            (date(1970, 1, 3), None, 8),
            (None, date(1970, 1, 3), 2),
            (date(1970, 1, 3), date(1970, 1, 5), 2),
        ):
            self.assertEqual((await ledger.totals((), since=since, until=until))[0].requests, days)
        self.assertEqual(await ledger.totals((), since=date(1990, 1, 1)), [])

    async def test_made_up_names(self) -> None:
        """What a client made up gets no row of its own; a model that a cache answered does."""
        junk = [record(number, provider="", model=f"junk {number}") for number in range(100)]
        cached = record(200, provider="", model="large", cache_hit=True)
        ledger = await self.filled([*junk, cached, record(201, principal=None)])
        found = await ledger.totals(("principal", "model"))
        self.assertEqual(
            [(each.principal, each.model, each.requests) for each in found],
            [("", "large", 1), ("alice", "", 100), ("alice", "large", 1)],
        )

    async def test_other_words(self) -> None:
        """Totals by anything else are refused."""
        ledger = await self.filled([record(1)])
        for by in (("cost",), ("principal", "1; DROP TABLE record")):
            await self.assertFails(ValueError, ledger.totals(by))

    async def test_huge_sums(self) -> None:
        """Sums are exact far beyond 64 bits of picodollars, in one row and over many."""
        random, costs = Random(1), []
        ledger = await self.opened()
        for batch in range(20):
            part = [random.randrange(10**22, 10**24) for _ in range(50)]
            costs += part
            numbers = range(batch * 50, batch * 50 + 50)
            await ledger.append([record(n, cost=cost) for n, cost in zip(numbers, part, strict=True)])
            more = [record(n * DAY, id=f"x{n}", cost=cost) for n, cost in zip(numbers, part, strict=True)]
            await ledger.append(more)
        (total,) = await ledger.totals(())
        self.assertGreater(total.cost, 2**63 * 10**6)
        self.assertEqual(total.cost, 2 * sum(costs))

    async def test_absurd_sums(self) -> None:
        """What nobody can have used or paid stops at a bound, and breaks nothing."""
        usage = Tokens(input_tokens=2**80)
        ledger = await self.filled([record(n, usage=usage, cost=10**60) for n in range(3)])
        await ledger.append([record(DAY + n, usage=usage, cost=10**60) for n in range(3)])
        (total,) = await ledger.totals(())
        self.assertEqual((total.input_tokens, total.cost // DOLLAR), (2 * LARGEST_SUM, 2 * LARGEST_SUM))

    @given(st.lists(st.integers(0, 10**15), min_size=1, max_size=20), st.integers(1, 5))
    @settings(deadline=None, max_examples=30)
    def test_any_batches(self, costs: list[int], batch: int) -> None:
        """However records come, the totals are the sum of the records."""
        file = _File(Path(self.mktemp()))
        self.addCleanup(file.close)
        records = [record(n * DAY // 3, id=str(n), cost=cost) for n, cost in enumerate(costs)]
        for start in range(0, len(records), batch):
            # Each batch begins with the end of the one before it, as after a crash.
            file.append(records[max(0, start - 2) : start + batch])
        (total,) = file.totals((), None, None)
        self.assertEqual((total.requests, total.cost), (len(costs), sum(costs)))


class TestPrune(Case):
    async def test_by_age(self) -> None:
        """Records that were accepted before a time are forgotten, in as many steps as it takes."""
        ledger = await self.filled([record(number) for number in range(100)])
        self.assertEqual(await ledger.prune(older_than=90, step=7), 90)
        self.assertEqual(names(await ledger.records())[-1], "req_90")
        self.assertEqual(await ledger.prune(older_than=90), 0)

    async def test_by_size(self) -> None:
        """The oldest records beyond a number are forgotten, and none if there are fewer."""
        ledger = await self.filled([record(number) for number in range(100)])
        self.assertEqual(await ledger.prune(max_records=200), 0)
        self.assertEqual(await ledger.prune(max_records=15, step=9), 85)
        self.assertEqual(names(await ledger.records()), [f"req_{n}" for n in range(99, 84, -1)])

    async def test_both(self) -> None:
        """Age and number together forget what either would; without them nothing is forgotten."""
        ledger = await self.filled([record(number) for number in range(100)])
        self.assertEqual(await ledger.prune(), 0)
        self.assertEqual(await ledger.prune(older_than=50, max_records=20), 80)
        self.assertEqual(await ledger.prune(older_than=90, max_records=20), 10)

    async def test_totals_stay(self) -> None:
        """What was spent was spent: totals do not shrink with the records."""
        ledger = await self.filled([record(number) for number in range(100)])
        before = await ledger.totals(("day",))
        await ledger.prune(max_records=0)
        self.assertEqual((names(await ledger.records()), await ledger.totals(("day",))), ([], before))

    async def test_takes_turns(self) -> None:
        """Others are served between two steps."""
        ledger = await self.filled([record(number) for number in range(100)])
        pruning = ledger.prune(max_records=0, step=1)
        self.assertEqual(len((await ledger.records()).records), 100)
        left = len((await ledger.records()).records)
        self.assertTrue(0 < left < 100, left)
        self.assertEqual(await pruning, 100)
