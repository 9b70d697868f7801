"""
Which deployments keep failing, and until when to leave them alone.

Told the time, never asks for it.
"""

from __future__ import annotations

import attrs

#: An upstream that asks for a longer rest than this many cool-downs is not believed.
MOST_COOLDOWNS = 10


@attrs.define
class _Record:
    failures: int = 0
    cool_until: float = 0.0


class Health:
    """
    Cool-downs: a deployment that fails `failures` times in a row is asked last for `seconds`.

    Asked *last*, not never: when all are cooling, one of them still is the best there is.  After the
    cool-down one more failure starts it again, one success forgets everything.  `now` is in seconds of any
    monotonic clock, the same throughout.
    """

    def __init__(self, *, failures: int = 3, seconds: float = 30.0) -> None:
        self._failures = failures
        self._seconds = seconds
        self._records: dict[str, _Record] = {}

    def failed(self, deployment: str, now: float, retry_after_seconds: float | None = None) -> None:
        """Count a failure; a rest that the upstream asked for (`Retry-After`) prolongs the cool-down."""
        record = self._records.setdefault(deployment, _Record())
        record.failures += 1
        if record.failures >= self._failures:
            wait = min(retry_after_seconds or 0.0, MOST_COOLDOWNS * self._seconds)
            record.cool_until = now + max(self._seconds, wait)

    def succeeded(self, deployment: str) -> None:
        """Forget the deployment's failures."""
        self._records.pop(deployment, None)

    def cool_until(self, deployment: str, now: float) -> float:
        """Return when its cool-down ends; 0.0 if it is not cooling."""
        record = self._records.get(deployment)
        return record.cool_until if record is not None and record.cool_until > now else 0.0
