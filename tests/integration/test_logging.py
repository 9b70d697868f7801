"""The log of requests of a running gateway, in a file of its own."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from tests.integration.running import running

CONFIGURATION = """
[extensions.logging]
path = "requests.jsonl"

[[keys]]
name = "tester"
key = "sk-ct-test"

[providers.echo]
models = ["echo"]
"""

QUESTION = json.dumps({"model": "echo", "messages": [{"role": "user", "content": "hello"}]}).encode()


class LoggingTests(SynchronousTestCase):
    """What is in the file, and what is not in the log."""

    def test_file(self) -> None:
        """After a stop every request is in the file, and none in twistd's log."""
        directory = Path(self.mktemp()).absolute()
        with running(directory, CONFIGURATION) as gateway:
            for _ in range(3):
                request = urllib.request.Request(
                    gateway.url + "/v1/messages", QUESTION, {"x-api-key": "sk-ct-test"}
                )
                urllib.request.urlopen(request).close()
            gateway.stop()
        lines = [json.loads(line) for line in (directory / "requests.jsonl").read_text().splitlines()]
        self.assertEqual([("request", 200, "tester")] * 3, [_told(line) for line in lines])
        for line in lines:
            self.assertNotIn(line["request_id"], gateway.log)

    def test_unusable(self) -> None:
        """A file that cannot be opened stops the start, in words."""
        configuration = CONFIGURATION.replace("requests.jsonl", "no/such/file")
        with self.assertRaises(AssertionError) as caught:
            running(Path(self.mktemp()).absolute(), configuration).__enter__()
        words = re.compile(r"not started: extensions\.logging\.path: .*no/such/file cannot be opened")
        self.assertRegex(str(caught.exception), words)


def _told(line: dict[str, object]) -> tuple[object, ...]:
    return line["event"], line["status"], line["principal"]
