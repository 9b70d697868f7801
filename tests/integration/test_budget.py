"""Budgets of a running gateway: hundreds at once, streams, clients that leave, restarts, and what SDKs do."""

from __future__ import annotations

import http.client
import json
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import openai
from twisted.trial.unittest import SynchronousTestCase

from tests.integration.running import RunningGateway
from tests.integration.test_fidelity import until

KEY = "sk-ct-test"

#: A tenth of a cent for each token of an answer, of which there are four; prompts cost nothing.
CONFIGURATION = """
[[keys]]
name = "tester"
key = "sk-ct-test"

[extensions.logging]

[extensions.budget]
dollars = {dollars}
per = "total"

[providers.echo]
models = ["echo", "nobody-knows"]

[providers.slow]
kind = "echo"
models = ["slow"]
delay_seconds = 0.1

[providers.slower]
kind = "echo"
models = ["slower"]
delay_seconds = 20

[models.slower]
input = 0
output = 1000

[models.echo]
input = 0
output = 1000

[models.slow]
input = 0
output = 1000
"""

AT_ONCE = 240
LONG = [{"role": "user", "content": "word " * 100}]
PATHS = ("/v1/messages", "/v1/chat/completions")

_LEFT = re.compile(r"has \$([0-9.]+) left")


class BudgetTests(SynchronousTestCase):
    """One key, a total, and a store in a file."""

    def setUp(self) -> None:
        """Have a folder for the gateway."""
        self.directory = Path(self.mktemp()).absolute()
        self.directory.mkdir()

    def start(self, dollars: float = 0.5) -> RunningGateway:
        """Start a gateway with a budget."""
        (self.directory / "crabtwist.toml").write_text(CONFIGURATION.format(dollars=dollars))
        gateway = RunningGateway(self.directory, "-l", "127.0.0.1:0")
        self.addCleanup(gateway.kill)
        return gateway

    def open(self, gateway: RunningGateway, path: str = PATHS[0], **body: Any) -> http.client.HTTPResponse:
        """Send a request, and return its answer when it begins."""
        self.connection = connection = http.client.HTTPConnection(gateway.host, gateway.port, timeout=30)
        messages = [{"role": "user", "content": "one two three four"}]
        text = json.dumps({"model": "echo", "messages": messages, "max_tokens": 5, **body})
        connection.request("POST", path, text, {"x-api-key": KEY})
        self.addCleanup(connection.close)
        return connection.getresponse()

    def ask(
        self, gateway: RunningGateway, path: str = PATHS[0], **body: Any
    ) -> tuple[int, dict[str, str], Any]:
        """Return the status, the fields and the text of an answer."""
        answer = self.open(gateway, path, **body)
        text = answer.read().decode()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, text

    def left(self, gateway: RunningGateway) -> int:
        """Return how many tokens are left: the words for one who asks for too many tell."""
        _, _, text = self.ask(gateway, max_tokens=10**6)
        found = _LEFT.search(text)
        return round(float(found[1]) * 1000) if found else 0

    def test_hundreds_at_once(self) -> None:
        """However many ask at once, in whichever way, all that there is gets spent and not a token more."""
        gateway = self.start()
        waves, answered, refused = 0, 0, {"budget_reserved"}
        with ThreadPoolExecutor(AT_ONCE) as threads:
            while "budget_reserved" in refused:
                waves += 1
                answers = list(threads.map(lambda number: self.one(gateway, number), range(AT_ONCE)))
                answered += answers.count("")
                refused = {*answers} - {""}
        self.assertGreaterEqual(waves, 2)
        self.assertEqual({"budget_too_small"}, refused)
        self.assertEqual(500 - 4 * answered, self.left(gateway))
        self.assertTrue(0 <= self.left(gateway) < 5)

    def one(self, gateway: RunningGateway, number: int) -> str:
        """Ask in one of four ways; return how it was refused, "" if it was answered."""
        body = {"model": "slow", "stream": number % 4 < 2}
        status, fields, _ = self.ask(gateway, PATHS[number % 2], **body)
        self.assertIn(status, (200, 429))
        return fields.get("x-crabtwist-error", "")

    def test_refusal(self) -> None:
        """Both dialects' 429 says whose, how much and whom to ask, and that asking again is of no use."""
        gateway = self.start(0.004)
        self.ask(gateway, max_tokens=4)
        for path in PATHS:
            status, fields, text = self.ask(gateway, path, max_tokens=4)
            self.assertEqual((429, "budget_spent"), (status, fields["x-crabtwist-error"]))
            self.assertEqual("false", fields["x-should-retry"])
            self.assertNotIn("retry-after", fields)
            error = json.loads(text)["error"]
            self.assertEqual(
                "key 'tester' has spent its budget: $0.004 of $0.004 in all;"
                " ask whoever runs this gateway for more",
                error["message"],
            )
        self.assertEqual(200, self.ask(gateway, "/v1/messages/count_tokens")[0])

    def test_unknown_price(self) -> None:
        """A model that nobody knows the price of is refused, and nothing goes upstream."""
        status, fields, text = self.ask(self.start(), model="nobody-knows")
        self.assertEqual((403, "price_unknown"), (status, fields["x-crabtwist-error"]))
        self.assertIn("[models.nobody-knows]", json.loads(text)["error"]["message"])

    def test_client_left_a_stream(self) -> None:
        """A client that leaves a stream pays for what it had, and not for more than it asked for."""
        gateway = self.start()
        self.open(gateway, model="slow", stream=True, max_tokens=40, messages=LONG).read1()
        self.connection.close()
        until(lambda: self.left(gateway) < 500, "the settlement")
        self.assertTrue(1 <= 500 - self.left(gateway) <= 40)

    def test_client_left_early(self) -> None:
        """A client that leaves before a plain answer pays for all that it might have been."""
        gateway = self.start()
        connection = http.client.HTTPConnection(gateway.host, gateway.port)
        text = json.dumps({"model": "slower", "max_tokens": 40, "messages": LONG})
        connection.request("POST", PATHS[0], text, {"x-api-key": KEY})
        until(lambda: b"crabtwist_active_connections 1.0" in self.metrics(gateway), "its beginning")
        connection.close()
        until(lambda: self.left(gateway) < 500, "the settlement")
        self.assertEqual(500 - 40, self.left(gateway))

    def metrics(self, gateway: RunningGateway) -> bytes:
        """Return what the gateway tells of itself."""
        connection = http.client.HTTPConnection(gateway.host, gateway.port)
        connection.request("GET", "/metrics")
        said = connection.getresponse().read()
        connection.close()
        return said

    def test_restart(self) -> None:
        """What was spent before a stop is spent after it."""
        gateway = self.start()
        for path in PATHS:
            self.ask(gateway, path)
        self.assertEqual(500 - 8, self.left(gateway))
        gateway.stop()
        self.assertEqual(500 - 8, self.left(self.start()))

    def test_crash(self) -> None:
        """What was spent before a crash is spent too, and so is what was reserved for what ran then."""
        gateway = self.start()
        self.ask(gateway)
        self.open(gateway, model="slow", stream=True, max_tokens=20, messages=LONG).read1()
        # Costs what is reserved for it, and takes longer than it takes to tell the store.
        self.ask(gateway, model="slow", max_tokens=4, stream=True)
        gateway.send(signal.SIGKILL)
        gateway.wait()
        self.assertEqual(500 - 4 - 20 - 4, self.left(self.start()))

    def test_sdks_stop(self) -> None:
        """The vendors' SDKs ask once and no more, however often they would try."""
        gateway = self.start(0.004)
        self.ask(gateway, max_tokens=4)
        messages: Any = [{"role": "user", "content": "hi"}]
        claude = anthropic.Anthropic(base_url=gateway.url, api_key=KEY, max_retries=5)
        self.addCleanup(claude.close)
        with self.assertRaises(anthropic.RateLimitError) as refused:
            claude.messages.create(model="echo", max_tokens=4, messages=messages)
        self.assertIn("has spent its budget", str(refused.exception))
        gpt = openai.OpenAI(base_url=gateway.url + "/v1", api_key=KEY, max_retries=5)
        self.addCleanup(gpt.close)
        self.assertRaises(
            openai.RateLimitError, gpt.chat.completions.create, model="echo", messages=messages, max_tokens=4
        )
        gateway.stop()
        self.assertEqual(2, gateway.log.count("429 budget_spent"), gateway.log)
