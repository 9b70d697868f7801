"""
Runs the extensions.

Which extension has which hook is found out once, at start; a hook that nobody has costs one look at an
empty tuple.  A guard that crashes or hangs refuses; a watcher that does is logged by name and changes
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from difflib import get_close_matches
from inspect import iscoroutine
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.defer import TimeoutError as DeferredTimeoutError
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from crabtwist.errors import ConfigurationError, Refusal, UpstreamError
from crabtwist.extension import Extension
from crabtwist.interfaces import IExtension
from crabtwist.recording import Recording
from crabtwist.sse import Event
from crabtwist.values import AdminAction, Answer, Context, Outcome

#: How long a guard or a cache may take before it counts as crashed.
HOOK_TIMEOUT_SECONDS = 10.0

_NAMES = tuple(name for name in IExtension.names() if name.startswith("on_"))

_log = Logger()


#: One extension's hook, after the name to blame.
_Hook = tuple[str, Callable[..., Any]]


def _overridden(extension: Any, name: str) -> bool:
    method = getattr(extension, name)
    return getattr(method, "__func__", method) is not getattr(Extension, name)


def _check_names(extension: Any) -> None:
    """Refuse a method that looks like a hook and is none: a typing slip must not be silence."""
    for name in dir(extension):
        if name.startswith("on_") and name not in _NAMES:
            near = get_close_matches(name, _NAMES, 1, 0)[0]
            raise ConfigurationError(
                [f"extensions.{extension.name}: {name!r} is no hook; did you mean {near!r}?"]
            )


class Hooks:
    """The hooks of all configured extensions, in the order of the configuration."""

    def __init__(
        self, extensions: Sequence[Any], clock: IReactorTime, timeout_seconds: float = HOOK_TIMEOUT_SECONDS
    ) -> None:
        for extension in extensions:
            _check_names(extension)
        self._clock = clock
        self._timeout_seconds = timeout_seconds
        self._on_request = self._collect(extensions, "on_request")
        self._on_cache_lookup = self._collect(extensions, "on_cache_lookup")
        self._on_response = self._collect(extensions, "on_response")
        self._on_chunk = self._collect(extensions, "on_chunk")
        self._on_error = self._collect(extensions, "on_error")
        self._on_end = self._collect(extensions, "on_end")
        self._on_admin_action = self._collect(extensions, "on_admin_action")

    @staticmethod
    def _collect(extensions: Sequence[Any], name: str) -> tuple[_Hook, ...]:
        return tuple((each.name, getattr(each, name)) for each in extensions if _overridden(each, name))

    @property
    def want_answers(self) -> bool:
        """Whether plain answers have to be kept whole for somebody."""
        return bool(self._on_response)

    @property
    def want_events(self) -> bool:
        """Whether streams have to be parsed whole for somebody."""
        return bool(self._on_chunk)

    async def request(self, context: Context) -> None:
        """Ask every guard; raises the first `Refusal`."""
        for extension, call in self._on_request:
            try:
                result = call(context)
                if result is not None:
                    await self._within_time(result)
            except (CancelledError, Refusal):
                raise
            except Exception as error:
                _log.failure(
                    "{request_id}: the guard {extension} failed; the request is refused",
                    request_id=context.request_id,
                    extension=extension,
                )
                raise Refusal(
                    500,
                    "guard_failed",
                    f"the gateway's extension {extension!r} failed, so the request was not sent; "
                    "tell whoever runs this gateway",
                ) from error

    async def cached(self, context: Context, body: bytes) -> Answer | Recording | None:
        """Return the first answer that some cache has, or wants to have."""
        for extension, call in self._on_cache_lookup:
            try:
                answer = call(context, body)
                if answer is not None:
                    answer = await self._within_time(answer)
            except CancelledError:
                raise
            except Exception:
                _log.failure(
                    "{request_id}: the cache {extension} failed; going on without",
                    request_id=context.request_id,
                    extension=extension,
                )
                continue
            if answer is not None:
                return answer  # type: ignore[no-any-return] # the hook's contract
        return None

    def responded(self, context: Context, body: bytes, answer: Answer) -> None:
        """Show a whole plain answer to its watchers."""
        self._tell(self._on_response, context, body, answer)

    def chunk(self, context: Context, event: Event) -> None:
        """Show one event to its watchers."""
        self._tell(self._on_chunk, context, event)

    def failed(self, context: Context, error: UpstreamError) -> None:
        """Show a failed attempt or a broken stream to its watchers."""
        self._tell(self._on_error, context, error)

    def ended(self, context: Context, outcome: Outcome) -> None:
        """Show the outcome to its watchers."""
        self._tell(self._on_end, context, outcome)

    def administered(self, action: AdminAction) -> None:
        """Show what was done to the gateway itself to its watchers."""
        self._tell(self._on_admin_action, action)

    async def _within_time(self, result: Any) -> Any:
        if iscoroutine(result):
            result = Deferred.fromCoroutine(result)
        if not isinstance(result, Deferred):
            return result
        return await result.addTimeout(self._timeout_seconds, self._clock, _timed_out)

    def _tell(self, hooks: tuple[_Hook, ...], subject: Context | AdminAction, *args: object) -> None:
        for extension, call in hooks:
            try:
                result = call(subject, *args)
            except Exception:
                _crashed(extension, subject, Failure())
                continue
            if result is not None:
                _watch(extension, subject, result)


def _timed_out(_result: object, timeout_seconds: float) -> Any:
    raise DeferredTimeoutError(f"no answer within {timeout_seconds} seconds")


def _watch(
    extension: str, subject: Context | AdminAction, result: Deferred[Any] | Coroutine[Any, Any, Any]
) -> None:
    """Log what a watcher's Deferred fails with; nothing waits for it."""
    deferred = Deferred.fromCoroutine(result) if iscoroutine(result) else result
    if isinstance(deferred, Deferred):
        deferred.addErrback(lambda failure: _crashed(extension, subject, failure))


def _crashed(extension: str, subject: Context | AdminAction, failure: Failure) -> None:
    request_id = subject.request_id if isinstance(subject, Context) else None
    _log.failure(
        "{subject}: the extension {extension} failed",
        failure,
        subject=subject.action if isinstance(subject, AdminAction) else request_id,
        request_id=request_id,
        extension=extension,
    )
