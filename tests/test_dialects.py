"""What the dialects say and what they understand: errors, usage, ends, and all manner of nonsense."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from crabtwist import body
from crabtwist.dialects.anthropic import ANTHROPIC
from crabtwist.dialects.base import MAX_COUNT, AnswerReader, Dialect, UpstreamSays
from crabtwist.dialects.openai import OPENAI
from crabtwist.dialects.operations import DIALECTS, OPERATIONS, dialect_of
from crabtwist.errors import Refusal
from crabtwist.sse import Event, EventStream
from crabtwist.values import Usage


class Listening(EventStream):
    """Shows a reader those events that it wants, as a relay does; `withheld` are those that it claims."""

    def __init__(self, reader: AnswerReader, *, reads_all: bool = False) -> None:
        super().__init__()
        self.reader = reader
        self.reads_all = reads_all
        self.withheld: list[bytes] = []

    def eventsReceived(self, region: bytes) -> None:
        if self.reads_all or self.reader.wants(region):
            self.parse(region)

    def eventReceived(self, event: Event) -> None:
        if self.reader.event(event):
            self.withheld.append(event.data)


def listen(dialect: Dialect, *stream: bytes, hide_usage: bool = False, reads_all: bool = False) -> Any:
    """Read a stream, event by event, and return what listened."""
    listening = Listening(dialect.reader(hide_usage=hide_usage), reads_all=reads_all)
    for event in stream:
        listening.dataReceived(event)
    return listening


def named(kind: str, **content: Any) -> bytes:
    """Return an event of Anthropic's."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **content})}\n\n".encode()


def chunk(**content: Any) -> bytes:
    """Return an event of OpenAI's."""
    return f"data: {json.dumps(content)}\n\n".encode()


def start(**usage: Any) -> bytes:
    """Return a message's first event."""
    return named("message_start", message={"id": "msg_1", "model": "claude", "usage": usage})


def block_delta(**delta: Any) -> bytes:
    """Return a piece of a message."""
    return named("content_block_delta", index=0, delta=delta)


def delta(**usage: Any) -> bytes:
    """Return the event that says what a message used."""
    return named("message_delta", delta={"stop_reason": "end_turn"}, usage=usage)


PING = named("ping")
STOP = named("message_stop")
TEXT = block_delta(type="text_delta", text="hello")
SAID = chunk(model="gpt", choices=[{"delta": {"content": "hello"}, "finish_reason": None}], usage=None)
DONE = b"data: [DONE]\n\n"

THOUGHT = (
    start(input_tokens=25, cache_read_input_tokens=1000, cache_creation_input_tokens=0, output_tokens=1),
    named("content_block_start", index=0, content_block={"type": "thinking", "thinking": ""}),
    PING,
    block_delta(type="thinking_delta", thinking="an error in the message_stop?"),
    block_delta(type="signature_delta", signature="EqQB"),
    named("content_block_stop", index=0),
    named("content_block_start", index=1, content_block={"type": "tool_use", "name": "f", "input": {}}),
    block_delta(type="input_json_delta", partial_json='{"usage": {"output_tokens": 9'),
    named("content_block_stop", index=1),
    delta(output_tokens=90, output_tokens_details={"thinking_tokens": 60}, cache_read_input_tokens=None),
    STOP,
)
SPOKEN = (
    chunk(model="gpt", choices=[{"delta": {"role": "assistant", "content": ""}}], usage=None),
    SAID,
    chunk(choices=[{"delta": {}, "finish_reason": "stop"}], usage=None),
    chunk(choices=[], usage={"prompt_tokens": 20, "completion_tokens": 9, "total_tokens": 29}),
    DONE,
)


