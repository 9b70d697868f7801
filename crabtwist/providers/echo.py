"""
An upstream without an account: says back what it was told.

Deterministic, in both dialects, streamed word by word, with usage: one word is one token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import attrs
import msgspec
from attrs.validators import ge
from twisted.internet.defer import Deferred, succeed
from twisted.web.iweb import IResponse
from zope.interface import implementer

from crabtwist.dialects.operations import DIALECTS
from crabtwist.interfaces import IProvider
from crabtwist.providers.local import LocalResponse
from crabtwist.values import Call

#: How long an embedding is, in numbers.
DIMENSIONS = 8

_JSON = (b"content-type", b"application/json")
_EVENTS = (b"content-type", b"text/event-stream; charset=utf-8")


@attrs.frozen
class EchoSettings:
    """`delay_seconds` passes before each word."""

    delay_seconds: float = attrs.field(default=0.0, validator=ge(0))


@implementer(IProvider)
class EchoProvider:
    """The provider of the kind `echo`."""

    Settings = EchoSettings

    kind = "echo"
    dialects = frozenset({"anthropic", "openai"})
    operations = frozenset({"messages", "messages.count_tokens", "chat.completions", "embeddings"})

    def __init__(self, name: str, settings: EchoSettings, services: Any) -> None:
        self.name = name
        self._delay_seconds = settings.delay_seconds
        self._clock = services.clock

    def open(self, call: Call) -> Deferred[IResponse]:
        """Answer at once; with a 400 what this parser cannot read, though the gateway's could."""
        try:
            return self._answer(call, msgspec.json.decode(call.body, type=dict[str, Any]))
        except (msgspec.DecodeError, RecursionError) as error:
            message = f"the body cannot be read: {error}"
            dialect = DIALECTS[call.dialect]
            body = dialect.error_body(400, None, "invalid_body", message, _id("req_", call.body))
            return self._plain(msgspec.Raw(body), 400)

    def _answer(self, call: Call, asked: dict[str, Any]) -> Deferred[IResponse]:
        words = _last_words(asked)
        counts = _text_of(asked.get("system")).split() + _text_of(asked.get("messages")).split()
        if call.operation == "messages.count_tokens":
            return self._plain({"input_tokens": len(counts)})
        if call.operation == "embeddings":
            return self._plain(_embeddings(call.model, asked.get("input")))
        if call.dialect == "anthropic":
            if call.stream:
                return self._stream(_message_events(call.model, words, len(counts)))
            return self._plain(_message(call.model, words, len(counts)))
        if call.stream:
            return self._stream(_chunks(call.model, words, len(counts), asked))
        return self._plain(_completion(call.model, words, len(counts)))

    def list_models(self) -> Deferred[list[str]]:
        """It echoes under any name."""
        return succeed(["echo"])

    def _plain(self, answer: object, status: int = 200) -> Deferred[IResponse]:
        body, delay_seconds = msgspec.json.encode(answer), self._delay_seconds
        return succeed(
            LocalResponse(
                status, (_JSON,), [body], self._clock, length=len(body), delay_seconds=delay_seconds
            )
        )

    def _stream(self, events: Iterator[bytes]) -> Deferred[IResponse]:
        return succeed(LocalResponse(200, (_EVENTS,), events, self._clock, delay_seconds=self._delay_seconds))


def _text_of(content: object) -> str:
    """Return all text in a message's content, however deep it is wrapped."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return " ".join(filter(None, map(_text_of, content)))
    if isinstance(content, dict):
        return _text_of(content.get("text") or content.get("content"))
    return ""


def _last_words(asked: dict[str, Any]) -> list[str]:
    messages = asked.get("messages")
    said = messages if isinstance(messages, list) else []
    # Claude Code's last message may be the system's.
    users = [each for each in said if isinstance(each, dict) and each.get("role") == "user"]
    last = (users or said or [""])[-1]
    return _text_of(last).split() or ["..."]


def _pieces(words: list[str]) -> Iterator[str]:
    """Yield the words so that joining them gives the whole text."""
    for index, word in enumerate(words):
        yield word if index == 0 else " " + word


def _id(prefix: str, *parts: object) -> str:
    return prefix + hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


# Anthropic.


def _message(model: str, words: list[str], prompt: int) -> dict[str, Any]:
    return {
        "id": _id("msg_", model, words),
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [{"type": "text", "text": " ".join(words)}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": prompt, "output_tokens": len(words)},
    }


def _event(name: str, **content: object) -> bytes:
    data = msgspec.json.encode({"type": name, **content})
    return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"


def _message_events(model: str, words: list[str], prompt: int) -> Iterator[bytes]:
    begun = {**_message(model, words, prompt), "content": [], "stop_reason": None}
    begun["usage"] = {"input_tokens": prompt, "output_tokens": 1}
    yield _event("message_start", message=begun)
    yield _event("content_block_start", index=0, content_block={"type": "text", "text": ""})
    for piece in _pieces(words):
        yield _event("content_block_delta", index=0, delta={"type": "text_delta", "text": piece})
    yield _event("content_block_stop", index=0)
    yield _event(
        "message_delta",
        delta={"stop_reason": "end_turn", "stop_sequence": None},
        usage={"output_tokens": len(words)},
    )
    yield _event("message_stop")


# OpenAI.


def _counts(prompt: int, completion: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _completion(model: str, words: list[str], prompt: int) -> dict[str, Any]:
    message = {"role": "assistant", "content": " ".join(words)}
    return {
        "id": _id("chatcmpl-", model, words),
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": _counts(prompt, len(words)),
    }


def _chunks(model: str, words: list[str], prompt: int, asked: dict[str, Any]) -> Iterator[bytes]:
    options = asked.get("stream_options")
    counts = isinstance(options, dict) and options.get("include_usage") is True
    common = {
        "id": _id("chatcmpl-", model, words),
        "object": "chat.completion.chunk",
        "created": 0,
        "model": model,
    }

    def chunk(**content: object) -> bytes:
        return b"data: " + msgspec.json.encode({**common, **content}) + b"\n\n"

    for index, piece in enumerate(_pieces(words)):
        delta = {"role": "assistant", "content": piece} if index == 0 else {"content": piece}
        yield chunk(choices=[{"index": 0, "delta": delta, "finish_reason": None}])
    yield chunk(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
    if counts:
        yield chunk(choices=[], usage=_counts(prompt, len(words)))
    yield b"data: [DONE]\n\n"


def _embeddings(model: str, given: object) -> dict[str, Any]:
    texts = given if isinstance(given, list) and not all(isinstance(each, int) for each in given) else [given]
    prompt = sum(len(str(each).split()) for each in texts)
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": _vector(each)}
            for index, each in enumerate(texts)
        ],
        "model": model,
        "usage": {"prompt_tokens": prompt, "total_tokens": prompt},
    }


def _vector(text: object) -> list[float]:
    digest = hashlib.sha256(str(text).encode("utf-8", "surrogatepass")).digest()
    return [byte / 255 for byte in digest[:DIMENSIONS]]
