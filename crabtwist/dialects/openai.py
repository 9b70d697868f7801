"""
OpenAI's API, and that of the many servers which speak it.

`prompt_tokens` includes what came from the prompt cache, and `completion_tokens` what was reasoned;
both are taken apart here.
"""

from __future__ import annotations

import re
from typing import Any

import attrs
import msgspec

from crabtwist.body import Edit, JSONObject, RequestBody, splice, unambiguous
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
from crabtwist.values import Usage

ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    504: "timeout_error",
}

#: What error types and codes amount to, where a stream says no status.
_STATUSES = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "invalid_api_key": 401,
    "permission_error": 403,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "insufficient_quota": 429,
    "overloaded_error": 503,
    "timeout_error": 504,
}

#: Statuses as they stand in an error's code, as a number or a string.
_ERROR_CODES = frozenset(str(status) for status in range(400, 600))

#: A chunk that counts; with `include_usage` every other chunk says `"usage": null`.
_COUNTS = re.compile(rb'"usage"[ \t]*:[ \t]*\{')


def usage_from(counts: dict[str, Any], *, complete: bool = True) -> Usage:
    """Return a usage object's numbers by class."""
    prompt = count(counts, "prompt_tokens")
    details = part(counts, "prompt_tokens_details")
    # DeepSeek's older name stands beside the total, not below it.
    read = min(count(details, "cached_tokens") or count(counts, "prompt_cache_hit_tokens"), prompt)
    written = min(count(details, "cache_write_tokens"), prompt - read)
    completion = count(counts, "completion_tokens")
    reasoning = min(count(part(counts, "completion_tokens_details"), "reasoning_tokens"), completion)
    return Usage(
        input_tokens=prompt - read - written,
        cache_read_tokens=read,
        cache_write_tokens=written,
        output_tokens=completion - reasoning,
        reasoning_tokens=reasoning,
        raw=msgspec.json.encode(counts),
        complete=complete,
    )


def read_error(data: bytes) -> UpstreamSays | None:
    """Return what an error body or event says, None if it is no error of this dialect's."""
    content = decode_object(data)
    # Some servers send the error's members without the wrapper.
    error = content if content.get("object") == "error" else content.get("error")
    if isinstance(error, str):
        return UpstreamSays(500, "server_error", error)
    if not isinstance(error, dict):
        return None
    code, kind = str(error.get("code")), text(error, "type", "server_error")
    status = int(code) if code in _ERROR_CODES else _STATUSES.get(code) or _STATUSES.get(kind, 500)
    return UpstreamSays(status, kind, text(error, "message"))


class CompletionReader(AnswerReader):
    """Reads a chat completion, streamed or plain, and any other answer that counts alike."""

    def __init__(self, *, hide_usage: bool = False) -> None:
        """With `hide_usage` the chunk that only counts is kept from a caller that did not ask for it."""
        super().__init__()
        self._hide_usage = hide_usage

    def wants(self, region: bytes) -> bool:
        """Everything before the first chunk; then the one that counts, the end, and errors."""
        return (
            not self.began or _COUNTS.search(region) is not None or b"[DONE]" in region or b"error" in region
        )

    def event(self, event: Event) -> bool:
        """Learn from one chunk."""
        first, self.began = not self.began, True
        if event.data.strip() == b"[DONE]":
            self.finished = True
            if self.usage is not None:
                self.usage = attrs.evolve(self.usage, complete=True)
            return False
        content = decode_object(event.data)
        self.model = self.model or text(content, "model") or None
        if content.get("error") or content.get("object") == "error" or event.name == "error":
            self.refused = first
            self.error = read_error(event.data) or UpstreamSays(500, "server_error", event.text)
        counts = part(content, "usage")
        if counts:
            # Some servers count in every chunk; only one without choices is their last word.
            self.usage = usage_from(counts, complete=content.get("choices") == [])
        return bool(self._hide_usage and counts and content.get("choices") == [])

    def body(self, data: bytes) -> None:
        """Learn from a whole answer."""
        self.model, counts = model_and_usage(data)
        if counts:
            self.usage = usage_from(counts)

    def tail(self, data: bytes) -> None:
        """Learn from the end of a large answer (embeddings): its usage is its last member."""
        if counts := last_usage(data):
            self.usage = usage_from(counts)


def _render_error(type: str, slug: str, message: str, request_id: str) -> bytes:  # noqa: A002 - the field's name on the wire
    error = {"message": message, "type": type, "param": None, "code": slug}
    return msgspec.json.encode({"error": error, "request_id": request_id})


def _render_error_event(body: bytes) -> bytes:
    return b"data: " + body + b"\n\n"


def ask_for_usage(body: RequestBody) -> list[Edit]:
    """
    Return the edits that set `stream_options.include_usage`, keeping the caller's other options.

    Options that are no object are left for the upstream to refuse.  Raises `Refusal` (400) for those that
    might say otherwise to another parser: the usage would be lost.
    """
    options = body.get("stream_options")
    if options in (None, b"null"):
        return [body.setting("stream_options", b'{"include_usage":true}')]
    parsed = JSONObject.parse(options or b"")
    if parsed is None or unambiguous(parsed.members, ("include_usage",)).get("include_usage") == b"true":
        return []
    return [body.setting("stream_options", splice(parsed.data, [parsed.setting("include_usage", b"true")]))]


OPENAI = Dialect(
    name="openai",
    error_types=ERROR_TYPES,
    keep_alive=b": keep-alive\n\n",
    render_error=_render_error,
    render_error_event=_render_error_event,
    read_error=read_error,
    reader=CompletionReader,
    ask_for_usage=ask_for_usage,
)
