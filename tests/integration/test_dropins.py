"""Drop-ins of other people: installed as a distribution, or lying in a directory on the path."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SkipTest, SynchronousTestCase

from tests.integration.running import CHECKOUT, RunningGateway, running

#: The interpreter with everything that is needed, also for building; a test may patch `sys.executable`.
PYTHON = sys.executable
#: Where what we depend on is installed.
HERE = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
SECONDS = 20.0
TWISTD = "from twisted.scripts.twistd import run; run()"

BASE = """
allow_anonymous = true
[providers.third]
kind = "parrot"
models = ["polly"]
"""
PROVIDER = """
from twisted.internet.defer import succeed
from zope.interface import implementer
from crabtwist.interfaces import IProvider
from crabtwist.providers.local import LocalResponse

@implementer(IProvider)
class Parrot:
    kind = "parrot"
    dialects = frozenset({"anthropic"})
    operations = frozenset({"messages"})

    def __init__(self, name, settings, services):
        self.name, self._clock = name, services.clock

    def open(self, call):
        body = b'{"type":"message","content":[{"type":"text","text":"Polly"}]}'
        fields = ((b"content-type", b"application/json"),)
        return succeed(LocalResponse(200, fields, [body], self._clock, length=len(body)))

    def list_models(self):
        return succeed(["polly"])
"""
DROP_IN = """
from crabtwist.plugins import ProviderMaker
parrot = ProviderMaker("parrot", "parrot_for_crabtwist:Parrot")
"""
SETUP = """
[metadata]
name = parrot-for-crabtwist
version = 1.0
[options]
package_dir =
    = .
py_modules = parrot_for_crabtwist
packages = twisted.plugins
"""
BOUNCER = """
from crabtwist.errors import Refused
from crabtwist.extension import Extension
from crabtwist.plugins import ExtensionMaker

class Bouncer(Extension):
    name = "bouncer"

    def __init__(self, settings, services):
        self.storage = services.storage

    async def on_request(self, context):
        if context.max_tokens == 7 and await self.storage.increment("bouncer", b"seven", 1) > 2:
            raise Refused(429, None, "twice is enough")
        if (context.max_tokens or 0) > 100:
            raise Refused(402, None, "that is too much")
        if context.max_tokens == 13:
            raise RuntimeError("unlucky")

    def on_end(self, context, outcome):
        print(f"<{context.request_id} {outcome.status} {outcome.ended_by} {outcome.reason}>", flush=True)

bouncer = ExtensionMaker("bouncer", __name__ + ":Bouncer")
"""
BOUNCED = """
allow_anonymous = true
shutdown_timeout = 0.2
[extensions.bouncer]
[providers.echo]
kind = "echo"
models = ["echo"]
[providers.slow]
kind = "echo"
models = ["slow"]
delay_seconds = 0.1
[providers.gone]
kind = "anthropic"
base_url = "http://127.0.0.1:1"
models = ["gone"]
max_retries = 0
"""


def ask(gateway: RunningGateway, model: str, words: str = "hi", **more: object) -> HTTPResponse:
    """Send a request for a message; return the answer, its body unread."""
    connection = HTTPConnection(gateway.host, gateway.port, timeout=SECONDS)
    body = {"model": model, "messages": [{"role": "user", "content": words}], **more}
    connection.request("POST", "/v1/messages", json.dumps(body))
    return connection.getresponse()


def check(python: str | Path, directory: Path, path: str) -> str:
    """Return the complaints about the configuration in a directory."""
    done = subprocess.run(
        [python, "-c", TWISTD, "-n", "crabtwist", "--check"],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, ""), done
    return done.stderr


def run(*command: str | Path, directory: Path | None = None) -> None:
    """Run a command; its output is in the error if it fails."""
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"


class TestInstalled(SynchronousTestCase):
    """A third party's distribution beside ours, in an environment with no sign of the checkout."""

    def setUp(self) -> None:
        if tuple(map(int, importlib.metadata.version("setuptools").split(".")[:2])) < (70, 1):
            raise SkipTest("setuptools 70.1 or newer is needed to build wheels without a network")
        self.scratch = Path(self.mktemp()).absolute()
        self.environment = self.scratch / "environment"
        run(PYTHON, "-m", "venv", "--without-pip", self.environment)
        self.python = self.environment / "bin" / "python"
        (site_packages,) = self.environment.glob("lib/python*/site-packages")
        # What we depend on comes from here; an editable install of ours would not come along.
        (site_packages / "dependencies.pth").write_text("\n".join(HERE))
        # Twisted itself is not installed there, so neither is its command.
        twistd = self.environment / "bin" / "twistd"
        twistd.write_text(f"#!{self.python}\n{TWISTD}\n")
        twistd.chmod(0o755)

    def our_source(self) -> Path:
        copy = self.scratch / "ours"
        ignored = shutil.ignore_patterns("__pycache__", "dropin.cache")
        for directory in "crabtwist", "twisted":
            shutil.copytree(CHECKOUT / directory, copy / directory, ignore=ignored)
        for file in CHECKOUT.iterdir():
            if file.is_file():
                shutil.copy(file, copy)
        return copy

    def their_source(self) -> Path:
        theirs = self.scratch / "theirs"
        (theirs / "twisted" / "plugins").mkdir(parents=True)
        (theirs / "twisted" / "plugins" / "parrot_dropin.py").write_text(DROP_IN)
        (theirs / "parrot_for_crabtwist.py").write_text(PROVIDER)
        (theirs / "setup.cfg").write_text(SETUP)
        (theirs / "pyproject.toml").write_text('[build-system]\nrequires = ["setuptools"]\n')
        return theirs

    def pip(self, *arguments: str | Path) -> None:
        run(PYTHON, "-m", "pip", "--python", self.python, "--disable-pip-version-check", *arguments)

    def test_life(self) -> None:
        """A wheel with a drop-in serves once it is installed; uninstalled, its kind is missing."""
        offline = ("--no-deps", "--no-index", "--no-build-isolation")
        self.pip("install", *offline, self.our_source(), self.their_source())
        self.patch(sys, "executable", str(self.python))
        with running(self.scratch / "served", BASE, environ={"PYTHONPATH": ""}) as gateway:
            self.assertIn(b'"Polly"', ask(gateway, "polly").read())
        self.pip("uninstall", "--yes", "parrot-for-crabtwist")
        complaints = check(self.python, self.scratch / "served", "")
        self.assertIn('providers.third.kind: there is no provider kind "parrot"', complaints)
        self.assertIn("There are: anthropic, echo, openai.", complaints)


