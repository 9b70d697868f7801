"""
An upstream that says what a test tells it to, byte by byte, on real sockets.

An answer is a list of steps: bytes are sent, a number of seconds or an event is waited for, `FIN` and
`RESET` end the connection, `SILENCE` lasts until the peer ends it.  Without an ending the connection is
kept for the next request.  What a peer sent, and when it left, is remembered.
"""

from __future__ import annotations

import contextlib
import enum
import json
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Self

import attrs

#: Nothing in these tests takes longer; a script that waits longer is a broken test.
PATIENCE_SECONDS = 30.0

_POLL_SECONDS = 0.02
_SEND_BUFFER_BYTES = 65536


class Act(enum.Enum):
    """What a script can do besides sending and waiting."""

    FIN = "close the connection"
    RESET = "reset the connection"
    SILENCE = "say nothing until the peer leaves"


FIN, RESET, SILENCE = Act.FIN, Act.RESET, Act.SILENCE

Step = bytes | float | threading.Event | Act
Answer = Iterable[Step]


@attrs.frozen
class Received:
    """One request as it came; `at` is on the monotonic clock."""

    line: str
    head: bytes = attrs.field(repr=False)
    fields: tuple[tuple[str, str], ...]
    body: bytes = attrs.field(repr=False)
    connection: Connection = attrs.field(repr=False)
    at: float

    def values(self, name: str) -> list[str]:
        """Return the values of a field, in order; `name` in lower case."""
        return [value for each, value in self.fields if each.lower() == name]


Script = Callable[[Received], Answer]


class _Ended(Exception):
    """The connection is over."""


