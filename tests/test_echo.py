"""The echo: an upstream without an account, and the answers that are made in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import treq
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.interfaces import IPushProducer
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.client import ResponseDone
from twisted.web.iweb import IResponse
from zope.interface.verify import verifyObject

from crabtwist.dialects.anthropic import ANTHROPIC
from crabtwist.dialects.base import AnswerReader
from crabtwist.dialects.openai import OPENAI
from crabtwist.dialects.operations import OPERATIONS
from crabtwist.interfaces import IProvider
from crabtwist.providers.echo import DIMENSIONS, EchoProvider, EchoSettings
from crabtwist.providers.local import LocalResponse
from crabtwist.sse import EventStream
from crabtwist.testing import FakeServices
from crabtwist.values import Call
from tests.network import Reader

CALL = Call("messages", "anthropic", "m", False, b"", (), b"{}")
CHAT = evolve(CALL, operation="chat.completions", dialect="openai")
COUNT = evolve(CALL, operation="messages.count_tokens")
EMBED = evolve(CHAT, operation="embeddings")


def said(text: str, **options: Any) -> dict[str, Any]:
    """Return a body in which a user says something."""
    return {"messages": [{"role": "user", "content": text}], **options}


class Events(EventStream):
    """Shows a reader all events of a stream; `all` are their data."""

    def __init__(self, reader: AnswerReader) -> None:
        super().__init__()
        self.reader = reader
        self.all: list[bytes] = []

    def eventReceived(self, event: Any) -> None:
        self.reader.event(event)
        self.all.append(event.data)


class EchoTestCase(SynchronousTestCase):
    """An echo on a clock."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.echo = EchoProvider("e", EchoSettings(), FakeServices(self.clock))

    def ask(self, call: Call, body: bytes | dict[str, Any] = b"{}") -> tuple[int, bytes]:
        """Return the status and body of an answer."""
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        response: Any = self.successResultOf(self.echo.open(evolve(call, body=body)))
        content = treq.content(response)
        while self.clock.getDelayedCalls():
            self.clock.advance(0)
        return response.code, self.successResultOf(content)

    def answer(self, call: Call, **body: Any) -> Any:
        """Return a good answer's document."""
        status, content = self.ask(call, body)
        self.assertEqual(200, status)
        return json.loads(content)


