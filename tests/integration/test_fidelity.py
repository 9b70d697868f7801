"""What a client sends is what the upstream gets, and what the upstream sends is what the client gets."""

from __future__ import annotations

import atexit
import base64
import contextlib
import http.client
import json
import re
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from string import Template
from typing import Any, ClassVar
from urllib.parse import urlsplit

import attrs
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from tests.integration import scripted_upstream as script
from tests.integration.running import RunningGateway, running
from tests.integration.scripted_upstream import Received, ScriptedUpstream, plain, stream

KEY = "sk-ct-the-clients-own-key"
UPSTREAM_KEY = "sk-the-key-for-the-upstream"
COMMON = f"""
[[keys]]
name = "tester"
key = "{KEY}"
[extensions.logging]
"""
MESSAGES = "/v1/messages"
CHAT = "/v1/chat/completions"

_CASES = Path(__file__).parents[1] / "data" / "sse_cases.json"


@attrs.frozen
class Answered:
    """An answer as a client saw it; `whole` is False if the connection ended in the middle of it."""

    status: int
    fields: list[tuple[str, str]]
    body: bytes
    whole: bool

    def values(self, name: str) -> list[str]:
        """Return the values of a field; `name` in lower case."""
        return [value for each, value in self.fields if each.lower() == name]

    @property
    def document(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


def body_of(response: http.client.HTTPResponse, begun: threading.Event | None = None) -> tuple[bytes, bool]:
    """Read an answer to its end, or to where it broke; `begun` is set when its first bytes are here."""
    body = b""
    try:
        body = response.read1(65536)
        if begun is not None:
            begun.set()
        return body + response.read(), True
    except http.client.IncompleteRead as broken:
        return body + broken.partial, False
    except ConnectionError:
        return body, False


def until(condition: Callable[[], object], what: str, seconds: float = 10.0) -> None:
    """Wait for a condition; AssertionError if it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} seconds: {what}")
        time.sleep(0.01)


class GatewayCase(SynchronousTestCase):
    """
    A gateway process before two scripted upstreams, shared by all tests of a class.

    Trial knows no class-wide fixtures: the first test of a class starts the gateway, and that of the
    next class, or the end of the process, stops it.
    """

    CONFIGURATION = ""

    upstream: ClassVar[ScriptedUpstream]
    second: ClassVar[ScriptedUpstream]
    gateway: ClassVar[RunningGateway]

    _owner: ClassVar[type[GatewayCase] | None] = None
    _open: ClassVar[contextlib.ExitStack] = contextlib.ExitStack()

    def setUp(self) -> None:
        """Start the gateway, unless it runs."""
        if GatewayCase._owner is not type(self):
            stop_shared_gateway()
            self._start()
            GatewayCase._owner = type(self)
        self.upstream.play()
        self.second.play()

    def _start(self) -> None:
        case, enter = type(self), GatewayCase._open.enter_context
        case.upstream, case.second = enter(ScriptedUpstream()), enter(ScriptedUpstream())
        names = {"up": case.upstream.url, "second": case.second.url, "key": UPSTREAM_KEY}
        configuration = Template(self.CONFIGURATION + COMMON).substitute(names)
        case.gateway = enter(running(Path(self.mktemp()).absolute(), configuration))

    def connect(self) -> http.client.HTTPConnection:
        """Return a connection to the gateway, closed after the test."""
        address = urlsplit(self.gateway.url).netloc
        connection = http.client.HTTPConnection(address, timeout=script.PATIENCE_SECONDS)
        self.addCleanup(connection.close)
        return connection

    def post(
        self,
        body: bytes | dict[str, Any],
        path: str = MESSAGES,
        fields: Iterable[tuple[str, str]] = (("x-api-key", KEY),),
        connection: http.client.HTTPConnection | None = None,
    ) -> http.client.HTTPResponse:
        """Send a request; return its answer, of which only the head has been read."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection = connection or self.connect()
        connection.putrequest("POST", path, skip_accept_encoding=True)
        for name, value in (*fields, ("content-length", str(len(data)))):
            connection.putheader(name, value)
        connection.endheaders(data)
        return connection.getresponse()

    def ask(
        self,
        body: bytes | dict[str, Any],
        path: str = MESSAGES,
        begun: threading.Event | None = None,
        **more: Any,
    ) -> Answered:
        """Send a request; return its answer, as far as it came."""
        response = self.post(body, path, **more)
        return Answered(response.status, response.getheaders(), *body_of(response, begun))

    def log(self) -> str:
        """Return all that the gateway has logged so far."""
        return self.gateway.log

    def counter(self, name: str, **labels: str) -> float:
        """Return the sum of a counter's samples that have all of these labels."""
        connection = self.connect()
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        samples = re.findall(rf"^crabtwist_{name}(?:\{{(.*)\}})? (\S+)$", text, re.MULTILINE)
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(float(value) for found, value in samples if all(each in found for each in wanted))


@atexit.register
def stop_shared_gateway() -> None:
    """End what the last class started."""
    GatewayCase._open.close()
    GatewayCase._owner = None


# Bodies as somebody might write them: odd spaces, escapes, numbers that no program would print.

SPACES = st.text(" \t\r\n", max_size=2)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=6)
STRINGS = st.one_of(TEXTS.map(json.dumps), TEXTS.map(lambda text: json.dumps(text, ensure_ascii=False)))
SCALARS = st.one_of(
    STRINGS, st.sampled_from(["true", "null", "-0", "1.0", "1E+2", "12345678901234567890123", "0.10"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.builds("[{0}{1}]".format, SPACES, st.lists(inner, max_size=3).map(" ,".join)),
        st.builds("{{{0}{1}:{2}}}".format, SPACES, STRINGS, inner),
    ),
    max_leaves=6,
)
MEMBERS = st.lists(
    st.builds('"x{0}"{1}:{2}{3}'.format, st.integers(0, 99), SPACES, SPACES, VALUES), max_size=3
)


def around_a_model() -> st.SearchStrategy[tuple[bytes, bytes]]:
    """Make the text before and after the value of `model` in some body."""
    before = st.builds(
        lambda space, members: "{" + space + "".join(each + "," for each in members) + '"model":' + space,
        SPACES,
        MEMBERS,
    )
    after = st.builds(
        lambda space, members: space + "".join("," + each for each in members) + "}" + space, SPACES, MEMBERS
    )
    return st.tuples(before.map(str.encode), after.map(str.encode))


FEW = settings(max_examples=60, deadline=None)


class RequestTests(GatewayCase):
    """On the way up."""

    CONFIGURATION = """
    [providers.claude]
    kind = "anthropic"
    api_key = "$key"
    base_url = "$up"
    models = ["same", {name = "here", upstream = "th\u00e9re \\"so to speak\\""}]
    [providers.gpt]
    kind = "openai"
    api_key = "$key"
    base_url = "$up/v1"
    models = ["gpt", {name = "gpt-here", upstream = "gpt-there"}]
    [aliases]
    nickname = "same"
    """

    def sent_up(self, body: bytes, path: str = MESSAGES, **more: Any) -> Received:
        """Send a request; return what the upstream got of it."""
        self.upstream.play(script.MESSAGE_ANSWER if path.startswith(MESSAGES) else script.CHAT_ANSWER)
        answered = self.ask(body, path, **more)
        self.assertEqual((200, 1), (answered.status, len(self.upstream.received)), answered.body)
        return self.upstream.received[0]

    def test_same_name(self) -> None:
        """A body whose model has the same name there arrives byte by byte as it was sent."""
        connection = self.connect()

        @FEW
        @given(around_a_model(), st.sampled_from([b'"same"', rb'"s\u0061me"']))
        def check(around: tuple[bytes, bytes], model: bytes) -> None:
            body = model.join(around)
            self.assertEqual(body, self.sent_up(body, connection=connection).body)

        check()

    def test_other_name(self) -> None:
        """Of a body whose model has another name there, that value changes and nothing else."""
        connection = self.connect()

        @FEW
        @given(around_a_model(), st.sampled_from([(b'"here"', MESSAGES), (b'"gpt-here"', CHAT)]))
        def check(around: tuple[bytes, bytes], asked: tuple[bytes, str]) -> None:
            model, path = asked
            there = {CHAT: b'"gpt-there"', MESSAGES: '"th\u00e9re \\"so to speak\\""'.encode()}[path]
            received = self.sent_up(model.join(around), path, connection=connection)
            self.assertEqual(there.join(around), received.body)

        check()

    def test_alias(self) -> None:
        """An alias is replaced by the model's own name."""
        self.assertEqual(b'{ "model" : "same"}', self.sent_up(b'{ "model" : "nickname"}').body)

    def test_large_body(self) -> None:
        """A body of megabytes arrives whole, and as it was."""
        body = b'{"messages": "' + b"\xc3\xa9\\n" * 1_000_000 + b'", "model": "same"}'
        self.assertTrue(body == self.sent_up(body).body)

    def test_usage_is_asked_for(self) -> None:
        """A stream's options get `include_usage`, and every other byte stays."""
        self.upstream.play(stream(*script.CHAT_STREAM))
        self.ask(b'{"model":"gpt", "stream" : true,"stream_options":{ "x" : 1.0}}', CHAT)
        self.assertEqual(
            b'{"model":"gpt", "stream" : true,"stream_options":{ "include_usage":true,"x" : 1.0}}',
            self.upstream.received[0].body,
        )

    def test_query(self) -> None:
        """The query goes up as it is, under the upstream's own path."""
        received = self.sent_up(b'{"model":"same"}', MESSAGES + "?beta=true&x=%2F+a")
        self.assertEqual("POST /v1/messages?beta=true&x=%2F+a HTTP/1.1", received.line)

    def test_end_to_end_fields(self) -> None:
        """Fields that nobody here knows go up, repeated ones as often as they came, in their order."""
        fields = (
            ("anthropic-version", "2026-10-21"),
            ("anthropic-beta", "one-2026-01-01,two-2026-01-01"),
            ("Anthropic-Beta", "three-2026-01-01"),
            ("anthropic-workspace-id", "wrkspc_1"),
            ("x-stainless-retry-count", "0"),
            ("X-Unheard-Of", "a;  b, \xe9"),
            ("User-Agent", "a client"),
            ("Content-Type", "application/json; charset=utf-8"),
            ("Accept", "application/json"),
        )
        received = self.sent_up(b'{"model":"same"}', fields=(("x-api-key", KEY), *fields))
        for name, value in fields:
            self.assertIn(value, received.values(name.lower()))
        self.assertEqual([fields[1][1], fields[2][1]], received.values("anthropic-beta"))
        self.assertEqual(["2026-10-21"], received.values("anthropic-version"))

    def test_what_stays(self) -> None:
        """Credentials, cookies, fields of one hop and those that Connection names do not go up."""
        fields = (
            ("Authorization", f"Bearer {KEY}"),
            ("x-api-key", KEY),
            ("api-key", "other"),
            ("Cookie", "session=1"),
            ("Connection", "keep-alive, X-Only-Here"),
            ("X-Only-Here", "1"),
            ("Keep-Alive", "timeout=5"),
            ("Proxy-Authorization", "Basic eA=="),
            ("TE", "trailers"),
            ("x-crabtwist-trick", "1"),
        )
        received = self.sent_up(b'{"model":"same"}', fields=fields)
        self.assertEqual([UPSTREAM_KEY], received.values("x-api-key"))
        for name, _ in fields[:1] + fields[2:]:
            self.assertEqual([], received.values(name.lower()), name)
        self.assertNotIn(KEY.encode(), received.head)

    def test_openai_credential(self) -> None:
        """OpenAI's dialect carries the provider's key as a bearer token, and only there."""
        received = self.sent_up(b'{"model":"gpt"}', CHAT, fields=(("Authorization", f"Bearer {KEY}"),))
        self.assertEqual([f"Bearer {UPSTREAM_KEY}"], received.values("authorization"))
        self.assertEqual([], received.values("x-api-key"))

    def test_identity(self) -> None:
        """Whatever codings the client takes, the upstream is asked for none."""
        fields = (("x-api-key", KEY), ("Accept-Encoding", "gzip, br, zstd"))
        received = self.sent_up(b'{"model":"same"}', fields=fields)
        self.assertEqual(["identity"], received.values("accept-encoding"))

    def test_own_fields(self) -> None:
        """Host and length are the upstream's and the body's own, and a missing version is filled in."""
        received = self.sent_up(b'{"model":"same"}')
        self.assertEqual([urlsplit(self.upstream.url).netloc], received.values("host"))
        self.assertEqual(["16"], received.values("content-length"))
        self.assertEqual(["2023-06-01"], received.values("anthropic-version"))


class AnswerTests(GatewayCase):
    """On the way down."""

    CONFIGURATION = """
    ping_seconds = 30
    [providers]
    gpt = {kind = "openai", base_url = "$up/v1", models = ["gpt"]}
    [providers.claude]
    kind = "anthropic"
    base_url = "$up"
    models = ["same", {name = "here", upstream = "there"}]
    max_retries = 0
    """

    FIELDS = (
        *script.LIMITS,
        ("anthropic-ratelimit-tokens-remaining", "79000"),
        ("retry-after", "7"),
        ("x-should-retry", "false"),
        ("X-Unheard-Of", "a;  b"),
        ("x-repeated", "1"),
        ("x-repeated", "2"),
    )

    def assert_came_down(self, answered: Answered) -> None:
        """Check that every field is there that has to be, and none that must not."""
        for name in {name for name, _ in self.FIELDS}:
            sent = [value for each, value in self.FIELDS if each == name]
            self.assertEqual(sent, answered.values(name.lower()), name)
        for name in ("set-cookie", "alt-svc", "x-own"):
            self.assertEqual([], answered.values(name), name)
        self.assertEqual(1, len(answered.values("x-crabtwist-request-id")))

    def answer(self, status: int, body: bytes, kind: str = "application/json") -> Answered:
        """Let the upstream answer with all kinds of fields."""
        unwanted = (("Set-Cookie", "a=b"), ("alt-svc", "h3"), ("Connection", "x-own"), ("x-own", "1"))
        self.upstream.play(plain(status, body, *self.FIELDS, *unwanted, kind=kind))
        return self.ask({"model": "same"})

    def test_answer(self) -> None:
        """A plain answer's body and fields come down as they are."""
        body = b' {"content":\t[], "new": 1.0, "usage": {"input_tokens": 1}}\n'
        answered = self.answer(200, body)
        self.assertEqual((200, body, True), (answered.status, answered.body, answered.whole))
        self.assert_came_down(answered)
        self.assertEqual([str(len(body))], answered.values("content-length"))

    def test_no_other_fields(self) -> None:
        """Nothing is added but the gateway's own fields, the date and the length."""
        self.upstream.play([script.head(200, ("transfer-encoding", "chunked"), ("X-A", "1")), b"0\r\n\r\n"])
        names = {name.lower() for name, _ in self.ask({"model": "same"}).fields}
        own = {"x-crabtwist-request-id", "x-crabtwist-fidelity"}
        self.assertEqual({"x-a", "date", "content-length", *own}, names)

    def test_errors(self) -> None:
        """An error's status, body and fields come down as they are, also if it is no JSON."""
        for status in (400, 402, 404, 408, 413, 422, 429, 500, 503, 529):
            body = b'{"type":"error", "error":{"type":"new_error","message":"%d \\u00e9"}}' % status
            answered = self.answer(status, body)
            self.assertEqual((status, body), (answered.status, answered.body))
            self.assert_came_down(answered)
        answered = self.answer(413, b"<html>too large", "text/html")
        self.assertEqual(b"<html>too large", answered.body)
        self.assertEqual(["text/html"], answered.values("content-type"))

    def test_stream_fields(self) -> None:
        """A stream's fields come down too."""
        self.upstream.play(stream(*script.TEXT_STREAM, fields=(*self.FIELDS, ("Set-Cookie", "a=b"))))
        answered = self.ask({"model": "same", "stream": True})
        self.assert_came_down(answered)
        self.assertEqual(["text/event-stream; charset=utf-8"], answered.values("content-type"))

    def test_error_to_a_stream(self) -> None:
        """A stream that is refused is told so as plainly as the upstream did."""
        body = script.anthropic_error("invalid_request_error", "no")
        self.upstream.play(plain(400, body, *self.FIELDS))
        answered = self.ask({"model": "same", "stream": True})
        self.assertEqual((400, body), (answered.status, answered.body))
        self.assert_came_down(answered)

    def test_fidelity(self) -> None:
        """The answer says whether the body went up verbatim or with a value changed."""
        self.upstream.play(script.MESSAGE_ANSWER)
        said = [self.ask({"model": model}).values("x-crabtwist-fidelity") for model in ("same", "here")]
        self.assertEqual([["verbatim"], ["spliced"]], said)

    def test_request_ids(self) -> None:
        """Every answer has an id of its own, which the log has too."""
        self.upstream.play(script.MESSAGE_ANSWER)
        ids = [self.ask({"model": "same"}).values("x-crabtwist-request-id")[0] for _ in range(3)]
        self.assertEqual(3, len(set(ids)))
        until(lambda: all(each in self.log() for each in ids), "the ids in the log")

    def test_event_streams(self) -> None:
        """Whatever an event stream holds and however it is cut, its bytes come down unchanged."""
        connection = self.connect()
        for case in json.loads(_CASES.read_text())["cases"]:
            given_pieces = [base64.b64decode(piece) for piece in case["input_base64"]]
            whole = b"".join(given_pieces)
            for pieces in (given_pieces, [whole], [whole[i : i + 1] for i in range(len(whole))]):
                self.check_stream(case["name"], pieces, connection)

    def check_stream(self, name: str, pieces: list[bytes], connection: http.client.HTTPConnection) -> None:
        """Send a stream in both dialects, with an ending."""
        for path, model, ending in ((MESSAGES, "same", script.MESSAGE_STOP), (CHAT, "gpt", script.DONE)):
            sent = [*pieces, b"\n\n", ending]
            self.upstream.play(stream(*sent))
            asked = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
            answered = self.ask(asked, path, connection=connection)
            self.assertEqual((True, b"".join(sent)), (answered.whole, answered.body), (name, path))

    def test_cuts(self) -> None:
        """A stream cut into two chunks anywhere is the same stream."""
        connection = self.connect()
        whole = b"".join(script.TEXT_STREAM)
        for position in range(1, len(whole), 7):
            self.upstream.play(stream(whole[:position], whole[position:]))
            answered = self.ask({"model": "same", "stream": True}, connection=connection)
            self.assertEqual((True, whole), (answered.whole, answered.body), position)

    def test_unpaid_usage(self) -> None:
        """Of OpenAI's stream, only the chunk that the client did not ask for is left out."""
        self.upstream.play(stream(*script.CHAT_STREAM))
        answered = self.ask({"model": "gpt", "stream": True}, CHAT)
        rest = [each for each in script.CHAT_STREAM if each != script.USAGE_CHUNK]
        self.assertEqual(b"".join(rest), answered.body)
