"""
What a request's JSON body says, found without building the document, and spliced without rebuilding it.

The bytes that are checked here are the bytes that go upstream, where another parser reads them.  So
whatever two parsers could read differently is refused: a key that we read given twice (or in other
letter cases, which Go's decoder takes for the same key), other encodings than UTF-8, a byte order mark,
numbers beyond what a double holds.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import attrs
import msgspec

from crabtwist.errors import Refusal
from crabtwist.settings import LONGEST_MODEL_NAME

#: The top-level keys that the gateway reads; each may stand once, spelled just so.
KEYS_READ = frozenset({"model", "stream", "max_tokens", "max_completion_tokens", "n", "stream_options"})

#: Digits of the largest number of answers that is taken for one.
LONGEST_CHOICES = 6

#: How deep arrays and objects may nest, if the configuration does not say.
MAX_JSON_DEPTH = 64

#: Members of the top level, of which real requests have a few dozen.
MAX_MEMBERS = 1000

#: `[` and `{` in a body, its texts included: what takes long to look through, and no model reads.
MAX_BRACKETS = 500_000

#: The largest whole number that every JSON parser reads alike (RFC 8259, section 6).
MAX_EXACT_INTEGER = 2**53 - 1
LONGEST_INTEGER = len(str(MAX_EXACT_INTEGER))

#: Replace `body[start:end]` with `text`.
Edit = tuple[int, int, bytes]

_WHITE = rb"[ \t\r\n]*"
#: From the end of one member's value (or the start of the document) to the start of the next one's.
_TO_NEXT_VALUE = re.compile(
    _WHITE + rb"[{,]" + _WHITE + rb'"[^"\\]*(?:\\.[^"\\]*)*"' + _WHITE + rb":" + _WHITE, re.DOTALL
)
_OPENING_BRACE = re.compile(_WHITE + rb"\{" + _WHITE)
_NOT_MARKS = bytes(set(range(256)) - set(b'[]{}"'))
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")


class _Key:
    """
    Stands for a member's name and equals nothing but itself, so that a dict keeps repeated members.

    msgspec has one made for each key that it meets: the cheapest way to learn the top level's names, with
    the values left as slices of the body.
    """

    __slots__ = ()


#: The names in the document in hand, in order.
_names: list[str] = []


class _TooManyMembersError(Exception):
    """The top level goes on and on; raised in its middle, so that nobody waits for its end."""


def _make_key(_type: type, name: str) -> _Key:
    if len(_names) >= MAX_MEMBERS:
        raise _TooManyMembersError
    _names.append(name)
    return _Key()


_top_level = msgspec.json.Decoder(dict[_Key, msgspec.Raw], dec_hook=_make_key)


def _parsed(data: bytes) -> list[tuple[str, msgspec.Raw]]:
    """Return names and values of the members of an object's text; raises what msgspec does."""
    try:
        return list(zip(_names, _top_level.decode(data).values(), strict=True))
    finally:
        _names.clear()


def invalid(message: str) -> Refusal:
    """Return the refusal of a body that says something wrong."""
    return Refusal(400, "invalid_body", message)


@attrs.frozen
class JSONObject:
    """
    One JSON object as it was written: its text, and its members' names and values in order.

    Names may repeat; the first one counts.
    """

    data: bytes = attrs.field(repr=False)
    members: Sequence[tuple[str, msgspec.Raw]] = attrs.field(repr=False)

    @classmethod
    def parse(cls, data: bytes) -> JSONObject | None:
        """Return the object that `data` is the text of, None if it is none."""
        try:
            return cls(data, _parsed(data))
        except (msgspec.DecodeError, RecursionError, _TooManyMembersError):
            return None

    def get(self, name: str) -> bytes | None:
        """Return the value of a member as it was written, or None."""
        for member, raw in self.members:
            if member == name:
                return bytes(raw)
        return None

    def span(self, name: str) -> tuple[int, int]:
        """Return where in `data` the value of the member `name` stands; KeyError if there is none."""
        position = 0
        for member, raw in self.members:
            match = _TO_NEXT_VALUE.match(self.data, position)
            assert match is not None, "the parser and the walk disagree about a valid document"
            position = match.end() + memoryview(raw).nbytes
            if member == name:
                return match.end(), position
        raise KeyError(name)

    def setting(self, name: str, value: bytes) -> Edit:
        """Return the edit that gives the member `name` a value, adding it as the first if it is missing."""
        if any(member == name for member, _ in self.members):
            return (*self.span(name), value)
        match = _OPENING_BRACE.match(self.data)
        assert match is not None
        comma = b"," if self.members else b""
        return (match.end(), match.end(), b'"' + name.encode() + b'":' + value + comma)


@attrs.frozen
class RequestBody(JSONObject):
    """
    A body that passed every check, and what it says.

    `stream` is False where it is absent or null.  `max_tokens` is the caller's bound on the answer, None
    where there is none; of `max_tokens` and `max_completion_tokens` the larger one, for some upstreams read
    only the one, and others only the other.  `choices` is how many answers are asked for (OpenAI's `n`).
    """

    model: str
    stream: bool
    max_tokens: int | None
    choices: int = 1

    def renaming(self, model: str) -> list[Edit]:
        """Return the edit that makes `model` the body's model: none if it says so already."""
        if model == self.model:
            return []
        return [(*self.span("model"), msgspec.json.encode(model))]