class EchoTests(EchoTestCase):
    """What it says."""

    def test_contract(self) -> None:
        """It is a provider of every operation there is."""
        verifyObject(IProvider, self.echo)
        self.assertEqual(set(OPERATIONS), self.echo.operations)
        self.assertEqual(["echo"], self.successResultOf(self.echo.list_models()))

    def test_negative_delay(self) -> None:
        """Time does not run backwards."""
        self.assertRaises(ValueError, EchoSettings, delay_seconds=-1.0)

    def test_last_of_the_user(self) -> None:
        """It answers the user, not what the system says after that."""
        messages = [{"role": "user", "content": "hi"}, {"role": "system", "content": "by the way"}]
        self.assertEqual("hi", self.answer(CALL, messages=messages)["content"][0]["text"])

    def test_message(self) -> None:
        """The last message comes back, one token a word; all of the prompt is counted."""
        messages = [{"role": "user", "content": "one two"}, {"role": "user", "content": "three  four\n five"}]
        answer = self.answer(CALL, system="be brief", messages=messages)
        self.assertEqual([{"type": "text", "text": "three four five"}], answer["content"])
        self.assertEqual({"input_tokens": 7, "output_tokens": 3}, answer["usage"])
        self.assertEqual(
            ("message", "m", "end_turn"), (answer["type"], answer["model"], answer["stop_reason"])
        )

    def test_completion(self) -> None:
        """So does the other dialect's."""
        answer = self.answer(CHAT, **said("hello world"))
        self.assertEqual("hello world", answer["choices"][0]["message"]["content"])
        self.assertEqual({"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}, answer["usage"])

    def test_blocks(self) -> None:
        """Text is found in blocks, however deep; what is no text is left out."""
        result = {"type": "tool_result", "content": [{"type": "text", "text": "b"}]}
        content = [{"type": "text", "text": "a"}, {"type": "image", "source": {"data": "xx"}}, result]
        answer = self.answer(CALL, messages=[{"role": "user", "content": content}])
        self.assertEqual("a b", answer["content"][0]["text"])

    def test_nothing_to_say(self) -> None:
        """Silence is answered too."""
        bodies: list[dict[str, Any]] = [{}, {"messages": []}, said("  ")]
        for body in bodies:
            self.assertEqual("...", self.answer(CALL, **body)["content"][0]["text"])

    def test_deterministic(self) -> None:
        """The same question has the same answer, to the byte."""
        body = said("hi")
        self.assertEqual(self.ask(CALL, body), self.ask(CALL, body))
        self.assertNotEqual(self.ask(CALL, body), self.ask(evolve(CALL, model="n"), body))

    def test_message_stream(self) -> None:
        """A stream says the same word by word, and ends with its usage."""
        status, stream = self.ask(evolve(CALL, stream=True), said("alpha beta gamma"))
        events = Events(ANTHROPIC.reader(hide_usage=False))
        events.dataReceived(stream)
        deltas = [json.loads(data).get("delta", {}).get("text", "") for data in events.all]
        self.assertEqual((200, "alpha beta gamma"), (status, "".join(deltas)))
        usage = events.reader.usage
        assert usage is not None
        self.assertEqual((3, 3, True), (usage.input_tokens, usage.output_tokens, events.reader.finished))

    def test_completion_stream(self) -> None:
        """The other dialect's ends with usage only if that is asked for."""
        for options, expected in ((None, None), ({"include_usage": True}, 2), ({"include_usage": 1}, None)):
            body = said("alpha beta", stream_options=options)
            events = Events(OPENAI.reader(hide_usage=False))
            events.dataReceived(self.ask(evolve(CHAT, stream=True), body)[1])
            chunks = [json.loads(data) for data in events.all[:-1]]
            words = [choice["delta"].get("content", "") for each in chunks for choice in each["choices"]]
            usage = events.reader.usage
            self.assertEqual(("alpha beta", True), ("".join(words), events.reader.finished))
            self.assertEqual(expected, usage.completion_tokens if usage else None)

    def test_count_tokens(self) -> None:
        """Counting is only counting."""
        answer = self.answer(COUNT, system="a", messages=[{"role": "user", "content": "b c"}])
        self.assertEqual({"input_tokens": 3}, answer)

    def test_embeddings(self) -> None:
        """One vector a text, the same for the same text."""
        answer = self.answer(EMBED, input=["a b", "c", "a b"])
        one, two, three = (each["embedding"] for each in answer["data"])
        self.assertEqual((one, DIMENSIONS), (three, len(one)))
        self.assertNotEqual(one, two)
        self.assertEqual({"prompt_tokens": 5, "total_tokens": 5}, answer["usage"])

    def test_embeddings_of_tokens(self) -> None:
        """One text, one array of tokens, and an array of those."""
        for given_, texts, tokens in (("a b", 1, 2), ([1, 2, 3], 1, 3), ([[1, 2], [3]], 2, 3)):
            answer = self.answer(EMBED, input=given_)
            self.assertEqual((texts, tokens), (len(answer["data"]), answer["usage"]["prompt_tokens"]))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["text", "content", "role", "include_usage"]), inner, max_size=4)
    ),
    max_leaves=10,
)
BODIES = st.dictionaries(st.sampled_from(["messages", "system", "input", "stream_options", "model"]), JSON)


class MalformedTests(EchoTestCase):
    """Bodies that are valid JSON, and no sense."""

    @given(BODIES, st.sampled_from([CALL, CHAT, COUNT, EMBED]), st.booleans())
    @settings(deadline=None)
    def test_any_json(self, body: dict[str, Any], call: Call, stream: bool) -> None:
        """Whatever JSON it is given, it has an answer."""
        stream = stream and call.operation in ("messages", "chat.completions")
        status, content = self.ask(evolve(call, stream=stream), body)
        self.assertEqual((200, True), (status, bool(content)))

    def test_unreadable(self) -> None:
        """What its parser cannot hold is refused in the caller's dialect, streamed or not."""
        deep = b'{"messages":' + b"[" * 5000 + b"]" * 5000 + b"}"
        for body in (b'{"messages":1e999}', b'{"input":' + b"9" * 5000 + b"}", deep, b"[]", b"", b"\xff"):
            for call, dialect in ((CALL, ANTHROPIC), (CHAT, OPENAI), (EMBED, OPENAI)):
                status, content = self.ask(evolve(call, stream=call is CHAT), body)
                said = dialect.read_error(content)
                assert said is not None
                self.assertEqual((400, "invalid_request_error"), (status, said.type))


