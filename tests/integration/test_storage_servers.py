"""Stores on real servers: the contract, and what servers do to those who rely on them."""

from __future__ import annotations

from typing import Any

import psycopg
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import SkipTest

from crabtwist.settings import Secret
from crabtwist.storage import postgres
from crabtwist.storage.postgres import PostgresStorage
from crabtwist.storage.postgres_lane import PostgresSettings
from crabtwist.storage.redis import RedisSettings, RedisStorage
from crabtwist.testing import FakeServices
from tests import storage_contract
from tests.integration import servers


class TestPostgresStorage(storage_contract.ServedStorageContract):
    """PostgreSQL, each test in a schema of its own."""

    def setUp(self) -> Any:
        if servers.postgres_programs() is None:
            raise SkipTest("the Debian package postgresql is missing")
        self.server = servers.postgres()
        return super().setUp()

    async def begin(self) -> None:
        await self.move()
        await super().begin()

    async def move(self) -> None:
        self.number = storage_contract.next_number()
        await deferToThread(self.run_sql, f"CREATE SCHEMA test_{self.number}")

    def run_sql(self, *statements: str) -> list[Any]:
        """Run statements in the test's schema, and return the rows of the last, if it has any."""
        options = f"-c search_path=test_{self.number}"
        with psycopg.connect(self.server.dsn, autocommit=True, options=options) as connection:
            *_, last = [connection.execute(statement.encode()) for statement in statements]
            return last.fetchall() if last.description else []

    def make(self, **changes: Any) -> PostgresStorage:
        dsn = f"{self.server.dsn}?options=-csearch_path%3Dtest_{self.number}"
        settings = {
            "dsn": Secret(dsn),
            "call_timeout": self.patience_seconds,
            "connect_timeout": 2,
            **changes,
        }
        return PostgresStorage(PostgresSettings(**settings), FakeServices(self.reactor))

    async def test_unreachable(self) -> None:
        """Where no server is, or the password is wrong, the start fails and says where."""
        away = f"postgresql://gateway:{self.server.quoted_password}@127.0.0.1:{servers.free_port()}/postgres"
        self.assertIn("127.0.0.1", await self.refused(dsn=Secret(away)))
        wrong = self.server.dsn.replace(self.server.quoted_password, "wrong-word")
        self.assertIn("password authentication failed", await self.refused(dsn=Secret(wrong)))

    async def test_hang_at_the_start(self) -> None:
        """A server that hangs fails the start in time."""
        await self.lose_patience()
        self.server.pause()
        try:
            began = self.reactor.seconds()
            await self.refused()
            self.assertLess(self.reactor.seconds() - began, 2 + storage_contract.GRACE_SECONDS)
        finally:
            self.server.resume()

    async def test_hang_keeps_no_thread(self) -> None:
        """A call that was given up also gives up its connection, and does not hold up those after it."""
        await self.lose_patience()
        await self.store.set("n", b"k", b"v")
        self.server.pause()
        try:
            success, _ = await self.timed(self.store.get("n", b"k"))
            await self.pass_time(0.1)
            self.assertEqual((success, sum(lane.waiting for lane in self.store._lanes)), (False, 0))
        finally:
            self.server.resume()

    def test_dsn(self) -> None:
        """A connection string that would be misread is refused, without a word of it."""
        for dsn in (
            "p@ss",
            "postgresql://u:p@ss@h/d",
            "postgresql://u:pa/p@ss@h/d",
            "postgresql://u:p@ss:w@h",
        ):
            error = self.assertRaises(ValueError, PostgresSettings, dsn=Secret(dsn))
            self.assertNotIn("ss", str(error).replace("password", ""))

    async def test_older_schema(self) -> None:
        """An older schema takes the steps that it lacks, once, however many nodes start at once."""
        await self.store.set("n", b"k", b"v")
        step = ("CREATE TABLE later (a int)", "INSERT INTO later VALUES (1)")
        self.patch(postgres, "STEPS", (*postgres.STEPS, step))
        stores = await gatherResults([Deferred.fromCoroutine(self.opened()) for _ in range(4)])
        self.assertEqual(await stores[0].get("n", b"k"), b"v")
        self.assertEqual(await deferToThread(self.run_sql, "SELECT * FROM later"), [(1,)])

    async def test_schema_without_boards(self) -> None:
        """A schema from before there were boards gets them, and keeps what it holds."""
        await self.move()
        now = postgres.STEPS
        self.patch(postgres, "STEPS", now[:1])
        old = await self.opened()
        await old.set("n", b"k", b"v")
        self.patch(postgres, "STEPS", now)
        new = await self.opened()
        await new.post("n", b"m", {b"k": b"note"})
        self.assertEqual((await old.get("n", b"k"), await new.boards("n")), (b"v", {b"k": {b"m": b"note"}}))

    def test_for_several_nodes(self) -> None:
        """Other nodes see the same."""
        self.assertIs(self.store.between_nodes, True)

    async def test_newer_schema(self) -> None:
        """A newer schema is refused."""
        await deferToThread(self.run_sql, "UPDATE crabtwist_schema SET version = 99")
        self.assertIn("schema version 99", await self.refused())

    async def test_expired_rows_are_deleted(self) -> None:
        """What has expired leaves the tables though nobody asks for it."""
        store = self.make(sweep_interval=0.05)
        await store.open()
        self.addCleanup(store.close)
        await store.set("n", b"k", b"v", ttl_seconds=0.1)
        await store.increment("n", b"k", 1, ttl_seconds=0.1)
        await store.post("n", b"m", {b"k": b"v"}, ttl_seconds=0.1)
        tables = ("crabtwist_entry", "crabtwist_counter", "crabtwist_note")
        count = "SELECT " + " + ".join(f"(SELECT count(*) FROM {table})" for table in tables)
        deadline = self.reactor.seconds() + 5
        while await deferToThread(self.run_sql, count) != [(0,)]:
            self.assertLess(self.reactor.seconds(), deadline)
            await self.pass_time(0.05)

    async def test_sweeping_leaves_live_boards(self) -> None:
        """A board is swept whole when its latest note's time is over, and not touched before."""
        for key, ttls in ((b"dead", (None, 0.5)), (b"alive", (0.5, None)), (b"longer", (0.5, 600))):
            for number, ttl in enumerate(ttls):
                await self.store.post("n", b"%d" % number, {key: b"v"}, ttl_seconds=ttl)
        await self.pass_time(0.5)
        await self.store._sweep()
        rows = await deferToThread(
            self.run_sql, "SELECT key, count(*) FROM crabtwist_note GROUP BY key ORDER BY key"
        )
        self.assertEqual(rows, [(b"alive", 2), (b"longer", 2)])

    async def test_sweeping_in_steps(self) -> None:
        """Dead boards go a few at a time, until none is left."""
        self.patch(postgres, "SWEEP_ROWS", 7)
        for member in (b"a", b"b"):
            await self.store.post("n", member, {b"%d" % n: b"v" for n in range(50)}, ttl_seconds=0.1)
        await self.pass_time(0.1)
        await self.store._sweep()
        self.assertEqual(await deferToThread(self.run_sql, "SELECT count(*) FROM crabtwist_note"), [(0,)])

    async def test_posting_waits_for_nobody(self) -> None:
        """A node that keeps its notes locked holds up no other that posts to the same boards."""
        await self.lose_patience()
        await self.store.post("n", b"a", {b"k": b"1"})
        with psycopg.connect(self.server.dsn) as other:
            other.execute(f"UPDATE test_{self.number}.crabtwist_note SET note = '2'".encode())
            found = await self.store.post("n", b"b", {b"k": b"3"})
            other.commit()
        self.assertEqual(found, {b"k": {b"a": b"1", b"b": b"3"}})

    async def test_locked_row(self) -> None:
        """A row that somebody else keeps locked fails its callers in time, and no others."""
        await self.lose_patience()
        await self.store.increment("n", b"k", 1)
        with psycopg.connect(self.server.dsn) as other:
            other.execute(f"UPDATE test_{self.number}.crabtwist_counter SET total = 7".encode())
            success, seconds = await self.timed(self.store.increment("n", b"k", 1))
            self.assertFalse(success)
            self.assertLess(seconds, storage_contract.CALL_SECONDS + storage_contract.GRACE_SECONDS)
            await self.store.increment("n", b"other", 1)
            other.commit()
        self.assertEqual(await self.store.increment("n", b"k", 1), 8)


