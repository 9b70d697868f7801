"""The bytes of a request, as an SDK would send them to a gateway."""

from __future__ import annotations

import json
from typing import Any

from bench.scenarios import CHAT

#: The load generator puts another number in its place in each request.
NUMBER = "req-0000000000"

#: Text as coding agents send it: JSON has to escape its lines and quotes.
_CODE = '    if name not in seen:\n        seen["' + "x" * 40 + '"] = True  # once\n'
_TEXT_BYTES = 2000


def body_of(dialect: str, model: str, size_bytes: int, *, stream: bool) -> bytes:
    """Return a body of about that size: a conversation of many messages if it is large."""
    document: dict[str, Any] = {"model": model, "max_tokens": 64, "stream": stream}
    if stream and dialect == CHAT:
        document["stream_options"] = {"include_usage": True}
    document["messages"] = [{"role": "user", "content": NUMBER}]
    missing = size_bytes - len(_encoded(document))
    if missing <= _TEXT_BYTES:
        document["messages"][0]["content"] += " " + "x" * (missing - 1)
        return _encoded(document)
    text = (_CODE * (_TEXT_BYTES // len(_CODE) + 1))[:_TEXT_BYTES]
    pair = [{"role": "assistant", "content": text}, {"role": "user", "content": text}]
    document["messages"] += pair * round(missing / len(_encoded(pair)))
    return _encoded(document)


def _encoded(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def request_of(path: str, headers: dict[str, str], body: bytes) -> bytes:
    """Return a whole request, for a connection that is kept."""
    lines = [f"POST {path} HTTP/1.1", "host: gateway.test", "content-type: application/json"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    lines.append(f"content-length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body