class LocalResponseTests(SynchronousTestCase):
    """Answers that are made chunk by chunk, as they are read."""

    def open(self, delay_seconds: float = 0.0, thirst: float = float("inf")) -> LocalResponse:
        """Begin to read an answer of three chunks."""
        self.clock, self.reader = Clock(), Reader(thirst)
        self.made: list[bytes] = []

        def chunks() -> Iterator[bytes]:
            for chunk in (b"a", b"b", b"c"):
                self.made.append(chunk)
                yield chunk

        response = LocalResponse(200, ((b"X-A", b"1"),), chunks(), self.clock, delay_seconds=delay_seconds)
        response.deliverBody(self.reader)
        return response

    def test_contract(self) -> None:
        """It is a response, and its own producer."""
        response = self.open()
        verifyObject(IResponse, response)
        verifyObject(IPushProducer, response)
        self.assertEqual(
            (200, ["1"], None), (response.code, response.headers.getRawHeaders("x-a"), response.length)
        )

    def test_whole(self) -> None:
        """Nothing comes before the reactor's next turn; the end is a good one."""
        self.open()
        self.assertEqual(b"", self.reader.data)
        self.clock.pump([0] * 4)
        self.assertEqual(b"abc", self.reader.data)
        self.assertIsInstance(self.reader.reason, ResponseDone)
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_crash(self) -> None:
        """What making a chunk raises is logged and breaks the body off, so that nobody waits for the rest."""
        clock, reader = Clock(), Reader()
        LocalResponse(200, (), (bytes(1 // count) for count in (1, 0)), clock).deliverBody(reader)
        clock.pump([0] * 3)
        self.assertEqual(b"\0", reader.data)
        self.assertIsInstance(reader.reason, ZeroDivisionError)
        self.assertEqual(1, len(self.flushLoggedErrors(ZeroDivisionError)))

    def test_delay(self) -> None:
        """The delay passes before each chunk, the first among them."""
        self.open(delay_seconds=2.0)
        read = []
        for _ in range(7):
            self.clock.advance(1.0)
            read.append(self.reader.data)
        self.assertEqual([b"", b"a", b"a", b"ab", b"ab", b"abc", b"abc"], read)

    def test_echo_delay(self) -> None:
        """The echo's `delay_seconds` is this delay."""
        clock, reader = Clock(), Reader()
        echo = EchoProvider("e", EchoSettings(delay_seconds=1.0), FakeServices(clock))
        response: Any = self.successResultOf(echo.open(CALL))
        response.deliverBody(reader)
        clock.advance(0.9)
        self.assertEqual(b"", reader.data)
        clock.advance(0.1)
        self.assertTrue(reader.data.startswith(b'{"id"'))

    def test_pause(self) -> None:
        """A reader that pauses, even while it is given a chunk, is given no more, and none is made."""
        response = self.open(thirst=1)
        self.clock.pump([0] * 5)
        self.assertEqual((b"a", [b"a"]), (self.reader.data, self.made))
        self.assertEqual([], self.clock.getDelayedCalls())
        response.pauseProducing()
        self.reader.thirst = 9
        response.resumeProducing()
        response.resumeProducing()
        self.clock.pump([0] * 5)
        self.assertEqual(b"abc", self.reader.data)

    def test_stop(self) -> None:
        """A reader that stops is told nothing more, in whichever way it stops."""
        for how in ("stopProducing", "loseConnection", "abortConnection"):
            response = self.open(delay_seconds=1.0)
            self.clock.advance(1.0)
            getattr(response, how)()
            response.resumeProducing()
            self.clock.pump([1.0] * 5)
            self.assertEqual((b"a", None, [b"a"]), (self.reader.data, self.reader.reason, self.made))

    def test_stop_while_reading(self) -> None:
        """Also while it is given a chunk."""
        response = self.open()
        self.patch(self.reader, "dataReceived", lambda data: response.stopProducing())
        self.clock.pump([0] * 5)
        self.assertEqual([b"a"], self.made)