def splice(data: bytes, edits: Sequence[Edit]) -> bytes:
    """Return the text with the edits made and every other byte as it came."""
    if not edits:
        return data
    parts = []
    position = 0
    for start, end, text in sorted(edits):
        parts += [data[position:start], text]
        position = end
    return b"".join([*parts, data[position:]])


def read(data: bytes, max_depth: int = MAX_JSON_DEPTH) -> RequestBody:
    """
    Check a request's body and read what the gateway needs.

    Raises `Refusal` (400) in words for the caller.
    """
    marks = _marks(data)
    openings = marks.count(b"[") + marks.count(b"{")
    members = _members(data, openings)
    if openings > max_depth and _too_deep(marks, max_depth):
        raise invalid(f"the body nests deeper than {max_depth} levels; flatten it")
    values = unambiguous(members, KEYS_READ)
    max_tokens = _max_tokens(values)
    return RequestBody(
        data=data,
        members=members,
        model=_model(values.get("model")),
        stream=_stream(values.get("stream")),
        max_tokens=max_tokens,
        choices=_choices(values.get("n")),
    )


def _members(data: bytes, openings: int) -> list[tuple[str, msgspec.Raw]]:
    if not data:
        raise invalid("the body is empty; send a JSON object")
    if data.startswith(_BYTE_ORDER_MARKS):
        raise invalid("the body begins with a byte order mark; send plain UTF-8 without one")
    if openings > MAX_BRACKETS:
        raise invalid(f"the body holds more than {MAX_BRACKETS} opening brackets; send less")
    try:
        # msgspec does not look into the strings that it skips.
        data.isascii() or data.decode()
        return _parsed(data)
    except _TooManyMembersError:
        raise invalid(f"the body has more than {MAX_MEMBERS} members at its top level") from None
    except UnicodeDecodeError as error:
        raise invalid(f"the body is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise invalid("the body nests far too deep; flatten it") from None
    except msgspec.ValidationError:
        raise invalid("the body is not a JSON object") from None
    except msgspec.DecodeError as error:
        raise invalid(f"the body is not JSON: {_reason(str(error))}") from None


def _reason(text: str) -> str:
    if "truncated" in text:
        return "it ends too early, or holds half of a surrogate pair"
    # After `\ud800` the other half's escape is expected, and its absence is all that msgspec tells.
    text = text.replace("unexpected end of hex escape", "half of a surrogate pair")
    return text.removeprefix("JSON is malformed: ")


def _marks(data: bytes) -> bytes:
    """Return the brackets and quotes of a document, but for escaped quotes; one look at each byte."""
    if b"\\" in data:
        data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    return data.translate(None, _NOT_MARKS)


def _too_deep(marks: bytes, max_depth: int) -> bool:
    """
    Tell whether a valid document with these marks nests deeper than `max_depth`: bytes.replace is fast.

    What is in strings is dropped; each round of removing `[]` and `{}` then takes the innermost level away.
    """
    # Most strings hold no brackets.  Where two that do stand side by side, they become one that does.
    brackets = b"".join(marks.replace(b'""', b"").split(b'"')[::2])
    for _ in range(max_depth):
        if not brackets:
            return False
        brackets = brackets.replace(b"[]", b"\0").replace(b"{}", b"\0").replace(b"\0", b"")
    return bool(brackets)


def unambiguous(members: Sequence[tuple[str, msgspec.Raw]], keys: Collection[str]) -> dict[str, bytes]:
    """
    Return the values, as they were written, of those of `keys` that are there.

    Raises `Refusal` (400) if one of them, which the gateway reads, could be read differently.
    """
    values: dict[str, bytes] = {}
    for name, raw in members:
        folded = name.casefold()
        if folded not in keys:
            continue
        if folded in values:
            raise invalid(f'the key "{folded}" stands twice (other letter cases count); send it once')
        if name != folded:
            raise invalid(f'the key "{name}" has to be spelled "{folded}"')
        values[name] = bytes(raw)
    return values


def _model(raw: bytes | None) -> str:
    if raw is None:
        raise invalid('the key "model" is missing')
    try:
        model = msgspec.json.decode(raw)
    except msgspec.DecodeError:
        model = None
    if not isinstance(model, str) or not model:
        raise invalid('"model" has to be a string that is not empty')
    if len(model) > LONGEST_MODEL_NAME:
        raise invalid(f'"model" is longer than {LONGEST_MODEL_NAME} characters')
    if _UNPRINTABLE.search(model):
        raise invalid('"model" holds control characters')
    return model


def _stream(raw: bytes | None) -> bool:
    if raw not in (None, b"true", b"false", b"null"):
        raise invalid('"stream" has to be true or false')
    return raw == b"true"


def _choices(raw: bytes | None) -> int:
    # What is no number of answers is the vendor's to refuse.
    return max(1, int(raw)) if raw is not None and raw.isdigit() and len(raw) <= LONGEST_CHOICES else 1


def _max_tokens(values: dict[str, bytes]) -> int | None:
    most = None
    for name in ("max_completion_tokens", "max_tokens"):
        raw = values.get(name, b"null")
        if raw == b"null":
            continue
        # What zero means is the vendor's business; -1 is an endless answer at some.
        if not raw.isdigit() or len(raw) > LONGEST_INTEGER or int(raw) > MAX_EXACT_INTEGER:
            raise invalid(f'"{name}" has to be a whole number, at most {MAX_EXACT_INTEGER}, not negative')
        most = max(most or 0, int(raw))
    return most
