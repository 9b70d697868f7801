"""Three real gateways, with the page's own configuration, on one Redis and one PostgreSQL."""

from __future__ import annotations

import http.client
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
from twisted.trial.unittest import SkipTest, SynchronousTestCase

from crabtwist.leases import BLOCKS
from crabtwist.money import DOLLAR
from crabtwist.records import Record, decode_record
from tests import storage_contract
from tests.integration import servers
from tests.integration.callers import Answer, Question, at_once, until
from tests.integration.running import CHECKOUT, RunningGateway
from tests.integration.slow_road import SlowRoad

NODES = 3
TOKEN = "ct-admin-test"

#: What `limited` may ask for in a minute, and the most that three nodes let through.
LIMIT = 100
MOST_REQUESTS = LIMIT + (NODES - 1) * LIMIT // BLOCKS
#: What `spender` may spend, and the most that three nodes let it.
BUDGET = DOLLAR // 2
MOST_SPENT = BUDGET + (NODES - 1) * BUDGET // BLOCKS
#: How many requests of `crowd` may run at once.
CROWD = 10

#: Beside what the page says: whom the tests ask as, and whom they ask.
_MORE = f"""
[extensions.rate_limit.keys.limited]
requests_per_minute = {LIMIT}

[extensions.rate_limit.keys.spender]
requests_per_minute = 1_000_000

[extensions.rate_limit.keys.crowd]
concurrent_requests = {CROWD}

[extensions.rate_limit.keys.many]
requests_per_minute = 1_000_000

[extensions.budget.keys.spender]
dollars = {BUDGET / DOLLAR}
per = "total"

[extensions.budget.keys.crowd]
dollars = {BUDGET / DOLLAR}
per = "total"

[extensions.budget.keys.many]
dollars = 1_000_000.0

[[keys]]
name = "limited"
key = "sk-ct-limited"

[[keys]]
name = "spender"
key = "sk-ct-spender"

[[keys]]
name = "crowd"
key = "sk-ct-crowd"

[[keys]]
name = "many"
key = "sk-ct-many"

[providers.quick]
kind = "echo"
models = ["quick"]

[providers.slow]
kind = "echo"
models = ["slow"]
delay_seconds = 0.05

[models.quick]
input = 10
output = 1000

[models.slow]
input = 10
output = 1000
"""

_STORAGE = re.compile(r"^\[storage\]\n(?:\S.*\n)*", re.MULTILINE)
_IN_POSTGRES = '[storage]\nkind = "postgres"\ndsn = "${CRABTWIST_POSTGRES}"\n'

#: A word for each namespace and node, and how many heartbeats it has told.
_BEATS_IN_REDIS = (
    rb"""EVAL "local function hex(c) return string.format('%02x', string.byte(c)) end"""
    rb""" local found = {} for _, key in ipairs(redis.call('KEYS', '*b:*nodes')) do"""
    rb""" local board = redis.call('HGETALL', key) for i = 1, #board, 2 do"""
    rb""" local member = string.gsub(board[i], '.', hex)"""
    rb""" found[#found + 1] = string.match(key, 'b:(.-):') .. '/' .. member .. '=' .. board[i + 1] end end"""
    rb""" return table.concat(found, ' ')" 0"""
)
_BEATS_IN_POSTGRES = """
    SELECT namespace || '/' || encode(member, 'hex') || '=' || convert_from(note, 'UTF8')
    FROM crabtwist_note WHERE convert_from(key, 'UTF8') LIKE '% nodes'"""
_BEAT = re.compile(r"(\w+)/(\w+)=(\d+)")

#: Namespaces in which nodes hear of each other.
_SHARING = ("budget", "rate_limit", "usage")
_LEFT = re.compile(r"has \$([0-9.]+) left of")
_SPENT = re.compile(r"has spent its budget: \$([0-9.]+) of \$([0-9.]+)")


def picodollars(dollars: str) -> int:
    """Return an amount that is told in dollars."""
    return int(Decimal(dollars) * DOLLAR)


