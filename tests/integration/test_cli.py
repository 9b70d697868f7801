"""The real command, in a process of its own, against the real gateway: the newcomer's path, and its page."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from tests.integration.running import CHECKOUT, RunningGateway
from tests.integration.test_real_clients import node_modules

PAGE = CHECKOUT / "docs" / "command-line.md"
SECONDS = 30.0

_BLOCK = re.compile(r"^```console\n\$ ([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_SECRET = re.compile(r"sk-ct-[0-9a-f]{64}|ct-admin-[0-9a-f]{64}")
_ID = re.compile(r"req_ct_[0-9a-f]+")

#: What differs from one run to the next, all as wide as what stands for it.
_CHANGING = (
    (_SECRET, "sk-ct-..."),
    (_ID, "req_ct_..."),
    (re.compile(r"\.\.\.[0-9a-f]{4}\b"), "...hint"),
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ"), "TIME"),
    (re.compile(r"\b20\d\d-\d\d\b"), "MONTH"),
    (re.compile(r"\b0\.\d{3}\b"), "0.000"),
    (re.compile(r"127\.0\.0\.1:\d+"), "127.0.0.1:5632"),
)


def masked(text: str) -> str:
    """Return what a command printed without what differs from one run to the next."""
    for pattern, shown in _CHANGING:
        text = pattern.sub(shown, text)
    return text


class Newcomer:
    """Sits in the folder of a gateway that was just started for the first time."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.gateway = RunningGateway(folder, "-l", "127.0.0.1:0")
        configuration = folder / "crabtwist.toml"
        # As if it listened where its file says.
        text = configuration.read_text()
        self.admin_token = re.findall(r"ct-admin-[0-9a-f]+", text)[0]
        configuration.write_text(text.replace("127.0.0.1:5632", self.where))
        (folder / "crabtwist").write_text(
            f"#!/bin/sh\nexec {sys.executable} -c 'from crabtwist.cli.root import main; main()' \"$@\"\n"
        )
        (folder / "crabtwist").chmod(0o700)
        kept = {name: text for name, text in os.environ.items() if not re.match("CRABTWIST|ANTHROPIC", name)}
        path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        self.environ = {**kept, "PYTHONPATH": str(CHECKOUT), "PATH": path, "COLUMNS": "80"}

    @property
    def where(self) -> str:
        """The gateway's address and port."""
        return f"{self.gateway.host}:{self.gateway.port}"

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run a command as a shell does."""
        return subprocess.run(
            ["bash", "-c", command.replace("127.0.0.1:5632", self.where)],
            cwd=self.folder,
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=SECONDS * 2,
            check=False,
        )

    def json(self, command: str) -> Any:
        """Return what a command prints as JSON."""
        done = self.run(f"crabtwist {command} --json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def ask(self, secret: str) -> int:
        """Ask the echo something; return the status."""
        connection = HTTPConnection(self.gateway.host, self.gateway.port, timeout=SECONDS)
        messages = [{"role": "user", "content": "Hello"}]
        body = json.dumps({"model": "echo", "max_tokens": 9, "messages": messages})
        connection.request(
            "POST", "/v1/messages", body, {"x-api-key": secret, "content-type": "application/json"}
        )
        response = connection.getresponse()
        response.read()
        return response.status


@contextlib.contextmanager
def newcomer(case: SynchronousTestCase) -> Iterator[Newcomer]:
    """Start a gateway for the first time, and end it at last."""
    sitting = Newcomer(Path(case.mktemp()).absolute())
    try:
        yield sitting
    finally:
        sitting.gateway.kill()


class Following:
    """A `crabtwist logs --follow` that runs."""

    def __init__(self, sitting: Newcomer, *words: str) -> None:
        self.lines: list[str] = []
        self._grown = threading.Condition()
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from crabtwist.cli.root import main; main()", "logs", "--follow", *words],
            cwd=sitting.folder,
            env=sitting.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            with self._grown:
                self.lines.append(line)
                self._grown.notify_all()

    def wait_for(self, count: int) -> list[str]:
        """Return its lines when there are so many."""
        with self._grown:
            come = self._grown.wait_for(lambda: len(self.lines) >= count, SECONDS)
        assert come, self.lines
        return self.lines

    def end(self) -> tuple[int, str]:
        """End it as Ctrl-C does; return its status and what it said on stderr."""
        self.process.send_signal(signal.SIGINT)
        status = self.process.wait(SECONDS)
        self._reader.join(SECONDS)
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.process.stdout.close()
        with self.process.stderr as stderr:
            return status, stderr.read()


def settled(sitting: Newcomer, count: int) -> list[dict[str, Any]]:
    """Return the latest requests when the ledger has so many."""
    deadline = time.monotonic() + SECONDS
    while True:
        found: list[dict[str, Any]] = sitting.json("logs")["requests"]
        if len(found) >= count or time.monotonic() > deadline:
            return found


class PageTests(SynchronousTestCase):
    """The page shows what the commands print."""

    maxDiff = None

    def test_page(self) -> None:
        """Every command of the page, in its order, prints what stands below it."""
        following = None
        with newcomer(self) as sitting:
            for command, expected in _BLOCK.findall(PAGE.read_text()):
                if "--follow" in command:
                    following, expected_lines = Following(sitting), expected
                    following.wait_for(1)
                    continue
                shown = self.shown(sitting, command)
                self.assertEqual(masked(expected), masked(shown), command)
                self.note(sitting, shown)
                if command.startswith("curl"):
                    assert following is not None
                    lines = following.wait_for(2)
                    sitting.environ["ID"] = _ID.findall(lines[1])[0]
                    settled(sitting, 1)
            assert following is not None
            status, said = following.end()
            self.assertEqual(masked(expected_lines), masked(said + "".join(following.lines)))
            self.assertEqual(130, status)

    def shown(self, sitting: Newcomer, command: str) -> str:
        """Return what a command prints."""
        done = sitting.run(command)
        return done.stdout + done.stderr

    def note(self, sitting: Newcomer, shown: str) -> None:
        """Keep the key's secret for the commands that use it."""
        secrets = _SECRET.findall(shown)
        if secrets:
            sitting.environ["CRABTWIST_KEY"] = secrets[0]