class ErrorWordsTests(SynchronousTestCase):
    """Errors that the gateway reports."""

    def test_anthropic_types(self) -> None:
        """Each status has the type that Anthropic's documentation gives it; others go by their class."""
        expected = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error"}
        expected |= {404: "not_found_error", 405: "invalid_request_error", 413: "request_too_large"}
        expected |= {429: "rate_limit_error", 500: "api_error", 502: "api_error", 504: "timeout_error"}
        expected |= {402: "billing_error", 409: "conflict_error", 529: "overloaded_error", 599: "api_error"}
        self.assertEqual(expected, {status: ANTHROPIC.error_type(status) for status in expected})

    def test_openai_types(self) -> None:
        """So has OpenAI's."""
        expected = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error"}
        expected |= {404: "invalid_request_error", 415: "invalid_request_error", 429: "rate_limit_error"}
        expected |= {500: "server_error", 502: "server_error", 529: "server_error", 504: "timeout_error"}
        self.assertEqual(expected, {status: OPENAI.error_type(status) for status in expected})

    def test_anthropic_shape(self) -> None:
        """Anthropic's envelope: type, error, request id."""
        error = {"type": "not_found_error", "message": 'no "x"'}
        expected = {"type": "error", "error": error, "request_id": "req_1"}
        self.assertEqual(
            expected, json.loads(ANTHROPIC.error_body(404, None, "model_not_found", 'no "x"', "req_1"))
        )

    def test_openai_shape(self) -> None:
        """OpenAI's envelope: the gateway's slug is the code."""
        error = {"message": "slow", "type": "rate_limit_error", "param": None, "code": "too_fast"}
        expected = {"error": error, "request_id": "req_1"}
        self.assertEqual(expected, json.loads(OPENAI.error_body(429, None, "too_fast", "slow", "req_1")))

    def test_own_type(self) -> None:
        """A refusal that names its type is worded with that one."""
        for dialect in DIALECTS.values():
            said = dialect.read_error(dialect.error_body(400, "odd_error", "slug", "why", "req_1"))
            assert said is not None
            self.assertEqual(("odd_error", "why"), (said.type, said.message))

    def test_what_is_said_is_understood(self) -> None:
        """Every error that a dialect words, it also reads: as a body, and as the last event of a stream."""
        for dialect in DIALECTS.values():
            for status in range(400, 600):
                said = dialect.read_error(dialect.error_body(status, None, "slug", "why\n", "req_1"))
                assert said is not None
                self.assertEqual((dialect.error_type(status), "why\n"), (said.type, said.message))
                heard = listen(dialect, dialect.error_event(status, "slug", "why\n", "req_1")).reader
                self.assertEqual((said, False), (heard.error, heard.finished))

    def test_error_first(self) -> None:
        """An error before anything else refuses the request; one after that does not."""
        for dialect, beginning in ((ANTHROPIC, start()), (OPENAI, chunk(choices=[{}]))):
            error = dialect.error_event(529, "s", "m", "r")
            self.assertTrue(listen(dialect, error).reader.refused)
            self.assertTrue(listen(dialect, dialect.keep_alive, error).reader.refused)
            self.assertFalse(listen(dialect, beginning, error).reader.refused)

    def test_error_event_name(self) -> None:
        """Anthropic's clients look for an event named error, OpenAI's only at the data."""
        self.assertTrue(ANTHROPIC.error_event(500, "s", "m", "r").startswith(b"event: error\ndata: {"))
        self.assertTrue(OPENAI.error_event(500, "s", "m", "r").startswith(b"data: {"))

    def test_no_error(self) -> None:
        """What is no error of the dialect is not taken for one."""
        for dialect in DIALECTS.values():
            for data in (b"", b"null", b"[]", b"{}", b'{"error":null}', b'{"error":7}', b"<html>", b"\xff"):
                self.assertIsNone(dialect.read_error(data))

    def test_keep_alive(self) -> None:
        """What keeps a stream alive is a whole event that begins nothing, ends nothing and counts nothing."""
        for dialect in DIALECTS.values():
            reader = listen(dialect, dialect.keep_alive, reads_all=True).reader
            self.assertTrue(dialect.keep_alive.endswith(b"\n\n"))
            self.assertEqual(
                (False, False, None, None), (reader.began, reader.finished, reader.usage, reader.error)
            )


