"""
The `audit` extension: who did what when, one line of JSON for each request and each admin action.

With `bodies` it also keeps what was asked and answered, without what must not be written down.
"""

from __future__ import annotations

from typing import Any, Literal

import attrs
import msgspec
from twisted.application.service import Service

from crabtwist.errors import ConfigurationError, Refused, UpstreamError
from crabtwist.extension import Extension
from crabtwist.extensions.audit_trail import Trail, time_of, whole_text
from crabtwist.extensions.redaction import Redactor, fault_in_pattern, without_credentials
from crabtwist.extensions.rotating_file import RotatingFile
from crabtwist.money import in_dollars
from crabtwist.records import LONGEST_TEXT
from crabtwist.settings import not_blank, not_negative, positive
from crabtwist.sse import Event
from crabtwist.values import AdminAction, Answer, Context, Outcome, Usage

#: What clients are told where nothing goes unrecorded; disks are seldom emptied faster.
RETRY_AFTER_SECONDS = 5

#: What all open requests together may have kept of their bodies.
MOST_KEPT_BYTES = 64 * 2**20


def _patterns(_instance: object, _attribute: object, value: tuple[str, ...]) -> None:
    for number, pattern in enumerate(value):
        fault = fault_in_pattern(pattern)
        if fault:
            raise ValueError(f"[{number}] is no regular expression: {fault}")


@attrs.frozen(kw_only=True)
class AuditSettings:
    """
    Where the lines go, what is in them, and what happens while they cannot be written.

    `path` begins at the configuration's folder.  `max_bytes` is the size of one file, and `keep_files` how
    many full ones are kept beside it.  `max_body_bytes` is where a body is cut, `redact` what is taken out
    of bodies beside credentials.
    """

    path: str = attrs.field(default="crabtwist-audit.jsonl", validator=not_blank)
    max_bytes: int = attrs.field(default=100_000_000, validator=positive)
    keep_files: int = attrs.field(default=10, validator=not_negative)
    on_failure: Literal["log", "refuse"] = "log"
    bodies: bool = False
    max_body_bytes: int = attrs.field(default=65536, validator=positive)
    redact: tuple[str, ...] = attrs.field(default=(), validator=_patterns)


# --- lines -------------------------------------------------------------------------------------------


class TokensLine(msgspec.Struct):
    """Tokens by class; see `crabtwist.values.Usage`."""

    input: int
    cache_read: int
    cache_write: int
    cache_write_1h: int
    output: int
    reasoning: int


class RequestLine(msgspec.Struct, tag_field="event", tag="request"):
    """How a request ended; see `crabtwist.values.Outcome`.  `time` is that of its start."""

    time: str
    request_id: str
    principal: str | None
    operation: str
    dialect: str
    model_asked: str
    model: str
    model_answered: str | None
    provider: str | None
    stream: bool
    status: int
    ended_by: str
    reason: str
    duration_ms: int
    tokens: TokensLine | None
    cost_usd: str | None
    cache_hit: bool


class BodiesLine(msgspec.Struct):
    """What was asked and answered, None where there is nothing; whether that is all."""

    request: str | None = None
    request_cut: bool = False
    answer: str | None = None
    answer_cut: bool = False


class _WithBodies(RequestLine, tag_field="event", tag="request"):
    bodies: BodiesLine


class AdminLine(msgspec.Struct, tag_field="event", tag="admin"):
    """What was done to the gateway; see `crabtwist.values.AdminAction`."""

    time: str
    actor: str
    action: str
    target: str
    outcome: str
    detail: str


_encode = msgspec.json.Encoder().encode


def _kept(text: str) -> str:
    # Peers choose these texts, and half a surrogate pair is no UTF-8.
    return text if text.isascii() and len(text) <= LONGEST_TEXT else whole_text(text[:LONGEST_TEXT])


def _tokens(usage: Usage) -> TokensLine:
    return TokensLine(
        usage.input_tokens,
        usage.cache_read_tokens,
        usage.cache_write_tokens,
        usage.cache_write_1h_tokens,
        usage.output_tokens,
        usage.reasoning_tokens,
    )


def _what_ended(context: Context, outcome: Outcome) -> tuple[Any, ...]:
    """Return the members of a request's line, in their order."""
    answered, usage, cost = outcome.model_answered, outcome.usage, outcome.cost
    return (
        time_of(context.started_at),
        context.request_id,
        context.principal,
        context.operation,
        context.dialect,
        _kept(context.model_asked),
        _kept(context.model),
        None if answered is None else _kept(answered),
        context.provider or None,
        context.stream,
        outcome.status,
        outcome.ended_by,
        outcome.reason,
        round(outcome.duration_seconds * 1000),
        None if usage is None else _tokens(usage),
        None if cost is None else in_dollars(cost).removeprefix("$"),
        outcome.cache_hit,
    )


# --- extensions --------------------------------------------------------------------------------------


