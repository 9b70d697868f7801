"""The clients that people have: vendors' SDKs, Claude Code, and requests as others were seen to send them."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any
from unittest import SkipTest

import anthropic
import openai

from tests.integration import scripted_upstream as script
from tests.integration.scripted_upstream import Answer, Received, plain, stream
from tests.integration.test_fidelity import KEY, UPSTREAM_KEY, GatewayCase

NARROW_KEY = "sk-ct-a-key-for-one-model"

_HERE = Path(__file__).parent
_CACHE = Path("~/.cache/crabtwist-tests").expanduser()
_REQUESTS = json.loads((_HERE.parent / "data" / "client_requests.json").read_text())

#: What the upstream says at each path, plainly and as a stream.
_ANSWERS = {
    "/v1/messages": (script.MESSAGE_ANSWER, script.TEXT_STREAM),
    "/v1/messages/count_tokens": (script.COUNT_ANSWER, []),
    "/v1/chat/completions": (script.CHAT_ANSWER, script.CHAT_STREAM),
    "/v1/embeddings": (script.EMBEDDINGS_ANSWER, []),
}


def answer(request: Received) -> Answer:
    """Answer as the vendor would."""
    whole, events = _ANSWERS[request.line.split()[1].partition("?")[0]]
    return stream(*events) if json.loads(request.body).get("stream") else whole


class ClientCase(GatewayCase):
    """A gateway with all the models that the clients ask for."""

    CONFIGURATION = f"""
    [providers.claude]
    kind = "anthropic"
    api_key = "$key"
    base_url = "$up"
    max_retries = 0
    models = ["claude-opus-4-8", "claude-opus-5-5", "claude-sonnet-4-5", "my-virtual-model"]
    [providers.gpt]
    kind = "openai"
    api_key = "$key"
    base_url = "$up/v1"
    max_retries = 0
    models = ["gpt-4o-mini", "text-embedding-3-small"]
    [providers.echo]
    models = ["echo"]
    [[keys]]
    name = "narrow"
    key = "{NARROW_KEY}"
    models = ["gpt-4o-mini"]
    """

    def setUp(self) -> None:
        """Let the upstream answer."""
        super().setUp()
        self.upstream.play(answer)


class AnthropicTests(ClientCase):
    """Python's `anthropic`."""

    ASKED: Any = {
        "model": "claude-opus-4-8",
        "max_tokens": 64,
        "messages": [{"role": "user", "content": "hi"}],
    }

    def client(self, key: str = KEY) -> Any:
        """Return a client that tries nothing twice; its answers' many types are looked at by no checker."""
        client = anthropic.Anthropic(base_url=self.gateway.url, api_key=key, max_retries=0)
        self.addCleanup(client.close)
        return client

    def test_message(self) -> None:
        """A plain message comes back, with its usage and the vendor's request id."""
        message = self.client().messages.create(**self.ASKED)
        self.assertEqual(("Hello there", 7), (message.content[0].text, message.usage.output_tokens))
        self.assertEqual("req_011up", message._request_id)
        self.assertEqual([UPSTREAM_KEY], self.upstream.received[0].values("x-api-key"))
        self.assertEqual([], self.upstream.received[0].values("authorization"))

    def test_thinking_and_tools(self) -> None:
        """A stream of thoughts, text and a tool's input is put together as the model said it."""
        self.upstream.play(stream(*script.THINKING_STREAM))
        with self.client().messages.stream(**self.ASKED) as events:
            kinds = {event.type for event in events}
            thought, text, tool = events.get_final_message().content
        self.assertIn("signature", kinds)
        self.assertEqual(("Let me see\u2026", "EqQBCgIYAhIM"), (thought.thinking, thought.signature))
        self.assertEqual("I will look.", text.text)
        self.assertEqual({"command": "echo crab", "description": "say crab"}, tool.input)

    def test_count_tokens(self) -> None:
        """Tokens are counted."""
        asked = {name: self.ASKED[name] for name in ("model", "messages")}
        self.assertEqual(2095, self.client().messages.count_tokens(**asked).input_tokens)

    def test_models(self) -> None:
        """The list of models can be paged through."""
        listed = [model.id for model in self.client().models.list(limit=2)]
        self.assertEqual(["claude-opus-4-8", "claude-opus-5-5", "claude-sonnet-4-5"], listed[:3])
        self.assertIn("echo", listed)
        self.assertEqual("echo", self.client().models.retrieve("echo").id)

    def test_own_errors(self) -> None:
        """The gateway's own refusals are the exceptions that they should be, and say what to do."""
        with self.assertRaises(anthropic.AuthenticationError) as caught:
            self.client("sk-ct-unknown").messages.create(**self.ASKED)
        self.assertIn("check the key", str(caught.exception))
        with self.assertRaises(anthropic.PermissionDeniedError):
            self.client(NARROW_KEY).messages.create(**self.ASKED)
        with self.assertRaises(anthropic.NotFoundError) as missing:
            self.client().messages.create(**{**self.ASKED, "model": "claude-none"})
        self.assertIn("/v1/models", str(missing.exception))

    def test_upstreams_errors(self) -> None:
        """So are the upstream's, with its words, its id and when to come back."""
        self.upstream.play(script.limited("7"))
        with self.assertRaises(anthropic.RateLimitError) as limited:
            self.client().messages.create(**self.ASKED)
        self.assertEqual("7", limited.exception.response.headers["retry-after"])
        self.assertEqual("req_011up", limited.exception.request_id)
        self.upstream.play(script.OVERLOADED)
        with self.assertRaises(anthropic.APIStatusError) as overloaded:
            self.client().messages.create(**self.ASKED)
        self.assertEqual(529, overloaded.exception.status_code)
        self.assertIn("Overloaded", str(overloaded.exception))

    def test_broken_stream(self) -> None:
        """A stream that is cut raises, however cleanly the upstream ended it."""
        for ending in ([script.LAST_CHUNK], [script.FIN], [script.chunk(script.ERROR_EVENT), script.FIN]):
            here = threading.Event()
            self.upstream.play([*script.broken_stream(script.MESSAGE_START, *script.HELLO, here), *ending])
            streaming = self.client().messages.stream(**self.ASKED)
            with self.assertRaises(anthropic.APIStatusError), streaming as events:
                for _ in events:
                    here.set()

    def test_embedded_echo(self) -> None:
        """The embedded provider speaks well enough for the SDK."""
        asked = {**self.ASKED, "model": "echo"}
        self.assertEqual("hi", self.client().messages.create(**asked).content[0].text)
        with self.client().messages.stream(**asked) as events:
            self.assertEqual("hi", events.get_final_text())