class MessageTests(SynchronousTestCase):
    """Anthropic's answers."""

    def used(self, *stream: bytes) -> Usage:
        """Return what a stream used."""
        usage: Usage | None = listen(ANTHROPIC, *stream).reader.usage
        assert usage is not None
        return usage

    def test_stream(self) -> None:
        """A stream with thinking and a tool: the last word on each number counts, thoughts apart."""
        reader = listen(ANTHROPIC, *THOUGHT).reader
        usage = reader.usage
        self.assertEqual(("claude", True, None), (reader.model, reader.finished, reader.error))
        self.assertEqual(
            (25, 1000, 0), (usage.input_tokens, usage.cache_read_tokens, usage.cache_write_tokens)
        )
        self.assertEqual((30, 60, True), (usage.output_tokens, usage.reasoning_tokens, usage.complete))

    def test_raw(self) -> None:
        """The vendor's own numbers are kept for later, those of both events together."""
        usage = self.used(start(input_tokens=1, output_tokens=1, new=[2]), delta(output_tokens=3))
        self.assertEqual({"input_tokens": 1, "output_tokens": 3, "new": [2]}, json.loads(usage.raw))

    def test_broken_off(self) -> None:
        """What was used before the stream broke is known, as incomplete."""
        usage = self.used(start(input_tokens=25, output_tokens=1), TEXT)
        self.assertEqual((25, 1, False), (usage.input_tokens, usage.output_tokens, usage.complete))

    def test_beginning(self) -> None:
        """Pings and comments begin nothing; an event of whatever other kind does."""
        listening = listen(ANTHROPIC, b": hi\n\n", PING)
        self.assertFalse(listening.reader.began)
        listening.dataReceived(named("brand_new_event"))
        self.assertTrue(listening.reader.began)

    def test_no_event_names(self) -> None:
        """The type in the data is enough: some vendors leave the names out."""
        stream = [event[event.index(b"data: ") :] for event in THOUGHT]
        reader = listen(ANTHROPIC, *stream).reader
        self.assertEqual((True, 90), (reader.finished, reader.usage.completion_tokens))

    def test_cumulative(self) -> None:
        """Later numbers replace earlier ones, also when they are smaller; null replaces nothing."""
        usage = self.used(
            start(input_tokens=9, output_tokens=5), delta(output_tokens=50), delta(output_tokens=40)
        )
        self.assertEqual((9, 40), (usage.input_tokens, usage.output_tokens))
        usage = self.used(start(input_tokens=9, output_tokens=5), delta(input_tokens=None, output_tokens=6))
        self.assertEqual((9, 6), (usage.input_tokens, usage.output_tokens))

    def test_cache_writes(self) -> None:
        """Writes are split by how long they are kept; nothing of them is lost if the parts do not fit."""
        for total, minutes, hour, expected in (
            (10, 7, 3, (7, 3)),
            (10, 5, 3, (7, 3)),
            (10, 0, 0, (10, 0)),
            (0, 0, 8, (0, 8)),
            (0, 6, 8, (6, 8)),
            (10, 9, 3, (9, 3)),
        ):
            parts = {"ephemeral_5m_input_tokens": minutes, "ephemeral_1h_input_tokens": hour}
            usage = self.used(start(cache_creation_input_tokens=total, cache_creation=parts))
            self.assertEqual(expected, (usage.cache_write_tokens, usage.cache_write_1h_tokens))

    def test_cache_writes_without_parts(self) -> None:
        """A total without parts was kept for five minutes, parts without a total are the total."""
        self.assertEqual(4, self.used(start(cache_creation_input_tokens=4)).cache_write_tokens)
        usage = self.used(start(cache_creation={"ephemeral_5m_input_tokens": 5}))
        self.assertEqual((5, 5), (usage.cache_write_tokens, usage.prompt_tokens))

    def test_server_tools(self) -> None:
        """The vendor's own tools are counted by name, those not used left out."""
        tools = {"web_search_requests": 2, "web_fetch_requests": 0, "later_requests": 1, "odd": "x"}
        usage = self.used(start(input_tokens=1), delta(server_tool_use=tools))
        self.assertEqual({"web_search_requests": 2, "later_requests": 1}, usage.server_tool_calls)

    def test_error_event(self) -> None:
        """An error event is the upstream's own word, with the status that it amounts to."""
        for kind, status in (("overloaded_error", 529), ("rate_limit_error", 429), ("new_error", 500)):
            event = named("error", error={"type": kind, "message": "busy"})
            reader = listen(ANTHROPIC, start(input_tokens=1), TEXT, event).reader
            self.assertEqual(UpstreamSays(status, kind, "busy"), reader.error)
            self.assertEqual((False, 1), (reader.finished, reader.usage.input_tokens))

    def test_unreadable_error_event(self) -> None:
        """An error event without an error in it is one all the same."""
        reader = listen(ANTHROPIC, b"event: error\ndata: upstream gone\n\n").reader
        self.assertEqual(
            (True, 500, "upstream gone"), (reader.began, reader.error.status, reader.error.message)
        )

    def test_body(self) -> None:
        """A plain message says who answered and what it used."""
        reader = ANTHROPIC.reader(hide_usage=False)
        reader.body(b'{"model":"claude","content":[],"usage":{"input_tokens":3,"output_tokens":4}}')
        assert reader.usage is not None
        self.assertEqual(
            ("claude", 3, 4), (reader.model, reader.usage.input_tokens, reader.usage.output_tokens)
        )
        self.assertTrue(reader.usage.complete)


