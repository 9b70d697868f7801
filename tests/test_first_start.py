"""The first start: a configuration that works at once, written safely, and what is said about it."""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import attrs
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

import crabtwist
from crabtwist.config import Config, load
from crabtwist.discovery import Makers
from crabtwist.errors import ConfigurationError
from crabtwist.first_start import CLAUDE_MODELS, GPT_MODELS, FirstStart, welcome, write_first_config
from crabtwist.ledger.sqlite import SQLiteLedgerSettings
from crabtwist.plugins import ExtensionMaker, LedgerMaker, ProviderMaker, StorageMaker
from crabtwist.settings import Secret
from crabtwist.storage.sqlite import SQLiteSettings
from crabtwist.tap import Options, make_node


class Upstream:
    @attrs.frozen
    class Settings:
        api_key: Secret | None = None


class Plain:
    pass


MAKERS = Makers(
    providers={
        "anthropic": ProviderMaker("anthropic", f"{__name__}:Upstream"),
        "openai": ProviderMaker("openai", f"{__name__}:Upstream"),
        "echo": ProviderMaker("echo", f"{__name__}:Plain"),
    },
    extensions={
        "logging": ExtensionMaker("logging", f"{__name__}:Plain"),
        "rate_limit": ExtensionMaker("rate_limit", "crabtwist.extensions.rate_limit:RateLimitExtension"),
        "budget": ExtensionMaker("budget", "crabtwist.extensions.budget:BudgetExtension"),
    },
    storages={"sqlite": StorageMaker("sqlite", "crabtwist.storage.sqlite:SQLiteStorage")},
    ledgers={"sqlite": LedgerMaker("sqlite", "crabtwist.ledger.sqlite:SQLiteLedger")},
)

BOTH = {"ANTHROPIC_API_KEY": "sk-ant-hunter2", "OPENAI_API_KEY": "sk-hunter3"}
# No file of more than 100 bytes may be written by this program.
LITTLE_ROOM = """
import resource, signal, sys
from crabtwist.errors import ConfigurationError
from crabtwist.first_start import write_first_config
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    write_first_config(sys.argv[1], {})
except ConfigurationError as error:
    print(error)
"""
ROOT = Path(crabtwist.__file__).parents[1]
URL = "http://127.0.0.1:5632"


class Starting(SynchronousTestCase):
    def setUp(self) -> None:
        self.path = Path(self.mktemp())

    def start(self, **environ: str) -> tuple[FirstStart, Config]:
        first_start = write_first_config(self.path, environ)
        return first_start, load(self.path, environ, MAKERS)


