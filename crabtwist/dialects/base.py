"""
What every dialect can do: word an error, keep a stream alive, and read what an answer says of itself.

A dialect is stateless and shared; an `AnswerReader` belongs to one attempt's answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any, Protocol

import attrs
import msgspec

from crabtwist.body import Edit, RequestBody
from crabtwist.sse import Event
from crabtwist.values import Usage

#: No real count of tokens comes near; what is larger is a broken upstream's.
MAX_COUNT = 2**53 - 1

#: How many closing braces are tried as the end of a usage object; real ones hold a few dozen.
MOST_CLOSINGS = 256

#: A member that holds an object; within a string its quotes would be escaped.
_USAGE = re.compile(rb'(?<!\\)"usage"[ \t\r\n]*:[ \t\r\n]*(?=\{)')


@attrs.frozen
class UpstreamSays:
    """An error in the upstream's own words, from a body or an event; `status` is what it amounts to."""

    status: int
    type: str
    message: str


class AnswerReader:
    """
    Reads one answer as it passes: who answered, what it used, whether it is whole, whether it failed.

    Never raises, whatever the upstream sends.  `began` is True once something that a caller can use, or an
    error, has come (a ping is neither), and `refused` if an error was the first.  `finished` is True once
    the event that ends a whole stream has come.
    """

    def __init__(self) -> None:
        self.usage: Usage | None = None
        self.model: str | None = None
        self.error: UpstreamSays | None = None
        self.began = False
        self.refused = False
        self.finished = False

    def wants(self, region: bytes) -> bool:
        """
        Tell whether any of these whole events has to be read.

        Called for all that passes, so it only looks for a few words, at the speed of `in`.
        """
        raise NotImplementedError

    def event(self, event: Event) -> bool:
        """Learn from one event; True means that it is the gateway's own business, not the caller's."""
        raise NotImplementedError

    def body(self, data: bytes) -> None:
        """Learn from a whole plain answer of status 200."""
        raise NotImplementedError

    def tail(self, data: bytes) -> None:
        """Learn what can be learnt from the end of a plain answer that was too large to keep."""
        raise NotImplementedError


class _MakesReader(Protocol):
    """With `hide_usage`, what is there only to count is kept from a caller that did not ask for it."""

    def __call__(self, *, hide_usage: bool) -> AnswerReader: ...


@attrs.frozen
class Dialect:
    """
    One API's wire format.

    `error_types` maps a status to the error type of the dialect; `keep_alive` is what may be said
    between two events so that nobody takes a silent stream for a dead one.  `ask_for_usage` returns the
    edits that make a stream tell its usage: none where it does so anyway.
    """

    name: str
    error_types: Mapping[int, str]
    keep_alive: bytes
    render_error: Callable[[str, str, str, str], bytes]
    render_error_event: Callable[[bytes], bytes]
    read_error: Callable[[bytes], UpstreamSays | None]
    reader: _MakesReader
    ask_for_usage: Callable[[RequestBody], list[Edit]]

    def error_type(self, status: int) -> str:
        """Return the dialect's usual error type for a status."""
        return self.error_types.get(status) or self.error_types[400 if status < 500 else 500]

    def error_body(self, status: int, type: str | None, slug: str, message: str, request_id: str) -> bytes:  # noqa: A002 - the field's name on the wire
        """Return the JSON body of an error that the gateway itself reports."""
        return self.render_error(type or self.error_type(status), slug, message, request_id)

    def error_event(self, status: int, slug: str, message: str, request_id: str) -> bytes:
        """Return the event that tells a caller, in mid-stream, that no more will come."""
        return self.render_error_event(self.error_body(status, None, slug, message, request_id))


def decode_object(data: bytes) -> dict[str, Any]:
    """Return the JSON object in `data`; an empty one for anything else."""
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


class _Said(msgspec.Struct):
    model: Any = None
    usage: Any = None


_SAID = msgspec.json.Decoder(_Said)


def model_and_usage(data: bytes) -> tuple[str | None, dict[str, Any]]:
    """
    Return what a plain answer names as its model, None if nothing, and its usage object, {} if it has none.

    The rest of it is looked through and not built.
    """
    try:
        said = _SAID.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None, {}
    model = said.model if isinstance(said.model, str) else None
    return model or None, said.usage if isinstance(said.usage, dict) else {}


def part(parent: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the object that is the member `name`; an empty one if it is none."""
    value = parent.get(name)
    return value if isinstance(value, dict) else {}


def text(parent: Mapping[str, Any], name: str, default: str = "") -> str:
    """Return the string that is the member `name`."""
    value = parent.get(name)
    return value if isinstance(value, str) else default


def count(parent: Mapping[str, Any], name: str) -> int:
    """Return the number that is the member `name`, made sane: whole, not negative, not absurd."""
    value = parent.get(name, 0)
    # Nearly always; a bool is of another type.
    if type(value) is int and 0 <= value <= MAX_COUNT:
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        return 0
    return min(max(value, 0), MAX_COUNT)


def last_usage(data: bytes) -> dict[str, Any]:
    """Return the last object named "usage" in the end of a JSON document, {} if there is none."""
    openings = [match.end() for match in _USAGE.finditer(data)]
    if not openings:
        return {}
    text = data[openings[-1] :]
    closings = islice(re.finditer(rb"}", text), MOST_CLOSINGS)
    return next(filter(None, (decode_object(text[: match.end()]) for match in closings)), {})
