"""A client's request without a connection: what an exchange and its answer need of one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.python.failure import Failure

from crabtwist.headers import written
from crabtwist.values import Headers


class FakeRequest:
    """Remembers what it was answered; `leave` is the client going away."""

    def __init__(self, body: bytes | dict[str, Any], fields: Headers = (), query: bytes = b"") -> None:
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.fields = fields
        self.query = query
        self.head: Headers = ()
        self.code: int | None = None
        self.data = b""
        self.head_sent = self.finished = self.aborted = False
        self.producer: Any = None
        self._notifications: list[Deferred[None]] = []

    @property
    def answer(self) -> Any:
        """The body that was sent, as JSON."""
        return json.loads(self.data)

    def header(self, name: str) -> str | None:
        """Return a header of the answer."""
        values = [value for each, value in self.head if each.lower() == name.lower().encode()]
        return values[-1].decode() if values else None

    def notifyFinish(self) -> Deferred[None]:
        """As Twisted's."""
        self._notifications.append(Deferred())
        return self._notifications[-1]

    def when_left(self, leave: Callable[[], object]) -> None:
        """As the gateway's own request has it."""
        self.notifyFinish().addErrback(lambda _: leave() and None)

    def say_head(self, status: int, fields: Headers, length: int | None) -> None:
        """As the gateway's own request has it."""
        assert not self.head_sent, "a second head"
        written(fields)
        framing = () if length is None else ((b"content-length", b"%d" % length),)
        self.code, self.head, self.head_sent = status, (*fields, *framing), True

    def flush(self) -> None:
        """As the gateway's own request has it."""
        assert self.head_sent, "nothing to flush"

    def write(self, data: bytes) -> None:
        """As Twisted's."""
        assert not self.finished, "written to after its end"
        assert self.head_sent, "a body before its head"
        self.data += data

    def finish(self) -> None:
        """As Twisted's."""
        assert not self.finished, "finished twice"
        assert self.producer is None, "finished with a producer"
        self.finished = True

    def abort(self) -> None:
        """As the gateway's own request has it."""
        self.aborted = True

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        """As Twisted's."""
        assert self.producer is None and streaming
        self.producer = producer

    def unregisterProducer(self) -> None:
        """As Twisted's."""
        self.producer = None

    def leave(self) -> None:
        """Let the client go away, as a lost connection tells it."""
        if self.producer is not None:
            self.producer.stopProducing()
        for notification in self._notifications:
            notification.errback(Failure(ConnectionDone()))
