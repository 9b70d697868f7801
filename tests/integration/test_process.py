"""The process: how it starts, says what is wrong, reads its configuration again, and ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from tests.integration.running import CHECKOUT, RunningGateway, running

KEY = "sk-ct-first"
BASE = f"""
[[keys]]
name = "first"
key = "{KEY}"
[providers.echo]
kind = "echo"
models = ["echo"]
"""
SLOW = """
[providers.slow]
kind = "echo"
models = ["slow"]
delay_seconds = 0.1
[extensions.endings]
"""
#: Tells the log how each request ended.
ENDINGS = """
from crabtwist.extension import Extension
from crabtwist.plugins import ExtensionMaker
class Endings(Extension):
    name = "endings"
    def __init__(self, settings, services):
        pass
    def on_end(self, context, outcome):
        print(f"<{outcome.status} {outcome.ended_by} {outcome.reason}>", flush=True)
endings = ExtensionMaker("endings", __name__ + ":Endings")
"""
CLOSED_STORE = """
from twisted.internet.defer import fail
from crabtwist.plugins import StorageMaker
from crabtwist.storage.memory import MemoryStorage
class ClosedStore(MemoryStorage):
    def open(self):
        return fail(RuntimeError("the store is shut today"))
    def close(self):
        raise RuntimeError("it was never open")
