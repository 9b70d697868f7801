"""The admin API as it is documented: the pages' examples are run, the document is taken at its word."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SkipTest

from tests.integration.admin_client import FILE_KEY, TOKEN
from tests.integration.scripted_upstream import ScriptedUpstream
from tests.integration.test_admin_api import CONFIGURATION, AdminCase, models_and_words

DOCS = Path(__file__).parents[2] / "docs"
#: Where the pages say that an upstream is.
UPSTREAM = "http://127.0.0.1:8000"

_EXAMPLE = re.compile(r"^```sh\n(.*?)^```\n(?:\n```json\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
_PATH = re.compile(r"^\| ([A-Z, ]+) \| `(/v1/[^`]+)` \|", re.MULTILINE)
#: What differs each time: secrets and their ends, moments, the ids of requests.
_CHANGING = {
    r"sk-ct-[0-9a-f.]+": "SECRET",
    r"\d{4}-\d\d-\d\dT[0-9:.]+Z": "MOMENT",
    r'"hint": ?"[0-9a-f]{4}"': '"hint": "HINT"',
    r"req_ct_[0-9a-f.]+": "ID",
}

FUZZING = """
[phases.coverage]
# A method that HTTP does not know is a 501 here, before there is a path.
unexpected-methods = []
"""

#: All but those for a server that takes everything that its document can say, and for guesses at the token.
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
)


def settled(text: str) -> Any:
    """Return a JSON document without what differs each time."""
    for pattern, word in _CHANGING.items():
        text = re.sub(pattern, word, text)
    return json.loads(text)


class PagesTests(AdminCase):
    """The pages."""

    configuration = CONFIGURATION.replace('name = "file"', 'name = "default"')

    def setUp(self) -> None:
        """Have an upstream, too."""
        super().setUp()
        if shutil.which("curl") is None:
            raise SkipTest("curl is missing")
        self.upstream = ScriptedUpstream()
        self.addCleanup(self.upstream.close)
        self.upstream.play(models_and_words)
        self.environ = {**os.environ, "URL": self.gateway.url, "TOKEN": TOKEN}

    def run_examples(self, page: str) -> int:
        """Run a page's examples in order, hold what comes against what is shown; return how many."""
        examples = _EXAMPLE.findall((DOCS / page).read_text())
        for command, shown in examples:
            answer = self.run_line(command.replace(UPSTREAM, self.upstream.url))
            if shown:
                self.assertEqual(
                    settled(shown), settled(answer.replace(self.upstream.url, UPSTREAM)), command
                )
            self.environ.update({"KEY": json.loads(answer)["secret"]} if '"secret":' in answer else {})
        return len(examples)

    def run_line(self, command: str) -> str:
        """Run a line for a shell; return what it prints."""
        words = ["bash", "-ec", command]
        return subprocess.run(words, env=self.environ, capture_output=True, text=True, check=True).stdout

    def test_admin_api(self) -> None:
        """The examples of the page on the admin API answer what is shown there."""
        self.assertGreaterEqual(self.run_examples("admin-api.md"), 6)

    def test_keys(self) -> None:
        """So do those of the page on keys."""
        self.assertGreaterEqual(self.run_examples("keys.md"), 5)

    def test_paths(self) -> None:
        """The page lists what the document does, no more and no less."""
        listed = {
            (method, path)
            for methods, path in _PATH.findall((DOCS / "admin-api.md").read_text())
            for method in methods.split(", ")
        }
        paths = self.admin.send("GET", "/openapi.json", None, {}).json["paths"]
        self.assertEqual({(each.upper(), path) for path in paths for each in paths[path]}, listed)


class FuzzingTests(AdminCase):
    """Whatever the document lets anybody ask."""

    configuration = CONFIGURATION + "\n[extensions.cache]\n[extensions.usage]\n"

    def test_no_server_error(self) -> None:
        """Nothing that is asked is answered with a 500, or with what the document does not say."""
        if find_spec("schemathesis") is None:
            raise SkipTest("schemathesis is missing; it is among the extra `dev`")
        self.admin.make("visitor")
        self.admin.chat(FILE_KEY)
        config = self.folder / "schemathesis.toml"
        config.write_text(FUZZING)
        command = [sys.executable, "-c", "from schemathesis.cli import schemathesis as run; run()"]
        command += ["--config-file", str(config), "run", f"{self.gateway.url}/openapi.json"]
        command += ["-H", f"Authorization: Bearer {TOKEN}", "--checks", ",".join(CHECKS)]
        # An event stream has no end, and an upstream that is made up is waited for.
        command += ["--exclude-path-regex", "follow$", "-n", "20", "--seed", "1", "--no-color"]
        done = subprocess.run(
            command, cwd=self.folder, capture_output=True, text=True, check=False, timeout=240
        )
        self.assertEqual(0, done.returncode, done.stdout[-6000:] + done.stderr[-2000:])
        self.assertIn("Test cases:", done.stdout)
        self.assertNotIn("Traceback", self.gateway.log)
