"""Asks the gateway: one request, one answer; or a stream of events until somebody has enough."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator, Mapping
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import attrs

from crabtwist.cli.faults import Fault, NotAllowed, Unreachable
from crabtwist.cli.place import Place
from crabtwist.sse import Event, EventStream

CONNECT_SECONDS = 10.0
#: The slowest answer asks an upstream for its models, which it may take 15 seconds for.
ANSWER_SECONDS = 60.0
ADMIN = "/v1/admin"

_READ_BYTES = 65536


@attrs.frozen
class Said:
    """A whole answer, of any status; `content` is its JSON, None if it has none."""

    status: int
    headers: Mapping[str, str]
    content: Any


class Client:
    """
    Speaks to the gateway at a place; every method raises `Fault`.

    The token goes nowhere else: redirects are not followed, and proxies not asked.
    """

    def __init__(self, place: Place) -> None:
        self.place = place

    def get(self, *path: str, **query: object) -> Any:
        """Return what is at a path of the admin API; parameters that are None are left out."""
        return self._ask("GET", path, query)

    def post(self, *path: str, body: Mapping[str, Any] | None = None, **query: object) -> Any:
        """Make something, or do something."""
        return self._ask("POST", path, query, {} if body is None else body)

    def patch(self, *path: str, body: Mapping[str, Any], **query: object) -> Any:
        """Change something by a merge patch."""
        return self._ask("PATCH", path, query, body)

    def delete(self, *path: str) -> None:
        """Remove something."""
        self._ask("DELETE", path, {})

    def look(self, path: str) -> Said:
        """Return what is at a path that is open to all, without the token and whatever its status."""
        response = self._open("GET", path, {}, None)
        return Said(response.status, _headers(response), _content(self._rest(response)))

    def follow(self, *path: str, **query: object) -> Iterator[Event]:
        """Yield the events of a stream as they come; ends when the gateway ends it."""
        headers = {**self._credential(), "accept": "text/event-stream"}
        response = self._open("GET", _target(path, query), headers, None)
        if response.status != 200:
            self._content_of(response)
        elif "text/event-stream" not in (response.getheader("content-type") or ""):
            raise self._stranger("no event stream")
        return self._events(response)

    def _events(self, response: HTTPResponse) -> Iterator[Event]:
        stream = _Events()
        while data := self._read(response):
            stream.dataReceived(data)
            yield from stream.taken()

    def _ask(self, method: str, path: tuple[str, ...], query: Mapping[str, object], body: Any = None) -> Any:
        headers = {**self._credential(), "accept": "application/json"}
        return self._content_of(self._open(method, _target(path, query), headers, body))

    def _credential(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.place.required_token}"}

    def _open(self, method: str, target: str, headers: Mapping[str, str], body: Any) -> HTTPResponse:
        sent = dict(headers)
        if body is not None:
            sent["content-type"] = "application/json"
        text = None if body is None else json.dumps(body)
        try:
            connection = self._connection()
            connection.connect()
            connection.sock.settimeout(ANSWER_SECONDS)
            connection.request(method, urlsplit(self.place.url).path + target, text, sent)
            return connection.getresponse()
        except (OSError, HTTPException) as error:
            raise self._unreachable(error) from error

    def _connection(self) -> HTTPConnection:
        parts = urlsplit(self.place.url)
        host = parts.hostname or ""
        if parts.scheme == "http":
            return HTTPConnection(host, parts.port, timeout=CONNECT_SECONDS)
        return HTTPSConnection(
            host, parts.port, timeout=CONNECT_SECONDS, context=ssl.create_default_context()
        )

    def _read(self, response: HTTPResponse) -> bytes:
        try:
            return response.read1(_READ_BYTES)
        except (OSError, HTTPException) as error:
            raise self._unreachable(error) from error

    def _rest(self, response: HTTPResponse) -> bytes:
        try:
            return response.read()
        except (OSError, HTTPException) as error:
            raise self._unreachable(error) from error

    def _content_of(self, response: HTTPResponse) -> Any:
        """Return the JSON of a good answer; raises a `Fault` with the gateway's own words of a refusal."""
        content = _content(self._rest(response))
        if response.status == 204:
            return None
        if 200 <= response.status < 300 and content is not None:
            return content
        raise self._refusal(response, content)

    # What went wrong.

    def _refusal(self, response: HTTPResponse, content: Any) -> Fault:
        status = response.status
        slug = response.getheader("x-crabtwist-error")
        error = content.get("error") if isinstance(content, dict) else None
        if slug is None or not isinstance(error, dict):
            return self._stranger(f"status {status}")
        words = f"{error.get('message') or slug}"
        if status in (401, 403):
            words += f" (the token is from {self.place.token_from})"
        elif slug == "path_not_found":
            words += "; a gateway has an admin API if its configuration has an `admin_token`"
        kind: type[Fault] = NotAllowed if status in (401, 403) else Fault
        return kind(words, slug=slug, http_status=status)

    def _stranger(self, what: str) -> Fault:
        words = f"what answers at {self.place.url} ({self.place.url_from}) is no crabtwist: {what}"
        return Unreachable(words, slug="not_a_gateway")

    def _unreachable(self, error: Exception) -> Fault:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        words = (
            f"no gateway answers at {self.place.url} ({self.place.url_from}): {why}; "
            "start it with `twistd -n crabtwist`, or say with --url where it is"
        )
        return Unreachable(words, slug="unreachable")


class _Events(EventStream):
    """Keeps events until they are taken."""

    def __init__(self) -> None:
        super().__init__()
        self._events: list[Event] = []

    def eventReceived(self, event: Event) -> None:
        self._events.append(event)

    def taken(self) -> list[Event]:
        """Return the events that came since the last time."""
        events, self._events = self._events, []
        return events


def _target(path: tuple[str, ...], query: Mapping[str, object]) -> str:
    given = {name: value for name, value in query.items() if value is not None}
    parameters = f"?{urlencode(given)}" if given else ""
    return "/".join((ADMIN, *(quote(part, safe="") for part in path))) + parameters


def _content(data: bytes) -> Any:
    try:
        return json.loads(data) if data else None
    except (ValueError, RecursionError):
        return None


def _headers(response: HTTPResponse) -> dict[str, str]:
    return {name.lower(): value for name, value in response.getheaders()}