class OpenAITests(ClientCase):
    """Python's `openai`."""

    ASKED: Any = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "hi"}]}

    def client(self, key: str = KEY) -> Any:
        """Return a client that tries nothing twice; its answers' many types are looked at by no checker."""
        client = openai.OpenAI(base_url=self.gateway.url + "/v1", api_key=key, max_retries=0)
        self.addCleanup(client.close)
        return client

    def test_completion(self) -> None:
        """A plain completion comes back."""
        completion = self.client().chat.completions.create(**self.ASKED)
        self.assertEqual("Hi you", completion.choices[0].message.content)
        self.assertEqual([f"Bearer {UPSTREAM_KEY}"], self.upstream.received[0].values("authorization"))

    def test_stream_without_usage(self) -> None:
        """A client that did not ask for usage sees none, though the gateway did."""
        chunks = list(self.client().chat.completions.create(**self.ASKED, stream=True))
        self.assertEqual("Hi you", "".join(chunk.choices[0].delta.content or "" for chunk in chunks))
        self.assertEqual([None] * 3, [chunk.usage for chunk in chunks])
        sent = json.loads(self.upstream.received[0].body)
        self.assertEqual({"include_usage": True}, sent["stream_options"])

    def test_stream_with_usage(self) -> None:
        """A client that did ask sees it, in a chunk of its own."""
        options = {"include_usage": True}
        chunks = list(
            self.client().chat.completions.create(**self.ASKED, stream=True, stream_options=options)
        )
        self.assertEqual([1, 1, 1, 0], [len(chunk.choices) for chunk in chunks])
        self.assertEqual(12, chunks[-1].usage.total_tokens)

    def test_embeddings(self) -> None:
        """Embeddings come back, decoded from base64 by the client."""
        created = self.client().embeddings.create(model="text-embedding-3-small", input="x")
        self.assertEqual([1.0, -2.0], created.data[0].embedding)

    def test_models(self) -> None:
        """The list holds what the key may use."""
        self.assertEqual(["gpt-4o-mini"], [model.id for model in self.client(NARROW_KEY).models.list()])
        self.assertIn("echo", {model.id for model in self.client().models.list()})
        self.assertEqual("echo", self.client().models.retrieve("echo").id)

    def test_errors(self) -> None:
        """Refusals and the upstream's errors are the exceptions that they should be."""
        with self.assertRaises(openai.AuthenticationError):
            self.client("sk-ct-unknown").chat.completions.create(**self.ASKED)
        with self.assertRaises(openai.NotFoundError):
            self.client().chat.completions.create(**{**self.ASKED, "model": "gpt-none"})
        body = b'{"error":{"message":"You exceeded","type":"insufficient_quota","code":"insufficient_quota"}}'
        self.upstream.play(plain(429, body, ("x-request-id", "req_up")))
        with self.assertRaises(openai.RateLimitError) as limited:
            self.client().chat.completions.create(**self.ASKED)
        self.assertEqual(
            ("insufficient_quota", "req_up"), (limited.exception.code, limited.exception.request_id)
        )

    def test_broken_stream(self) -> None:
        """A stream that is cut raises, however cleanly the upstream ended it."""
        for ending in ([script.LAST_CHUNK], [script.FIN], [script.chunk(script.CHAT_ERROR), script.FIN]):
            here = threading.Event()
            self.upstream.play([*script.broken_stream(script.CHAT_START, here), *ending])
            with self.assertRaises(openai.APIError):
                for _ in self.client().chat.completions.create(**self.ASKED, stream=True):
                    here.set()

    def test_embedded_echo(self) -> None:
        """The embedded provider speaks well enough for the SDK."""
        asked = {**self.ASKED, "model": "echo"}
        self.assertEqual("hi", self.client().chat.completions.create(**asked).choices[0].message.content)
        chunks = list(self.client().chat.completions.create(**asked, stream=True))
        self.assertEqual("hi", "".join(chunk.choices[0].delta.content or "" for chunk in chunks))