class Dropping(SynchronousTestCase):
    """A directory on PYTHONPATH for drop-ins, and one for the gateway."""

    def setUp(self) -> None:
        self.place = Path(self.mktemp()).absolute()
        (self.place / "twisted" / "plugins").mkdir(parents=True)
        self.directory = Path(self.mktemp()).absolute()
        self.path = os.pathsep.join([str(self.place), str(CHECKOUT)])

    def drop_in(self, **sources: str) -> None:
        for name, source in sources.items():
            (self.place / "twisted" / "plugins" / f"{name}.py").write_text(source)

    def run_gateway(self, configuration: str) -> RunningGateway:
        """Return a running gateway, ended with the test."""
        context = running(self.directory, configuration, environ={"PYTHONPATH": self.path})
        gateway = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        return gateway


class TestPath(Dropping):
    def complaints(self) -> str:
        self.directory.mkdir()
        (self.directory / "crabtwist.toml").write_text(BASE)
        return check(PYTHON, self.directory, self.path)

    def test_nothing_installed(self) -> None:
        """A drop-in and its module that lie on the path are enough."""
        (self.place / "parrot_for_crabtwist.py").write_text(PROVIDER)
        self.drop_in(parrot_dropin=DROP_IN)
        self.assertIn(b'"Polly"', ask(self.run_gateway(BASE), "polly").read())

    def test_two_makers(self) -> None:
        """Two makers of one kind are an error that names both of their modules."""
        self.drop_in(first_dropin=DROP_IN, second_dropin=DROP_IN)
        complaints = self.complaints()
        for named in '"parrot"', "twisted.plugins.first_dropin", "twisted.plugins.second_dropin":
            self.assertIn(named, complaints)

    def test_broken_drop_in(self) -> None:
        """A drop-in that cannot be imported is named, with the reason, to whoever misses its kind."""
        self.drop_in(parrot_dropin="import cages")
        complaints = self.complaints()
        self.assertIn('providers.third.kind: there is no provider kind "parrot"', complaints)
        self.assertIn("twisted.plugins.parrot_dropin could not be loaded: ModuleNotFoundError", complaints)

    def test_broken_module(self) -> None:
        """A drop-in whose module cannot be imported is complained of with the reason."""
        self.drop_in(parrot_dropin=DROP_IN)
        self.assertRegex(
            self.complaints(), r"providers\.third: parrot_for_crabtwist:Parrot: .*ModuleNotFound"
        )


class TestExtension(Dropping):
    def setUp(self) -> None:
        super().setUp()
        self.drop_in(bouncer_dropin=BOUNCER)
        self.gateway = self.run_gateway(BOUNCED)
        self.expected: dict[str, str] = {}

    def ask(self, expected: str, model: str, *, read: bool = True, **more: Any) -> HTTPResponse:
        """Send a request that is to end as expected."""
        response = ask(self.gateway, model, **more)
        self.expected[str(response.headers["x-crabtwist-request-id"])] = expected
        if read:
            response.read()
        return response

    def test_refusal(self) -> None:
        """A guard's refusal is the answer, and no upstream is asked."""
        response = self.ask("", "gone", max_tokens=101, read=False)
        self.assertEqual(response.status, 402)
        self.assertEqual(json.loads(response.read())["error"]["message"], "that is too much")

    def test_storage(self) -> None:
        """An extension may use the configured store; it is open before the first request."""
        statuses = [self.ask("", "echo", max_tokens=7).status for _ in range(3)]
        self.assertEqual(statuses, [200, 200, 429])

    def test_every_end(self) -> None:
        """The end of each request is told exactly once, however it ended."""
        self.ask("200 upstream complete", "echo")
        self.ask("200 upstream complete", "echo", stream=True)
        self.ask("402 gateway refused", "echo", max_tokens=101)
        self.ask("500 gateway guard_failed", "echo", max_tokens=13)
        self.ask("502 upstream connect_failed", "gone", stream=True)
        self.ask("404 gateway model_not_found", "nobody's")
        self.ask("400 gateway invalid_body", "echo", max_tokens="ten")
        self.leave(self.ask("499 client client_left", "slow", read=False, stream=True, words="word " * 99))
        last = self.ask("0 gateway shutting_down", "slow", read=False, stream=True, words="word " * 99)
        last.read1()
        self.gateway.stop()
        told = re.findall(r"<(\w+) (.*)>", self.gateway.log)
        self.assertEqual(sorted(told), sorted(self.expected.items()))

    def leave(self, response: HTTPResponse) -> None:
        response.read1()
        response.close()
        self.gateway.wait_for(re.compile("client_left"))
