"""The ledger on a real PostgreSQL: the contract, several nodes, and the server's misfortunes."""

from __future__ import annotations

import os
from datetime import date, timedelta
from random import Random
from typing import Any

import psycopg
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import SkipTest

from crabtwist.errors import RecordRefused, StorageError
from crabtwist.ledger import postgres_tables
from crabtwist.ledger.columns import SUMS, columns_of, summands, total_of
from crabtwist.ledger.postgres import PostgresLedger, PostgresLedgerSettings
from crabtwist.records import Record, Tokens
from crabtwist.settings import Secret
from crabtwist.storage.postgres import PostgresStorage
from crabtwist.testing import FakeServices
from tests import ledger_contract, storage_contract
from tests.integration import servers
from tests.ledger_contract import DAY, mixed, names, record, scattered

#: How long calls may take where nothing goes wrong, on a machine that is busy with other things.
PATIENCE_SECONDS = 20.0


FOLD = postgres_tables.fold


def insert_1(each: Record) -> str:
    """Return what inserts a total by everything, of one record, as it was kept in version 1."""
    day, *who = total_of(each, columns_of(each))
    values = ", ".join(f"'{name}'" for name in who)
    table = "crabtwist_total AS old"
    key = "(grouping_by, day, principal, model, provider)"
    changes = ", ".join(f"{name} = old.{name} + EXCLUDED.{name}" for name in SUMS)
    return f"""INSERT INTO {table} VALUES ('principal,model,provider', {day}, {values},
        {", ".join(map(str, summands(each)))}) ON CONFLICT {key} DO UPDATE SET {changes}"""