class RecordedTests(ClientCase):
    """Requests as clients were seen to send them."""

    def fields(self, recorded: dict[str, Any]) -> list[tuple[str, str]]:
        """Return a recorded request's fields, with a key that the gateway knows."""
        keys = {"x-api-key": KEY, "authorization": f"Bearer {KEY}"}
        return [(name, keys.get(name.lower(), value)) for name, value in recorded["headers"]]

    def body(self, recorded: dict[str, Any]) -> bytes:
        """Return a body of the recorded shape and length."""
        filling: dict[str, Any] = {
            "messages": [{"role": "user", "content": ""}],
            "system": [{"type": "text", "text": "You are.", "cache_control": {"type": "ephemeral"}}],
            "tools": [{"name": "Bash", "input_schema": {"type": "object"}}],
            "metadata": {"user_id": '{"session_id":"1"}'},
        }
        shape = recorded["body"].items()
        body = {
            name: filling[name] if isinstance(value, str) and name in filling else value
            for name, value in shape
        }
        missing = recorded["body_bytes"] - len(json.dumps(body, separators=(",", ":")))
        if missing > 0:
            body["messages"][0]["content"] += "x" * missing
        return json.dumps(body, separators=(",", ":")).encode()

    def test_posts(self) -> None:
        """Each is answered, and arrives with its body and all of its fields but the client's own key."""
        for recorded in _REQUESTS:
            method, path, _ = recorded["request_line"].split()
            if method != "POST" or path.partition("?")[0] not in _ANSWERS:
                continue
            self.upstream.play(answer)
            body, fields = self.body(recorded), self.fields(recorded)
            answered = self.ask(body, path, fields=fields)
            self.assertEqual((200, True), (answered.status, answered.whole), recorded["client"])
            self.check_arrived(recorded["client"], self.upstream.received[0], path, body, fields)

    def check_arrived(
        self, client: str, received: Received, path: str, body: bytes, fields: list[tuple[str, str]]
    ) -> None:
        """Check what the upstream got."""
        self.assertEqual(f"POST {path} HTTP/1.1", received.line)
        if "chat" not in path or b"include_usage" in body or b'"stream"' not in body:
            self.assertEqual(body, received.body, client)
        own = {"connection", "accept-encoding", "x-api-key", "authorization"}
        for name, value in fields:
            if name.lower() not in own:
                self.assertEqual([value], received.values(name.lower()), (client, name))
        self.assertNotIn(KEY.encode(), received.head)

    def test_others(self) -> None:
        """What they ask for without a body is answered by the gateway itself."""
        for recorded in _REQUESTS:
            method, path, _ = recorded["request_line"].split()
            if method != "POST":
                connection = self.connect()
                connection.request(method, path, headers=dict(self.fields(recorded)))
                response = connection.getresponse()
                self.assertEqual(200, response.status, recorded["client"])
                self.assertEqual(method == "HEAD", response.read() == b"")
        self.assertEqual([], self.upstream.received)


@functools.cache
def node_modules() -> Path:
    """
    Return where the clients from npm are, installing them once for all runs.

    The environment's CRABTWIST_NODE_MODULES may name a directory that holds them already.  Raises
    SkipTest where there is no npm.
    """
    if given := os.environ.get("CRABTWIST_NODE_MODULES"):
        return Path(given)
    if shutil.which("npm") is None:
        raise SkipTest("npm is not installed, nor does CRABTWIST_NODE_MODULES say where its packages are")
    manifest = (_HERE / "package.json").read_bytes()
    prefix = _CACHE / hashlib.sha256(manifest).hexdigest()[:16]
    prefix.mkdir(parents=True, exist_ok=True)
    with (prefix / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (prefix / "installed").exists():
            (prefix / "package.json").write_bytes(manifest)
            command = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(prefix)]
            subprocess.run(command, check=True, capture_output=True, timeout=300)
            (prefix / "installed").touch()
    return prefix / "node_modules"


