"""Running gateways under load whose ledger's PostgreSQL hangs, dies, and comes back: no client notices."""

from __future__ import annotations

import http.client
import json
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psycopg
from twisted.trial.unittest import SkipTest, SynchronousTestCase

from crabtwist.records import Record, decode_record
from tests import storage_contract
from tests.integration import servers
from tests.integration.running import RunningGateway

CONFIGURATION = """
[ledger]
kind = "postgres"
dsn = "{dsn}?options=-csearch_path%3D{schema}"
call_timeout = {call_timeout}
connect_timeout = 2

[[keys]]
name = "tester"
key = "sk-ct-test"

[[keys]]
name = "strange"
key = "sk-ct-odd"

[providers.echo]
models = ["echo"]

[models.echo]
input = 1
output = 2
"""

#: A request's words, there and back, at these prices: in picodollars.
COST = 4 * 10**6 + 4 * 2 * 10**6
QUESTION = json.dumps({"model": "echo", "messages": [{"role": "user", "content": "one two three four"}]})
STREAM = QUESTION.replace("{", '{"stream": true, ', 1)

CALLERS = 30
#: Any call to the server waits longer than this when it hangs.
LONGEST_SECONDS = 4.0
CALL_SECONDS = 6.0
PATIENCE_SECONDS = 60.0


def get(gateway: RunningGateway, path: str) -> str:
    """Return what a gateway says there."""
    connection = http.client.HTTPConnection(gateway.host, gateway.port, timeout=PATIENCE_SECONDS)
    try:
        connection.request("GET", path)
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def metric(gateway: RunningGateway, name: str) -> float:
    """Return a number that the gateway shows of its journal."""
    match = re.search(rf"^crabtwist_journal_{name} (\S+)$", get(gateway, "/metrics"), re.MULTILINE)
    assert match is not None, name
    return float(match[1])


