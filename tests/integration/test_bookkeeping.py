"""The ledger of a running gateway: every request once, also those that a crash interrupted."""

from __future__ import annotations

import http.client
import json
import signal
import sqlite3
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from crabtwist.money import DOLLAR
from crabtwist.records import Record, decode_record
from tests.integration.running import RunningGateway

CONFIGURATION = """
[ledger]

[[keys]]
name = "tester"
key = "sk-ct-test"

[providers.echo]
models = ["echo"]

[providers.slow]
kind = "echo"
models = ["slow"]
delay_seconds = 0.2

[models.echo]
input = 1
output = 2

[models.slow]
input = 1
output = 2
"""


class BookkeepingTests(SynchronousTestCase):
    """What is in the ledger after the gateway has ended."""

    def setUp(self) -> None:
        """Have a folder for the gateway."""
        self.directory = Path(self.mktemp()).absolute()
        self.directory.mkdir()
        (self.directory / "crabtwist.toml").write_text(CONFIGURATION)

    def start(self) -> RunningGateway:
        """Start the gateway."""
        gateway = RunningGateway(self.directory, "-l", "127.0.0.1:0")
        self.addCleanup(gateway.kill)
        return gateway

    def ask(self, gateway: RunningGateway, **body: Any) -> http.client.HTTPResponse:
        """Send a request, and return its answer when it begins."""
        self.connection = connection = http.client.HTTPConnection(gateway.host, gateway.port, timeout=20)
        messages = [{"role": "user", "content": "one two three four"}]
        text = json.dumps({"model": "echo", "messages": messages, **body})
        connection.request("POST", "/v1/messages", text, {"x-api-key": "sk-ct-test"})
        self.addCleanup(connection.close)
        return connection.getresponse()

    def records(self) -> dict[str, Record]:
        """Return all records, by why they ended."""
        with sqlite3.connect(self.directory / "crabtwist-ledger.db") as database:
            rows = database.execute("SELECT body FROM record").fetchall()
        found = [decode_record(row[0].encode()) for row in rows]
        self.assertEqual(len(found), len({each.id for each in found}))
        return {each.reason: each for each in found}

    def test_every_end(self) -> None:
        """Complete, refused and abandoned requests are there, with what they cost."""
        gateway = self.start()
        self.ask(gateway).read()
        self.ask(gateway, model="nobody's").read()
        left = self.ask(gateway, model="slow", stream=True)
        left.read1()
        left.close()
        self.connection.close()
        gateway.stop()
        records = self.records()
        self.assertEqual({"complete", "model_not_found", "client_left"}, set(records))
        complete = records["complete"]
        self.assertEqual(("tester", "echo", 200), (complete.principal, complete.model, complete.status))
        self.assertEqual(4 * DOLLAR // 10**6 + 4 * 2 * DOLLAR // 10**6, complete.cost)
        self.assertEqual(0, records["model_not_found"].cost)

    def test_crash(self) -> None:
        """What a crash interrupted is found at the next start, and recorded once with a bounded estimate."""
        gateway = self.start()
        self.ask(gateway).read()
        self.ask(gateway, model="slow", stream=True, max_tokens=9).read1()
        gateway.send(signal.SIGKILL)
        gateway.wait()
        self.start().stop()
        self.start().stop()
        records = self.records()
        self.assertEqual({"complete", "interrupted"}, set(records))
        interrupted = records["interrupted"]
        assert interrupted.usage is not None
        self.assertEqual((True, 9), (interrupted.estimated, interrupted.usage.output_tokens))
        self.assertGreaterEqual(interrupted.cost or 0, 9 * 2 * DOLLAR // 10**6)

    def test_unusable(self) -> None:
        """A ledger that cannot be opened stops the start, in words, before any port is open."""
        (self.directory / "crabtwist-ledger.db").write_text("this is no database, however long it is\n" * 99)
        error = self.assertRaises(AssertionError, self.start)
        self.assertIn("not started", str(error))
        self.assertIn("crabtwist-ledger.db", str(error))
        self.assertNotIn("Starting factory", str(error))