closed = StorageMaker("closed", __name__ + ":ClosedStore")
"""
SECONDS = 20.0


def free_port() -> int:
    """Return a port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def twistd(directory: Path, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `twistd crabtwist` until it ends by itself."""
    directory.mkdir(parents=True, exist_ok=True)
    script = "from twisted.scripts.twistd import run; run()"
    paths = [str(CHECKOUT)] if path is None else [str(path), str(CHECKOUT)]
    return subprocess.run(
        [sys.executable, "-c", script, "-n", "--pidfile=", "crabtwist", *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=SECONDS * 2,
        check=False,
    )


def ask(
    gateway: RunningGateway,
    words: str = "hi",
    model: str = "echo",
    key: str = KEY,
    *,
    receive_bytes: int = 65536,
    stream: bool = False,
) -> HTTPResponse:
    """Send a request for a message; return the answer, its body unread."""
    connection = HTTPConnection(gateway.host, gateway.port, timeout=SECONDS)
    connection.sock = socket.socket()
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.sock.settimeout(SECONDS)
    connection.sock.connect((gateway.host, gateway.port))
    messages = [{"role": "user", "content": words}]
    body = {"model": model, "max_tokens": 9, "stream": stream, "messages": messages}
    connection.request("POST", "/v1/messages", json.dumps(body), {"x-api-key": key})
    return connection.getresponse()


def ready(gateway: RunningGateway) -> int:
    """Return the status of `/ready`."""
    connection = HTTPConnection(gateway.host, gateway.port, timeout=SECONDS)
    connection.request("GET", "/ready")
    return connection.getresponse().status


def texts(stream: bytes) -> str:
    """Return what an Anthropic stream says."""
    return "".join(
        json.loads(f'"{text}"') for text in re.findall(r'"text_delta","text":"(.*?)"}', stream.decode())
    )


class Case(SynchronousTestCase):
    """A directory for one gateway, and one for its drop-ins."""

    def setUp(self) -> None:
        self.directory = Path(self.mktemp()).absolute()
        self.drop_ins = Path(self.mktemp()).absolute()
        (self.drop_ins / "twisted" / "plugins").mkdir(parents=True)

    def drop_in(self, name: str, source: str) -> None:
        (self.drop_ins / "twisted" / "plugins" / f"{name}.py").write_text(source)

    def run_gateway(self, configuration: str, *arguments: str) -> RunningGateway:
        """Return a running gateway, ended with the test."""
        paths = os.pathsep.join([str(self.drop_ins), str(CHECKOUT)])
        context = running(self.directory, configuration, *arguments, environ={"PYTHONPATH": paths})
        gateway = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        return gateway

    def write(self, configuration: str) -> None:
        (self.directory / "crabtwist.toml").write_text(configuration)


class TestFirstStart(Case):
    def start(self) -> RunningGateway:
        self.directory.mkdir(exist_ok=True)
        gateway = RunningGateway(self.directory, "-l", f"127.0.0.1:{self.port}")
        self.addCleanup(gateway.kill)
        return gateway

    def setUp(self) -> None:
        super().setUp()
        self.port = free_port()
        self.gateway = self.start()
        self.path = self.directory / "crabtwist.toml"
        self.secrets = re.findall(r'^(?:admin_token|key) = "(.*)"', self.path.read_text(), re.MULTILINE)

    def test_welcome(self) -> None:
        """The first start writes a configuration for its owner alone, and shows its secrets above the log."""
        welcome, log = self.gateway.log.split("twistd 26", 1)
        self.assertEqual(stat.S_IMODE(self.path.stat().st_mode), 0o600)
        self.assertEqual(len(self.secrets), 2)
        for shown in (*self.secrets, "export ANTHROPIC_BASE_URL=", "export OPENAI_BASE_URL=", "curl "):
            self.assertIn(shown, welcome)
            self.assertNotIn(shown, log)

    def test_curl(self) -> None:
        """The line with curl works as it is pasted."""
        (line,) = re.findall(r"^ *(curl .*)$", self.gateway.log, re.MULTILINE)
        done = subprocess.run(["sh", "-c", line], capture_output=True, timeout=SECONDS, check=True)
        self.assertEqual(json.loads(done.stdout)["content"], [{"type": "text", "text": "Hello"}])

    def test_second_start(self) -> None:
        """The second start changes nothing, and shows no secret."""
        before = self.path.read_bytes()
        self.gateway.stop()
        second = self.start()
        second.stop()
        self.assertEqual(before, self.path.read_bytes())
        for secret in self.secrets:
            self.assertNotIn(secret, second.log)


class TestStart(Case):
    def test_check(self) -> None:
        """`--check` prints what would be served, and opens no port."""
        self.directory.mkdir()
        self.write(BASE + '[aliases]\nfast = "echo"\n')
        done = twistd(self.directory, "--check", "-l", "127.0.0.1:1")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        expected = ["would listen on 127.0.0.1:1", "provider echo (echo): echo", "alias fast: echo"]
        self.assertEqual(
            done.stdout.splitlines(), [*expected, "key first: *", "storage sqlite", "ledger sqlite"]
        )

    def test_check_without_file(self) -> None:
        """`--check` writes no configuration where there is none."""
        done = twistd(self.directory, "--check")
        self.assertEqual((done.returncode, list(self.directory.iterdir())), (1, []))
        self.assertIn("crabtwist.toml: cannot be read: No such file", done.stderr)

    def test_all_complaints(self) -> None:
        """A bad configuration is complained of all at once, each with the key's path, and nothing starts."""
        self.directory.mkdir()
        self.write('listen = "80"\nlissen = 1\n' + BASE.replace('"echo"]', "1]") + "max_retries = -1\n")
        for arguments in (), ("--check",):
            done = twistd(self.directory, *arguments)
            self.assertEqual((done.returncode, done.stdout), (1, ""))
            paths = {re.split(r": ", line)[1] for line in done.stderr.splitlines()}
            self.assertLessEqual({"lissen", "providers.echo.models[0]", "providers.echo.max_retries"}, paths)

    def test_closed_store(self) -> None:
        """A store that cannot be opened is one line in the log and the exit status 1; no port was open."""
        self.drop_in("closed_dropin", CLOSED_STORE)
        self.directory.mkdir()
        self.write(BASE + '[storage]\nkind = "closed"\n')
        done = twistd(self.directory, "-l", "127.0.0.1:0", path=self.drop_ins)
        self.assertEqual(done.returncode, 1)
        (line,) = [line for line in done.stdout.splitlines() if "shut today" in line]
        self.assertIn("not started: the store is shut today", line)
        for unwanted in ("Traceback", "GatewayFactory", "serving on"):
            self.assertNotIn(unwanted, done.stdout + done.stderr)

    def test_port_in_use(self) -> None:
        """A port that somebody else has is one line in the log and the exit status 1."""
        self.directory.mkdir()
        self.write(BASE)
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            done = twistd(self.directory, "-l", "127.0.0.1:0", "-l", f"127.0.0.1:{port}")
        self.assertEqual(done.returncode, 1)
        self.assertIn(f"not started: Couldn't listen on 127.0.0.1:{port}: ", done.stdout)
        self.assertNotIn("Traceback", done.stdout + done.stderr)

    def test_several_listens(self) -> None:
        """`--listen` may be given several times, also with endpoint strings such as a Unix socket's."""
        place = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, place)
        gateway = self.run_gateway(
            BASE, "--listen", f"unix:{place}/socket", "-l", "tcp:0:interface=127.0.0.1"
        )
        gateway.wait_for(re.compile(r"(serving on (?s:.*)){3}"))
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"{place}/socket")
            client.sendall(b"GET /ready HTTP/1.1\r\nHost: a\r\n\r\n")
            self.assertIn(b"200 OK", client.recv(99))
        for port in re.findall(r"serving on http://127.0.0.1:(\d+)", gateway.log):
            gateway.port = int(port)
            self.assertEqual(ready(gateway), 200)

    def test_help(self) -> None:
        """`--help` explains every option."""
        words = " ".join(twistd(self.directory, "--help").stdout.split())
        for said in ("-c, --config= The configuration file", "--check Validate", "-l, --listen= Listen on"):
            self.assertIn(said, words)


