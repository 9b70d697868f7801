"""What a doctor has to say."""

from __future__ import annotations

from typing import Literal

import attrs

Level = Literal["fine", "warning", "problem"]


@attrs.frozen
class Finding:
    """
    One thing that was looked at.

    `what` is how it is, `why` why that matters and `do` what to do about it; both are "" if it is fine.
    """

    level: Level
    what: str
    why: str = ""
    do: str = ""


def fine(what: str) -> Finding:
    """Return that something is as it should be."""
    return Finding("fine", what)


def warning(what: str, why: str, do: str) -> Finding:
    """Return that something may be meant so, and may not."""
    return Finding("warning", what, why, do)


def problem(what: str, why: str, do: str) -> Finding:
    """Return that something is wrong."""
    return Finding("problem", what, why, do)
