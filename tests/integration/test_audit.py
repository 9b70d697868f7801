"""The audit of a running gateway: every request that was read, in the file as soon as it has ended."""

from __future__ import annotations

import http.client
import json
import re
import signal
import urllib.request
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from tests.integration.running import RunningGateway

CONFIGURATION = """
[extensions.audit]
bodies = true
redact = ["Alice"]

[extensions.rate_limit.keys.idler]
requests_per_minute = 1

[[keys]]
name = "tester"
key = "sk-ct-test"

[[keys]]
name = "idler"
key = "sk-ct-idle"

[providers.echo]
models = ["echo"]

[models.echo]
input = 1
output = 2
"""


class AuditTests(SynchronousTestCase):
    """What is in the audit's file."""

    def setUp(self) -> None:
        """Have a folder for the gateway."""
        self.directory = Path(self.mktemp()).absolute()
        self.directory.mkdir()

    def start(self, configuration: str = CONFIGURATION) -> RunningGateway:
        """Start the gateway."""
        (self.directory / "crabtwist.toml").write_text(configuration)
        gateway = RunningGateway(self.directory, "-l", "127.0.0.1:0")
        self.addCleanup(gateway.kill)
        return gateway

    def ask(self, gateway: RunningGateway, key: str = "sk-ct-test", **body: Any) -> int:
        """Send a request, read its answer, and return the status."""
        connection = http.client.HTTPConnection(gateway.host, gateway.port, timeout=20)
        messages = [{"role": "user", "content": "I am Alice"}]
        text = json.dumps({"model": "echo", "messages": messages, **body})
        connection.request("POST", "/v1/messages", text, {"x-api-key": key})
        answer = connection.getresponse()
        answer.read()
        connection.close()
        return answer.status

    def lines(self) -> list[Any]:
        """Return what is in the file."""
        text = (self.directory / "crabtwist-audit.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def test_every_end(self) -> None:
        """Complete, refused and streamed requests are there after a crash, with who asked, and the cost."""
        gateway = self.start()
        asked = [
            self.ask(gateway),
            self.ask(gateway, stream=True),
            self.ask(gateway, model="nobody's"),
            self.ask(gateway, "sk-ct-idle"),
            self.ask(gateway, "sk-ct-idle"),
        ]
        # Whoever is answered now was so after the others were written down.
        urllib.request.urlopen(gateway.url + "/health").close()
        gateway.send(signal.SIGKILL)
        gateway.wait()
        lines = self.lines()
        self.assertEqual(asked, [line["status"] for line in lines])
        whole, refused = "complete", "model_not_found"
        self.assertEqual([whole, whole, refused, whole, "rate_limited"], [line["reason"] for line in lines])
        self.assertEqual(["tester"] * 3 + ["idler"] * 2, [line["principal"] for line in lines])
        # Three words there at a dollar a million, and three back at two.
        self.assertEqual(["0.000009"] * 2 + ["0.00"], [line["cost_usd"] for line in lines[:3]])

    def test_bodies(self) -> None:
        """What was asked and answered is there, plain and streamed, but for what is to be taken out."""
        gateway = self.start()
        self.ask(gateway)
        self.ask(gateway, stream=True)
        gateway.stop()
        plain, stream = (line["bodies"] for line in self.lines())
        self.assertIn("I am [redacted]", plain["request"])
        self.assertIn("I am [redacted]", json.loads(plain["answer"])["content"][0]["text"])
        events = [json.loads(line)["type"] for line in stream["answer"].splitlines()]
        self.assertEqual(("message_start", "message_stop"), (events[0], events[-1]))
        self.assertNotIn("Alice", (self.directory / "crabtwist-audit.jsonl").read_text())

    def test_unusable(self) -> None:
        """A file that cannot be opened stops the start, in words."""
        error = self.assertRaises(
            AssertionError, self.start, CONFIGURATION.replace("bodies", 'path = "no/such/file"\nbodies')
        )
        self.assertRegex(str(error), re.compile(r"not started: extensions\.audit\.path: .*no/such/file"))