class TestReload(Case):
    def reload(self, gateway: RunningGateway, configuration: str, answer: str = "reloaded: ") -> None:
        self.write(configuration)
        gateway.send(signal.SIGHUP)
        gateway.wait_for(re.compile(answer))

    def test_additions(self) -> None:
        """After SIGHUP a new model, key and alias are served at once."""
        gateway = self.run_gateway(BASE)
        self.assertEqual([404, 401], [ask(gateway, model="fast").status, ask(gateway, key="sk-ct-2").status])
        more = '[[keys]]\nname = "second"\nkey = "sk-ct-2"\n[aliases]\nfast = "new"\n'
        self.reload(gateway, BASE.replace('["echo"]', '["echo", "new"]') + more)
        statuses = [ask(gateway, model=model, key="sk-ct-2").status for model in ("echo", "new", "fast")]
        self.assertEqual(statuses, [200, 200, 200])

    def test_removed_key(self) -> None:
        """After SIGHUP a key that was removed is refused at once, also on a connection that was open."""
        gateway = self.run_gateway(BASE)
        connection = HTTPConnection(gateway.host, gateway.port, timeout=SECONDS)
        statuses = []
        for configuration in (BASE, BASE.replace(KEY, "sk-ct-other")):
            self.reload(gateway, configuration)
            gateway.log = ""
            connection.request("GET", "/v1/models", headers={"authorization": f"Bearer {KEY}"})
            response = connection.getresponse()
            response.read()
            statuses.append(response.status)
        self.assertEqual(statuses, [200, 401])

    def test_broken_file(self) -> None:
        """A file with faults changes nothing, and every fault is logged."""
        gateway = self.run_gateway(BASE)
        self.reload(gateway, BASE.replace("models", "modles") + "weight = -1\n", "not reloaded.*\n")
        for key in ("modles", "models", "weight"):
            self.assertIn(f"providers.echo.{key}: ", gateway.log)
        self.assertEqual(ask(gateway).status, 200)

    def test_running_stream(self) -> None:
        """A stream that runs keeps what it began with, when its model and its key are removed."""
        gateway = self.run_gateway(BASE + SLOW.replace("[extensions.endings]", ""))
        stream = ask(gateway, "one two three four five six", "slow", stream=True)
        begun = stream.read1()
        self.reload(gateway, BASE.replace(KEY, "sk-ct-other"))
        self.assertEqual(ask(gateway, model="slow").status, 401)
        self.assertEqual(ask(gateway, model="slow", key="sk-ct-other").status, 404)
        self.assertEqual(texts(begun + stream.read()), "one two three four five six")


