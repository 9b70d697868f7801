"""How the doors speak: JSON, and refusals in the caller's dialect."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote_to_bytes

import msgspec

from crabtwist.dialects.base import Dialect
from crabtwist.dialects.operations import dialect_of
from crabtwist.downstream import REQUEST_ID, refusal_answer
from crabtwist.errors import Refusal
from crabtwist.gateway import new_request_id
from crabtwist.values import Answer, Headers

#: Where everything is that needs the admin token, as a router reads it: decoded.
ADMIN = b"/v1/admin/"


def is_for_admin(path: bytes) -> bool:
    """Tell whether a path, as it was sent, leads to where the admin token is needed."""
    return (unquote_to_bytes(path) + b"/").startswith(ADMIN)


def asks_as_anthropic(request: Any) -> bool:
    """Tell whether a request looks like one of Anthropic's clients: by its version, or by its key's place."""
    named = request.named
    return b"anthropic-version" in named or (b"x-api-key" in named and b"authorization" not in named)


def path_not_found(path: bytes) -> Refusal:
    """Return the refusal of a path that leads nowhere."""
    return Refusal(404, "path_not_found", f"there is nothing at {path.decode('latin-1')[:200]!r}")


def dialect_for(request: Any) -> Dialect:
    """Return the dialect in which to answer a request; whoever administers is always told OpenAI's way."""
    anthropic_client = asks_as_anthropic(request) and not is_for_admin(request.path)
    return dialect_of(request.path, anthropic_client=anthropic_client)


def say(request: Any, answer: Answer) -> bytes:
    """Set an answer's head on the request; return its body, for Klein to send."""
    request.setResponseCode(answer.status)
    for name, value in answer.headers:
        request.responseHeaders.addRawHeader(name, value)
    request.responseHeaders.setRawHeaders(b"content-length", [str(len(answer.body)).encode()])
    return answer.body


def say_json(request: Any, status: int, content: object) -> bytes:
    """Say a JSON document."""
    answer = Answer(status, ((b"content-type", b"application/json"),), msgspec.json.encode(content))
    return say(request, answer)


def say_refusal(request: Any, refusal: Refusal) -> bytes:
    """Say a refusal in the caller's dialect, with an id of its own."""
    request_id = new_request_id()
    request.responseHeaders.setRawHeaders(REQUEST_ID, [request_id.encode()])
    return say(request, refusal_answer(refusal, dialect_for(request), request_id))


def refuse_unread(refusal: Refusal, path: bytes) -> tuple[Headers, bytes]:
    """Return the fields and body that refuse what is no request; its path is all that tells the dialect."""
    request_id = new_request_id()
    answer = refusal_answer(refusal, dialect_of(path, anthropic_client=not is_for_admin(path)), request_id)
    return (*answer.headers, (REQUEST_ID, request_id.encode())), answer.body


def send_refusal(request: Any, refusal: Refusal) -> None:
    """Send a refusal and finish, where there is no Klein to do it."""
    request.write(say_refusal(request, refusal))
    request.finish()
