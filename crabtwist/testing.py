"""
Fakes that keep the contracts, for the tests of plugins and for our own.

Nothing here opens a socket or reads a real clock; time is a `twisted.internet.task.Clock`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.interfaces import IPushProducer
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone
from twisted.web.http_headers import Headers as HeaderMap
from twisted.web.iweb import IResponse
from zope.interface import implementer

from crabtwist.errors import ConnectionBroken, UpstreamError
from crabtwist.interfaces import IProvider, IServices
from crabtwist.values import Call, Context, Headers

EVENT_STREAM: Headers = ((b"content-type", b"text/event-stream"),)
JSON: Headers = ((b"content-type", b"application/json"),)


@implementer(IServices)
class FakeServices:
    """Services without a network: a clock that the test advances, a folder of its own, gauges in `shown`."""

    def __init__(self, clock: Clock | None = None, directory: Path | None = None) -> None:
        self.clock = clock or Clock()
        self.directory = directory or Path()
        self.storage: Any = None
        self.shown: dict[str, Callable[[], float]] = {}

    def show(self, name: str, what: str, read: Callable[[], float]) -> None:
        """Remember what is to be shown, by name."""
        assert what and name not in self.shown, "shown twice"
        self.shown[name] = read

    def agent(self, *, ca_file: str | None = None) -> Any:
        """There is no network here."""
        raise AssertionError(f"no agent in a test without a network (ca_file={ca_file!r})")


@implementer(IResponse, IPushProducer)
class FakeResponse:
    """
    A response whose body the test sends: `receive`, then `end` or `break_off`.

    `paused` and `stopped` tell what the reader did to it.
    """

    version = (b"HTTP", 1, 1)
    phrase = b""
    request = None
    previousResponse = None

    def __init__(
        self, code: int = 200, fields: Headers = JSON, body: bytes | None = None, length: int | None = None
    ) -> None:
        """With a `body` it sends that, whole, as soon as somebody reads."""
        self.code = code
        self.raw_headers = fields
        self.headers = HeaderMap()
        for name, value in fields:
            self.headers.addRawHeader(name, value)
        self.length: Any = length
        self.paused = False
        self.stopped = False
        self._body = body
        self._protocol: Any = None

    def setPreviousResponse(self, response: IResponse) -> None:
        """There never is one."""

    def deliverBody(self, protocol: Any) -> None:
        """Remember who reads."""
        self._protocol = protocol
        protocol.makeConnection(self)
        if self._body is not None:
            self.receive(self._body)
            self.end()

    def receive(self, data: bytes) -> None:
        """Give the reader some of the body."""
        if not self.stopped:
            self._protocol.dataReceived(data)

    def end(self) -> None:
        """End the body as a whole one."""
        self._lose(Failure(ResponseDone()))

    def break_off(self, error: Exception | None = None) -> None:
        """End the body as a broken one."""
        self._lose(Failure(error or ConnectionBroken("the connection was reset")))

    def pauseProducing(self) -> None:
        """The reader wants no more for now."""
        self.paused = True

    def resumeProducing(self) -> None:
        """The reader wants more."""
        self.paused = False

    def stopProducing(self) -> None:
        """The reader wants nothing, ever."""
        self.stopped = True

    loseConnection = abortConnection = stopProducing

    def _lose(self, reason: Failure) -> None:
        if not self.stopped:
            self._protocol.connectionLost(reason)


@implementer(IProvider)
class FakeProvider:
    """
    A provider that answers from a list, and remembers what it was asked.

    Each answer is a response, an error, or a Deferred that the test fires.
    """

    def __init__(
        self,
        name: str = "fake",
        answers: Iterable[IResponse | UpstreamError | Deferred[Any]] = (),
        *,
        dialects: Iterable[str] = ("anthropic", "openai"),
        operations: Iterable[str] = (
            "messages",
            "messages.count_tokens",
            "chat.completions",
            "embeddings",
        ),
    ) -> None:
        self.name = name
        self.kind = "fake"
        self.dialects = frozenset(dialects)
        self.operations = frozenset(operations)
        self.calls: list[Call] = []
        self._answers = list(answers)

    def open(self, call: Call) -> Deferred[IResponse]:
        """Give the next answer."""
        self.calls.append(call)
        answer: Any = self._answers.pop(0)
        if isinstance(answer, Deferred):
            return answer
        return fail(answer) if isinstance(answer, Exception) else succeed(answer)

    def list_models(self) -> Deferred[list[str]]:
        """It has none of its own."""
        return succeed([])


class FakeSink:
    """A `crabtwist.relay.Sink` that remembers what it got."""

    def __init__(self) -> None:
        self.data = b""
        self.finished = False
        self.aborted = False
        self.producer: Any = None

    def write(self, data: bytes) -> None:
        """Remember some of the body."""
        assert not (self.finished or self.aborted), "written to after its end"
        self.data += data

    remark = write

    def finish(self, error: UpstreamError | None = None) -> None:  # noqa: ARG002 - the contract's
        """Remember that the answer ended, as a whole one or in words."""
        self.finished = True

    def abort(self, error: UpstreamError | None = None) -> None:  # noqa: ARG002 - the contract's
        """Remember that the answer was cut."""
        self.aborted = True

    def brake(self, producer: object) -> None:
        """Remember who can be paused."""
        self.producer = producer

    def release(self) -> None:
        """Forget who can be paused."""
        self.producer = None


def make_context(**changes: Any) -> Context:
    """Return the context of some request; give the fields that matter."""
    fields: dict[str, Any] = {
        "request_id": "req_test",
        "operation": "messages",
        "dialect": "anthropic",
        "model_asked": "model",
        "model": "model",
        "principal": "default",
        "stream": False,
        "started_at": 0.0,
    }
    return Context(**{**fields, **changes})