class CompletionTests(SynchronousTestCase):
    """OpenAI's answers, and those of its many imitators."""

    def used(self, **counts: Any) -> Usage:
        """Return what a counting chunk says."""
        usage: Usage | None = listen(OPENAI, SAID, chunk(choices=[], usage=counts)).reader.usage
        assert usage is not None
        return usage

    def test_stream(self) -> None:
        """A stream's last chunk counts; the chunks before say null."""
        listening = listen(OPENAI, *SPOKEN)
        reader = listening.reader
        self.assertEqual(("gpt", True, None), (reader.model, reader.finished, reader.error))
        self.assertEqual((20, 9), (reader.usage.input_tokens, reader.usage.output_tokens))
        self.assertEqual([], listening.withheld)

    def test_usage_that_nobody_asked_for(self) -> None:
        """The chunk that only counts is withheld from a caller that did not ask; no other chunk is."""
        listening = listen(OPENAI, *SPOKEN, hide_usage=True, reads_all=True)
        self.assertEqual([json.loads(SPOKEN[3][6:])], [json.loads(data) for data in listening.withheld])
        self.assertEqual(29, listening.reader.usage.prompt_tokens + listening.reader.usage.completion_tokens)

    def test_usage_beside_content(self) -> None:
        """A chunk that counts and says something is the caller's, whoever asked; the last count holds."""
        one, two = ({"prompt_tokens": 5, "completion_tokens": n} for n in (1, 2))
        listening = listen(
            OPENAI, chunk(choices=[{}], usage=one), chunk(choices=[{}], usage=two), hide_usage=True
        )
        self.assertEqual(([], 2), (listening.withheld, listening.reader.usage.output_tokens))

    def test_counting_in_every_chunk(self) -> None:
        """What a server counts on the way is not its last word until the stream has ended."""
        counted = chunk(choices=[{}], usage={"prompt_tokens": 5, "completion_tokens": 1})
        self.assertFalse(listen(OPENAI, counted).reader.usage.complete)
        self.assertTrue(listen(OPENAI, counted, DONE).reader.usage.complete)

    def test_no_usage(self) -> None:
        """A stream that never counts has no usage, and is whole."""
        reader = listen(OPENAI, SAID, DONE).reader
        self.assertEqual((None, True), (reader.usage, reader.finished))

    def test_details(self) -> None:
        """Cached and reasoned tokens are inside OpenAI's totals, and taken out of them."""
        usage = self.used(
            prompt_tokens=100,
            completion_tokens=50,
            prompt_tokens_details={"cached_tokens": 60, "cache_write_tokens": 30},
            completion_tokens_details={"reasoning_tokens": 20},
        )
        self.assertEqual(
            (10, 60, 30), (usage.input_tokens, usage.cache_read_tokens, usage.cache_write_tokens)
        )
        self.assertEqual((30, 20), (usage.output_tokens, usage.reasoning_tokens))

    def test_details_beyond_the_totals(self) -> None:
        """Parts larger than their whole are cut to it: no class is ever negative."""
        usage = self.used(
            prompt_tokens=10,
            completion_tokens=5,
            prompt_tokens_details={"cached_tokens": 99, "cache_write_tokens": 99},
            completion_tokens_details={"reasoning_tokens": 99},
        )
        self.assertEqual((10, 5), (usage.prompt_tokens, usage.completion_tokens))
        self.assertEqual((0, 10, 0), (usage.input_tokens, usage.cache_read_tokens, usage.output_tokens))

    def test_deepseek(self) -> None:
        """DeepSeek's cache hits stand beside the total."""
        usage = self.used(prompt_tokens=10, prompt_cache_hit_tokens=8, prompt_cache_miss_tokens=2)
        self.assertEqual((2, 8), (usage.input_tokens, usage.cache_read_tokens))

    def test_done(self) -> None:
        """The end is told with any white space around it; a text that speaks of it is not the end."""
        for end in (b"data: [DONE] \n\n", b"data:[DONE]\r\n\r\n", b"data:  [DONE]\t\n\n"):
            self.assertTrue(listen(OPENAI, SAID, end).reader.finished)
        said = chunk(choices=[{"delta": {"content": "[DONE]"}}])
        self.assertFalse(listen(OPENAI, said, reads_all=True).reader.finished)

    def test_error_chunks(self) -> None:
        """Errors as OpenAI, vLLM, OpenRouter, Groq and Ollama put them into a stream."""
        for event, status, message in (
            (chunk(error={"message": "m", "type": "server_error", "code": None}), 500, "m"),
            (chunk(error={"message": "m", "type": "tokens", "code": "rate_limit_exceeded"}), 429, "m"),
            (
                chunk(error={"object": "error", "message": "m", "type": "BadRequestError", "code": 400}),
                400,
                "m",
            ),
            (chunk(error={"code": 502, "message": "m"}, choices=[{"finish_reason": "error"}]), 502, "m"),
            (b"event: error\n" + chunk(error={"message": "m", "type": "overloaded_error"}), 503, "m"),
            (chunk(error={"code": "429", "message": "m"}), 429, "m"),
            (chunk(object="error", message="m", type="BadRequestError", code=400), 400, "m"),
            (chunk(error="model not found"), 500, "model not found"),
            (b"event: error\ndata: gone\n\n", 500, "gone"),
        ):
            reader = listen(OPENAI, SAID, event).reader
            self.assertEqual((status, message), (reader.error.status, reader.error.message))
            self.assertFalse(reader.finished)

    def test_body(self) -> None:
        """A plain answer says who answered and what it used; embeddings have no completion."""
        reader = OPENAI.reader(hide_usage=False)
        reader.body(b'{"model":"ada","data":[],"usage":{"prompt_tokens":7,"total_tokens":7}}')
        assert reader.usage is not None
        self.assertEqual(
            ("ada", 7, 0), (reader.model, reader.usage.input_tokens, reader.usage.completion_tokens)
        )


