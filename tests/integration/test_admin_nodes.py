"""Keys and providers of three gateways on one real PostgreSQL: what is made at one holds at the others."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from twisted.trial.unittest import SkipTest, SynchronousTestCase

from tests.integration import servers
from tests.integration.admin_client import FILE_KEY, SECRET_KEY, TOKEN, AdminClient
from tests.integration.running import RunningGateway, running
from tests.integration.scripted_upstream import ScriptedUpstream
from tests.integration.test_admin_api import UPSTREAM_KEY, models_and_words

NODES = 3
#: What is promised, and some patience for a machine that is busy with other things.
PROMISED_SECONDS, PATIENCE_SECONDS = 1.0, 10.0

CONFIGURATION = f"""
admin_token = "{TOKEN}"
secret_key = "{SECRET_KEY}"

[storage]
kind = "postgres"
dsn = "{{dsn}}"

[ledger]
kind = "postgres"
dsn = "{{dsn}}"

[[keys]]
name = "file"
key = "{FILE_KEY}"

[providers.echo]
models = ["echo"]

[extensions.rate_limit]
"""


class NodesTests(SynchronousTestCase):
    """Three nodes."""

    def setUp(self) -> None:
        """Start them, and the server, and an upstream."""
        if servers.postgres_programs() is None:
            raise SkipTest("the Debian package postgresql is missing")
        self.server = servers.PostgresServer()
        self.addCleanup(self.server.remove)
        self.server.start()
        self.upstream = ScriptedUpstream()
        self.addCleanup(self.upstream.close)
        self.upstream.play(models_and_words)
        self.folder = Path(self.mktemp()).absolute()
        self.gateways = [self.start(self.folder / f"node-{number}") for number in range(NODES)]
        self.here, *self.others = [AdminClient(gateway) for gateway in self.gateways]

    def start(self, folder: Path) -> RunningGateway:
        """Start a node."""
        gateway = running(folder, CONFIGURATION.replace("{dsn}", self.server.dsn))
        self.addCleanup(gateway.__exit__, None, None, None)
        return gateway.__enter__()

    def everywhere(self, holds: Callable[[AdminClient], bool]) -> None:
        """Wait until something holds at all others; it has to within the promised time."""
        began = time.monotonic()
        waiting = list(self.others)
        while waiting and time.monotonic() - began < PATIENCE_SECONDS:
            waiting = [client for client in waiting if not holds(client)]
        seconds = time.monotonic() - began
        self.assertEqual([], waiting, "it never held")
        self.assertLess(seconds, PROMISED_SECONDS)

    def test_keys(self) -> None:
        """A key made at one works at the others within a second; so it changes, and so it ends."""
        secret = self.here.make("ann")
        self.everywhere(lambda client: client.chat(secret).status == 200)
        new = self.others[0].ask("POST", "/keys/ann/rotate", {"overlap_seconds": 0}).json["secret"]
        self.everywhere(lambda client: client.chat(secret).status == 401)
        self.everywhere(lambda client: client.chat(new).status == 200)
        self.here.ask("PATCH", "/keys/ann", {"disabled": True})
        self.everywhere(lambda client: client.chat(new).slug == "key_disabled")
        self.here.ask("PATCH", "/keys/ann", {"disabled": False})
        self.everywhere(lambda client: client.chat(new).status == 200)
        self.here.ask("DELETE", "/keys/ann")
        self.assertEqual(401, self.here.chat(new).status)
        self.everywhere(lambda client: client.chat(new).slug == "unknown_key")

    def test_providers(self) -> None:
        """A provider made at one serves at the others within a second, and as it was changed there."""
        table = {
            "name": "up",
            "kind": "openai",
            "api_key": UPSTREAM_KEY,
            "base_url": f"{self.upstream.url}/v1",
        }
        self.assertEqual(201, self.here.ask("POST", "/providers", table).status)
        self.everywhere(lambda client: client.chat(FILE_KEY, "m1").status == 200)
        self.others[1].ask("PATCH", "/providers/up", {"models": [{"name": "renamed", "upstream": "m2"}]})
        self.everywhere(lambda client: client.chat(FILE_KEY, "renamed").status == 200)
        self.everywhere(lambda client: client.chat(FILE_KEY, "m1").status == 404)
        self.here.ask("DELETE", "/providers/up")
        self.everywhere(lambda client: client.chat(FILE_KEY, "renamed").status == 404)

    def test_store_away(self) -> None:
        """While the store is gone keys go on to open; no change is made, which is said."""
        secret = self.here.make("ann")
        self.everywhere(lambda client: client.chat(secret).status == 200)
        self.server.kill()
        self.assertEqual([200] * 2, [client.chat(secret).status for client in self.others])
        said = self.here.ask("DELETE", "/keys/ann")
        self.assertEqual((503, "storage_unavailable"), (said.status, said.slug))
        self.assertIn("retry-after", said.fields)
        self.assertEqual(200, self.here.chat(secret).status)
        self.server.start()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.here.ask("DELETE", "/keys/ann").status != 204 and time.monotonic() < deadline:
            pass
        self.assertEqual(401, self.here.chat(secret).status)

    def test_no_secret_in_the_store(self) -> None:
        """A dump of the database, the logs and the answers have no secret in clear."""
        table = {
            "name": "up",
            "kind": "openai",
            "api_key": UPSTREAM_KEY,
            "base_url": f"{self.upstream.url}/v1",
        }
        self.here.ask("POST", "/providers", table)
        self.here.make("ann")
        self.here.ask("POST", "/keys/ann/rotate", {})
        for secret in (*self.here.secrets, FILE_KEY):
            self.here.chat(secret, "m1")
        dump = self.dump()
        self.assertIn("admin.keys", dump, "what is looked through is what was kept")
        shown = "".join([dump, self.here.told, *(gateway.log for gateway in self.gateways)])
        for secret in (*self.here.secrets, FILE_KEY, TOKEN, SECRET_KEY, UPSTREAM_KEY):
            self.assertNotIn(secret, shown)
            self.assertNotIn(secret.encode().hex(), shown)

    def dump(self) -> str:
        """Return all that the database has."""
        programs = servers.postgres_programs()
        assert programs is not None
        command = [str(programs / "pg_dump"), "--dbname", self.server.dsn, "--inserts"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
        return done.stdout
