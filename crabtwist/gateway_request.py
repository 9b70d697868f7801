"""A client's request with its body in memory, and the gateway's plainest refusals of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from http import HTTPStatus
from io import BytesIO
from types import MappingProxyType
from typing import Any

from twisted.internet.interfaces import IAddress
from twisted.python.failure import Failure
from twisted.web.http import NO_BODY_CODES, RESPONSES, parse_qs
from twisted.web.http_headers import Headers as HeaderMap
from twisted.web.server import Request

from crabtwist.errors import Refusal, internal_error
from crabtwist.headers import header_map
from crabtwist.http_reader import Head
from crabtwist.values import Headers

#: What statuses are called; Twisted does not know all that there are.
REASONS: Mapping[int, bytes] = {
    **{status.value: status.phrase.encode() for status in HTTPStatus},
    **RESPONSES,
}


class GatewayRequest(Request):
    """
    A request with its body in memory.

    `fields` are the header fields in wire order, names as they were written, and `named` their values by
    names in lower case, beside `requestHeaders`.  `head_received_at` is on the factory's clock, in seconds.
    `admission` is for `admit` to leave what it found for those who come after it; whatever type that is, it
    is theirs.  No cookies and no forms are parsed.
    """

    #: None before and after: Twisted deletes it from a finished request.
    channel: Any = None
    body: bytes = b""
    fields: Headers = ()
    named: Mapping[bytes, Sequence[bytes]] = MappingProxyType({})
    head_received_at: float = 0.0
    admission: Any = None
    #: Twisted's: neither has a request wait for another, nor a form be parsed.
    queued = False
    _parsePOSTFormSubmission = False
    _is_head_said = False
    _is_bodiless = False
    #: What is still to come of an answer whose length was said.
    _missing_bytes: int | None = None

    def __init__(self, channel: Any) -> None:
        # Not as Twisted's: most requests need none of the rest, and whoever does is given it when asking.
        self.channel = channel
        self.transport: Any = channel.transport
        self.notifications = []
        self._leave: list[Callable[[], object]] = []

    @cached_property
    def requestHeaders(self) -> HeaderMap:  # type: ignore[override]  # Twisted's are plain attributes
        """The header fields as Twisted has them."""
        return header_map(self.fields)

    @cached_property
    def responseHeaders(self) -> HeaderMap:  # type: ignore[override]
        """The answer's header fields, where `say_head` does not say them."""
        return HeaderMap()

    @cached_property
    def client(self) -> IAddress:
        """Whose request it is."""
        address: IAddress = self.transport.getPeer()
        return address

    @cached_property
    def host(self) -> IAddress:
        """Where it came in."""
        address: IAddress = self.transport.getHost()
        return address

    @cached_property
    def cookies(self) -> list[bytes]:  # type: ignore[override]
        """What the answer sets."""
        return []

    @cached_property
    def received_cookies(self) -> dict[bytes, bytes]:  # type: ignore[override]
        """None: nobody parses them."""
        return {}

    @cached_property
    def _adapterCache(self) -> dict[str, object]:  # type: ignore[override]
        return {}

    def take_head(self, head: Head, now: float) -> None:
        """Become the request of this head."""
        self.method, self.uri, self.clientproto = head.method, head.target, head.version
        self.path = head.target.partition(b"?")[0]
        self.fields, self.named = head.fields, head.named
        self.head_received_at = now

    def take_body(self, body: bytes) -> None:
        """Have this body, whole."""
        self.body = body

    def process(self) -> None:
        """Be served: at once where it is known beforehand by whom, else as Twisted finds out."""
        serve = self.channel.owner.shortcuts.get((self.method, self.path))
        if serve is None:
            self.content = BytesIO(self.body)
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
        parsed: dict[bytes, list[bytes]] = parse_qs(self.query, 1)
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
        reason = REASONS.get(status, b"Unknown Status")
        bodiless, chunked = self.method == b"HEAD" or status in NO_BODY_CODES, False
        if length is not None and status not in NO_BODY_CODES:
            fields = (*fields, (b"content-length", b"%d" % length))
        elif not bodiless and self.clientproto == b"HTTP/1.1":
            fields = (*fields, (b"transfer-encoding", b"chunked"))
            chunked = True
        self.channel.say_head(self.clientproto, status, reason, fields)
        # Only now: of a head with a name that is none nothing was said, and another may follow.
        self.code, self.code_message, self.startedWriting, self.chunked = status, reason, 1, int(chunked)
        self._is_head_said, self._is_bodiless, self._missing_bytes = True, bodiless, length

    def write(self, data: bytes) -> None:
        """Send some of the body; after a head that was set on the request as Twisted does it."""
        if not self._is_head_said or self.finished:
            super().write(data)
        elif not data or self._is_bodiless or self._disconnected:
            return
        elif self.chunked:
            self.channel.write(b"%x\r\n%b\r\n" % (len(data), data))
        elif self._missing_bytes == len(data):
            self.channel.write_last(data)
        else:
            if self._missing_bytes is not None:
                self._missing_bytes -= len(data)
            self.channel.write(data)

    def flush(self) -> None:
        """Have a head that was said leave, though nothing follows it yet."""
        if self.channel is not None:
            self.channel.flush()

    def abort(self) -> None:
        """
        End the connection at once, so that the answer cannot be taken for a whole one.

        `notifyFinish` errbacks soon after.  Harmless when the request has ended.
        """
        if self.channel is not None:
            self.channel.abort()

    def finish(self) -> None:
        """End the answer as a whole one, unless it was aborted."""
        if self.channel is None or not (self._is_head_said or self.channel.is_aborted):
            super().finish()
        elif not self.channel.is_aborted:
            if self.chunked:
                self.channel.write_last(b"0\r\n\r\n")
            self.finished = 1
            self._leave.clear()
            self._cleanup()

    def when_left(self, leave: Callable[[], object]) -> None:
        """Have `leave` called if the client leaves before its answer ends: a plain `notifyFinish`."""
        self._leave.append(leave)

    def connectionLost(self, reason: Failure) -> None:
        """Tell everybody that there is nobody to answer."""
        self._disconnected, self.channel = True, None
        # Before those of `notifyFinish`, who may end what these have to know.
        while self._leave:
            self._leave.pop(0)()
        super().connectionLost(reason)

    def processingFailed(self, reason: Failure) -> Failure:
        """Log what the code that should have answered raised; the client is told that it failed."""
        self._log.failure("A request was not answered", failure=reason)
        if self.startedWriting:
            self.abort()
        elif self.channel is not None:
            self.channel.refuse(internal_error())
        return reason


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