class TestPostgresLedger(ledger_contract.LedgerContract):
    """Each test in a schema of its own."""

    timeout = 120

    def setUp(self) -> Any:
        """Have a schema."""
        if servers.postgres_programs() is None:
            raise SkipTest("the Debian package postgresql is missing")
        from twisted.internet import reactor

        self.reactor: Any = reactor
        self.server = servers.postgres()
        self.number = storage_contract.next_number()
        return deferToThread(self.run_sql, f"CREATE SCHEMA ledger_{self.number}")

    def run_sql(self, *statements: str) -> list[Any]:
        """Run statements in the test's schema, and return the rows of the last, if it has any."""
        options = f"-c search_path=ledger_{self.number}"
        with psycopg.connect(self.server.dsn, autocommit=True, options=options) as connection:
            *_, last = [connection.execute(statement.encode()) for statement in statements]
            return last.fetchall() if last.description else []

    def make(self, **changes: Any) -> PostgresLedger:
        """Return a ledger in the test's schema."""
        dsn = f"{self.server.dsn}?options=-csearch_path%3Dledger_{self.number}"
        settings = {"dsn": Secret(dsn), "call_timeout": PATIENCE_SECONDS, "connect_timeout": 2, **changes}
        return PostgresLedger(PostgresLedgerSettings(**settings), FakeServices(self.reactor))

    async def several(self, number: int = 4, **changes: Any) -> list[Any]:
        """Return so many open ledgers on the same tables, as nodes have them."""
        ledgers = [self.make(**changes) for _ in range(number)]
        for ledger in ledgers:
            self.addCleanup(ledger.close)
        await gatherResults([ledger.open() for ledger in ledgers])
        return ledgers

    # Several nodes.

    async def test_nodes(self) -> None:
        """What several nodes append at the same time is summed up exactly, and none waits for ever."""
        ledgers, records = await self.several(), mixed(400)
        parts = [records[start : start + 20] for start in range(0, 400, 20)]
        calls = [ledgers[n % 4].append(part) for n, part in enumerate(parts)]
        self.assertEqual(sum(await gatherResults(calls)), 400)
        for by in ((), ("model", "day"), ("principal", "model", "provider")):
            totals = await ledgers[0].totals(by)
            self.assertEqual(sum(total.requests for total in totals), 400)
            self.assertEqual(sum(total.cost for total in totals), sum(each.cost or 0 for each in records))

    async def test_same_records_from_all(self) -> None:
        """Records that several nodes append at once, in any order, are there once."""
        ledgers, random, number = await self.several(), Random(1), 500
        for start in range(0, 5 * number, number):
            part = [record(n, model=f"model {n % 50}") for n in range(start, start + number)]
            calls = [ledger.append(random.sample(part, number)) for ledger in ledgers]
            self.assertEqual(sum(await gatherResults(calls)), number)
        (total,) = await ledgers[0].totals(())
        self.assertEqual((total.requests, total.cost), (5 * number, 5 * number * 7))

    async def test_same_totals_from_all(self) -> None:
        """Nodes that add to the same totals at once, in any order, do not wait for each other in a circle."""
        ledgers, random = await self.several(), Random(1)
        for turn in range(10):
            lists = [
                [record(n, id=f"{turn} {node} {n}", model=f"model {n}") for n in range(200)]
                for node in range(4)
            ]
            calls = [
                ledger.append(random.sample(part, 200)) for ledger, part in zip(ledgers, lists, strict=True)
            ]
            self.assertEqual(await gatherResults(calls), [200] * 4)
        totals = await ledgers[0].totals(("model",))
        self.assertEqual([total.requests for total in totals], [40] * 200)

    async def test_days_from_all(self) -> None:
        """While days end for several nodes at once, and records of earlier days come, sums stay exact."""
        ledgers, records = await self.several(), scattered(1200, days=300)
        calls = [ledgers[n % 4].append(records[n * 10 : n * 10 + 10]) for n in range(120)]
        self.assertEqual(sum(await gatherResults(calls)), 1200)
        await ledgers[0].append([record(400 * DAY, id="last", cost=0)])
        for first, end in ((0, 64), (3, 290), (-50, 500), (100, 131)):
            days = [date(1970, 1, 1) + timedelta(days=day) for day in (first, end)]
            (total,) = await ledgers[1].totals((), since=days[0], until=days[1])
            fit = [each.cost or 0 for each in records if first * DAY <= each.accepted_at < end * DAY]
            self.assertEqual(total.cost, sum(fit))

    async def test_one_connection(self) -> None:
        """One connection is enough."""
        ledger = self.make(connections=1)
        await ledger.open()
        self.addCleanup(ledger.close)
        calls = [ledger.append([record(n)]) for n in range(20)]
        page = await ledger.records()
        self.assertEqual((len(page.records), await gatherResults(calls)), (20, [1] * 20))

    # Exactness.

    async def test_any_sums(self) -> None:
        """Sums are exact whatever their length."""
        usage = Tokens(input_tokens=2**80)
        ledger = await self.filled([record(n, usage=usage, cost=10**60 + n) for n in range(3)])
        await ledger.append([record(3, usage=usage, cost=10**60 + 3)])
        (total,) = await ledger.totals(())
        self.assertEqual((total.input_tokens, total.cost), (4 * 2**80, 4 * 10**60 + 6))

    async def test_refused_by_the_server(self) -> None:
        """An id that no index takes is refused as a record that cannot be stored, and says nothing of it."""
        ledger, long = await self.opened(), "".join(chr(0x4E00 + n) for n in range(3000))
        error = await self.assert_fails(RecordRefused, ledger.append([record(1), record(2, id=long)]))
        self.assertNotIn(long[:9], str(error))
        self.assertEqual((await ledger.totals(()), await ledger.append([record(1)])), ([], 1))

    async def test_longest_names(self) -> None:
        """Names of any length that do not compress are taken, and found."""
        long = "".join(chr(0x4E00 + n * 7) for n in range(1000))
        whole = record(1, principal=long, model=long[::-1], provider=long[5:], reason=long[9:])
        ledger = await self.filled([whole, record(2)])
        self.assertEqual((await ledger.records(principal=long)).records, (whole,))
        self.assertEqual((await ledger.records(model=long[::-1], reason=long[9:])).records, (whole,))

    async def test_durable(self) -> None:
        """What is confirmed is on the disk, also where the server is set to be faster than that."""
        dsn = f"{self.server.dsn}?options=-csearch_path%3Dledger_{self.number}%20-csynchronous_commit%3Doff"
        ledger = self.make(dsn=Secret(dsn))
        await ledger.open()
        self.addCleanup(ledger.close)
        await ledger.append([record(1)])
        (row,) = await ledger._lanes[0].ask(lambda it: it.execute("SHOW synchronous_commit").fetchall(), 9)
        self.assertEqual(row, ("on",))

    async def test_not_compiled(self) -> None:
        """The server compiles no statement, which would take it much longer than to run it."""
        ledger = await self.opened()
        for lane in ledger._lanes:
            (row,) = await lane.ask(lambda it: it.execute("SHOW jit").fetchall(), PATIENCE_SECONDS)
            self.assertEqual(row, ("off",))

    async def test_foreign_client_encoding(self) -> None:
        """What the environment says of encodings keeps no text away."""
        os.environ["PGCLIENTENCODING"] = "LATIN1"
        self.addCleanup(os.environ.pop, "PGCLIENTENCODING")
        ledger = await self.filled([record(1, model="\N{CRAB}")])
        self.assertEqual(names(await ledger.records(model="\N{CRAB}")), ["req_1"])

    # Schemas and settings.

    async def test_opened_at_once(self) -> None:
        """Several may open on new ground at the same time."""
        ledgers = await self.several(6)
        counts = await gatherResults([ledger.append([record(n)]) for n, ledger in enumerate(ledgers)])
        self.assertEqual(counts, [1] * 6)

    async def test_older_schema(self) -> None:
        """An older schema takes the steps that it lacks, and keeps what it has."""
        await self.filled([record(1)])
        step = ("ALTER TABLE crabtwist_record ADD COLUMN mood text",)
        self.patch(postgres_tables, "STEPS", (*postgres_tables.STEPS, step))
        ledger = (await self.several())[0]
        self.assertEqual(await ledger.get("req_1"), record(1))
        self.assertEqual(await deferToThread(self.run_sql, "SELECT mood FROM crabtwist_record"), [(None,)])

    async def test_of_version_1(self) -> None:
        """A schema with totals of days alone is brought up to date, and its totals are what they were."""
        steps, records = postgres_tables.STEPS, scattered(60, days=70)
        self.patch(postgres_tables, "STEPS", steps[:1])
        # What opens it makes sums of spans, which there were none of.
        self.patch(postgres_tables, "fold", lambda _: None)
        await (await self.opened()).close()
        await deferToThread(self.run_sql, *map(insert_1, records))
        self.patch(postgres_tables, "STEPS", steps)
        self.patch(postgres_tables, "fold", FOLD)
        ledger = await self.opened()
        await ledger.append([record(60 * DAY, id="late", cost=1), record(80 * DAY, id="new", cost=2)])
        for days in ({}, {"since": date(1970, 1, 6), "until": date(1970, 3, 3)}):
            for by in (("principal", "model"), ("model", "provider")):
                total = sum(each.cost for each in await ledger.totals(by, **days))
                bounds = (5 * DAY, 61 * DAY) if days else (-100 * DAY, 100 * DAY)
                fit = [each.cost or 0 for each in records if bounds[0] <= each.accepted_at < bounds[1]]
                self.assertEqual(total, sum(fit) + (1 if days else 3))

    async def test_newer_schema(self) -> None:
        """A newer schema is refused."""
        await self.opened()
        await deferToThread(self.run_sql, "UPDATE crabtwist_schema SET version = 99 WHERE part = 'ledger'")
        error = await self.assert_fails(StorageError, self.make().open())
        self.assertIn("schema version 99", str(error))

    async def test_beside_a_store(self) -> None:
        """The ledger and a store may share a schema."""
        await self.opened()
        store = PostgresStorage(self.make()._settings, FakeServices(self.reactor))
        await store.open()
        await store.close()
        rows = await deferToThread(self.run_sql, "SELECT part FROM crabtwist_schema ORDER BY part")
        self.assertEqual(rows, [("ledger",), ("storage",)])

    async def test_other_encodings(self) -> None:
        """A database that cannot hold every text is refused in words."""
        name = f"latin_{self.number}"
        create = f"CREATE DATABASE {name} ENCODING 'LATIN1' TEMPLATE template0"
        await deferToThread(self.run_sql, create)
        other = Secret(self.server.dsn.replace("/postgres", f"/{name}"))
        error = await self.assert_fails(StorageError, self.make(dsn=other).open())
        self.assertIn("LATIN1", str(error))

    async def test_unreachable(self) -> None:
        """Where no server is the start fails, says where, and never the password."""
        away = f"postgresql://gateway:{self.server.quoted_password}@127.0.0.1:{servers.free_port()}/postgres"
        error = await self.assert_fails(StorageError, self.make(dsn=Secret(away)).open())
        self.assertIn("127.0.0.1", str(error))
        self.assertNotIn(self.server.password, str(error))

    def test_settings(self) -> None:
        """Settings that would be misread are refused, without a word of the password."""
        error = self.assertRaises(ValueError, PostgresLedgerSettings, dsn=Secret("postgresql://u:p@ss@h/d"))
        self.assertNotIn("ss@", str(error))
        for name in ("connections", "connect_timeout", "call_timeout"):
            with self.assertRaises(ValueError):
                self.make(**{name: 0})

    # Misfortunes.

    async def test_hang(self) -> None:
        """A server that hangs fails calls in time; what it did after all counts once."""
        await self.opened()
        ledger = self.make(call_timeout=storage_contract.CALL_SECONDS)
        await ledger.open()
        self.addCleanup(ledger.close)
        await ledger.append([record(1)])
        self.server.pause()
        try:
            for call in (ledger.append([record(2)]), ledger.get("req_1"), ledger.totals(())):
                began = self.reactor.seconds()
                await self.assert_fails(StorageError, call)
                limit = storage_contract.CALL_SECONDS + storage_contract.GRACE_SECONDS
                self.assertLess(self.reactor.seconds() - began, limit)
        finally:
            self.server.resume()
        await self.until_it_takes(ledger, 2)
        (total,) = await ledger.totals((), since=date(1970, 1, 1))
        self.assertEqual(total.requests, 2)

    async def test_killed(self) -> None:
        """A server that was killed and started again has what it confirmed, and takes the rest."""
        ledger = await self.filled([record(1)])
        self.server.kill()
        await self.assert_fails(StorageError, ledger.append([record(2)]))
        await deferToThread(self.server.start)
        await self.until_it_takes(ledger, 2)
        self.assertEqual(names(await ledger.records()), ["req_2", "req_1"])

    async def until_it_takes(self, ledger: Any, number: int) -> None:
        """Append a record until that succeeds."""
        deadline = self.reactor.seconds() + PATIENCE_SECONDS
        while True:
            try:
                await ledger.append([record(number)])
            except StorageError:
                self.assertLess(self.reactor.seconds(), deadline)
            else:
                return
            pause: Deferred[None] = Deferred()
            self.reactor.callLater(0.05, pause.callback, None)
            await pause
