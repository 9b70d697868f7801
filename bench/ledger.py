"""
How fast the ledger in SQLite is: `python -m bench.ledger`, about ten minutes.

Prints, in Markdown, what a record costs that is appended (microseconds, of the clock and of the processor),
then, of a file with a million records of a month and the totals of a year, how long questions for totals
and for pages take (milliseconds, medians; for pages the slowest of each kind).  `--records` and
`--directory` (for the file, which takes about 1.5 kB a record) change that.
"""

# ruff: noqa: T201 - what it is for

from __future__ import annotations

import argparse
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import closing
from datetime import date, timedelta
from itertools import combinations
from pathlib import Path
from random import Random
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.task import react

from bench.machine import description
from crabtwist.ledger.columns import cursor_of
from crabtwist.ledger.sqlite import SQLiteLedger, SQLiteLedgerSettings
from crabtwist.records import MICROSECONDS, Attempt, Record, Tokens
from crabtwist.testing import FakeServices

BATCH_RECORDS = 250
TIMES = 7
MONTH_DAYS = 30
FIRST_DAY = date(2026, 3, 1)
START = (FIRST_DAY - date(1970, 1, 1)).days * 86400 * MICROSECONDS
MONTH = MONTH_DAYS * 86400 * MICROSECONDS
NAMES = ("principal", "model", "provider")
_SUMS = "requests, unpriced, estimated, input_tokens, cache_read_tokens, cache_write_tokens, "
_SUMS += "cache_write_1h_tokens, output_tokens, reasoning_tokens, cost_dollars, cost_rest"
_PRICE = {"vendor": "acme", "model": "m", "rates": {"input": 3_000_000, "output": 15_000_000}}


@attrs.frozen
class Crowd:
    """Who asks whom; each of them as often as any other, which is the worst for totals."""

    keys: int
    models: int
    providers: int

    def records(self, number: int) -> Iterator[Record]:
        """Return so many records of a month, in their order."""
        random = Random(1)  # noqa: S311 - the same each time
        for n in range(number):
            names = [f"{name}-{random.randrange(most)}" for name, most in attrs.asdict(self).items()]
            yield _record(random, START + n * MONTH // number, *names)


def _record(random: Random, at: int, key: str, model: str, provider: str) -> Record:
    return Record(
        id=f"req_{random.getrandbits(96):024x}",
        accepted_at=at,
        first_byte_at=at + 300_000,
        ended_at=at + 3_000_000,
        principal=key,
        operation="messages",
        dialect="anthropic",
        model_asked=model,
        model=model,
        provider=provider,
        upstream_model=model,
        attempts=(Attempt(provider=provider, model=model, status=200, duration_seconds=2.9),),
        status=200,
        reason=random.choices(["complete", "truncated", "client_left"], [97, 2, 1])[0],
        usage=Tokens(input_tokens=random.randrange(50_000), output_tokens=random.randrange(2000)),
        cost=random.randrange(10**11),
        price_row=_PRICE,
    )


FEW, MANY = Crowd(3, 2, 1), Crowd(300, 15, 3)


def ledger_in(path: Path, reactor: Any) -> SQLiteLedger:
    """Return the ledger in a file, not open yet."""
    return SQLiteLedger(SQLiteLedgerSettings(path.name), FakeServices(reactor, path.parent))


async def fill(ledger: SQLiteLedger, crowd: Crowd, number: int) -> None:
    """Append records, and print what one cost."""
    records, clock, processor = crowd.records(number), 0.0, 0.0
    for _ in range(0, number, BATCH_RECORDS):
        batch = [record for record, _ in zip(records, range(BATCH_RECORDS), strict=False)]
        began, worked = time.perf_counter(), time.process_time()
        await ledger.append(batch)
        clock += time.perf_counter() - began
        processor += time.process_time() - worked
    whom = f"{crowd.keys} keys, {crowd.models} models, {crowd.providers} providers"
    print(f"| {number} records: {whom} | {clock / number * 1e6:.0f} | {processor / number * 1e6:.0f} |")


def copy_totals(path: Path, months: int) -> None:
    """Let the months before have the totals of the one that there is."""
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("DELETE FROM total WHERE days > 1")
        database.execute("UPDATE spans SET over_until = 0")
        names = f"principal, model, provider, {_SUMS}"
        for month in range(1, months):
            database.execute(
                f"INSERT INTO total SELECT grouping_bits, 1, first - ?, {names} FROM total WHERE first >= ?",  # noqa: S608
                (month * MONTH_DAYS, (FIRST_DAY - date(1970, 1, 1)).days),
            )


async def milliseconds(ask: Callable[[], Awaitable[Any]]) -> tuple[float, Any]:
    """Return the median of a few times, and the answer."""
    taken = []
    for _ in range(TIMES):
        began = time.perf_counter()
        answer = await ask()
        taken.append((time.perf_counter() - began) * 1e3)
    return median(taken), answer


async def ask_totals(ledger: SQLiteLedger) -> None:
    """Print how long totals take: of the month, of as many days across two, and of a year."""
    end = FIRST_DAY + timedelta(days=MONTH_DAYS)
    shift = timedelta(days=14)
    ranges = [(FIRST_DAY, end), (FIRST_DAY - shift, end - shift), (None, None)]
    print("\n| totals by | rows | the month | 30 other days | the year |\n|---|---|---|---|---|")
    for by in (chosen for length in range(4) for chosen in combinations(NAMES, length)):
        taken = [
            await milliseconds(lambda: ledger.totals(by, since=since, until=until))  # noqa: B023 - asked at once
            for since, until in ranges
        ]
        print(f"| {', '.join(by) or 'nothing'} | {len(taken[0][1])} |", end="")
        print("".join(f" {each:.1f} |" for each, _ in taken))


async def ask_pages(ledger: SQLiteLedger, some: Record) -> None:
    """Print how long the slowest page takes, by how many filters there are."""
    filters = {**{name: getattr(some, name) for name in NAMES}, "reason": "truncated"}
    cursors = (None, cursor_of(START + MONTH // 2, 0), cursor_of(START + MONTH // 100, 0))
    print("\n| a page of 100, filters | slowest |\n|---|---|")
    for length in range(5):
        slowest = [
            (await milliseconds(lambda: ledger.records(**dict(chosen), before=before, until=until)))[0]  # noqa: B023
            for chosen in combinations(filters.items(), length)
            for before in cursors
            for until in (None, START + MONTH * 2 // 3)
        ]
        print(f"| {length} | {max(slowest):.1f} |")


async def measure(reactor: Any, directory: Path, number: int) -> None:
    """Print everything."""
    print(", ".join(f"{name}: {value}" for name, value in description().items()))
    print("\n| appended, 250 at a time | µs a record | µs of the processor |\n|---|---|---|")
    for name, crowd, records in (("few", FEW, number // 20), ("many", MANY, number)):
        ledger = ledger_in(directory / f"{name}.db", reactor)
        await ledger.open()
        await fill(ledger, crowd, records)
        await ledger.close()
    copy_totals(directory / "many.db", 12)
    ledger, began = ledger_in(directory / "many.db", reactor), time.perf_counter()
    await ledger.open()
    print(f"\nSums of a year's spans: {time.perf_counter() - began:.1f} s")
    await ask_totals(ledger)
    await ask_pages(ledger, next(MANY.records(1)))
    await ledger.close()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m bench.ledger", description=__doc__)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args(arguments)
    with TemporaryDirectory(dir=options.directory) as directory:
        react(lambda reactor: Deferred.fromCoroutine(measure(reactor, Path(directory), options.records)), ())


if __name__ == "__main__":
    main()
