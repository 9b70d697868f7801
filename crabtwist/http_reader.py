"""
One client's requests as they are read: heads and bodies, judged by llhttp byte by byte; no I/O.

llhttp is never fed past the end of a head or of a body, so what belongs to which request is decided here
and only once.  Whatever two servers could read differently is refused (RFC 9112, section 11.2).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import attrs
from httptools import HttpParserError, HttpParserInvalidMethodError, HttpParserUpgrade, HttpRequestParser

from crabtwist.errors import Refusal
from crabtwist.values import Headers

METHODS = (b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS")

_REQUEST_LINE = re.compile(rb"([^ ]+) ([^ ]+) HTTP/([0-9]\.[0-9])\r\n")
_METHOD_AND_PATH = re.compile(rb"([A-Z-]+)(?: (/[^ ?\r\n]*)?|\Z)")
_TARGET = re.compile(rb"/[!\"$-~]*")
#: What lines are made of: neither their ends nor any other control character.
_PLAIN = bytes(byte for byte in range(256) if byte == 0x09 or (byte >= 0x20 and byte != 0x7F))
_HOST = re.compile(
    rb"(?:[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*\.?|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?"
)
_CONTENT_LENGTH = re.compile(rb"[0-9]{1,18}")
#: The longest line that says a chunk's size and nothing else: llhttp takes no larger number.
_SIZE_LINE_BYTES = 18
_CHUNKED_HEAD = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


@attrs.frozen
class HTTPLimits:
    """
    What one client connection may cost.

    `max_head_bytes` counts the request line and all header fields.  Times are seconds and absolute: no
    byte prolongs them.  `head_timeout_seconds` runs from a head's first byte (from connecting, for the
    first), `body_timeout_seconds` from the head's end, `keep_alive_timeout_seconds` between requests.
    `linger_seconds` is how long a refused client may go on sending into the void before it is cut off;
    `flush_timeout_seconds` how long a closing connection may take to fetch the end of its last answer.
    `max_chunk_extension_bytes` counts, over a whole body, what chunks carry besides size and data.
    """

    max_body_bytes: int = 32 * 1024 * 1024
    max_head_bytes: int = 32 * 1024
    max_headers: int = 200
    max_chunk_extension_bytes: int = 4096
    head_timeout_seconds: float = 15.0
    body_timeout_seconds: float = 120.0
    keep_alive_timeout_seconds: float = 75.0
    linger_seconds: float = 2.0
    flush_timeout_seconds: float = 60.0


def bad(message: str, status: int = 400, **headers: str) -> Refusal:
    """Return the refusal of what is not HTTP."""
    return Refusal(status, "bad_http", f"This is not HTTP as it is spoken here: {message}.", headers=headers)


def too_large(limits: HTTPLimits) -> Refusal:
    """Return the refusal of a body that is larger than the limit."""
    return Refusal(413, "body_too_large", f"The body is larger than {limits.max_body_bytes} bytes.")


@attrs.frozen
class Head:
    """
    A good head.

    `named` are the values of its `fields`, in order, by their names in lower case.  `length` is its body's in
    bytes, None if that comes in chunks.
    """

    method: bytes
    target: bytes
    version: bytes
    fields: Headers
    named: Mapping[bytes, Sequence[bytes]]
    length: int | None
    keep_alive: bool
    awaits_continue: bool


def judge(raw: bytes, fields: Headers, limits: HTTPLimits) -> Head:
    """Say what a whole head asks for, or refuse it."""
    line = _REQUEST_LINE.match(raw)
    if line is None or not _is_of_lines(raw):
        raise bad("the head is malformed")
    method, target, version = line.groups()
    _check_request_line(method, target, version)
    if len(fields) > limits.max_headers:
        raise bad(f"there are more than {limits.max_headers} header fields", 431)
    named = _by_name(fields)
    is_1_1 = version == b"1.1"
    _check_host(named.get(b"host", ()), is_required=is_1_1)
    return Head(
        method=method,
        target=target,
        version=b"HTTP/" + version,
        fields=fields,
        named=named,
        length=_body_length(named, may_be_chunked=is_1_1),
        keep_alive=is_1_1 and b"close" not in tokens(named.get(b"connection", ())),
        awaits_continue=is_1_1 and _awaits_continue(named.get(b"expect", ())),
    )


def _by_name(fields: Headers) -> dict[bytes, list[bytes]]:
    named: dict[bytes, list[bytes]] = {}
    for name, value in fields:
        lower = name.lower()
        if lower in named:
            named[lower].append(value)
        else:
            named[lower] = [value]
    return named


def _is_of_lines(raw: bytes) -> bool:
    """Tell whether nothing but whole lines is there, of which none goes on in the next (obs-fold)."""
    # Each of these passes over the head runs at C's speed; one expression for all is many times slower.
    ends = b"\r\n" * raw.count(b"\r\n")
    return raw.translate(None, _PLAIN) == ends and b"\n " not in raw and b"\n\t" not in raw


def _check_request_line(method: bytes, target: bytes, version: bytes) -> None:
    if version not in (b"1.0", b"1.1"):
        raise bad("only versions 1.0 and 1.1 are", 505)
    if method not in METHODS:
        known = method in (b"CONNECT", b"TRACE")
        raise bad("the method is not served", 405 if known else 501, allow=b", ".join(METHODS).decode())
    if _TARGET.fullmatch(target) is None:
        raise bad("the target is not a path, with or without a query")


def _check_host(values: Sequence[bytes], *, is_required: bool) -> None:
    # RFC 9112, section 3.2; RFC 9110, section 4.2.1: an http URI has a host.
    if len(values) > 1 or (is_required and not values) or not all(map(_HOST.fullmatch, values)):
        raise bad("there must be one Host field, with a name or an address in it")


def _body_length(named: Mapping[bytes, Sequence[bytes]], *, may_be_chunked: bool) -> int | None:
    """Return the body's length in bytes, None for chunks (RFC 9112, section 6)."""
    codings = named.get(b"transfer-encoding", ())
    lengths = named.get(b"content-length", ())
    if codings:
        if not may_be_chunked or lengths or [coding.lower() for coding in codings] != [b"chunked"]:
            raise bad("the only Transfer-Encoding is one chunked, in HTTP/1.1, without a Content-Length")
        return None
    if len(lengths) > 1 or not all(map(_CONTENT_LENGTH.fullmatch, lengths)):
        raise bad("Content-Length must be one number")
    return int(lengths[0]) if lengths else 0


