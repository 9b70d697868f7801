"""Secrets are found nowhere: not in what the gateway logs, nor in what it answers, however things go."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from tests.integration import scripted_upstream as script
from tests.integration.running import CHECKOUT, RunningGateway, running
from tests.integration.scripted_upstream import Answer, Received, ScriptedUpstream

KEY = "sk-ct-hushed-virtual"
ADMIN = "ct-admin-hushed"
SECONDS = 20.0
ANTHROPIC, OPENAI, COUNT = "/v1/messages", "/v1/chat/completions", "/v1/messages/count_tokens"
#: What the scripted upstream does with a request for a model of that name.
MODELS = ["whole", "denied", "forbidden", "denied-event", "torn", "reset", "garbage", "moved", "busy"]

CONFIGURATION = f"""
admin_token = "{ADMIN}"
[[keys]]
name = "first"
key = "{KEY}"
[extensions.logging]
[extensions.crashing]
[providers.anthropic]
api_key = "sk-ant-hushed"
base_url = "URL"
models = {json.dumps(MODELS)}
max_retries = 0
[providers.openai]
api_key = "sk-hushed-openai"
base_url = "URL"
models = {json.dumps(MODELS)}
max_retries = 0
[providers.bearer]
kind = "anthropic"
api_key = "sk-ant-oat-hushed"
base_url = "URL"
models = ["bearer"]
[providers.gone]
kind = "openai"
api_key = "sk-hushed-gone"
base_url = "http://127.0.0.1:1"
models = ["gone"]
max_retries = 0
[providers.crashing]
api_key = "sk-hushed-crashing"
models = ["crashing"]
max_retries = 0
"""
#: A provider and an extension that tell all they have when they crash.
CRASHING = """
import attrs
from crabtwist.extension import Extension
from crabtwist.plugins import ExtensionMaker, ProviderMaker
from crabtwist.settings import Secret

@attrs.frozen
class Settings:
    api_key: Secret

class Provider:
    Settings = Settings
    kind, dialects, operations = "crashing", {"anthropic"}, {"messages"}
    def __init__(self, name, settings, services):
        self.name, self.settings = name, settings
    def open(self, call):
        raise RuntimeError(f"{vars(self)} {call}")

class Watcher(Extension):
    name = "crashing"
    def __init__(self, settings, services):
        pass
    def on_request(self, context):
        if context.max_tokens == 13:
            raise RuntimeError(repr(context))
    def on_end(self, context, outcome):
        raise RuntimeError(f"{context} {outcome}")

provider = ProviderMaker("crashing", __name__ + ":Provider")
extension = ExtensionMaker("crashing", __name__ + ":Watcher")
"""
#: Configurations with secrets where none belong.
MISTAKES = [
    CONFIGURATION.replace("http://127.0.0.1:1", "http://user:hushed-password@127.0.0.1:1"),
    CONFIGURATION.replace("http://127.0.0.1:1", "http://127.0.0.1:1/?key=hushed-in-query"),
    CONFIGURATION.replace("http://127.0.0.1:1", "hushed-as-url"),
    CONFIGURATION.replace(ADMIN, KEY),
    CONFIGURATION.replace(f'"{ADMIN}"', f'["{ADMIN}"]'),
    CONFIGURATION.replace(KEY, "sk-ct-hushed with spaces"),
    CONFIGURATION.replace("sk-ant-hushed", "sk-ant-hushed\\n"),
    CONFIGURATION.replace("api_key", "apikey"),
    CONFIGURATION.replace('"sk-ant-hushed"', '"sk-ant-hushed'),
    CONFIGURATION.replace("sk-ant-hushed", "${sk-ant-hushed}"),
    CONFIGURATION + '[[keys]]\nname = "second"\nkey = "' + KEY + '"\n',
]


def answer(request: Received) -> Answer:
    """Do as the model's name says, repeating the credential wherever there is room."""
    asked = json.loads(request.body)
    said = " ".join(request.values("x-api-key") + request.values("authorization"))
    error = {"type": "authentication_error", "message": f"no such key: {said}"}
    words = json.dumps({"type": "error", "error": error}).encode()
    answers: dict[str, Answer] = {
        "denied": script.plain(401, words),
        "forbidden": script.plain(403, f"Go away with your {said}".encode(), kind="text/plain"),
        "denied-event": script.stream(script.event("error", error=error)),
        "torn": script.broken_stream(script.MESSAGE_START, script.RESET),
        "reset": [script.RESET],
        "garbage": [b"SSH-2.0-OpenSSH\r\n", script.FIN],
        "moved": script.plain(307, b"", ("location", "http://127.0.0.1:1/")),
        "busy": script.plain(529, b'{"error":{"type":"overloaded_error","message":"later"}}'),
    }
    whole = script.stream(*script.TEXT_STREAM) if asked["stream"] else script.plain(200, b"{}")
    is_stream = asked["stream"] and not request.line.startswith(f"POST {COUNT}")
    # What an upstream says with a 200 passes unread, so it had better hold no key.
    return whole if asked["model"] == "denied-event" and not is_stream else answers.get(asked["model"], whole)