#: Whatever JSON can hold, under the names that readers look for.
NAMES = [
    *("type", "model", "message", "usage", "error", "code", "choices"),
    *("input_tokens", "output_tokens", "output_tokens_details", "thinking_tokens"),
    *("cache_creation", "cache_creation_input_tokens", "ephemeral_1h_input_tokens"),
    *("server_tool_use", "web_search_requests", "completion_tokens", "prompt_tokens"),
    *("prompt_tokens_details", "cached_tokens", "cache_write_tokens"),
]
WORDS = ("message_start", "message_delta", "error", "overloaded_error", "")
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    LEAVES | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=5),
    max_leaves=20,
)
ABSURD: tuple[object, ...] = (
    -1,
    -(2**70),
    2**53,
    2**64,
    10**400,
    True,
    1.5,
    "7",
    None,
    [],
    {},
    [1],
    {"input_tokens": 1},
)


class HostileTests(SynchronousTestCase):
    """Upstreams that send what no upstream should."""

    def check(self, reader: AnswerReader) -> None:
        """Everything learnt is of its type, and no number is absurd."""
        usage = reader.usage or Usage()
        for number in (usage.prompt_tokens, usage.completion_tokens, *usage.server_tool_calls.values()):
            self.assertIs(int, type(number))
            self.assertTrue(0 <= number <= 4 * MAX_COUNT)
        self.assertTrue(reader.model is None or isinstance(reader.model, str))
        json.loads(usage.raw or b"{}")

    @given(
        st.lists(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6), max_size=4),
        st.sampled_from(WORDS),
    )
    @settings(deadline=None)
    def test_any_json(self, contents: list[dict[str, Any]], name: str) -> None:
        """No JSON whatever makes a reader raise, or count what is no number."""
        for dialect in DIALECTS.values():
            events = [f"event: {name}\ndata: {json.dumps(content)}\n\n".encode() for content in contents]
            reader = listen(dialect, *events, reads_all=True).reader
            self.check(reader)
            for content in contents:
                reader.body(json.dumps(content).encode())
                reader.tail(json.dumps(content).encode()[5:])
                self.check(reader)

    @given(st.lists(st.binary(max_size=60), max_size=4))
    @settings(deadline=None)
    def test_any_bytes(self, pieces: list[bytes]) -> None:
        """No bytes whatever do either."""
        for dialect in DIALECTS.values():
            reader = listen(dialect, *(b'data: {"usage":' + piece + b"\n\n" for piece in pieces)).reader
            for piece in pieces:
                reader.body(piece)
                reader.tail(b'"usage":{' + piece)
                self.check(reader)

    def test_absurd_numbers(self) -> None:
        """What is negative, or no whole number, is 0; what no upstream can mean is the largest count."""
        for dialect, name in ((ANTHROPIC, "output_tokens"), (OPENAI, "completion_tokens")):
            for value in ABSURD:
                reader = dialect.reader(hide_usage=False)
                reader.body(json.dumps({"usage": {name: value, "x": 1}}).encode())
                assert reader.usage is not None
                huge = type(value) is int and value > 0
                self.assertEqual(MAX_COUNT if huge else 0, reader.usage.completion_tokens)

    def test_deep(self) -> None:
        """Nesting that the parser gives up on is as if nothing had been said."""
        deep = b'{"type":"message_delta","usage":{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}}"
        for dialect in DIALECTS.values():
            reader = listen(dialect, b"data: " + deep + b"\n\n").reader
            reader.body(deep)
            reader.tail(deep)
            self.assertEqual((None, True), (reader.usage, reader.began))