class NodeCase(ClientCase):
    """Clients that run on Node.js."""

    def run_node(self, command: list[str], **environ: str) -> Any:
        """Run a command in a home of its own; return the JSON that it prints."""
        home = Path(self.mktemp()).absolute()
        home.mkdir()
        ended = subprocess.run(
            command,
            check=False,
            cwd=node_modules().parent,
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(home),
                "ANTHROPIC_BASE_URL": self.gateway.url,
                **environ,
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
        )
        self.assertEqual(0, ended.returncode, ended.stdout + ended.stderr)
        return json.loads(ended.stdout)


_SDK_PROGRAM = """
import Anthropic from '@anthropic-ai/sdk';
const client = new Anthropic({ maxRetries: 0 });
const asked = { model: process.argv[1], max_tokens: 64, messages: [{ role: 'user', content: 'say hi' }] };
const plain = await client.messages.create(asked);
const streamed = await client.messages.stream(asked).finalMessage();
console.log(JSON.stringify([plain, streamed]));
"""


class NodeSDKTests(NodeCase):
    """npm's `@anthropic-ai/sdk`."""

    def test_plain_and_stream(self) -> None:
        """A message comes back, in one piece and as a stream."""
        node_modules()
        for model, text in (("claude-opus-4-8", "Hello there"), ("echo", "say hi")):
            command = ["node", "--input-type=module", "-e", _SDK_PROGRAM, model]
            for message in self.run_node(command, ANTHROPIC_API_KEY=KEY):
                self.assertEqual([text], [block["text"] for block in message["content"]])
                self.assertEqual("end_turn", message["stop_reason"])
        self.assertEqual(2, len(self.upstream.received))


class ClaudeCodeTests(NodeCase):
    """Claude Code."""

    QUIET = {
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_TELEMETRY": "1",
        "DISABLE_AUTOUPDATER": "1",
    }

    def say(self, prompt: str, model: str, *more: str, **environ: str) -> dict[str, Any]:
        """Let it answer a prompt; return what it prints."""
        program = str(node_modules() / ".bin" / "claude")
        command = [program, "-p", prompt, "--output-format", "json", "--model", model, *more]
        said: dict[str, Any] = self.run_node(command, **self.QUIET, **environ)
        self.assertEqual((False, "success"), (said["is_error"], said["subtype"]), said)
        return said

    def test_api_key(self) -> None:
        """It works with an API key; its betas and its query go up."""
        said = self.say("say hi", "claude-opus-4-8", ANTHROPIC_API_KEY=KEY)
        self.assertEqual(("Hello there", 7), (said["result"], said["usage"]["output_tokens"]))
        (received,) = self.upstream.received
        self.assertEqual("POST /v1/messages?beta=true HTTP/1.1", received.line)
        self.assertIn("claude-code-20250219", received.values("anthropic-beta")[0])
        self.assertEqual([UPSTREAM_KEY], received.values("x-api-key"))

    def test_auth_token(self) -> None:
        """It works with a bearer token, which does not go up."""
        said = self.say("say hi", "claude-opus-4-8", ANTHROPIC_AUTH_TOKEN=KEY)
        self.assertEqual("Hello there", said["result"])
        self.assertEqual([], self.upstream.received[0].values("authorization"))

    def test_tool(self) -> None:
        """It runs a tool that the model asked for, and sends what came out, thoughts and signature intact."""
        self.upstream.play(stream(*script.THINKING_STREAM), stream(*script.TEXT_STREAM))
        allowed = ("--allowedTools", "Bash(echo:*)")
        said = self.say("say crab", "claude-opus-4-8", *allowed, ANTHROPIC_API_KEY=KEY)
        self.assertEqual(("Hello there", 2), (said["result"], said["num_turns"]))
        _, again = self.upstream.received
        contents = [each["content"] for each in json.loads(again.body)["messages"]]
        found = {block["type"]: block for each in contents if isinstance(each, list) for block in each}
        self.assertEqual("crab", found["tool_result"]["content"])
        self.assertEqual("EqQBCgIYAhIM", found["thinking"]["signature"])

    def test_embedded_echo(self) -> None:
        """It works against the embedded provider, without any upstream."""
        said = self.say("say hi", "echo", ANTHROPIC_API_KEY=KEY)
        self.assertGreater(said["usage"]["output_tokens"], 0)
        self.assertEqual([], self.upstream.received)