class NodesCase(SynchronousTestCase):
    """Three gateways, a slow road to each server, and what is in the ledger."""

    nodes = NODES
    storage_kind = "redis"

    def setUp(self) -> None:
        """Start everything, and wait until the nodes have heard of each other."""
        if servers.redis_program() is None or servers.postgres_programs() is None:
            raise SkipTest("the Debian packages redis-server and postgresql are needed")
        self.asked = 0
        self.redis, self.postgres = servers.RedisServer(), servers.postgres()
        self.addCleanup(self.redis.remove)
        self.redis.start()
        self.schema = f"nodes_{storage_contract.next_number()}"
        self.sql(f"CREATE SCHEMA {self.schema}")
        self.roads = [SlowRoad(server.port) for server in (self.redis, self.postgres)]
        for road in self.roads:
            self.addCleanup(road.close)
        self.directories = [Path(self.mktemp()).absolute() for _ in range(self.nodes)]
        with ThreadPoolExecutor(self.nodes) as pool:
            self.gateways = list(pool.map(self.start, self.directories))
        self.until_known()

    def configuration(self) -> str:
        """Return the page's example, with the keys and the models of the tests."""
        [page] = re.findall(r"```toml\n(.*?)```", (CHECKOUT / "docs/several-nodes.md").read_text(), re.DOTALL)
        text: str = _STORAGE.sub(_IN_POSTGRES, page) if self.storage_kind == "postgres" else page
        return text + _MORE

    def start(self, directory: Path) -> RunningGateway:
        """Start a gateway, in a folder of its own or in one where one was."""
        directory.mkdir(exist_ok=True)
        (directory / "crabtwist.toml").write_text(self.configuration())
        redis, postgres = self.roads
        schema = f"?options=-csearch_path%3D{self.schema}"
        environ = {
            "CRABTWIST_ADMIN_TOKEN": TOKEN,
            "CRABTWIST_SECRET_KEY": "the same thirty-two letters or more",
            "CRABTWIST_REDIS": redis.leads(self.redis.url),
            "CRABTWIST_POSTGRES": postgres.leads(self.postgres.dsn) + schema,
            "ANTHROPIC_API_KEY": "sk-ant-nobody-asks",
            "BUILD_SERVER_KEY": "sk-ct-build-server",
        }
        gateway = RunningGateway(directory, "-l", "127.0.0.1:0", environ=environ)
        self.addCleanup(gateway.kill)
        return gateway

    def sql(self, statement: str) -> list[tuple[Any, ...]]:
        """Run a statement, and return its rows, if it has any."""
        options = f"-c search_path={self.schema}"
        with psycopg.connect(self.postgres.dsn, autocommit=True, options=options) as connection:
            done = connection.execute(statement.encode())
            return done.fetchall() if done.description else []

    def beats(self) -> dict[tuple[str, str], int]:
        """Return how many heartbeats each node has told, by namespace and node."""
        if self.storage_kind == "postgres":
            said = " ".join(row[0] for row in self.sql(_BEATS_IN_POSTGRES))
        else:
            said = self.redis.say(_BEATS_IN_REDIS).decode()
        return {(name, node): int(beats) for name, node, beats in _BEAT.findall(said)}

    def until_known(self) -> None:
        """Wait until every node has heard of the others: who tells its heartbeat hears theirs."""

        def told(begun: dict[tuple[str, str], int]) -> bool:
            new = Counter(name for (name, node), beats in self.beats().items() if beats > begun[name, node])
            return all(new[name] >= self.nodes for name in _SHARING)

        until(lambda: told(defaultdict(int)), "all are there")
        begun = defaultdict(int, self.beats())
        until(lambda: told(begun), "all have heard of all")

    # What is asked.

    def shown(self, gateway: RunningGateway, path: str) -> str:
        """Return what a gateway shows to its administrator."""
        connection = http.client.HTTPConnection(gateway.host, gateway.port, timeout=30)
        try:
            connection.request("GET", path, headers={"authorization": f"Bearer {TOKEN}"})
            return connection.getresponse().read().decode()
        finally:
            connection.close()

    def ask_at_once(self, questions: Iterable[Question]) -> list[Answer]:
        """Ask, and remember how many were asked; nothing but a limit or a budget refuses anything."""
        answers = at_once(questions)
        self.asked += len(answers)
        self.assertLessEqual({each.status for each in answers}, {0, 200, 429})
        return answers

    def ask(self, question: Question) -> Answer:
        """Ask one question, and remember that."""
        self.asked += 1
        return question.answer()

    def left(self, gateway: RunningGateway, key: str = "spender") -> int:
        """Return what a key has left, in picodollars, as a gateway tells who asks for too much."""
        text = self.ask(Question(gateway=gateway, key=key, max_tokens=10**9)).text
        left, spent = _LEFT.search(text), _SPENT.search(text)
        self.assertTrue(left or spent, text)
        if spent:
            return picodollars(spent[2]) - picodollars(spent[1])
        return picodollars(left[1]) if left else 0

    # What is in the ledger.

    def until_delivered(self) -> None:
        """Wait until no journal holds anything."""
        until(lambda: all(map(self.is_delivered, self.gateways)), "all is delivered")

    def is_delivered(self, gateway: RunningGateway) -> bool:
        """Say whether its journal holds nothing."""
        return "\ncrabtwist_journal_undelivered 0.0\n" in self.shown(gateway, "/metrics")

    def recorded(self) -> int:
        """Return how many records there are."""
        [[number]] = self.sql("SELECT count(*) FROM crabtwist_record")
        return int(number)

    def records(self, *keys: str) -> list[Record]:
        """Return the records of some keys, or of all."""
        found = [decode_record(row[0].encode()) for row in self.sql("SELECT body FROM crabtwist_record")]
        return [each for each in found if not keys or each.principal in keys]

    def assert_recorded(self, answers: Iterable[Answer], lost: int = 0) -> None:
        """
        Check that everything that was asked is in the ledger once, and that its sums are right.

        Of requests that were `lost` with their node nobody knows whether it had noted them yet.
        """
        until(lambda: self.asked - lost <= self.recorded() <= self.asked, "all is recorded")
        self.until_delivered()
        records = self.records()
        ids = Counter(each.id for each in records)
        self.assertEqual({1}, set(ids.values()))
        self.assertEqual([], [each for each in answers if each.id and each.id not in ids])
        [sums] = self.sql(
            "SELECT sum(requests), sum(cost) FROM crabtwist_total WHERE grouping_by = '' AND days = 1"
        )
        self.assertEqual((len(records), sum(each.cost or 0 for each in records)), sums)