class TailTests(SynchronousTestCase):
    """The ends of answers that are too large to keep."""

    def tokens(self, tail: bytes) -> int | None:
        """Return how many tokens went in, as both dialects read it."""
        read = []
        for dialect in DIALECTS.values():
            reader = dialect.reader(hide_usage=False)
            reader.tail(tail)
            read.append(reader.usage.prompt_tokens if reader.usage else None)
        self.assertEqual(read[0], read[1])
        return read[0]

    def test_usage(self) -> None:
        """The last usage is found, wherever the tail begins and whatever follows."""
        counts = b'{"input_tokens":7,"prompt_tokens":7,"details":{"a":{"b":"}"}}}'
        for tail in (
            b'0.1,0.2],"usage":' + counts + b"}",
            b'"}],"usage" :\n ' + counts + b',"service_tier":"default","x":{}}',
            b'"usage":{"prompt_tokens":1}}],"usage":' + counts + b"}",
        ):
            self.assertEqual(7, self.tokens(tail))

    def test_no_usage(self) -> None:
        """Text that speaks of usage, other names, null, and an object cut in two are none."""
        counts = b':{"input_tokens":9,"prompt_tokens":9}}'
        for tail in (
            *(b"", json.dumps({"text": '{"usage"' + counts.decode()}).encode()),
            *(b'"x\\"usage"' + counts, b'"usage":null,"x"' + counts, b'"usage"' + counts[:9]),
        ):
            self.assertIsNone(self.tokens(tail), tail)

    def test_many_braces(self) -> None:
        """A tail made to be looked through over and over is given up soon."""
        self.assertIsNone(self.tokens(b'"usage":{"a":"' + b"}" * 1_000_000))


