"""
What can go wrong, named by whose fault it is and by what may be done next.

Two families.  A `Refusal` is the gateway's own answer: the caller asked for something that it will not
or cannot do, and the words in it are for the caller.  An `UpstreamError` is one attempt that failed;
the gateway decides whether another attempt may help, and only the last one is put into words.
"""

from __future__ import annotations

from collections.abc import Mapping

from crabtwist.values import Answer, Headers


class CrabtwistError(Exception):
    """The root of everything that this package raises on purpose."""


class ConfigurationError(CrabtwistError):
    """
    The configuration cannot be served; nothing was started.

    `complaints` holds every fault found, one line each, with the path of the key it is about.
    """

    def __init__(self, complaints: list[str]) -> None:
        super().__init__("\n".join(complaints))
        self.complaints = complaints


class StorageError(CrabtwistError):
    """
    A store cannot do what it was asked to: out of reach, too slow, closed, or not ours.

    The words never hold a password, a key or a value.  An increment that failed on its way may have been
    counted or not; a value that was being set may be the old one or the new one.
    """


class RecordRefused(StorageError):
    """
    A ledger cannot hold what it was given, now or later: the data is at fault, and not the ledger.

    Raised for a list of records when one of them is; given alone, the others are taken.
    """


class Refusal(CrabtwistError):
    """
    An answer that the gateway makes itself.

    `status` is the HTTP status (400 to 599).  `slug` is a stable word for programs, sent as
    `x-crabtwist-error`.  `type` is the dialect's own error type; None means the dialect's usual one for
    the status.  `message` is for people: what was wrong, and what to do.  `headers` are sent with it.
    """

    def __init__(
        self,
        status: int,
        slug: str,
        message: str,
        *,
        type: str | None = None,  # noqa: A002 - the field's name on the wire
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.slug = slug
        self.type = type
        self.message = message
        self.headers = dict(headers or {})

    @property
    def fields(self) -> Headers:
        """`headers` as they are sent."""
        return tuple((name.encode(), value.encode()) for name, value in self.headers.items())


class Refused(Refusal):
    """
    Raised by an extension's `on_request` to end a request before any upstream is called.

    `type` may be the caller's dialect's error type, or None for the usual one of the status.
    """

    def __init__(
        self,
        status: int,
        type: str | None,  # noqa: A002 - the field's name on the wire
        message: str,
        headers: Mapping[str, str] | None = None,
        *,
        slug: str = "refused",
    ) -> None:
        super().__init__(status, slug, message, type=type, headers=headers)


def internal_error() -> Refusal:
    """Return the refusal that stands for a fault of the gateway's own."""
    return Refusal(500, "internal_error", "the gateway failed; its log says why")


class UpstreamError(CrabtwistError):
    """
    One attempt at a deployment failed.

    `slug` names the fault, `status` is what a client is told when no other attempt helps, `transient`
    says whether the same deployment may be asked again, and `final` whether no deployment may: the
    upstream has done the work, and would bill it twice.  `answer` is the upstream's own answer, where
    there was one that the client should see, and `fidelity` says how its request had been sent.
    """

    slug = "upstream_error"
    status = 502
    transient = True
    final = False
    answer: Answer | None = None
    fidelity: bytes = b"verbatim"
    retry_after_seconds: float | None = None

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConnectFailed(UpstreamError):
    """No connection: refused, unreachable, name unknown, TLS not verified."""

    slug = "connect_failed"


class ConnectTimedOut(ConnectFailed):
    """No connection within `connect_timeout`."""

    slug = "connect_timeout"
    status = 504


class NoConnectionFree(UpstreamError):
    """Every connection that `max_connections` allows was busy for the whole wait."""

    slug = "no_connection_free"
    status = 503


class HeadTimedOut(UpstreamError):
    """The upstream took the request and sent no response head within `timeout`."""

    slug = "head_timeout"
    status = 504


class ConnectionBroken(UpstreamError):
    """The connection ended, or spoke no HTTP, before the response was whole."""

    slug = "connection_broken"


class NotAnEventStream(UpstreamError):
    """A stream was asked for and the upstream answered 200 with something else."""

    slug = "not_an_event_stream"


class BrokenBeforeFirstEvent(UpstreamError):
    """A stream's head came, and no usable first event after it."""

    slug = "broken_before_first_event"


class Redirected(UpstreamError):
    """The upstream answered with a redirect; the gateway follows none, and passes none on."""

    slug = "upstream_redirected"
    transient = False


class UpstreamStatus(UpstreamError):
    """The upstream answered with a status, or a first event, that another attempt may better."""

    slug = "upstream_status"

    def __init__(self, message: str, answer: Answer, *, transient: bool = True) -> None:
        super().__init__(message)
        self.answer = answer
        self.status = answer.status
        self.transient = transient


class CredentialRejected(UpstreamError):
    """
    The upstream refused the gateway's own credential (401 or 403).

    Asking again is useless; another deployment may have a better one.  Never passed on as a 401, which
    would blame the client's key.
    """

    slug = "upstream_credential_rejected"
    transient = False


class CredentialMisdirected(UpstreamError):
    """A credential was about to be sent to a host that it does not belong to; nothing was sent."""

    slug = "credential_misdirected"
    transient = False


class AnswerBroken(UpstreamError):
    """The answer broke after its head: the work may have been done, so it is not asked for again."""

    slug = "connection_broken"
    transient = False
    final = True


class Truncated(AnswerBroken):
    """A stream ended without the event that ends a whole one."""

    slug = "truncated"


class IdleTimedOut(AnswerBroken):
    """The upstream sent nothing for `idle_timeout`."""

    slug = "idle_timeout"
    status = 504


class ErrorEvent(AnswerBroken):
    """The upstream itself said, in mid-stream, that it failed."""

    slug = "upstream_error_event"


class ShuttingDown(UpstreamError):
    """The gateway is being stopped, and the answer took longer than it may."""

    slug = "shutting_down"
    status = 503
    final = True
