"""Moments as the admin API writes them."""

from __future__ import annotations

from datetime import UTC, datetime


def rfc3339(unix_seconds: float) -> str:
    """
    Return a moment as text, in UTC, to the second or as exactly as microseconds can (RFC 3339).

    Raises ValueError or OverflowError outside the years 1 to 9999.
    """
    return datetime.fromtimestamp(unix_seconds, UTC).isoformat().replace("+00:00", "Z")
