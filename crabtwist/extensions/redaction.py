"""
Takes out of a text what must not be written down.

What looks like a credential always goes; whoever runs the gateway adds patterns of his own.  Python's
patterns can take time that grows with the square of the text and worse, and nothing can stop one, so
these are applied to a piece of the text at a time, and the text ends where their time is used up.  The
built-in ones need time in proportion to the text.
"""

from __future__ import annotations

import re
from codecs import getincrementaldecoder
from collections.abc import Callable, Sequence
from time import perf_counter

REDACTED = "[redacted]"

#: What is looked at beyond the cut, so that a secret across it is known for one.
LOOK_AHEAD_BYTES = 1024

#: The own patterns see this much at once, in characters, ...
PIECE_CHARACTERS = 4096
#: ... and so much of what follows: a longer match may be missed across the end of a piece.
OVERLAP_CHARACTERS = 1024

#: What the own patterns may take for one text.
BUDGET_SECONDS = 0.05

#: Stands for each character that goes.  JSON has none, and other texts lose nothing by it.
_MASK = "\0"
_MASKED = re.compile("\0+")

# A word begins after anything that is no part of one, and after an escape in a JSON string.
_BEGINS = r"(?:(?<![A-Za-z0-9_-])|(?<=\\[nrtbf])|(?<=\\u[0-9A-Fa-f]{4}))"
_NAMES = (
    r"api[_-]?key|secret[_-]?(?:access[_-]?)?key|(?:access|auth)[_-]?token|client[_-]?secret|passw(?:or)?d"
)
_QUOTES = r"[\\\"']{0,4}"
_BASIC = rf"authorization{_QUOTES}\s{{0,4}}:\s{{0,4}}{_QUOTES}basic"
_PRIVATE_KEY = r"[A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"

#: What looks like a credential, each beside the words of which one must be there, in lower case.  Where
#: there is a group, only that goes.
_CREDENTIALS = tuple(
    (words, re.compile(pattern))
    for words, pattern in (
        (("sk-",), r"(?:(?<![A-Za-z0-9])|(?<=\\[nrtbf])|(?<=\\u[0-9A-Fa-f]{4}))sk-[A-Za-z0-9_-]{16,}"),
        (("ct-admin-",), r"ct-admin-[A-Za-z0-9_-]{16,}"),
        (("bearer", "basic"), rf"(?i:bearer|{_BASIC})\s{{1,4}}([A-Za-z0-9._~+/=-]{{16,}})"),
        (
            ("key", "token", "secret", "passw"),
            rf"(?i:{_NAMES}){_QUOTES}\s{{0,4}}[:=]\s{{0,4}}{_QUOTES}([^\s\"'\\,;&]{{6,}})",
        ),
        (("akia", "asia"), r"(?:AKIA|ASIA)[A-Z0-9]{16}"),
        (("aiza",), r"AIza[A-Za-z0-9_-]{35}"),
        (("ghp_", "gho_", "ghu_", "ghs_", "ghr_"), r"gh[pousr]_[A-Za-z0-9]{36,}"),
        (("github_pat_",), r"github_pat_[A-Za-z0-9_]{22,}"),
        (("xox",), r"xox[a-z]-[A-Za-z0-9-]{10,}"),
        # Only from a word's beginning: from each `eyJ` within one, time would grow with the square.
        (("eyj",), _BEGINS + r"eyJ[A-Za-z0-9_-]{8,}+\.eyJ[A-Za-z0-9_-]{8,}+\.[A-Za-z0-9_-]+"),
        (("private key",), rf"(?s:-----BEGIN {_PRIVATE_KEY}.*?(?:-----END {_PRIVATE_KEY}|\Z))"),
    )
)


def fault_in_pattern(pattern: str) -> str | None:
    """Return why something is no regular expression, None if it is one."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return str(error)
    return None


class Redactor:
    """
    Makes a text that may be written down out of a body.

    `patterns` are regular expressions beside the built-in ones, `max_bytes` is where a body is cut, and
    `seconds` tells the time that patterns take.
    """

    def __init__(
        self, patterns: Sequence[str], max_bytes: int, seconds: Callable[[], float] = perf_counter
    ) -> None:
        self._own = tuple(re.compile(pattern) for pattern in patterns)
        self._max_bytes = max_bytes
        self._seconds = seconds

    @property
    def wanted_bytes(self) -> int:
        """How much of a body's beginning is looked at: what is written down, and a little more."""
        return self._max_bytes + LOOK_AHEAD_BYTES

    def __call__(self, body: bytes, size_bytes: int) -> tuple[str, bool]:
        """
        Return what may be written down, and whether the body has more than that.

        `body` is its beginning, `wanted_bytes` of it if there is so much, and `size_bytes` the size of the
        whole.  One that is no UTF-8, a sound or a picture, is told by its size alone.
        """
        whole = len(body) >= size_bytes
        end = min(self._max_bytes, len(body) if whole else max(0, len(body) - LOOK_AHEAD_BYTES))
        try:
            text, kept = _decoded(body), len(_decoded(body[:end]))
        except UnicodeDecodeError:
            return f"[{size_bytes} bytes that are no text]", True
        # Masks are as long as what they stand for, so the place of the cut stays where it is.
        masked, seen = self._without_own(_without_credentials(text))
        shown = _MASKED.sub(REDACTED, masked[: min(kept, seen)])
        return shown, end < size_bytes or seen < kept

    def _without_own(self, text: str) -> tuple[str, int]:
        """Return the text with what the own patterns find masked, and up to where they have looked."""
        if not self._own:
            return text, len(text)
        until = self._seconds() + BUDGET_SECONDS
        for start in range(0, len(text), PIECE_CHARACTERS):
            if self._seconds() > until:
                return text, start
            end = start + PIECE_CHARACTERS + OVERLAP_CHARACTERS
            for pattern in self._own:
                text = _mask(pattern, 0, text, start, end)
        return text, len(text)


def without_credentials(text: str) -> str:
    """Return a short text with `REDACTED` for what looks like a credential."""
    return _MASKED.sub(REDACTED, _without_credentials(text))


def _decoded(data: bytes) -> str:
    # A character that is cut at the end is no fault of the text's.
    return getincrementaldecoder("utf-8")().decode(data)


def _without_credentials(text: str) -> str:
    lower = text.lower()
    for words, pattern in _CREDENTIALS:
        if any(word in lower for word in words):
            text = _mask(pattern, pattern.groups, text, 0, len(text))
    return text


def _mask(pattern: re.Pattern[str], group: int, text: str, start: int, end: int) -> str:
    """Return `text` with what a pattern's group finds from `start` to `end` masked."""
    spans = [match.span(group) for match in pattern.finditer(text, start, end)]
    if not spans:
        return text
    parts, position = [], 0
    for first, last in spans:
        parts += [text[position:first], _MASK * (last - first)]
        position = last
    return "".join([*parts, text[position:]])
