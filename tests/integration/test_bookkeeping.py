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
        self.write()

    def write(self, ledger: str = "") -> None:
        """Write the configuration, with a `[ledger]` or without."""
        (self.directory / "crabtwist.toml").write_text(CONFIGURATION + ledger)

    def start(self, *arguments: str) -> RunningGateway:
        """Start the gateway."""
        gateway = RunningGateway(self.directory, "-l", "127.0.0.1:0", *arguments)
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

    def count(self) -> int:
        """Return how many records there are."""
        with sqlite3.connect(self.directory / "crabtwist-ledger.db") as database:
            (number,) = database.execute("SELECT COUNT(*) FROM record").fetchone()
        return int(number)

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

    def test_nothing_else(self) -> None:
        """Without `[storage]` and `[ledger]` all is in files beside the configuration, its owner's alone."""
        gateway = self.start()
        self.ask(gateway).read()
        gateway.stop()
        places = {place.name: place.stat().st_mode & 0o077 for place in self.directory.iterdir()}
        expected = {"crabtwist.db", "crabtwist-ledger.db", "crabtwist-journal"}
        self.assertEqual(expected, places.keys() - {"crabtwist.toml"})
        self.assertEqual({0}, {places[name] for name in expected})

    def test_none(self) -> None:
        """With no ledger nothing is noted and the gateway serves all the same."""
        self.write('[ledger]\nkind = "none"\n[storage]\nkind = "memory"\n')
        gateway = self.start()
        self.assertEqual(200, self.ask(gateway).status)
        gateway.stop()
        self.assertEqual(["crabtwist.toml"], [place.name for place in self.directory.iterdir()])

    def test_two_in_one_folder(self) -> None:
        """A second gateway in a folder says what to do; with a journal of its own both write one ledger."""
        first = self.start()
        error = self.assertRaises(AssertionError, self.start)
        for words in (
            "not started",
            "crabtwist-journal: another process has this journal",
            "`journal` in [ledger]",
        ):
            self.assertIn(words, str(error))
        self.assertNotIn("Starting factory", str(error))
        self.write('[ledger]\njournal = "other/journal"\n')
        second = self.start()
        for gateway in (first, second):
            self.ask(gateway).read()
        second.stop()
        first.stop()
        self.assertEqual(2, self.count())

    def test_no_such_place(self) -> None:
        """A file that cannot be where it should is told with the setting that names its place."""
        for section, key in (("ledger", "journal"), ("ledger", "path"), ("storage", "path")):
            self.write(f'[{section}]\n{key} = "crabtwist.toml/x"\n')
            error = self.assertRaises(AssertionError, self.start)
            self.assertIn("crabtwist.toml/x", str(error))
            self.assertIn("Not a directory", str(error))
            self.assertIn(f"`{key}` in [{section}]", str(error))
