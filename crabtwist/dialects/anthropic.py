"""
Anthropic's Messages API.

Usage follows the vendor's rules: the numbers of `message_delta` are cumulative and replace those of
`message_start`; `input_tokens` excludes whatever went through the prompt cache.
"""

from __future__ import annotations

from typing import Any

import msgspec

from crabtwist.dialects.base import (
    AnswerReader,
    Dialect,
    UpstreamSays,
    count,
    decode_object,
    last_usage,
    model_and_usage,
    part,
    text,
)
from crabtwist.sse import Event
from crabtwist.values import NOTHING, Usage

ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}

_STATUSES = {name: status for status, name in ERROR_TYPES.items()} | {"overloaded_error": 529}


def usage_from(counts: dict[str, Any], *, complete: bool) -> Usage:
    """
    Return a usage object's numbers by class.

    When the cache's 5-minute and 1-hour parts do not add up to the total (server tools), the rest
    counts as the cheaper 5-minute kind; parts that exceed it, or come without one, are the total.
    """
    output, thinking, for_an_hour = count(counts, "output_tokens"), 0, 0
    written = count(counts, "cache_creation_input_tokens")
    if details := part(counts, "output_tokens_details"):
        thinking = min(count(details, "thinking_tokens"), output)
    if by_time := part(counts, "cache_creation"):
        for_an_hour = count(by_time, "ephemeral_1h_input_tokens")
        written = max(written, count(by_time, "ephemeral_5m_input_tokens") + for_an_hour)
    calls = part(counts, "server_tool_use")
    return Usage(
        input_tokens=count(counts, "input_tokens"),
        cache_read_tokens=count(counts, "cache_read_input_tokens"),
        cache_write_tokens=written - for_an_hour,
        cache_write_1h_tokens=for_an_hour,
        output_tokens=output - thinking,
        reasoning_tokens=thinking,
        server_tool_calls={name: number for name in calls if (number := count(calls, name))}
        if calls
        else NOTHING,
        raw=msgspec.json.encode(counts),
        complete=complete,
    )


def read_error(data: bytes) -> UpstreamSays | None:
    """Return what an error body or event says, None if it is no error of this dialect's."""
    error = part(decode_object(data), "error")
    if not error:
        return None
    kind = text(error, "type", "api_error")
    return UpstreamSays(_STATUSES.get(kind, 500), kind, text(error, "message"))


class MessageReader(AnswerReader):
    """Reads a message, streamed or plain."""

    def __init__(self) -> None:
        super().__init__()
        self._counts: dict[str, Any] = {}

    def wants(self, region: bytes) -> bool:
        """Everything before the first real event; then only what frames the message, and errors."""
        return not self.began or b"message_" in region or b"error" in region

    def event(self, event: Event) -> bool:
        """Learn from one event, by the type in its data (some vendors send no event names)."""
        content = decode_object(event.data)
        kind = text(content, "type", event.name)
        if kind == "message_start":
            message = part(content, "message")
            self.model = text(message, "model") or None
            self._count(part(message, "usage"), complete=False)
        elif kind == "message_delta":
            self._count(part(content, "usage"), complete=True)
        elif kind == "message_stop":
            self.finished = True
        elif kind == "error":
            self.refused = not self.began
            self.error = read_error(event.data) or UpstreamSays(500, "api_error", event.text)
        self.began = self.began or kind != "ping"
        return False

    def _count(self, counts: dict[str, Any], *, complete: bool) -> None:
        for name, value in counts.items():
            if value is not None:
                self._counts[name] = value
        if self._counts:
            self.usage = usage_from(self._counts, complete=complete)

    def body(self, data: bytes) -> None:
        """Learn from a whole message."""
        self.model, counts = model_and_usage(data)
        self._count(counts, complete=True)

    def tail(self, data: bytes) -> None:
        """Learn from the end of a large message: its usage is its last member."""
        self._count(last_usage(data), complete=True)


def _render_error(type: str, slug: str, message: str, request_id: str) -> bytes:  # noqa: A002, ARG001 - one signature for all dialects
    error = {"type": type, "message": message}
    return msgspec.json.encode({"type": "error", "error": error, "request_id": request_id})


def _render_error_event(body: bytes) -> bytes:
    return b"event: error\ndata: " + body + b"\n\n"


def _reader(*, hide_usage: bool) -> AnswerReader:  # noqa: ARG001 - this dialect always tells its usage
    return MessageReader()


ANTHROPIC = Dialect(
    name="anthropic",
    error_types=ERROR_TYPES,
    keep_alive=b'event: ping\ndata: {"type": "ping"}\n\n',
    render_error=_render_error,
    render_error_event=_render_error_event,
    read_error=read_error,
    reader=_reader,
    ask_for_usage=lambda _: [],
)