class TestRedisStorage(storage_contract.ServedStorageContract):
    """Redis, each test with a prefix of its own."""

    def setUp(self) -> Any:
        if servers.redis_program() is None:
            raise SkipTest("the Debian package redis-server is missing")
        self.server = servers.redis()
        return super().setUp()

    async def move(self) -> None:
        self.number = storage_contract.next_number()

    def make(self, **changes: Any) -> RedisStorage:
        settings = {
            "url": Secret(self.server.url),
            "prefix": f"t*st [{self.number}]:",
            "reply_timeout": self.patience_seconds,
            "connect_timeout": self.patience_seconds,
            **changes,
        }
        return RedisStorage(RedisSettings(**settings), FakeServices(self.reactor))

    async def test_unreachable(self) -> None:
        """Where no server is, or the password is wrong, the start fails and says where."""
        away = f"redis://:{self.server.quoted_password}@127.0.0.1:{servers.free_port()}"
        self.assertIn("127.0.0.1", await self.refused(url=Secret(away)))
        wrong = self.server.url.replace(self.server.quoted_password, "wrong-word")
        self.assertIn("WRONGPASS", await self.refused(url=Secret(wrong)))
        none = f"redis://127.0.0.1:{self.server.port}"
        self.assertIn("NOAUTH", await self.refused(url=Secret(none)))

    async def test_hang_at_the_start(self) -> None:
        """A server that hangs fails the start in time."""
        await self.lose_patience()
        self.server.pause()
        try:
            began = self.reactor.seconds()
            self.assertIn("no answer within", await self.refused())
            limit = storage_contract.CALL_SECONDS + storage_contract.GRACE_SECONDS
            self.assertLess(self.reactor.seconds() - began, limit)
        finally:
            self.server.resume()

    def test_url(self) -> None:
        """A URL that would be misread is refused, without a word of it."""
        for url in ("p@ss", "rediss://h", "redis://", "redis://:pa/ss@h", "redis://h/p@ss"):
            error = self.assertRaises(ValueError, RedisSettings, url=Secret(url))
            self.assertNotIn("ss", str(error).lower().replace("password", ""))

    async def test_prefixes_of_stores(self) -> None:
        """Stores with different prefixes on one server see nothing of each other."""
        await self.store.set("n", b"k", b"v")
        other = self.make(prefix="t*")
        await other.open()
        self.addCleanup(other.close)
        self.assertEqual((await other.get("n", b"k"), await other.list("n")), (None, []))
        await self.store.post("n", b"m", {b"k": b"v"})
        self.assertEqual(await other.boards("n"), {})

    async def test_databases(self) -> None:
        """The number in the URL says which database."""
        other = self.make(url=Secret(self.server.url[:-1] + "3"))
        await other.open()
        self.addCleanup(other.close)
        await other.set("n", b"k", b"v")
        self.assertIsNone(await self.store.get("n", b"k"))
        self.assertIn(b"keys=", await deferToThread(self.server.say, b"INFO keyspace"))

    async def test_server_forgets_scripts(self) -> None:
        """Counting goes on when the server has forgotten how."""
        await self.store.increment("n", b"k", 1)
        await self.store.increment("n", b"k", 1)
        await deferToThread(self.server.say, b"SCRIPT FLUSH")
        self.assertEqual(await self.store.increment("n", b"k", 1), 3)

    def test_for_several_nodes(self) -> None:
        """Other nodes see the same."""
        self.assertIs(self.store.between_nodes, True)

    async def test_server_forgets_how_to_post(self) -> None:
        """Posting and reading go on when the server has forgotten how."""
        for note in (b"1", b"2"):
            await self.store.post("n", b"m", {b"k": note})
            self.assertEqual(await self.store.boards("n"), {b"k": {b"m": note}})
            await deferToThread(self.server.say, b"SCRIPT FLUSH")
        self.assertEqual(await self.store.boards("n"), {b"k": {b"m": b"2"}})

    async def test_boards_expire_on_the_server(self) -> None:
        """A board with a time has it on the server, also if its store dies then; another one has none."""
        await self.store.post("n", b"m", {b"k": b"v"}, ttl_seconds=600)
        milliseconds = int(await self._ttl(b"b:n:k"))
        self.assertTrue(590_000 < milliseconds <= 600_000, milliseconds)
        await self.store.post("n", b"m", {b"k": b"v"})
        self.assertEqual(int(await self._ttl(b"b:n:k")), -1)

    async def test_counters_expire_on_the_server(self) -> None:
        """A counter with a time has it from its first increment on, also if its store dies then."""
        await self.store.increment("n", b"k", 1, ttl_seconds=600)
        seconds = int(await self._ttl(b"c:n:k"))
        self.assertTrue(590_000 < seconds <= 600_000, seconds)

    async def _ttl(self, rest: bytes) -> Any:
        redis = await self.store._line.ready()
        return await redis.execute_command("PTTL", self.store._settings.prefix.encode() + rest)
