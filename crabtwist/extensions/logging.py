"""
The `logging` extension: one structured line for each request.

The lines go through twisted.logger, or, where `path` is set, as JSON into a file of their own, which is
cheaper: they are not formatted for people, and many of them are one write.
"""

from __future__ import annotations

from time import time
from typing import Any

import attrs
from twisted.application.service import Service
from twisted.logger import LogEvent, Logger, LogLevel

from crabtwist.errors import ConfigurationError, UpstreamError
from crabtwist.extension import Extension
from crabtwist.extensions.audit_trail import Trail
from crabtwist.extensions.logging_file import CollectedLines, attempt_line, request_line
from crabtwist.extensions.rotating_file import RotatingFile
from crabtwist.money import in_dollars
from crabtwist.settings import not_blank, not_negative, positive
from crabtwist.values import Context, Outcome, Usage

_MAX_BYTES = 100_000_000
_KEEP_FILES = 10
_NO_USAGE = Usage()


@attrs.frozen
class LoggingSettings:
    """
    With `attempts` each failed attempt has a line of its own too.

    `path`, which begins at the configuration's folder, is the file for the lines; None gives them to
    twisted.logger.  `max_bytes` is the size of one file, and `keep_files` how many full ones are kept.
    """

    attempts: bool = True
    path: str | None = attrs.field(default=None, validator=attrs.validators.optional(not_blank))
    max_bytes: int = attrs.field(default=_MAX_BYTES, validator=positive)
    keep_files: int = attrs.field(default=_KEEP_FILES, validator=not_negative)

    def __attrs_post_init__(self) -> None:
        """Raise ValueError for a file's bounds without a file."""
        if self.path is None and (self.max_bytes, self.keep_files) != (_MAX_BYTES, _KEEP_FILES):
            raise ValueError("`max_bytes` and `keep_files` need `path`: without it there is no file")


class LoggingExtension(Extension, Service):
    """Logs how each request ended, and what went wrong on the way."""

    name = "logging"
    Settings = LoggingSettings

    _log = Logger()

    def __init__(self, settings: LoggingSettings, services: Any) -> None:
        self._attempts = settings.attempts
        #: Bound once: asked for by name, a logger is made anew each time.
        self._logger = self._log
        self._seconds = services.clock.seconds
        self._lines: CollectedLines | None = None
        if settings.path is not None:
            self._path = services.directory / settings.path
            self._lines = self._collected(settings, services)

    def _collected(self, settings: LoggingSettings, services: Any) -> CollectedLines:
        file = RotatingFile(self._path, settings.max_bytes, settings.keep_files)
        trail = Trail(file, services.clock, "the log of requests")
        services.show("logging_failures", "Writes of lines that failed.", lambda: trail.failures)
        services.show("logging_lost", "Lines that were never written.", lambda: trail.lost)
        return CollectedLines(trail, services.clock)

    def startService(self) -> None:
        """Open the file, if there is to be one.  Raises `ConfigurationError` when it cannot be."""
        try:
            if self._lines is not None:
                self._lines.open()
        except OSError as error:
            raise ConfigurationError(
                [f"extensions.logging.path: {self._path} cannot be opened: {error.strerror}"]
            ) from error
        super().startService()

    def stopService(self) -> None:
        """Write what waits, and close the file."""
        super().stopService()
        if self._lines is not None:
            self._lines.close()

    def on_error(self, context: Context, error: UpstreamError) -> None:
        """Log one failed attempt."""
        if not self._attempts:
            return
        if self._lines is None:
            self._logger.warn(
                "{request_id} {provider}/{upstream_model} failed: {error} {detail!r}",
                request_id=context.request_id,
                provider=context.provider,
                upstream_model=context.upstream_model,
                error=error.slug,
                detail=error.message,
            )
        else:
            self._lines.add(attempt_line(context, error, self._seconds()))

    def on_end(self, context: Context, outcome: Outcome) -> None:
        """Log how it ended."""
        if self._lines is None:
            self._logger.observer(self._event(context, outcome))
        else:
            self._lines.add(request_line(context, outcome, self._seconds()))

    def _event(self, context: Context, outcome: Outcome) -> LogEvent:
        """
        Return the event, with the same members of its own that `Logger.emit` adds.

        Made here, for `emit` sorts all levels for each event, and copies its fields twice.
        """
        usage = outcome.usage or _NO_USAGE
        request_id, operation, model = context.request_id, context.operation, context.model_asked
        provider, principal = context.provider or "nobody", context.principal or "anybody"
        status, reason = outcome.status, outcome.reason
        duration_ms = round(outcome.duration_seconds * 1000)
        prompt_tokens, completion_tokens = usage.prompt_tokens, usage.completion_tokens
        return {
            "log_logger": self._logger,
            "log_level": LogLevel.info if reason == "complete" else LogLevel.warn,
            "log_namespace": self._logger.namespace,
            "log_source": self,
            # Putting together a line of thirteen fields is dearer in a log observer than here.
            "log_format": "{line}",
            "log_time": time(),
            "line": f"{request_id} {operation} {model!r} by {provider} for {principal}: {status} {reason} in "
            f"{duration_ms} ms, {prompt_tokens} + {completion_tokens} tokens",
            "request_id": request_id,
            "operation": operation,
            "model": model,
            "model_resolved": context.model,
            "provider": provider,
            "upstream_model": context.upstream_model,
            "principal": principal,
            "stream": context.stream,
            "status": status,
            "ended_by": outcome.ended_by,
            "reason": reason,
            "detail": outcome.message,
            "attempts": len(outcome.attempts),
            "duration_ms": duration_ms,
            "first_byte_ms": _milliseconds(outcome.first_byte_seconds),
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "cost": None if outcome.cost is None else in_dollars(outcome.cost),
            "bytes_in": outcome.bytes_in,
            "bytes_out": outcome.bytes_out,
        }


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1000)
