"""A client's request, as the place where its answer goes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from twisted.internet.interfaces import IReactorTime

from crabtwist.dialects.base import Dialect
from crabtwist.errors import Refusal, UpstreamError
from crabtwist.values import Answer, Headers

#: Fields that the gateway adds to every answer.
REQUEST_ID = b"x-crabtwist-request-id"
FIDELITY = b"x-crabtwist-fidelity"
ERROR = b"x-crabtwist-error"

#: What frames a body is said by whoever sends it, and which request it was by the gateway.
_REPLACED = frozenset({b"content-length", b"transfer-encoding", b"connection", REQUEST_ID})

NO_HEADERS: Mapping[bytes, bytes] = MappingProxyType({})


class Downstream:
    """
    One client's answer.

    Wraps a `twisted.web` request; every guard that writing to one needs is here and nowhere else: after
    the client left, nothing does harm.  `own_headers` are looked at when the head is said.  `status` is what
    the client was sent, None before.  `first_byte_at` is on the given clock.
    """

    def __init__(
        self,
        request: Any,
        clock: IReactorTime,
        request_id: str,
        own_headers: Mapping[bytes, bytes] = NO_HEADERS,
    ) -> None:
        self.status: int | None = None
        self.bytes_out = 0
        self.first_byte_at: float | None = None
        self._request = request
        self._clock = clock
        self._request_id = request_id
        self._own_headers = own_headers
        self._braked = False
        self._gone = False
        self._ended = False
        request.when_left(self._left)

    def _left(self) -> None:
        self._gone = self._ended = True

    @property
    def open(self) -> bool:
        """Whether the client is there and its answer has not ended."""
        return not self._ended

    def start(self, status: int, fields: Headers, length: int | None = None) -> None:
        """Send the head; without a length the body is chunked.  Once."""
        own = self._own_headers
        replaced = _REPLACED.union(own) if own else _REPLACED
        if not self._ended:
            kept = [field for field in fields if field[0].lower() not in replaced]
            request_id = REQUEST_ID, self._request_id.encode()
            self._request.say_head(status, (*kept, *own.items(), request_id), length)
        self.status = status

    def write(self, data: bytes) -> None:
        """Send some of the body."""
        if self._ended or not data:
            return
        if self.first_byte_at is None:
            self.first_byte_at = self._clock.seconds()
        self.bytes_out += len(data)
        self._request.write(data)

    remark = write

    def flush(self) -> None:
        """Have the head leave, though nothing of the body is there yet."""
        if not self._ended:
            self._request.flush()

    def finish(self, error: UpstreamError | None = None) -> None:  # noqa: ARG002 - for sinks that pass it on
        """End the answer, which is whole or says itself that it is not."""
        if not self._ended:
            self._ended = True
            self._request.finish()

    def abort(self, error: UpstreamError | None = None) -> None:  # noqa: ARG002 - for sinks that pass it on
        """End the connection so that the answer cannot be taken for a whole one."""
        if not self._ended:
            self._ended = True
            self._request.abort()

    def brake(self, producer: object) -> None:
        """Let the client's connection pause, resume and stop `producer` (an `IPushProducer`)."""
        if self.open:
            self._braked = True
            self._request.registerProducer(producer, streaming=True)

    def release(self) -> None:
        """Let the producer go."""
        if self._braked and not self._gone:
            self._request.unregisterProducer()
        self._braked = False

    def answer(self, answer: Answer) -> None:
        """Send a whole answer."""
        self.start(answer.status, answer.headers, len(answer.body))
        self.write(answer.body)
        self.finish()


def refusal_answer(refusal: Refusal, dialect: Dialect, request_id: str) -> Answer:
    """Put a refusal into the words of the caller's dialect."""
    return Answer(
        status=refusal.status,
        headers=(
            (b"content-type", b"application/json"),
            (ERROR, refusal.slug.encode()),
            *refusal.fields,
        ),
        body=dialect.error_body(refusal.status, refusal.type, refusal.slug, refusal.message, request_id),
    )
