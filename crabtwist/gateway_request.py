"""A client's request with its body in memory, and the gateway's plainest refusals of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from http import HTTPStatus
from io import BytesIO
from typing import Any

from twisted.python.failure import Failure
from twisted.web import http, server

from crabtwist.errors import Refusal, internal_error
from crabtwist.http_reader import Head
from crabtwist.values import Headers

#: What statuses are called; Twisted does not know all that there are.
REASONS: Mapping[int, bytes] = {
    **{status.value: status.phrase.encode() for status in HTTPStatus},
    **http.RESPONSES,
}


class GatewayRequest(server.Request):
    """
    A request with its body in memory.

    `fields` are the header fields in wire order, names as they were written, beside `requestHeaders`.
    `head_received_at` is on the factory's clock, in seconds.  `admission` is for `admit` to leave what it
    found for those who come after it; whatever type that is, it is theirs.  No cookies and no forms are
    parsed.
    """

    #: None before and after: Twisted deletes it from a finished request.
    channel: Any = None
    body: bytes = b""
    fields: Headers = ()
    head_received_at: float = 0.0
    admission: Any = None

    def take_head(self, head: Head, now: float) -> None:
        """Become the request of this head."""
        self.method, self.uri, self.clientproto = head.method, head.target, head.version
        self.path = head.target.partition(b"?")[0]
        self.requestHeaders, self.fields = head.headers, head.fields
        self.head_received_at = now

    def take_body(self, body: bytes) -> None:
        """Have this body, whole."""
        self.body = body
        self.content = BytesIO(body)

    def process(self) -> None:
        """Be served: at once where it is known beforehand by whom, else as Twisted finds out."""
        serve = self.channel.owner.shortcuts.get((self.method, self.path))
        if serve is None:
            super().process()
            return
        try:
            serve(self)
        except Exception:
            self.processingFailed(Failure())

    @property
    def query(self) -> bytes:
        """What follows the target's first `?`, undecoded."""
        return self.uri.partition(b"?")[2]

    @cached_property
    def args(self) -> dict[bytes, list[bytes]]:  # type: ignore[override]  # Twisted's is a plain attribute
        """The query's names and values, decoded, those without `=` left out."""
        parsed: dict[bytes, list[bytes]] = http.parse_qs(self.query, 1)
        return parsed

    def getRequestHostname(self) -> bytes:
        """Return the host that was asked for; HTTP/1.0 need not say one, and a Unix socket has none."""
        return super().getRequestHostname() if self.getHeader(b"host") else b"localhost"

    def setResponseCode(self, code: int, message: bytes | None = None) -> None:
        """Set the status, and what it is called."""
        super().setResponseCode(code, message or REASONS.get(code))

    def say_head(self, status: int, fields: Headers, length: int | None) -> None:
        """
        Send an answer's head: these fields as they are written, and what the connection itself has to say.

        None of them may frame the body: that is done by `length`, or without one in chunks.  Once, and in
        the place of `setResponseCode` and `responseHeaders`, which cost five times as much.
        """
        self.code, self.code_message = status, REASONS.get(status, b"Unknown Status")
        self.startedWriting = 1
        bodiless = self.method == b"HEAD" or status in http.NO_BODY_CODES
        if length is not None and status not in http.NO_BODY_CODES:
            fields = (*fields, (b"content-length", b"%d" % length))
        elif not bodiless and self.clientproto == b"HTTP/1.1":
            fields = (*fields, (b"transfer-encoding", b"chunked"))
            self.chunked = 1
        self.channel.say_head(self.clientproto, status, self.code_message, fields)
        if bodiless:
            self.write = _say_nothing  # type: ignore[method-assign] # as Twisted does it

    def abort(self) -> None:
        """
        End the connection at once, so that the answer cannot be taken for a whole one.

        `notifyFinish` errbacks soon after.  Harmless when the request has ended.
        """
        if self.channel is not None:
            self.channel.abort()

    def finish(self) -> None:
        """End the answer as a whole one, unless it was aborted."""
        if self.channel is None or not self.channel.is_aborted:
            super().finish()

    def processingFailed(self, reason: Failure) -> Failure:
        """Log what the code that should have answered raised; the client is told that it failed."""
        self._log.failure("A request was not answered", failure=reason)
        if self.startedWriting:
            self.abort()
        elif self.channel is not None:
            self.channel.refuse(internal_error())
        return reason


def _say_nothing(_data: bytes) -> None:
    """Send no body where there may be none."""


def refuse(status: int, slug: str, message: str, path: bytes) -> tuple[Headers, bytes]:  # noqa: ARG001 - for those who word it by path
    """Return a refusal's header fields and body: OpenAI's and Anthropic's common denominator."""
    kind = "invalid_request_error" if status < 500 else "api_error"
    body = json.dumps({"error": {"type": kind, "message": message}}).encode()
    return ((b"content-type", b"application/json"), (b"x-crabtwist-error", slug.encode())), body


def render_refusal(request: GatewayRequest, refusal: Refusal) -> None:
    """Answer a request with a refusal, whole."""
    fields, body = refuse(refusal.status, refusal.slug, refusal.message, request.path)
    request.setResponseCode(refusal.status)
    for name, value in (*fields, *refusal.fields, (b"content-length", b"%d" % len(body))):
        request.setHeader(name, value)
    request.write(body)
    request.finish()