def tokens(values: Iterable[bytes]) -> set[bytes]:
    """Return the members of a field that is a list of words, in lower case, by its values."""
    return {token.strip(b" \t").lower() for value in values for token in value.split(b",")}


def _awaits_continue(values: Iterable[bytes]) -> bool:
    expected = tokens(values)
    if expected - {b"100-continue"}:
        raise bad("nothing but 100-continue can be expected", 417)
    return bool(expected)


class HeadReader:
    """
    One head as it comes.

    `take` and `judge` raise `Refusal`.  Reader and parser are kept from knowing each other, here and
    below, so that no cycle waits for the garbage collector.
    """

    def __init__(self, limits: HTTPLimits) -> None:
        self.has_begun = False
        self._limits = limits
        self._raw = bytearray()
        self._parsed_bytes = 0
        self._heard = _HeardHead()
        self._parser = HttpRequestParser(self._heard)

    def take(self, data: bytes) -> bytes | None:
        """Return what follows the head, or None if its end has not come."""
        self._raw += data
        # Some clients send an empty line after a body (RFC 9112, section 2.2).
        while not self.has_begun and self._raw.startswith(b"\r\n"):
            del self._raw[:2]
        if not self._raw or self._raw == b"\r":
            return None
        self.has_begun = True
        blank = self._raw.find(b"\r\n\r\n", max(0, self._parsed_bytes - 3))
        stop = len(self._raw) if blank < 0 else blank + 4
        if stop > self._limits.max_head_bytes:
            raise bad("the head is too large", 431 if b"\r\n" in self._raw else 414)
        self._parse(bytes(self._raw[self._parsed_bytes : stop]))
        self._parsed_bytes = stop
        rest = bytes(self._raw[stop:])
        del self._raw[stop:]
        return None if blank < 0 else rest

    def _parse(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except HttpParserUpgrade:
            # llhttp stops where another protocol may begin.  None does.
            pass
        except HttpParserInvalidMethodError as error:
            raise bad("the method is not known", 501 if self.method_and_path[0] else 400) from error
        except HttpParserError as error:
            raise bad(str(error), 505 if "version" in str(error) else 400) from error

    @property
    def method_and_path(self) -> tuple[bytes, bytes]:
        """What can be told of them yet; b"" for what cannot."""
        match = _METHOD_AND_PATH.match(self._raw)
        return (bytes(match[1]), bytes(match[2] or b"")) if match else (b"", b"")

    def judge(self) -> Head:
        """Return the whole head, if it is good."""
        if not self._heard.is_complete:
            raise bad("the head is malformed")
        return judge(bytes(self._raw), tuple(self._heard.fields), self._limits)


class _HeardHead:
    """What llhttp calls while it reads a head."""

    def __init__(self) -> None:
        self.fields: list[tuple[bytes, bytes]] = []
        self.is_complete = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name, value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        self.is_complete = True


#: Pieces of a body that are smaller are put together as they come.
SMALL_PIECE_BYTES = 4096


class BodyReader:
    """One body of a known length."""

    def __init__(self, length: int) -> None:
        self.body = b""
        self._missing_bytes = length
        self._parts: list[bytes | bytearray] = []

    def take(self, data: bytes) -> bytes | None:
        """Return what follows the body, or None if its end has not come."""
        piece = data[: self._missing_bytes]
        self._missing_bytes -= len(piece)
        if len(piece) < SMALL_PIECE_BYTES and self._parts:
            # Each piece as it came would weigh many times what is in it.
            if not isinstance(self._parts[-1], bytearray):
                self._parts.append(bytearray())
            self._parts[-1] += piece
        else:
            self._parts.append(piece)
        if self._missing_bytes:
            return None
        parts, self._parts = self._parts, []
        self.body = piece if len(parts) == 1 else b"".join(parts)
        return data[len(piece) :]


class ChunkReader:
    """One body in chunks (RFC 9112, section 7.1)."""

    def __init__(self, limits: HTTPLimits) -> None:
        self.body = b""
        self._limits = limits
        self._room_bytes = limits.max_body_bytes
        self._spare_bytes = limits.max_chunk_extension_bytes + _SIZE_LINE_BYTES
        self._line = bytearray()
        self._data_bytes = 0
        self._heard = _HeardChunks()
        self._parser = HttpRequestParser(self._heard)
        # A parser of its own: the head's has stopped for good if the head spoke of an upgrade.
        self._parser.feed_data(_CHUNKED_HEAD)

    def take(self, data: bytes) -> bytes | None:
        """Return what follows the body, or None if its end has not come.  Raises `Refusal`."""
        position = 0
        while position < len(data) and not self._heard.is_complete:
            if self._data_bytes:
                stop = min(len(data), position + self._data_bytes)
                self._data_bytes -= stop - position
                self._parse(data[position:stop])
            else:
                # The body ends with a line, so llhttp is never given more than one.
                stop = data.find(b"\n", position) + 1 or len(data)
                self._take_line(data[position:stop])
            position = stop
        if not self._heard.is_complete:
            return None
        self.body = bytes(self._heard.body)
        return data[position:]

    def _take_line(self, piece: bytes) -> None:
        self._line += piece
        self._spare_bytes -= len(piece)
        if self._spare_bytes < 0:
            raise bad("the chunks carry too much beside the body")
        self._heard.is_size = False
        self._parse(piece)
        if piece.endswith(b"\n"):
            if self._heard.is_size:
                self._expect(int(self._line.partition(b";")[0], 16))
                self._spare_bytes += min(len(self._line), _SIZE_LINE_BYTES)
            self._line.clear()

    def _expect(self, size: int) -> None:
        self._room_bytes -= size
        if self._room_bytes < 0:
            raise too_large(self._limits)
        self._data_bytes = size and size + len(b"\r\n")

    def _parse(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except HttpParserError as error:
            raise bad(str(error)) from error


class _HeardChunks:
    """What llhttp calls while it reads chunks."""

    def __init__(self) -> None:
        self.body = bytearray()
        self.is_size = False
        self.is_complete = False

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_chunk_header(self) -> None:
        self.is_size = True

    def on_message_complete(self) -> None:
        self.is_complete = True
