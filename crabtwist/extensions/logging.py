"""The `logging` extension: one structured line for each request."""

from __future__ import annotations

from typing import Any

import attrs
from twisted.logger import Logger

from crabtwist.errors import UpstreamError
from crabtwist.extension import Extension
from crabtwist.money import in_dollars
from crabtwist.values import Context, Outcome, Usage


@attrs.frozen
class LoggingSettings:
    """With `attempts` each failed attempt has a line of its own too."""

    attempts: bool = True


class LoggingExtension(Extension):
    """Logs how each request ended, and what went wrong on the way."""

    name = "logging"
    Settings = LoggingSettings

    _log = Logger()

    def __init__(self, settings: LoggingSettings, _services: Any) -> None:
        self._attempts = settings.attempts

    def on_error(self, context: Context, error: UpstreamError) -> None:
        """Log one failed attempt."""
        if self._attempts:
            self._log.warn(
                "{request_id} {provider}/{upstream_model} failed: {error} {detail!r}",
                request_id=context.request_id,
                provider=context.provider,
                upstream_model=context.upstream_model,
                error=error.slug,
                detail=error.message,
            )

    def on_end(self, context: Context, outcome: Outcome) -> None:
        """Log how it ended."""
        usage = outcome.usage or Usage()
        emit = self._log.info if outcome.reason == "complete" else self._log.warn
        duration_ms = round(outcome.duration_seconds * 1000)
        emit(
            # Putting together a line of thirteen fields is dearer in a log observer than here.
            "{line}",
            line=f"{context.request_id} {context.operation} {context.model_asked!r} "
            f"by {context.provider or 'nobody'} for {context.principal or 'anybody'}: {outcome.status} "
            f"{outcome.reason} in {duration_ms} ms, {usage.prompt_tokens} + {usage.completion_tokens} tokens",
            request_id=context.request_id,
            operation=context.operation,
            model=context.model_asked,
            model_resolved=context.model,
            provider=context.provider or "nobody",
            upstream_model=context.upstream_model,
            principal=context.principal or "anybody",
            stream=context.stream,
            status=outcome.status,
            ended_by=outcome.ended_by,
            reason=outcome.reason,
            detail=outcome.message,
            attempts=len(outcome.attempts),
            duration_ms=duration_ms,
            first_byte_ms=_milliseconds(outcome.first_byte_seconds),
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cost=None if outcome.cost is None else in_dollars(outcome.cost),
            bytes_in=outcome.bytes_in,
            bytes_out=outcome.bytes_out,
        )


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1000)
