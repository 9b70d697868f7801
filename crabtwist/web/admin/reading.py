"""What somebody asks of the admin API, read from a query and a body: checked, or refused in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import attrs
import msgspec

from crabtwist.errors import Refusal
from crabtwist.settings import read

T = TypeVar("T", bound=attrs.AttrsInstance)

#: Who writes more than this by hand?
MOST_BODY_BYTES = 2**20

_TRUTHS = {"true": True, "1": True, "false": False, "0": False}


def read_query(cls: type[T] | None, args: Mapping[bytes, list[bytes]]) -> T | None:
    """
    Return a request's parameters as an instance of a settings class; None stands for none at all.

    What is a `tuple` is one parameter, its items parted by commas.  Raises `Refusal` (400) with all that is
    wrong at once, so also for a parameter that is unknown or given twice.
    """
    if cls is None:
        if args:
            raise refused(["this takes no parameters"], "invalid_query")
        return None
    named = _named(args)
    hints = get_type_hints(cls)
    table = {name: _of_text(hints.get(name), text) for name, text in named.items()}
    return read_table(cls, table, "invalid_query")


def read_body(body: bytes, content_type: bytes) -> dict[str, Any]:
    """
    Return a body as a mapping; an empty one is an empty object.

    Raises `Refusal`: 415 for what does not call itself JSON, 413, and 400 for what is no JSON object.
    """
    if not body:
        return {}
    if len(body) > MOST_BODY_BYTES:
        raise Refusal(413, "body_too_large", f"the body may have {MOST_BODY_BYTES} bytes, not {len(body)}")
    media_type = content_type.partition(b";")[0].strip().lower()
    if media_type != b"application/json" and not media_type.endswith(b"+json"):
        raise Refusal(
            415, "content_type", "the body has to be JSON; send it with `Content-Type: application/json`"
        )
    try:
        document = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise refused([f"the body is not JSON: {error}"], "invalid_json") from error
    if not isinstance(document, dict):
        raise refused(["the body has to be a JSON object"], "invalid_json")
    return document


def read_table(cls: type[T], table: Mapping[str, Any], slug: str) -> T:
    """Return a table as an instance of a settings class; raises `Refusal` (400) with all that is wrong."""
    complaints: list[str] = []
    found = read(cls, table, "", complaints)
    if found is None:
        raise refused(complaints, slug)
    return found


def refused(complaints: Iterable[str], slug: str) -> Refusal:
    """Return the refusal of what has these faults."""
    return Refusal(400, slug, "; ".join(complaints))


def _named(args: Mapping[bytes, list[bytes]]) -> dict[str, str]:
    try:
        named = {name.decode(): [value.decode() for value in values] for name, values in args.items()}
    except UnicodeDecodeError:
        raise refused(["the query is not UTF-8"], "invalid_query") from None
    twice = sorted(name for name, values in named.items() if len(values) > 1)
    if twice:
        raise refused([f"{name}: is given more than once" for name in twice], "invalid_query")
    return {name: value for name, [value] in named.items()}


def _of_text(hint: Any, text: str) -> object:
    """Return what a text stands for, and the text itself if that is nothing of the kind wanted."""
    if get_origin(hint) is tuple:
        return [_of_text(get_args(hint)[0], item) for item in text.split(",") if item]
    wanted = {hint, *get_args(hint)}
    if bool in wanted:
        return _TRUTHS.get(text.lower(), text)
    for number in (int, float):
        if number in wanted:
            try:
                return number(text)
            except ValueError:
                return text
    return text
