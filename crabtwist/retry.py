"""May this failure be tried again, where, and when."""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from random import Random

from crabtwist.errors import UpstreamError
from crabtwist.routing import Deployment

#: Statuses that another attempt may turn into an answer: timeouts, conflicts, limits, overload, and what
#: reverse proxies make of a dead origin (520 to 524 are Cloudflare's, 529 Anthropic's).
TRANSIENT_STATUSES = frozenset(
    {408, 409, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529},
)

#: Statuses by which an upstream refuses the gateway's own credential.
CREDENTIAL_STATUSES = frozenset({401, 403})

#: The first wait before asking the same deployment again; it doubles up to the second.
FIRST_BACKOFF_SECONDS = 0.25
LONGEST_BACKOFF_SECONDS = 8.0


def delay_before_retry(
    deployment: Deployment, tries: int, elapsed_seconds: float, error: UpstreamError, random: Random
) -> float | None:
    """
    Return the seconds to wait before asking the same deployment again, None to go to the next one.

    `tries` counts the attempts made at it, `elapsed_seconds` runs since the first of them.  The wait is
    drawn from the upper half of an exponential back-off, and is never shorter than the upstream's own
    `Retry-After`.
    """
    if not error.transient or tries > deployment.max_retries:
        return None
    longest = min(FIRST_BACKOFF_SECONDS * 2 ** (tries - 1), LONGEST_BACKOFF_SECONDS)
    delay = max(random.uniform(longest / 2, longest), error.retry_after_seconds or 0.0)
    if elapsed_seconds + delay > deployment.retry_deadline_seconds:
        return None
    return delay


def retry_after_seconds(retry_after_ms: bytes | None, retry_after: bytes | None, now: float) -> float | None:
    """
    Return how long an upstream asks to wait, None if it does not say, or says nonsense.

    `retry-after-ms` is OpenAI's and wins; `Retry-After` is seconds or an HTTP date (RFC 9110, 10.2.3),
    measured against `now`, Unix time in seconds.
    """
    milliseconds = _number(retry_after_ms)
    if milliseconds is not None:
        return milliseconds / 1000
    seconds = _number(retry_after)
    return seconds if seconds is not None else _until(retry_after, now)


def _number(text: bytes | None) -> float | None:
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value < float("inf") else None


def _until(text: bytes | None, now: float) -> float | None:
    if text is None:
        return None
    try:
        date = parsedate_to_datetime(text.decode("ascii"))
    except (ValueError, OverflowError):
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.fromtimestamp(now, UTC)).total_seconds())