class AuditExtension(Extension, Service):
    """Writes a line for each request when it has ended, and for each admin action; no bodies."""

    name = "audit"
    Settings = AuditSettings

    def __init__(self, settings: AuditSettings, services: Any) -> None:
        self._path = services.directory / settings.path
        self._refuses = settings.on_failure == "refuse"
        self.trail = Trail(RotatingFile(self._path, settings.max_bytes, settings.keep_files), services.clock)
        services.show(
            "audit_failures", "Lines that could not be written at once.", lambda: self.trail.failures
        )
        services.show("audit_lost", "Lines that were never written.", lambda: self.trail.lost)

    def startService(self) -> None:
        """Open the file.  Raises `ConfigurationError` when it cannot be."""
        try:
            self.trail.open()
        except OSError as error:
            raise ConfigurationError(
                [f"extensions.audit.path: {self._path} cannot be opened: {error.strerror}"]
            ) from error
        super().startService()

    def stopService(self) -> None:
        """Close the file."""
        super().stopService()
        self.trail.close()

    def on_request(self, _context: Context) -> None:
        """Let nothing happen that cannot be written down, if that is what is asked for."""
        if self._refuses and not self.trail.works():
            raise Refused(
                503,
                None,
                "the gateway cannot write its audit, and does nothing unrecorded; tell whoever runs it",
                {"retry-after": str(RETRY_AFTER_SECONDS)},
                slug="audit_unavailable",
            )

    def on_end(self, context: Context, outcome: Outcome) -> None:
        """Write how it ended."""
        self.trail.write(_encode(RequestLine(*_what_ended(context, outcome))) + b"\n")

    def on_admin_action(self, action: AdminAction) -> None:
        """Write what was done to the gateway."""
        # Somebody may have sent a secret where a name should be.
        target, detail = without_credentials(action.target), without_credentials(action.detail)
        words = (action.actor, action.action, target, action.outcome, detail)
        self.trail.write(_encode(AdminLine(time_of(action.at), *map(_kept, words))) + b"\n")


class _Part:
    """The beginning of a body, as it came, and how long the body is."""

    __slots__ = ("data", "size_bytes")

    def __init__(self) -> None:
        self.data = bytearray()
        self.size_bytes = 0


class _Seen:
    """What there is of one request's bodies."""

    __slots__ = ("answer", "request")

    def __init__(self) -> None:
        self.request: _Part | None = None
        self.answer: _Part | None = None


class BodiesExtension(AuditExtension):
    """
    Writes the bodies too: the request's, a plain answer's, and the data of a stream's events, each a line.

    A class of its own, for its hooks make the gateway keep answers and read every event.  `kept_bytes` is
    what it holds for the requests that are open.
    """

    def __init__(self, settings: AuditSettings, services: Any) -> None:
        super().__init__(settings, services)
        self.kept_bytes = 0
        self._redact = Redactor(settings.redact, settings.max_body_bytes)
        self._seen: dict[str, _Seen] = {}

    def on_cache_lookup(self, context: Context, body: bytes) -> None:
        """Keep what is asked."""
        part = self._of(context).request = _Part()
        self._add(part, body)

    def on_response(self, context: Context, _body: bytes, response: Answer) -> None:
        """Keep a plain answer."""
        part = self._of(context).answer = _Part()
        self._add(part, response.body)

    def on_chunk(self, context: Context, event: Event) -> None:
        """Keep the data of an event."""
        seen = self._of(context)
        if seen.answer is None:
            seen.answer = _Part()
        self._add(seen.answer, event.data)
        self._add(seen.answer, b"\n")

    def on_error(self, context: Context, error: UpstreamError) -> None:
        """Forget what an attempt began with that was given up; what was passed on has been said."""
        seen = self._seen.get(context.request_id)
        if seen is not None and seen.answer is not None and not error.final:
            self.kept_bytes -= len(seen.answer.data)
            seen.answer = None

    def on_end(self, context: Context, outcome: Outcome) -> None:
        """Write how it ended, and forget it."""
        seen = self._seen.pop(context.request_id, None) or _Seen()
        request, request_cut = self._written(seen.request)
        answer, answer_cut = self._written(seen.answer)
        bodies = BodiesLine(request, request_cut, answer, answer_cut)
        members = (*_what_ended(context, outcome), bodies)
        self.trail.write(_encode(_WithBodies(*members)) + b"\n")

    def _of(self, context: Context) -> _Seen:
        seen = self._seen.get(context.request_id)
        if seen is None:
            seen = self._seen[context.request_id] = _Seen()
        return seen

    def _add(self, part: _Part, data: bytes) -> None:
        """Keep as much of it as is looked at in the end, and as there is room for."""
        part.size_bytes += len(data)
        room = min(self._redact.wanted_bytes - len(part.data), MOST_KEPT_BYTES - self.kept_bytes)
        if room > 0:
            kept = data[:room]
            part.data += kept
            self.kept_bytes += len(kept)

    def _written(self, part: _Part | None) -> tuple[str | None, bool]:
        if part is None:
            return None, False
        self.kept_bytes -= len(part.data)
        return self._redact(bytes(part.data), part.size_bytes)


class _Choice:
    """What the maker calls: which of the two it is."""

    Settings = AuditSettings

    def __call__(self, settings: AuditSettings, services: Any) -> AuditExtension:
        return (BodiesExtension if settings.bodies else AuditExtension)(settings, services)


audit = _Choice()