def until(holds: Callable[[], bool], what: str) -> None:
    """Wait for something to be so."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline, f"never so: {what}"
        time.sleep(0.1)


def until_kept(gateway: RunningGateway, number: int) -> None:
    """Wait until the journal holds more than so many records."""
    until(lambda: metric(gateway, "undelivered") > number, f"the journal holds more than {number}")


def until_delivered(gateway: RunningGateway) -> None:
    """Wait until the journal holds no record."""
    until(lambda: metric(gateway, "undelivered") == 0, "all is delivered")


class Load:
    """Many callers, each in a thread of its own, who ask one question after the other."""

    def __init__(self, *gateways: RunningGateway, key: str = "sk-ct-test") -> None:
        self.ids: list[str] = []
        self.failed: list[str] = []
        self.longest_seconds = 0.0
        self._key = key
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._call, args=(gateways[n % len(gateways)], n), daemon=True)
            for n in range(CALLERS)
        ]
        for thread in self._threads:
            thread.start()

    def more(self, number: int) -> None:
        """Wait for so many answers more."""
        enough = len(self.ids) + number
        until(lambda: len(self.ids) >= enough or bool(self.failed), f"{number} answers more")

    def end(self) -> None:
        """Let everybody come to an end."""
        self._ended.set()
        for thread in self._threads:
            thread.join(PATIENCE_SECONDS)

    def _call(self, gateway: RunningGateway, number: int) -> None:
        connection = http.client.HTTPConnection(gateway.host, gateway.port, timeout=PATIENCE_SECONDS)
        try:
            while not self._ended.wait(0.05):
                self._ask(connection, STREAM if number % 3 == 0 else QUESTION)
        except Exception as error:
            self.failed.append(repr(error))
        finally:
            connection.close()

    def _ask(self, connection: http.client.HTTPConnection, body: str) -> None:
        began = time.monotonic()
        connection.request("POST", "/v1/messages", body, {"x-api-key": self._key})
        response = connection.getresponse()
        text = response.read()
        self.longest_seconds = max(self.longest_seconds, time.monotonic() - began)
        self.ids.append(response.headers["x-crabtwist-request-id"])
        if response.status != 200 or b"four" not in text:
            self.failed.append(f"{response.status} {text!r}")


class LedgerAwayTests(SynchronousTestCase):
    """What clients and the ledger see of it."""

    def setUp(self) -> None:
        """Have a schema on a PostgreSQL."""
        if servers.postgres_programs() is None:
            raise SkipTest("the Debian package postgresql is missing")
        self.server = servers.postgres()
        self.schema = f"away_{storage_contract.next_number()}"
        self.sql(f"CREATE SCHEMA {self.schema}")

    def sql(self, statement: str) -> list[tuple[object, ...]]:
        """Run a statement, and return its rows, if it has any."""
        options = f"-c search_path={self.schema}"
        with psycopg.connect(self.server.dsn, autocommit=True, options=options) as connection:
            done = connection.execute(statement.encode())
            return done.fetchall() if done.description else []

    def start(self, directory: Path | None = None, call_seconds: float = 1.0) -> RunningGateway:
        """Start a gateway, in a folder of its own or in one where one was."""
        self.directory = directory or Path(self.mktemp()).absolute()
        self.directory.mkdir(exist_ok=True)
        text = CONFIGURATION.format(dsn=self.server.dsn, schema=self.schema, call_timeout=call_seconds)
        (self.directory / "crabtwist.toml").write_text(text)
        gateway = RunningGateway(self.directory, "-l", "127.0.0.1:0")
        self.addCleanup(gateway.kill)
        return gateway

    def load(self, *gateways: RunningGateway, key: str = "sk-ct-test") -> Load:
        """Begin to ask, until the test is over at the latest."""
        load = Load(*gateways, key=key)
        self.addCleanup(load.end)
        return load

    def check(self, load: Load, *gateways: RunningGateway) -> None:
        """End a load, and see that every request was answered in time and is in the ledger exactly once."""
        load.end()
        self.assertEqual([], load.failed)
        self.assertLess(load.longest_seconds, LONGEST_SECONDS)
        for gateway in gateways:
            until_delivered(gateway)
        self.check_ledger(load)

    def check_ledger(self, load: Load) -> None:
        """See that the ledger has every request of a load exactly once, and their exact sums."""
        records: list[Record] = [decode_record(str(row[0]).encode()) for row in self.sql(_BODIES)]
        self.assertEqual(Counter(load.ids), Counter(each.id for each in records))
        expected = len(load.ids), len(load.ids) * COST
        self.assertEqual({"complete"}, {each.reason for each in records})
        self.assertEqual(expected, (len(records), sum(each.cost or 0 for each in records)))
        for grouping in ("", "principal", "model", "provider", "principal,model,provider"):
            total = f"SELECT sum(requests), sum(cost) FROM crabtwist_total WHERE grouping_by = '{grouping}'"
            self.assertEqual([expected], self.sql(total))

    def test_hung(self) -> None:
        """While it hangs every request is answered at once and kept, and after it they are all there."""
        gateway = self.start(call_seconds=CALL_SECONDS)
        load = self.load(gateway)
        load.more(200)
        self.server.pause()
        try:
            load.more(300)
            until_kept(gateway, 300)
            gateway.wait_for(re.compile("the ledger takes no records"))
            load.more(100)
        finally:
            self.server.resume()
        load.more(100)
        self.check(load, gateway)

    def test_killed(self) -> None:
        """It may be killed and come back, several times, without a request failing or counting twice."""
        gateway = self.start()
        load = self.load(gateway)
        for _ in range(3):
            load.more(200)
            self.server.kill()
            load.more(200)
            self.server.start()
        self.check(load, gateway)

    def test_away(self) -> None:
        """While it is away the journal grows and keeps everything, and then it gets it all."""
        gateway = self.start()
        load = self.load(gateway)
        load.more(100)
        self.server.kill()
        try:
            for most in (300, 600, 900):
                load.more(350)
                until_kept(gateway, most)
        finally:
            self.server.start()
        self.check(load, gateway)

    def test_stopped_while_away(self) -> None:
        """A gateway that is stopped meanwhile ends in time, and its successor delivers what it kept."""
        gateway = self.start()
        load = self.load(gateway)
        load.more(100)
        self.server.kill()
        try:
            load.more(200)
            load.end()
            self.assertEqual(-signal.SIGTERM, gateway.stop())
        finally:
            self.server.start()
        successor = self.start(self.directory)
        self.check(load, successor)

    def test_two_gateways(self) -> None:
        """Two gateways fill one ledger, through a hang and a death, and its sums are exact."""
        gateways = self.start(), self.start()
        load = self.load(*gateways)
        load.more(200)
        self.server.pause()
        try:
            load.more(200)
        finally:
            self.server.resume()
        load.more(200)
        self.server.kill()
        self.server.start()
        load.more(200)
        self.check(load, *gateways)

    def test_refused(self) -> None:
        """Records that the server refuses are counted and logged whole, and hold up none of the others."""
        gateway = self.start()
        self.sql("ALTER TABLE crabtwist_record ALTER COLUMN principal TYPE varchar(6)")
        load, odd = self.load(gateway), self.load(gateway, key="sk-ct-odd")
        load.more(100)
        odd.end()
        self.check(load, gateway)
        self.assertEqual(len(odd.ids), metric(gateway, "refused"))
        logged = re.findall(r'the ledger refuses a record.*"id":"([^"]+)"', gateway.log)
        self.assertEqual(Counter(odd.ids), Counter(logged))


_BODIES = "SELECT body FROM crabtwist_record"
