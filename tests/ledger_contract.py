"""What every ledger has to do, whatever it is made of; each kind's own tests begin with these."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import date, timedelta
from itertools import combinations
from random import Random
from typing import Any

from twisted.internet.defer import CancelledError, gatherResults
from twisted.trial.unittest import TestCase
from zope.interface.verify import verifyObject

from crabtwist.errors import RecordRefused, StorageError
from crabtwist.interfaces import ILedger
from crabtwist.ledger.columns import LARGEST_PAGE, cursor_of
from crabtwist.records import Attempt, Page, Record, Tokens, Total

DAY = 86_400_000_000
TOKENS = Tokens(
    input_tokens=1,
    cache_read_tokens=2,
    cache_write_tokens=3,
    cache_write_1h_tokens=4,
    output_tokens=5,
    reasoning_tokens=6,
)


def record(number: int, **fields: Any) -> Record:
    known = {"accepted_at": number, "principal": "alice", "model": "large", "provider": "acme", "cost": 7}
    return Record(**{"id": f"req_{number}", "reason": "complete", "usage": TOKENS, **known, **fields})


#: A cursor with nothing after it.
NO_MORE = "LTEuLTE"
#: One whose numbers no row can have.
HUGE = cursor_of(10**30, 1)


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


def scattered(number: int, days: int) -> list[Record]:
    """Return records of days that go on, each with some of days before it and some before 1970."""
    random = Random(3)
    return [
        record(
            (n * days // number - random.choice([0, 0, 1, 2, 3, 40])) * DAY + random.randrange(DAY),
            id=str(n),
            principal=random.choice(["alice", "bob"]),
            model=random.choice(["large", "small"]),
            cost=random.randrange(10**13),
        )
        for n in range(number)
    ]


def names(page: Page) -> list[str]:
    return [each.id for each in page.records]


class LedgerContract(TestCase):
    """Subclassed with `make`; refer to it by its module, or trial runs it by itself."""

    def make(self) -> Any:
        """Return a ledger that is not open yet; all of one test's are on the same ground."""
        raise NotImplementedError

    async def opened(self) -> Any:
        """Return an open ledger, closed after the test."""
        ledger = self.make()
        await ledger.open()
        self.addCleanup(ledger.close)
        return ledger

    async def filled(self, records: Sequence[Record]) -> Any:
        """Return an open ledger with records."""
        ledger = await self.opened()
        await ledger.append(records)
        return ledger

    async def assert_fails(self, error: type[Exception], deferred: Any) -> Exception:
        """Return the failure, which has to be of that kind."""
        failure: Exception = await self.assertFailure(deferred, error)
        return failure

    async def test_is_a_ledger(self) -> None:
        """It provides the whole contract."""
        self.assertTrue(verifyObject(ILedger, await self.opened()))

    async def test_kept(self) -> None:
        """What was appended is there when it is opened again."""
        ledger = await self.filled([record(1)])
        await ledger.close()
        again = await self.opened()
        self.assertEqual(await again.get("req_1"), record(1))
        (total,) = await again.totals(())
        self.assertEqual(total.requests, 1)

    async def test_not_open(self) -> None:
        """Before it is opened and after it was closed nothing works, and closing it again does."""
        ledger = self.make()
        await ledger.close()
        await self.assert_fails(StorageError, ledger.append([record(1)]))
        ledger = await self.opened()
        await ledger.close()
        await ledger.close()
        for call in (ledger.append([record(1)]), ledger.get("a"), ledger.records(), ledger.totals(())):
            await self.assert_fails(StorageError, call)

    # Appending.

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
        await self.assert_fails(RecordRefused, ledger.append([record(1), record(2**70)]))
        self.assertEqual(names(await ledger.records()), [])
        self.assertEqual(await ledger.totals(()), [])
        self.assertEqual(await ledger.append([record(1)]), 1)

    async def test_get(self) -> None:
        """A record comes back as it was, and None for an id that there is not."""
        odd = record(1, principal=None, message="a\nb\u2028\x07", price_row={"model": "m"}, cost=10**40)
        ledger = await self.filled([odd])
        self.assertEqual((await ledger.get("req_1"), await ledger.get("req_2")), (odd, None))

    async def test_nothing(self) -> None:
        """No records are fine."""
        self.assertEqual(await (await self.opened()).append([]), 0)

    async def test_at_the_same_time(self) -> None:
        """Lists that come at the same time, also the same ones, are added once."""
        ledger = await self.opened()
        lists = [mixed(60)[start : start + 20] for start in (0, 10, 20, 30, 40, 0)]
        new = await gatherResults([ledger.append(each) for each in lists])
        (total,) = await ledger.totals(())
        self.assertEqual((sum(new), total.requests), (60, 60))

    async def test_given_up(self) -> None:
        """An append that was cancelled and tried again counts once."""
        ledger = await self.opened()
        for _ in range(3):
            call = ledger.append([record(1)])
            call.addErrback(lambda failure: failure.trap(CancelledError) and None)
            call.cancel()
        await ledger.append([record(1)])
        (total,) = await ledger.totals(())
        self.assertEqual(total.requests, 1)

    async def test_odd_texts(self) -> None:
        """Texts of any kind are taken, and can be searched for; what no store holds is replaced."""
        odd = ("a\0b", "\ud800", "\N{CRAB}" * 1000, "%_\\'\"", "\n\u2028\x1b", "")
        records = [record(n, id=f"{text[:9]} {n}", model=text, message=text) for n, text in enumerate(odd)]
        attempts = (Attempt(provider="a\0", model="\udfff"),)
        records.append(record(99, attempts=attempts, price_row={"a\0": "\ud800"}))
        ledger = await self.filled(records)
        for each in records:
            found = await ledger.get(each.id)
            self.assertEqual(found.accepted_at, each.accepted_at)
            self.assertIn(found, (await ledger.records(model=each.model)).records)
        (total,) = await ledger.totals(())
        self.assertEqual(total.requests, len(records))

    async def test_refused(self) -> None:
        """What cannot be stored is refused as such, and the ledger goes on."""
        ledger = await self.opened()
        for bad in (record(2**70), record(1, cost=10**5000), record(-(2**63) - 1)):
            await self.assert_fails(RecordRefused, ledger.append([record(5), bad]))
        self.assertEqual(await ledger.append([record(5)]), 1)

    # Records.

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
            page = await ledger.records(**{name: value})
            self.assertEqual(names(page), ["req_8", f"req_{number}"])
        self.assertEqual(names(await ledger.records(**fields)), ["req_8"])

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
        for cursor in ("", "x", "1.2", "é", "MQ", "MS54", "MS4yLjM", "' OR 1", HUGE):
            await self.assert_fails(ValueError, ledger.records(before=cursor))

    # Totals.

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

    async def test_any_days(self) -> None:
        """Over whatever days totals are, and however late records came, they are the sums of the records."""
        random, records = Random(2), scattered(400, days=100)
        ledger = await self.opened()
        for start in range(0, 400, 40):
            await ledger.append(records[start : start + 50])
        for _ in range(40):
            first, end = sorted(random.choices(range(-20, 130), k=2))
            sums: Counter[Any] = Counter()
            for each in records:
                if first * DAY <= each.accepted_at < end * DAY:
                    sums[each.principal, each.model] += each.cost or 0
            since, until = (date(1970, 1, 1) + timedelta(days=day) for day in (first, end))
            found = await ledger.totals(("principal", "model"), since=since, until=until)
            self.assertEqual({(each.principal, each.model): each.cost for each in found}, sums)

    async def test_backwards_days(self) -> None:
        """Days that there is nothing between have no totals."""
        ledger = await self.filled([record(0), record(9 * DAY)])
        for since, until in ((date(1970, 1, 5), date(1970, 1, 5)), (date(1970, 1, 8), date(1970, 1, 2))):
            self.assertEqual(await ledger.totals((), since=since, until=until), [])

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
            await self.assert_fails(ValueError, ledger.totals(by))

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
        """What nobody can have used or paid breaks nothing."""
        usage = Tokens(input_tokens=2**80)
        ledger = await self.filled([record(n, usage=usage, cost=10**60) for n in range(3)])
        await ledger.append([record(n, id=f"x{n}", usage=usage, cost=10**60) for n in range(3)])
        (total,) = await ledger.totals(())
        self.assertEqual(total.requests, 6)
        self.assertGreaterEqual(total.input_tokens, 10**15)

    # Pruning.

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

    async def test_prune_by_all(self) -> None:
        """Several that prune at the same time forget no more than one of them would."""
        ledgers = [await self.opened() for _ in range(3)]
        await ledgers[0].append([record(number) for number in range(300)])
        pruned = await gatherResults([ledger.prune(max_records=50, step=7) for ledger in ledgers])
        self.assertEqual(sum(pruned), 250)
        self.assertEqual(names(await ledgers[0].records())[-1], "req_250")