class WantsTests(SynchronousTestCase):
    """What is looked into while it passes."""

    def test_all_before_the_beginning(self) -> None:
        """Whatever comes first is read."""
        for dialect in DIALECTS.values():
            self.assertTrue(dialect.reader(hide_usage=False).wants(b"data: x\n\n"))

    def test_what_matters(self) -> None:
        """Usage, ends and errors are always read."""
        spaced = b'data: {"choices":[], "usage" : \t{"prompt_tokens":1}}\n\n'
        for dialect, matters in (
            (ANTHROPIC, (start(), delta(), STOP, named("error"), b'data: {"type":"message_stop"}\n\n')),
            (
                OPENAI,
                (SPOKEN[3], spaced, DONE, b"data:[DONE] \n\n", chunk(error={}), b"event: error\ndata: x\n\n"),
            ),
        ):
            reader = listen(dialect, TEXT).reader
            self.assertEqual([], [event for event in matters if not reader.wants(TEXT + event + SAID)])

    def test_what_does_not(self) -> None:
        """The pieces of an answer, of which there are thousands, are not."""
        for dialect, pieces in ((ANTHROPIC, (TEXT, PING, *THOUGHT[4:6])), (OPENAI, (SAID, SPOKEN[2]))):
            reader = listen(dialect, TEXT).reader
            self.assertEqual([], [piece for piece in pieces if reader.wants(piece)])

    def test_nothing_is_missed(self) -> None:
        """Reading only what is wanted learns what reading everything does."""
        for dialect, stream in ((ANTHROPIC, THOUGHT), (OPENAI, SPOKEN)):
            some, every = (listen(dialect, *stream, reads_all=all_).reader for all_ in (False, True))
            self.assertEqual(
                (every.usage, every.model, every.finished), (some.usage, some.model, some.finished)
            )


class AskForUsageTests(SynchronousTestCase):
    """Making a stream of OpenAI's tell its usage."""

    def asked(self, text: bytes, dialect: Dialect = OPENAI) -> bytes:
        """Return a body with the question in it."""
        return body.splice(text, dialect.ask_for_usage(body.read(text)))

    def test_asked(self) -> None:
        """The option is set, and every other byte stays."""
        for before, after in (
            (b'{"model":"m"}', b'{"stream_options":{"include_usage":true},"model":"m"}'),
            (
                b'{"model":"m","stream_options": null }',
                b'{"model":"m","stream_options": {"include_usage":true} }',
            ),
            (
                b'{"stream_options":{ },"model":"m"}',
                b'{"stream_options":{ "include_usage":true},"model":"m"}',
            ),
            (
                b'{"model":"m","stream_options":{"a": [1],"include_usage" :false}}',
                b'{"model":"m","stream_options":{"a": [1],"include_usage" :true}}',
            ),
            (
                b'{"model":"m","stream_options":{"include_obfuscation":false}}',
                b'{"model":"m","stream_options":{"include_usage":true,"include_obfuscation":false}}',
            ),
        ):
            self.assertEqual(after, self.asked(before))

    def test_left_alone(self) -> None:
        """A body that asks already, or whose options the upstream will refuse, goes up as it came."""
        for options in (b'{"include_usage": true}', b"[]", b"7", b'"x"', b"true"):
            text = b'{"model":"m","stream_options":' + options + b"}"
            self.assertEqual([], OPENAI.ask_for_usage(body.read(text)))

    def test_ambiguous(self) -> None:
        """Options that another parser may read the other way are refused: the usage would be lost."""
        for options in (
            b'{"include_usage":true,"include_usage":false}',
            b'{"include_usage":true,"Include_Usage":false}',
            b'{"INCLUDE_USAGE":false}',
        ):
            text = b'{"model":"m","stream_options":' + options + b"}"
            refusal = self.assertRaises(Refusal, OPENAI.ask_for_usage, body.read(text))
            self.assertEqual((400, "invalid_body"), (refusal.status, refusal.slug))

    def test_anthropic(self) -> None:
        """Anthropic's streams tell it anyway."""
        self.assertEqual([], ANTHROPIC.ask_for_usage(body.read(b'{"model":"m"}')))


class OperationTests(SynchronousTestCase):
    """Which path speaks which dialect."""

    def test_paths(self) -> None:
        """An operation's path is answered in its dialect, whatever the client looks like."""
        for operation in OPERATIONS.values():
            for anthropic_client in (False, True):
                dialect = dialect_of(b"/v1" + operation.path.encode(), anthropic_client=anthropic_client)
                self.assertIs(operation.dialect, dialect)

    def test_shared_paths(self) -> None:
        """Elsewhere the client decides."""
        for path in (b"/v1/models", b"/", b"/nowhere"):
            self.assertIs(ANTHROPIC, dialect_of(path, anthropic_client=True))
            self.assertIs(OPENAI, dialect_of(path, anthropic_client=False))
