"""One try at one deployment: from the call to an answer that is worth passing on, or an error."""

from __future__ import annotations

from functools import lru_cache

import attrs
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.defer import TimeoutError as DeferredTimeoutError
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.web.iweb import IResponse

from crabtwist.dialects.base import AnswerReader, UpstreamSays
from crabtwist.dialects.operations import Operation
from crabtwist.errors import (
    BrokenBeforeFirstEvent,
    ConnectionBroken,
    CredentialRejected,
    ErrorEvent,
    HeadTimedOut,
    NotAnEventStream,
    Redirected,
    UpstreamError,
    UpstreamStatus,
)
from crabtwist.headers import downward, first
from crabtwist.hooks import Hooks
from crabtwist.plain_relay import HOLD_BYTES, PlainRelay
from crabtwist.relay import Relay, RelayLimits
from crabtwist.retry import CREDENTIAL_STATUSES, TRANSIENT_STATUSES, retry_after_seconds
from crabtwist.routing import Deployment
from crabtwist.stream_relay import StreamRelay
from crabtwist.values import Answer, Call, Context, Headers

_log = Logger()

#: How much is read of an error's body: all of any real one, so that its connection can be used again.
ERROR_BODY_BYTES = 1 << 20

#: How long that may take.
ERROR_BODY_SECONDS = 5.0


@attrs.frozen(eq=False)
class Patience:
    """
    What the configuration says about waiting and keeping, for every attempt alike.

    `commit_seconds` is how long a stream's head waits for its first event.
    """

    commit_seconds: float = 10.0
    ping_seconds: float = 15.0
    client_stall_seconds: float = 300.0
    max_event_bytes: int = 1 << 20
    max_answer_copy_bytes: int = 1 << 20


@attrs.frozen
class Reply:
    """An upstream's answer, its head read and its body on the way."""

    status: int
    headers: Headers
    relay: Relay
    reader: AnswerReader

    @property
    def streamed(self) -> bool:
        """Whether it is a stream of events."""
        return isinstance(self.relay, StreamRelay)

    @property
    def whole(self) -> bytes | None:
        """The body of a plain answer that has come to its good end, and flowed nowhere; else None."""
        return self.relay.whole if isinstance(self.relay, PlainRelay) else None

    @property
    def length(self) -> int | None:
        """How many bytes its body has, None if nobody knows yet."""
        return self.relay.length if isinstance(self.relay, PlainRelay) else None