class NewcomerTests(SynchronousTestCase):
    """From a fresh start, without any option that says where the gateway is."""

    def test_path(self) -> None:
        """A key with a limit and a budget is made, used, accounted for, rotated and deleted."""
        with newcomer(self) as sitting:
            made = sitting.json("keys create alice --dollars 1 --requests-per-minute 10")
            statuses = [sitting.ask(made["secret"]) for _ in range(11)]
            self.assertEqual([200] * 10 + [429], statuses)
            found = settled(sitting, 11)
            limited = found[0]
            self.assertEqual((429, "rate_limited"), (limited["status"], limited["reason"]))
            record = sitting.json(f"logs {found[-1]['id']}")
            self.assertEqual(record["cost_dollars"], record["receipt"]["total_dollars"])
            rotated = sitting.json("keys rotate alice --overlap 0")
            self.assertEqual(401, sitting.ask(made["secret"]))
            self.assertEqual(429, sitting.ask(rotated["secret"]))
            sitting.json("keys delete alice")
            self.assertEqual(401, sitting.ask(rotated["secret"]))

    def test_claude_code(self) -> None:
        """Claude Code works with a new key, by the lines that its making prints, and leaves a receipt."""
        program = node_modules() / ".bin" / "claude"
        with newcomer(self) as sitting:
            said = sitting.run("crabtwist keys create alice --dollars 1 --requests-per-minute 10").stdout
            printed = [line.strip() for line in said.partition("Claude Code:")[2].splitlines()]
            setting = [line for line in printed if line.startswith(("export ", "unset "))]
            [started] = [line for line in printed if line.startswith("claude")]
            alone = "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1 DISABLE_AUTOUPDATER=1"
            quiet = f"export HOME={sitting.folder} {alone}"
            asked = f"{program}{started.removeprefix('claude')} -p 'say hi' --output-format json < /dev/null"
            answer = json.loads(sitting.run("; ".join([*setting, quiet, asked])).stdout)
            self.assertFalse(answer["is_error"], answer)
            [record, *_] = settled(sitting, 1)
            self.assertEqual(("alice", "echo", 200), (record["principal"], record["model"], record["status"]))
            self.assertTrue(sitting.json(f"logs {record['id']}")["receipt"]["lines"])

    def test_followed(self) -> None:
        """What the follower shows is what the ledger has."""
        with newcomer(self) as sitting:
            secret = sitting.json("keys create alice")["secret"]
            following = Following(sitting)
            following.wait_for(1)
            self.assertEqual(200, sitting.ask(secret))
            line = following.wait_for(2)[1]
            [record] = settled(sitting, 1)
            self.assertTrue(line.rstrip().endswith(record["id"]))
            self.assertIn("alice", line)
            sitting.gateway.stop()
            self.assertEqual(3, following.process.wait(SECONDS))
            self.assertIn("being stopped", following.end()[1])

    def test_terminal(self) -> None:
        """On a terminal there are colours, and an id is whole however narrow it is."""
        with newcomer(self) as sitting:
            self.assertEqual(200, sitting.ask(sitting.json("keys create alice")["secret"]))
            [record] = settled(sitting, 1)
            ours, theirs = os.openpty()
            with os.fdopen(ours, "rb", 0) as screen:
                environ = {**sitting.environ, "TERM": "xterm", "COLUMNS": "40"}
                command = [sys.executable, "-c", "from crabtwist.cli.root import main; main()", "logs"]
                done = subprocess.run(command, cwd=sitting.folder, env=environ, stdout=theirs, check=True)
                os.close(theirs)
                shown = screen.read(65536).decode()
            self.assertEqual(0, done.returncode)
            self.assertIn("\x1b[1m", shown)
            self.assertIn(record["id"], shown)

    def test_statuses(self) -> None:
        """Scripts are told by the status, and on stderr, what went wrong."""
        with newcomer(self) as sitting:
            for words, status in (
                ("keys list", 0),
                ("keys get nobody", 1),
                ("keys create alice --model nope", 1),
                ("keys create", 2),
                ("keys list --url http://127.0.0.1:9", 3),
                ("keys list --token wrong", 4),
            ):
                done = sitting.run(f"crabtwist {words} --json")
                self.assertEqual(status, done.returncode, words)
                if status:
                    self.assertEqual(status, json.loads(done.stderr)["error"]["exit_code"])

    def test_no_secrets(self) -> None:
        """No command but those that make a secret prints one."""
        with newcomer(self) as sitting:
            sitting.run("crabtwist keys create alice")
            sitting.run(
                "KEY=sk-hidden-1 crabtwist providers create p --kind openai -m m --set-from api_key=KEY"
            )
            for words in (
                "keys list",
                "keys get alice",
                "keys get default",
                "keys update alice --disabled",
                "providers list",
                "providers get p",
                "providers update p --set weight=2",
                "models",
                "plugins",
                "doctor",
                "logs",
                "keys delete alice",
            ):
                for form in ("", " --json"):
                    done = sitting.run(f"crabtwist {words}{form}")
                    shown = done.stdout + done.stderr
                    self.assertNotRegex(shown, "sk-ct-[0-9a-f]{8}|ct-admin-|sk-hidden", words)

    def test_doctor_without_gateway(self) -> None:
        """Without a gateway the stores are opened from here, and what is wrong with them is told."""
        with newcomer(self) as sitting:
            sitting.gateway.stop()
            done = sitting.run("crabtwist doctor")
            self.assertIn("ok      the ledger (sqlite) can be opened\n", done.stdout)
            self.assertIn("PROBLEM no gateway answers at", done.stdout)
            (sitting.folder / "crabtwist.db").write_bytes(b"no database" * 1000)
            done = sitting.run("crabtwist doctor")
            self.assertEqual(1, done.returncode)
            self.assertIn("PROBLEM the storage (sqlite) cannot be opened", done.stdout)