class TestSecrets(SynchronousTestCase):
    def setUp(self) -> None:
        self.upstream = ScriptedUpstream()
        self.addCleanup(self.upstream.close)
        self.upstream.play(answer)
        self.seen: list[str] = []
        self.directory = Path(self.mktemp()).absolute()
        plugins = Path(self.mktemp()).absolute() / "twisted" / "plugins"
        plugins.mkdir(parents=True)
        (plugins / "crashing_dropin.py").write_text(CRASHING)
        self.environ = {"PYTHONPATH": os.pathsep.join([str(plugins.parents[1]), str(CHECKOUT)])}

    def run_gateway(self) -> None:
        """Start a gateway, ended with the test."""
        configuration = CONFIGURATION.replace("URL", self.upstream.url)
        context = running(self.directory, configuration, environ=self.environ)
        self.gateway: RunningGateway = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)

    def say(self, line: str, *fields: str, body: str = "") -> str:
        """Send a request, and return all of the answer."""
        head = (f"{line} HTTP/1.1", "Host: a", f"Content-Length: {len(body)}", "Connection: close", *fields)
        with socket.create_connection((self.gateway.host, self.gateway.port), SECONDS) as client:
            client.sendall("\r\n".join([*head, "", body]).encode("latin-1"))
            parts = b"".join(iter(lambda: client.recv(65536), b""))
        self.seen.append(parts.decode("latin-1"))
        return self.seen[-1]

    def ask(self, path: str, model: str, *fields: str, stream: bool = False, max_tokens: int = 9) -> str:
        messages = [{"role": "user", "content": "hi"}]
        body = {"model": model, "stream": stream, "max_tokens": max_tokens, "messages": messages}
        return self.say(f"POST {path}", *fields, body=json.dumps(body))

    def assert_hushed(self) -> None:
        encoded = base64.b64encode(f"user:{KEY}".encode()).decode()
        for seen in self.seen:
            self.assertEqual([], re.findall(rf"(?:.*hushed.*|.*{encoded[6:-6]}.*)", seen))

    def end(self) -> str:
        """End the gateway, and return its log."""
        self.gateway.stop()
        self.seen.append(self.gateway.log)
        return self.gateway.log

    def test_upstreams(self) -> None:
        """Whatever becomes of a request, neither its key nor the provider's is told or logged."""
        self.run_gateway()
        credential = f"x-api-key: {KEY}"
        for model in (*MODELS, "bearer", "gone", "crashing", "nobody's"):
            for stream in False, True:
                for path in ANTHROPIC, OPENAI, COUNT:
                    answered = self.ask(path, model, credential, stream=stream)
                    # Also so that the log is fetched, and does not block the gateway.
                    request_id = answered.partition("equest-Id: ")[2].partition("\r")[0]
                    self.gateway.wait_for(re.compile(f"{request_id} .*"))
        self.ask(ANTHROPIC, "whole", credential, max_tokens=13)
        self.say("GET /metrics")
        log = self.end()
        self.assert_hushed()
        self.assertIn("RuntimeError: {'name': 'crashing', 'settings': Settings(api_key=<redacted>)}", log)
        sent = {value for each in self.upstream.received for value in each.values("authorization")}
        self.assertEqual(sent, {"Bearer sk-hushed-openai", "Bearer sk-ant-oat-hushed"})

    def test_clients(self) -> None:
        """Keys that are wrong, misplaced or in a malformed request are neither told back nor logged."""
        self.run_gateway()
        basic = base64.b64encode(f"user:{KEY}".encode()).decode()
        offers = [
            (f"x-api-key: {KEY}-not",),
            (f"Authorization: Bearer {ADMIN}",),
            (f"Authorization: Basic {basic}",),
            (f"Authorization: {KEY}",),
            (f"x-api-key: {KEY}", f"Authorization: Bearer {ADMIN}"),
            (f"x-api-key: {KEY * 99}",),
            (f"x-api-key: {KEY}\x07",),
            (f"x-api-key:\r\n {KEY}",),
            (f"x api key: {KEY}",),
            (f"x-api-key: {KEY}", "Expect: hushed"),
            (f"x-api-key: {KEY}", "Content-Encoding: hushed"),
            (f"x-api-key: {KEY}", f"x-filler: {'hushed' * 9999}"),
        ]
        for fields in offers:
            for path in ANTHROPIC, OPENAI, f"{ANTHROPIC}?key={KEY}", "/metrics", f"/nowhere?key={KEY}":
                self.ask(path, "whole", *fields)
            self.say("GET /v1/models", *fields)
            self.say("HUSHED /v1/models", *fields)
        self.end()
        self.assert_hushed()

    def test_configurations(self) -> None:
        """What is said about a configuration, good or bad, at the start or later, holds no secret."""
        self.run_gateway()
        for configuration in CONFIGURATION, *MISTAKES:
            (self.directory / "crabtwist.toml").write_text(configuration.replace("URL", self.upstream.url))
            self.gateway.log = ""
            self.gateway.send(signal.SIGHUP)
            self.gateway.wait_for(re.compile(r"reloaded.*\n"))
            self.seen += [self.gateway.log, self.check()]
        self.assertEqual(len(MISTAKES), sum("not reloaded" in seen for seen in self.seen))
        self.end()
        self.assert_hushed()

    def check(self) -> str:
        """Return all that `--check` says."""
        done = subprocess.run(
            [sys.executable, "-c", "from twisted.scripts.twistd import run; run()", "crabtwist", "--check"],
            cwd=self.directory,
            env={**os.environ, **self.environ},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        return done.stdout + done.stderr