class TestWriting(Starting):
    def test_without_vendors(self) -> None:
        """Without vendors' keys there are the echo provider, one key and the admin token."""
        first_start, config = self.start()
        self.assertEqual([each.name for each in config.providers], ["echo"])
        self.assertEqual(config.admin_token, first_start.admin_token)
        self.assertEqual([(each.name, each.key) for each in config.keys], [("default", first_start.key)])
        self.assertEqual((config.listen, first_start.models), (("127.0.0.1:5632",), ("echo",)))

    def test_with_vendors(self) -> None:
        """A vendor whose key is in the environment is a provider with current models."""
        first_start, config = self.start(**BOTH)
        self.assertEqual([each.name for each in config.providers], ["echo", "anthropic", "openai"])
        self.assertEqual(config.providers[1].settings, Upstream.Settings(Secret("sk-ant-hunter2")))
        self.assertEqual(first_start.models, ("echo", *CLAUDE_MODELS, *GPT_MODELS))
        served = [model.name for provider in config.providers for model in provider.common.models]
        self.assertEqual(served, list(first_start.models))

    def test_blank_variable(self) -> None:
        """A variable that holds nothing is no key."""
        first_start, _ = self.start(OPENAI_API_KEY=" ")
        self.assertEqual(first_start.models, ("echo",))

    def test_no_vendors_key_in_the_file(self) -> None:
        """The file names the variables; what they hold is not in it."""
        self.start(**BOTH)
        text = self.path.read_text()
        self.assertIn('api_key = "${ANTHROPIC_API_KEY}"', text)
        self.assertNotIn("hunter", text)

    def test_commented_settings(self) -> None:
        """The file still loads when every setting in its comments is had."""
        _, before = self.start()
        text = re.sub(r"(?m)^#(?=\S)", "", self.path.read_text())
        self.path.write_text(text)
        config = load(self.path, BOTH, MAKERS)
        self.assertEqual([each.name for each in config.providers], ["echo", "anthropic", "openai"])
        self.assertEqual([each.name for each in config.extensions], ["logging", "rate_limit", "budget"])
        self.assertEqual(dict(config.aliases), {"fast": "echo"})
        self.assertEqual((config.storage, config.ledger), (before.storage, before.ledger))

    def test_fresh_secrets(self) -> None:
        """Each first start has secrets of its own, the two of one are different."""
        first, _ = self.start()
        self.path = Path(self.mktemp())
        second, _ = self.start()
        secrets = {each.reveal() for each in (first.key, first.admin_token, second.key, second.admin_token)}
        self.assertEqual(len(secrets), 4)

    def test_only_the_owner_may_read(self) -> None:
        """The file is its owner's alone, from the beginning and whatever the umask."""
        self.addCleanup(os.umask, os.umask(0))
        self.start()
        self.assertEqual(stat.S_IMODE(self.path.stat().st_mode), 0o600)

    def test_never_overwrites(self) -> None:
        """What is there already stays as it is, and is not written through a link either."""
        self.path.write_text("mine")
        link = Path(self.mktemp())
        link.symlink_to(self.mktemp())
        for path in (self.path, link):
            error = self.assertRaises(ConfigurationError, write_first_config, path, {})
            self.assertIn("cannot be written: File exists", error.complaints[0])
        self.assertEqual((self.path.read_text(), link.exists()), ("mine", False))

    def test_no_such_directory(self) -> None:
        """A place that is not there is named."""
        path = self.path / "crabtwist.toml"
        error = self.assertRaises(ConfigurationError, write_first_config, path, {})
        self.assertEqual(error.complaints, [f"{path}: cannot be written: No such file or directory"])

    def test_full_disk(self) -> None:
        """A file that could not be written whole is not left behind."""
        run = subprocess.run(
            [sys.executable, "-Bc", LITTLE_ROOM, str(self.path.absolute())],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        self.assertIn("cannot be written: File too large", run.stdout)
        self.assertFalse(self.path.exists())

    def test_slip_in_an_option(self) -> None:
        """A first start that cannot listen where it should writes nothing, since it would show nothing."""
        options = Options()
        options.parseOptions(["-c", str(self.path), "-l", "nowhere"])
        error = self.assertRaises(ConfigurationError, make_node, options, Clock(), {})
        self.assertIn("--listen[0]", error.complaints[0])
        self.assertFalse(self.path.exists())

    def test_printed_without_secrets(self) -> None:
        """The record can be printed; its secrets are not."""
        first_start, _ = self.start()
        self.assertNotIn(first_start.key.reveal(), repr(first_start))


class TestWelcome(Starting):
    def lines(self, url: str = URL, **environ: str) -> list[str]:
        self.first_start, _ = self.start(**environ)
        return [line.strip() for line in welcome(self.first_start, url).splitlines()]

    def test_secrets(self) -> None:
        """The admin token, the key and the file are told."""
        text = "\n".join(self.lines())
        for part in (self.first_start.admin_token.reveal(), self.first_start.key.reveal(), str(self.path)):
            self.assertIn(part, text)

    def test_files(self) -> None:
        """What will be kept, and where, is told by the names that it will have."""
        text = "\n".join(self.lines())
        ledger = load(self.path, {}, MAKERS).ledger
        assert ledger is not None
        for name in (SQLiteSettings().path, SQLiteLedgerSettings().path, ledger.common.journal):
            self.assertIn(name, text)

    def test_curl(self) -> None:
        """One line can be pasted, and asks the echo model."""
        (line,) = [line for line in self.lines() if line.startswith("curl ")]
        words = shlex.split(line)
        self.assertIn(f"{URL}/v1/messages", words)
        headers = [value for option, value in pairwise(words) if option == "-H"]
        self.assertEqual(
            headers,
            [
                f"x-api-key: {self.first_start.key.reveal()}",
                "anthropic-version: 2023-06-01",
                "content-type: application/json",
            ],
        )
        body = json.loads(words[words.index("-d") + 1])
        self.assertEqual((body["model"], body["messages"][0]["role"]), ("echo", "user"))

    def test_clients(self) -> None:
        """Claude Code and OpenAI clients are told where to go, with which key."""
        lines = self.lines()
        key = self.first_start.key.reveal()
        self.assertIn(f"export ANTHROPIC_BASE_URL={URL} ANTHROPIC_AUTH_TOKEN={key}", lines)
        self.assertIn(f"export OPENAI_BASE_URL={URL}/v1 OPENAI_API_KEY={key}", lines)
        self.assertIn("claude --model echo", lines)

    def test_claude_models(self) -> None:
        """Claude Code is told a Claude model when there is one."""
        self.assertIn(f"claude --model {CLAUDE_MODELS[0]}", self.lines(**BOTH))

    def test_urls(self) -> None:
        """A slash at the end is no part of the address, and brackets do not confuse a shell."""
        text = "\n".join(self.lines("http://[::1]:5632/"))
        self.assertIn("curl 'http://[::1]:5632/v1/messages' ", text)
        self.assertIn("ANTHROPIC_BASE_URL='http://[::1]:5632' ", text)
