"""
Which header fields travel end to end.

Lists are open: whatever is not named here passes, so that a vendor's new header works the day it appears.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from twisted.web.http_headers import Headers as HeaderMap

from crabtwist.values import Headers

#: Fields that are about one connection only (RFC 9110, 7.6.1), or that each hop makes anew.
HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"expect",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)

#: What a client proves itself with, here or elsewhere; none of it is the upstream's business.
CREDENTIALS = frozenset({b"authorization", b"x-api-key", b"api-key", b"x-goog-api-key", b"cookie"})

#: Host and length are the next hop's own; identity is asked of the upstream because a compressed stream
#: could be neither read nor spoken into.
_REWRITTEN_UP = frozenset({b"host", b"content-length", b"accept-encoding"})

_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")

_NOT_UP = HOP_BY_HOP | CREDENTIALS | _REWRITTEN_UP
_NOT_DOWN = HOP_BY_HOP | {b"set-cookie", b"set-cookie2", b"alt-svc", b"content-length"}

#: What the gateway alone says.
_OWN = b"x-crabtwist-"


def upward(fields: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Return a client's fields that go to the upstream, names and order as they came."""
    return _without(fields, _NOT_UP)


def downward(fields: Iterable[tuple[bytes, bytes]]) -> Headers:
    """
    Return an upstream's fields that go to the client, names and order as they came.

    The length is left out: whoever sends the body knows it.
    """
    return _without(fields, _NOT_DOWN)


def written(fields: Headers) -> bytes:
    """
    Return fields as they go over the wire, without the last line's end; a line's end in one is a space.

    Raises ValueError for a name that is none (RFC 9110, 5.1).
    """
    lines = [_BEGUN[name] + value for name, value in fields]
    text = b"\r\n".join(lines)
    if text.count(b"\n") >= len(lines) or text.count(b"\r") >= len(lines):
        # Somebody's plugin, or its upstream, would otherwise say fields of its own.
        text = b"\r\n".join(b" ".join(line.splitlines()) for line in lines)
    return text


class _Begun(dict[bytes, bytes]):
    """How the line of a name begins; of so many names it is known, peers may say others."""

    MOST_NAMES = 1024

    def __missing__(self, name: bytes) -> bytes:
        if not _TOKEN.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a header field")
        begun = name + b": "
        if len(self) < self.MOST_NAMES:
            self[name] = begun
        return begun


_BEGUN = _Begun()


def header_map(fields: Headers) -> HeaderMap:
    """Return fields in a form in which Twisted looks them up."""
    by_name = HeaderMap()
    for name, value in fields:
        by_name.addRawHeader(name, value)
    return by_name


def first(fields: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """Return the first value of a field; `name` in lower case."""
    for each, value in fields:
        if each.lower() == name:
            return value
    return None


def _without(fields: Iterable[tuple[bytes, bytes]], unwanted: frozenset[bytes]) -> Headers:
    kept: list[tuple[bytes, bytes]] = []
    named: set[bytes] = set()
    for field in fields:
        lower = field[0].lower()
        if lower == b"connection":
            named.update(token.strip().lower() for token in field[1].split(b","))
        elif lower not in unwanted and not lower.startswith(_OWN):
            kept.append(field)
    if named:
        return tuple(field for field in kept if field[0].lower() not in named)
    return tuple(kept)
