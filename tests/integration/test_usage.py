"""The totals of running gateways: over stops, crashes and several nodes, and as the page shows them."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from crabtwist.money import DOLLAR, in_dollars
from tests.integration import servers
from tests.integration.running import CHECKOUT, RunningGateway

TOKEN = "ct-admin-test"
CONFIGURATION = f"""
admin_token = "{TOKEN}"

[[keys]]
name = "ann"
key = "sk-ct-ann"

[[keys]]
name = "bob"
key = "sk-ct-bob"

[providers.echo]
models = ["echo"]

[models.echo]
input = 1
output = 2

[extensions.usage]
"""
WORDS = "one two three four"
#: Four words in, four words out.
COST = 4 * DOLLAR // 10**6 + 4 * 2 * DOLLAR // 10**6

#: What a crash may take: told ten times a second, on a machine that is busy with other things.
TOLD_SECONDS = 2.0
WAIT_SECONDS = 10.0


class UsageTests(SynchronousTestCase):
    """What is counted, and still known afterwards."""

    def setUp(self) -> None:
        """Have a folder for each gateway."""
        self.directories = [Path(self.mktemp()).absolute() for _ in range(2)]
        self.write("")

    def write(self, more: str) -> None:
        """Write the configuration of both."""
        for directory in self.directories:
            directory.mkdir(exist_ok=True)
            (directory / "crabtwist.toml").write_text(CONFIGURATION + more)

    def start(self, number: int = 0) -> RunningGateway:
        """Start a gateway."""
        gateway = RunningGateway(self.directories[number], "-l", "127.0.0.1:0")
        self.addCleanup(gateway.kill)
        return gateway

    def ask(
        self, gateway: RunningGateway, key: str = "ann", model: str = "echo", *, stream: bool = False
    ) -> int:
        """Send a request, read its answer, and return its status."""
        connection = http.client.HTTPConnection(gateway.host, gateway.port, timeout=30)
        messages = [{"role": "user", "content": WORDS}]
        body = json.dumps({"model": model, "max_tokens": 50, "messages": messages, "stream": stream})
        try:
            connection.request("POST", "/v1/messages", body, {"x-api-key": f"sk-ct-{key}"})
            answer = connection.getresponse()
            answer.read()
            return answer.status
        finally:
            connection.close()

    def ask_at_once(self, gateway: RunningGateway, number: int) -> None:
        """Send so many requests at once, in turn with each key, plain and streamed."""

        def one(index: int) -> int:
            return self.ask(gateway, ("ann", "bob")[index % 2], stream=index % 4 < 2)

        with ThreadPoolExecutor(number) as pool:
            self.assertEqual([200] * number, list(pool.map(one, range(number))))

    def totals(self, gateway: RunningGateway, by: str = "", token: str = TOKEN) -> Any:
        """Return the totals, or the status where there are none."""
        connection = http.client.HTTPConnection(gateway.host, gateway.port, timeout=30)
        try:
            fields = {"authorization": f"Bearer {token}"}
            connection.request("GET", f"/v1/admin/extensions/usage/totals?by={by}", headers=fields)
            answer = connection.getresponse()
            shown = json.loads(answer.read())
            return shown["totals"] if answer.status == 200 else answer.status
        finally:
            connection.close()

    def requests(self, gateway: RunningGateway) -> int:
        """Return how many requests were counted."""
        return sum(total["requests"] for total in self.totals(gateway))

    def until(self, gateway: RunningGateway, number: int) -> None:
        """Wait until a gateway knows of so many."""
        deadline = time.monotonic() + WAIT_SECONDS
        while self.requests(gateway) != number and time.monotonic() < deadline:
            time.sleep(0.05)
        self.assertEqual(number, self.requests(gateway))

    def assert_exact(self, gateway: RunningGateway, number: int) -> None:
        """Check the sums of so many requests, half of them each key's."""
        totals = self.totals(gateway, "principal")
        self.assertEqual(["ann", "bob"], [total["principal"] for total in totals])
        for total in totals:
            self.assertEqual((number // 2, 0), (total["requests"], total["unpriced"]))
            self.assertEqual([number // 2 * 4] * 2, [total["input_tokens"], total["output_tokens"]])
            self.assertEqual(in_dollars(number // 2 * COST), f"${total['cost_dollars']}")

    def test_stop(self) -> None:
        """A hundred requests at once are all counted, and none is lost by stops and starts."""
        gateway = self.start()
        self.ask_at_once(gateway, 100)
        self.assert_exact(gateway, 100)
        self.assertEqual(404, self.ask(gateway, model="made-up"))
        self.assertIn("", [total["model"] for total in self.totals(gateway, "model")])
        gateway.stop()
        gateway = self.start()
        self.assertEqual(101, self.requests(gateway))
        self.ask(gateway)
        gateway.stop()
        self.assertEqual(102, self.requests(self.start()))

    def test_crash(self) -> None:
        """A crash takes at most what was counted in the last moment."""
        gateway = self.start()
        self.ask_at_once(gateway, 100)
        # The moment itself is what is tested; nobody says when it is over.
        time.sleep(TOLD_SECONDS)
        self.ask(gateway)
        gateway.send(signal.SIGKILL)
        gateway.wait()
        gateway = self.start()
        self.assertIn(self.requests(gateway), (100, 101))
        gateway.send(signal.SIGKILL)
        gateway.wait()
        self.assertIn(self.requests(self.start()), (100, 101))

    def test_locked(self) -> None:
        """No key opens it, and guessing is stopped."""
        gateway = self.start()
        statuses = [self.totals(gateway, token=f"sk-ct-ann{'x' * number}") for number in range(12)]
        self.assertEqual([*[401] * 10, 429, 429], statuses)
        self.assertEqual(429, self.totals(gateway))
        self.assertEqual(200, self.ask(gateway))

    def test_page(self) -> None:
        """What the page says to type works."""
        gateway = self.start()
        self.ask(gateway)
        [command] = re.findall(r"```sh\n(.*?)```", (CHECKOUT / "docs" / "usage.md").read_text(), re.DOTALL)
        yesterday = datetime.now(UTC).date() - timedelta(days=1)
        command = re.sub(r"since=[0-9-]+", f"since={yesterday}", command)
        command = command.replace("http://127.0.0.1:5632", gateway.url)
        environ = {"PATH": "/usr/bin:/bin", "CRABTWIST_ADMIN_TOKEN": TOKEN}
        done = subprocess.run(["sh", "-c", command], env=environ, capture_output=True, check=True)
        [total] = json.loads(done.stdout)["totals"]
        self.assertEqual(("ann", 1), (total["principal"], total["requests"]))

    def test_redis(self) -> None:
        """Two gateways on one Redis show the totals of both, also after one's crash and the other's stop."""
        if servers.redis_program() is None:
            self.skipTest("no Redis here")
        prefix = f"usage-{time.time_ns()}:"
        self.write(f'[storage]\nkind = "redis"\nurl = "{servers.redis().url}"\nprefix = "{prefix}"\n')
        one, other = self.start(0), self.start(1)
        for gateway in (one, other):
            self.ask_at_once(gateway, 50)
        for gateway in (one, other):
            self.until(gateway, 100)
            self.assert_exact(gateway, 100)
        one.send(signal.SIGKILL)
        one.wait()
        other.stop()
        one = self.start(0)
        self.ask_at_once(one, 20)
        self.assert_exact(one, 120)