class TestEnd(Case):
    def start(self, top: str = "", words: int = 20) -> tuple[RunningGateway, HTTPResponse]:
        """Return a gateway that was asked to end while a stream of `words` words runs, and the stream."""
        self.drop_in("endings_dropin", ENDINGS)
        gateway = self.run_gateway(top + BASE + SLOW)
        stream = ask(gateway, "word " * words, "slow", stream=True)
        stream.read1()
        gateway.send(signal.SIGTERM)
        self.wait_for_drain(gateway)
        return gateway, stream

    def wait_for_drain(self, gateway: RunningGateway) -> None:
        deadline, status = time.monotonic() + SECONDS, 0
        while status != 503:
            self.assertLess(time.monotonic(), deadline)
            self.assertIsNone(gateway.process.poll())
            status = ready(gateway)

    def endings(self, gateway: RunningGateway) -> list[str]:
        return re.findall(r"<(\d+ .*)>", gateway.log)

    def test_drain(self) -> None:
        """After SIGTERM new work is refused, what runs finishes whole, and the process ends."""
        gateway, stream = self.start()
        refused = ask(gateway)
        self.assertEqual((refused.status, refused.headers["x-crabtwist-error"]), (503, "draining"))
        self.assertGreaterEqual(int(refused.headers["retry-after"] or ""), 1)
        whole = stream.read()
        self.assertTrue(whole.endswith(b'{"type":"message_stop"}\n\n'), whole[-200:])
        self.assertEqual(gateway.wait(), -signal.SIGTERM)
        self.assertEqual(self.endings(gateway), ["200 upstream complete"])
        self.assertNotIn("Traceback", gateway.log)

    def test_shutdown_timeout(self) -> None:
        """A stream that takes longer than `shutdown_timeout` gets one error event, and is settled."""
        gateway, stream = self.start("shutdown_timeout = 0.5\n", words=500)
        events = stream.read().split(b"\n\n")
        self.assertEqual(
            [index for index, event in enumerate(events) if b"error" in event], [len(events) - 2]
        )
        self.assertIn(b"event: error", events[-2])
        self.assertEqual(gateway.wait(), -signal.SIGTERM)
        self.assertEqual(self.endings(gateway), ["0 gateway shutting_down"])

    def test_impatience(self) -> None:
        """A second SIGTERM ends everything at once."""
        gateway, _stream = self.start("shutdown_timeout = 300\n", words=3000)
        gateway.send(signal.SIGTERM)
        gateway.wait(5)
        self.assertEqual(self.endings(gateway), ["0 gateway shutting_down"])

    def test_slow_reader(self) -> None:
        """A client that reads late and slowly while the gateway ends gets the last byte."""
        self.drop_in("endings_dropin", ENDINGS)
        gateway = self.run_gateway(BASE + SLOW.replace("0.1", "0.01"))
        words = " ".join(["x" * 700_000] * 8)
        stream = ask(gateway, words, "slow", receive_bytes=4096, stream=True)
        gateway.send(signal.SIGTERM)
        self.wait_for_drain(gateway)
        whole = b"".join(iter(lambda: stream.read(4096), b""))
        self.assertEqual(hash(texts(whole)), hash(words))
        self.assertTrue(whole.endswith(b'{"type":"message_stop"}\n\n'), whole[-200:])
        gateway.wait()
        self.assertEqual(self.endings(gateway), ["200 upstream complete"])