class Connection:
    """
    One accepted connection.

    `left` is set when the peer has closed or reset it, and `left_at` says when (monotonic clock).
    `number` counts the upstream's connections from 0, `requests` what came on this one.
    """

    def __init__(self, upstream: ScriptedUpstream, sock: socket.socket, number: int) -> None:
        self.number = number
        self.requests = 0
        self.sent_bytes = 0
        self.left = threading.Event()
        self.left_at = 0.0
        self._upstream = upstream
        self._socket = sock
        self._buffer = b""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.thread = threading.Thread(target=self._serve, daemon=True)

    def _serve(self) -> None:
        with contextlib.suppress(_Ended, OSError), self._socket:
            while True:
                for step in self._upstream.answer_to(self._read_request()):
                    self._do(step)

    def _read_request(self) -> Received:
        while b"\r\n\r\n" not in self._buffer:
            self._receive()
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        line, *lines = head.decode("latin-1").split("\r\n")
        fields = tuple((name, value.strip()) for name, _, value in (each.partition(":") for each in lines))
        length = next((int(value) for name, value in fields if name.lower() == "content-length"), 0)
        while len(self._buffer) < length:
            self._receive()
        body, self._buffer = self._buffer[:length], self._buffer[length:]
        self.requests += 1
        return Received(line, head, fields, body, self, time.monotonic())

    def _receive(self) -> None:
        try:
            data = self._socket.recv(65536)
        except ConnectionError:
            data = b""
        if not data:
            self.left_at = time.monotonic()
            self.left.set()
            raise _Ended
        self._buffer += data

    def _do(self, step: Step) -> None:
        if isinstance(step, bytes):
            self._send(step)
        elif isinstance(step, Act):
            self._act(step)
        elif isinstance(step, threading.Event):
            self._wait(PATIENCE_SECONDS, step)
        else:
            self._wait(step, None)

    def _act(self, act: Act) -> None:
        if act is SILENCE:
            self._wait(PATIENCE_SECONDS, None)
        if act is RESET:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise _Ended

    def _send(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            ready = self._poll(select.POLLIN | select.POLLOUT, PATIENCE_SECONDS)
            if ready & ~select.POLLOUT:
                self._receive()
            elif ready:
                sent = self._socket.send(left, socket.MSG_DONTWAIT)
                self.sent_bytes += sent
                left = left[sent:]
            else:
                raise _Ended

    def _wait(self, seconds: float, event: threading.Event | None) -> None:
        deadline = time.monotonic() + seconds
        while (remaining := deadline - time.monotonic()) > 0 and not (event is not None and event.is_set()):
            if self._poll(select.POLLIN, remaining if event is None else min(remaining, _POLL_SECONDS)):
                self._receive()

    def _poll(self, events: int, seconds: float) -> int:
        poll = select.poll()
        poll.register(self._socket, events)
        ready = poll.poll(seconds * 1000)
        return ready[0][1] if ready else 0

    def shut(self) -> None:
        """End it, whatever its script is about."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)


class ScriptedUpstream:
    """
    A server on loopback, a thread for each connection.

    `play` says what to answer; `received` and `connections` are what came since then.
    """

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self.received: list[Received] = []
        self.connections: list[Connection] = []
        self._all: list[Connection] = []
        self._script: Script = unexpected
        self._lock = threading.Lock()
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_reason: object) -> None:
        self.close()

    def play(self, *answers: Answer | Script) -> None:
        """Answer with these, in order, the last one again and again; forget all that came before."""
        with self._lock:
            waiting = list(answers)
            self.received, self.connections = [], []

            def script(request: Received) -> Answer:
                answer = waiting.pop(0) if len(waiting) > 1 else waiting[0]
                return answer(request) if callable(answer) else answer

            self._script = script if answers else unexpected

    def answer_to(self, request: Received) -> Answer:
        """Return what to answer."""
        with self._lock:
            self.received.append(request)
            if request.connection not in self.connections:
                self.connections.append(request.connection)
            return self._script(request)

    def close(self) -> None:
        """End the server and every connection."""
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._accepting.join(PATIENCE_SECONDS)
        for connection in self._all:
            connection.shut()
        for connection in self._all:
            connection.thread.join(PATIENCE_SECONDS)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection = Connection(self, self._listening.accept()[0], len(self._all))
                self._all.append(connection)
                connection.thread.start()


# Answers.


def head(status: int, *fields: tuple[str, str]) -> bytes:
    """Return an answer's head."""
    lines = [f"HTTP/1.1 {status} Whatever", *(f"{name}: {value}" for name, value in fields), "", ""]
    return "\r\n".join(lines).encode("latin-1")


def plain(status: int, body: bytes, *fields: tuple[str, str], kind: str = "application/json") -> list[Step]:
    """Answer with a whole body."""
    length = ("content-length", str(len(body)))
    return [head(status, ("content-type", kind), length, *fields) + body]


def unexpected(request: Received) -> Answer:
    """Answer a request that no test asked for."""
    return plain(501, f"no script for {request.line}".encode())


def chunk(data: bytes) -> bytes:
    """Return a chunk of the chunked coding."""
    return b"%x\r\n%b\r\n" % (len(data), data)


LAST_CHUNK = b"0\r\n\r\n"


def beginning(*fields: tuple[str, str]) -> bytes:
    """Return the head of a chunked event stream."""
    kind = ("content-type", "text/event-stream; charset=utf-8")
    return head(200, kind, ("transfer-encoding", "chunked"), *fields)


def stream(*pieces: Step, fields: Iterable[tuple[str, str]] = ()) -> list[Step]:
    """Answer with a stream, each piece in a chunk of its own; what is no bytes is a step between."""
    chunks = [chunk(piece) if isinstance(piece, bytes) else piece for piece in pieces]
    return [beginning(*fields), *chunks, LAST_CHUNK]


def broken_stream(*pieces: Step) -> list[Step]:
    """Answer with the beginning of a stream; the last of the pieces should be an ending."""
    return stream(*pieces)[:-1]


# Shapes, as the vendors send them.


def event(kind: str, **content: object) -> bytes:
    """Return one of Anthropic's events."""
    data = json.dumps({"type": kind, **content}, separators=(",", ":"))
    return f"event: {kind}\ndata: {data}\n\n".encode()


def block(index: int, begun: dict[str, Any], *deltas: dict[str, str]) -> list[bytes]:
    """Return the events of one content block."""
    begin = event("content_block_start", index=index, content_block=begun)
    middle = [event("content_block_delta", index=index, delta=delta) for delta in deltas]
    return [begin, *middle, event("content_block_stop", index=index)]


def message_end(reason: str, output_tokens: int) -> list[bytes]:
    """Return the last events of a message."""
    delta = {"stop_reason": reason, "stop_sequence": None}
    return [event("message_delta", delta=delta, usage={"output_tokens": output_tokens}), MESSAGE_STOP]


MESSAGE: dict[str, Any] = json.loads(
    '{"id": "msg_01", "type": "message", "role": "assistant", "model": "claude-answering",'
    '"content": [{"type": "text", "text": "Hello there"}], "stop_reason": "end_turn", "stop_sequence": null,'
    '"usage": {"input_tokens": 12, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 5,'
    '"output_tokens": 7, "service_tier": "standard"}}'
)
_USAGE = {**MESSAGE["usage"], "output_tokens": 1}
MESSAGE_START = event(
    "message_start", message={**MESSAGE, "content": [], "stop_reason": None, "usage": _USAGE}
)
MESSAGE_STOP = event("message_stop")
PING = b'event: ping\ndata: {"type": "ping"}\n\n'
_WORDS = [{"type": "text_delta", "text": word} for word in ("Hello", " there")]
HELLO = block(0, {"type": "text", "text": ""}, *_WORDS)
TEXT_STREAM = [MESSAGE_START, PING, *HELLO, *message_end("end_turn", 7)]
THINKING_STREAM = [
    MESSAGE_START,
    *block(
        0,
        {"type": "thinking", "thinking": "", "signature": ""},
        {"type": "thinking_delta", "thinking": "Let me "},
        {"type": "thinking_delta", "thinking": "see\u2026"},
        {"type": "signature_delta", "signature": "EqQBCgIYAhIM"},
    ),
    PING,
    *block(1, {"type": "text", "text": ""}, {"type": "text_delta", "text": "I will look."}),
    *block(
        2,
        {"type": "tool_use", "id": "toolu_01", "name": "Bash", "input": {}},
        {"type": "input_json_delta", "partial_json": '{"command":"echo'},
        {"type": "input_json_delta", "partial_json": ' crab","description":"say crab"}'},
    ),
    *message_end("tool_use", 42),
]


def anthropic_error(kind: str, message: str) -> bytes:
    """Return an error as Anthropic words it."""
    error = {"type": kind, "message": message}
    return json.dumps({"type": "error", "error": error, "request_id": "req_011up"}).encode()


ERROR_EVENT = b"event: error\ndata: " + anthropic_error("overloaded_error", "Overloaded") + b"\n\n"
UP_ID = ("request-id", "req_011up")
LIMITS = (
    UP_ID,
    ("anthropic-organization-id", "org-1"),
    ("anthropic-ratelimit-requests-remaining", "0"),
    ("anthropic-ratelimit-requests-reset", "2026-11-23T14:00:00Z"),
    ("anthropic-ratelimit-unified-status", "allowed"),
)
OVERLOADED = plain(529, anthropic_error("overloaded_error", "Overloaded"), UP_ID)
MESSAGE_ANSWER = plain(200, json.dumps(MESSAGE).encode(), *LIMITS)
COUNT_ANSWER = plain(200, b'{"input_tokens": 2095}', UP_ID)


def limited(retry_after: str, *fields: tuple[str, str]) -> list[Step]:
    """Answer 429 as Anthropic does."""
    body = anthropic_error("rate_limit_error", "This request would exceed your rate limit")
    return plain(429, body, ("retry-after", retry_after), *LIMITS, *fields)


def _chat(kind: str, choices: list[object], **more: object) -> bytes:
    common = {"id": "chatcmpl-1", "object": kind, "created": 1764000000, "model": "gpt-answering"}
    return json.dumps({**common, "choices": choices, **more}).encode()


def chat_chunk(*choices: object, **more: object) -> bytes:
    """Return one of OpenAI's chunks."""
    return b"data: " + _chat("chat.completion.chunk", list(choices), **more) + b"\n\n"


_CHAT_COUNTS = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
DONE = b"data: [DONE]\n\n"
USAGE_CHUNK = chat_chunk(usage=_CHAT_COUNTS)
CHAT_START = chat_chunk({"index": 0, "delta": {"role": "assistant", "content": "Hi"}, "finish_reason": None})
CHAT_MORE = chat_chunk({"index": 0, "delta": {"content": " you"}, "finish_reason": None})
CHAT_STOP = chat_chunk({"index": 0, "delta": {}, "finish_reason": "stop"})
CHAT_STREAM = [CHAT_START, CHAT_MORE, CHAT_STOP, USAGE_CHUNK, DONE]
CHAT_ERROR = (
    b'data: {"error":{"message":"Overloaded","type":"overloaded_error","param":null,"code":null}}\n\n'
)
_SAID = {"index": 0, "message": {"role": "assistant", "content": "Hi you"}, "finish_reason": "stop"}
CHAT_ANSWER = plain(200, _chat("chat.completion", [_SAID], usage=_CHAT_COUNTS))
EMBEDDINGS_ANSWER = plain(
    200,
    b'{"object":"list","data":[{"object":"embedding","index":0,"embedding":"AACAPwAAAMA="}],'
    b'"model":"text-embedding-answering","usage":{"prompt_tokens":1,"total_tokens":1}}',
)