class Attempt:
    """
    One try; `status` is the upstream's, once it is known.

    `reader` has read whatever came of an answer, also of one that was no use.
    """

    def __init__(
        self,
        context: Context,
        operation: Operation,
        deployment: Deployment,
        clock: IReactorTime,
        patience: Patience,
        hooks: Hooks,
        *,
        hide_usage: bool,
    ) -> None:
        self.status: int | None = None
        self.reader = operation.dialect.reader(hide_usage=hide_usage)
        self._context = context
        self._operation = operation
        self._deployment = deployment
        self._clock = clock
        self._patience = patience
        self._hooks = hooks
        self._limits = _limits(deployment.idle_timeout_seconds, patience)

    async def reply(self, call: Call) -> Reply:
        """Send the call; returns an answer to pass on, or raises an `UpstreamError`."""
        response = await self._head(call)
        self.status = response.code
        fields = _fields(response)
        if 200 <= response.code < 300:
            if call.stream:
                return await self._stream(response, fields)
            return await self._plain(response, fields, self.reader if self._operation.counts else None)
        return await self._not_successful(response, fields)

    async def _head(self, call: Call) -> IResponse:
        seconds = self._deployment.head_timeout_seconds
        late: IDelayedCall | None = None
        try:
            opening: Deferred[IResponse] = self._deployment.provider.open(call)
            late = self._clock.callLater(seconds, opening.cancel)
            return await opening
        except CancelledError:
            if late is None or late.active():
                raise
            raise HeadTimedOut(f"the upstream sent no response head within {seconds:g} seconds") from None
        except UpstreamError:
            raise
        except Exception as error:
            _log.failure(
                "{request_id}: the provider {provider} failed",
                request_id=self._context.request_id,
                provider=self._deployment.provider.name,
            )
            raise ConnectionBroken(f"the provider failed: {type(error).__name__}") from error
        finally:
            if late is not None and late.active():
                late.cancel()

    # Answers.

    async def _plain(self, response: IResponse, fields: Headers, reader: AnswerReader | None) -> Reply:
        copy_bytes = self._patience.max_answer_copy_bytes if self._hooks.want_answers else HOLD_BYTES
        relay = PlainRelay(response, self._clock, self._limits, reader=reader, copy_bytes=copy_bytes)
        relay.open()
        await _until_ready(relay)
        if relay.end is not None and relay.end.error is not None:
            raise relay.end.error
        return Reply(response.code, downward(fields), relay, self.reader)

    async def _stream(self, response: IResponse, fields: Headers) -> Reply:
        await self._refuse_what_is_no_stream(response, fields)
        relay = StreamRelay(
            response,
            self._clock,
            self._limits,
            dialect=self._operation.dialect,
            reader=self.reader,
            request_id=self._context.request_id,
            on_event=(lambda event: self._hooks.chunk(self._context, event))
            if self._hooks.want_events
            else None,
            max_event_bytes=self._patience.max_event_bytes,
        )
        relay.open()
        await _until_ready(relay, self._patience.commit_seconds, self._clock)
        self._judge_beginning(relay, fields)
        return Reply(response.code, downward(fields), relay, self.reader)

    async def _refuse_what_is_no_stream(self, response: IResponse, fields: Headers) -> None:
        content_type = (first(fields, b"content-type") or b"none").split(b";")[0].strip().lower()
        encoding = first(fields, b"content-encoding") or b"identity"
        if content_type == b"text/event-stream" and encoding.lower() == b"identity":
            return
        body = await self._body(response)
        if content_type == b"application/json" and body is not None:
            self.reader.body(body)
        what = content_type if content_type != b"text/event-stream" else encoding + b"-encoded events"
        error = NotAnEventStream(
            f"a stream was asked for and the upstream answered with {what.decode('latin-1')!r}"
        )
        # A whole answer that counts has been billed; another would be, too.
        error.final = self.reader.usage is not None
        raise error

    def _judge_beginning(self, relay: StreamRelay, fields: Headers) -> None:
        """Raise if the first event says that another attempt may do better, or if there is none."""
        said = self.reader.error if self.reader.refused else None
        try:
            if said is not None and said.status in CREDENTIAL_STATUSES:
                raise self._credential_rejected(said.type)
            if said is not None and said.status in TRANSIENT_STATUSES:
                raise self._status_error(said, self._in_dialect(said, ErrorEvent.slug, fields), fields)
            if relay.end is not None and relay.end.error is not None and not self.reader.began:
                raise BrokenBeforeFirstEvent(f"before the first event: {relay.end.error.message}")
        except UpstreamError:
            relay.stop()
            raise

    # What is not passed on at once.

    async def _not_successful(self, response: IResponse, fields: Headers) -> Reply:
        if response.code in CREDENTIAL_STATUSES:
            body = await self._body(response)
            said = self._operation.dialect.read_error(body or b"")
            raise self._credential_rejected(said.type if said else "")
        if response.code in TRANSIENT_STATUSES:
            raise self._transient(response.code, await self._body(response), fields)
        if response.code < 400:
            await self._body(response)
            raise Redirected(
                f"the upstream answered with status {response.code}, which the gateway never follows"
            )
        return await self._plain(response, fields, None)

    async def _body(self, response: IResponse) -> bytes | None:
        """Return a body that is not passed on at once, None if it broke off or is absurdly long."""
        relay = PlainRelay(response, self._clock, self._limits, reader=None, hold_bytes=ERROR_BODY_BYTES)
        relay.open()
        await _until_ready(relay, ERROR_BODY_SECONDS, self._clock)
        whole = relay.end is not None and relay.end.error is None
        relay.stop()
        return relay.held if whole else None

    # Words.

    def _credential_rejected(self, kind: str) -> CredentialRejected:
        # The upstream's message is not quoted: some repeat the key in it.
        provider = self._deployment.provider.name
        return CredentialRejected(
            f"the upstream {provider!r} refuses the gateway's own credential; tell whoever runs this gateway"
            + (f" ({kind})" if kind else "")
        )

    def _transient(self, status: int, body: bytes | None, fields: Headers) -> UpstreamStatus:
        dialect = self._operation.dialect
        if body is None:
            said = UpstreamSays(status, dialect.error_type(status), "the upstream's words for it broke off")
            return self._status_error(said, self._in_dialect(said, UpstreamStatus.slug, fields), fields)
        said = dialect.read_error(body) or UpstreamSays(status, "", "")
        return self._status_error(said, Answer(status, downward(fields), body), fields)

    def _status_error(self, said: UpstreamSays, answer: Answer, fields: Headers) -> UpstreamStatus:
        transient = first(fields, b"x-should-retry") != b"false"
        message = f"the upstream answered with status {answer.status} {said.type} {said.message}".strip()
        error = UpstreamStatus(message, answer, transient=transient)
        error.retry_after_seconds = retry_after_seconds(
            first(fields, b"retry-after-ms"), first(fields, b"retry-after"), self._clock.seconds()
        )
        return error

    def _in_dialect(self, said: UpstreamSays, slug: str, fields: Headers) -> Answer:
        """Return what an upstream said as the plain answer that it amounts to, in the gateway's own bytes."""
        own = (b"content-type", b"content-encoding")
        kept = tuple((name, value) for name, value in downward(fields) if name.lower() not in own)
        body = self._operation.dialect.error_body(
            said.status, said.type, slug, said.message, self._context.request_id
        )
        return Answer(said.status, ((b"content-type", b"application/json"), *kept), body)


@lru_cache(maxsize=64)
def _limits(idle_timeout_seconds: float, patience: Patience) -> RelayLimits:
    return RelayLimits(idle_timeout_seconds, patience.client_stall_seconds, patience.ping_seconds)


def _fields(response: IResponse) -> Headers:
    """Return a response's fields, in wire order where the response knows it."""
    raw: Headers | None = getattr(response, "raw_headers", None)
    if raw is not None:
        return raw
    return tuple((name, value) for name, values in response.headers.getAllRawHeaders() for value in values)


async def _until_ready(relay: Relay, seconds: float | None = None, clock: IReactorTime | None = None) -> None:
    """Wait until a relay knows enough, or for `seconds`; whoever stops waiting stops the relay."""
    if relay.is_ready:
        return
    ready = relay.ready
    if seconds is not None and clock is not None:
        ready = ready.addTimeout(seconds, clock)
    try:
        await ready
    except DeferredTimeoutError:
        return
    except CancelledError:
        relay.stop()
        raise
