"""
The admin API's endpoints, each declared once: its route, its checks and its part of the document.

A family of endpoints is one file with one function that returns the list of them:

    @attrs.frozen(kw_only=True)
    class Filters:
        model: str | None = attrs.field(default=None, metadata=about("only requests for this model"))

    def cake_endpoints(cakes: Cakes) -> list[Endpoint]:
        return [
            Endpoint("GET", f"{ADMIN}cakes", "List the cakes", lambda asked: cakes.all(asked.query),
                     query=Filters, answer=Cakes),
            Endpoint("DELETE", f"{ADMIN}cakes/<name>", "Eat a cake",
                     lambda asked: cakes.eat(asked.path["name"]),
                     action="cakes.eat", status=204, refusals={404: "There is no such cake."}),
        ]

`crabtwist.web.app` adds the list.  The function of an endpoint takes one `Asked` and returns attrs or
msgspec values, or plain ones, or a Deferred or coroutine of these; it refuses by raising `Refusal`.  It need
not check who asks, nor tell anybody what was done: that is seen to here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from inspect import isawaitable
from types import MappingProxyType
from typing import Any, Literal

import attrs
import msgspec
from klein import Klein
from twisted.internet.defer import Deferred
from twisted.logger import Logger

from crabtwist.admin_providers import MASK
from crabtwist.errors import Refusal, StorageError
from crabtwist.gateway import Gateway
from crabtwist.keys import VirtualKey
from crabtwist.settings import Secret, fault_in, word
from crabtwist.values import AdminAction, Answer
from crabtwist.web.admin.reading import read_body, read_query, read_table, refused
from crabtwist.web.admin_lock import Administrator
from crabtwist.web.answers import path_not_found, say

#: Where the endpoints for administrators are.
ADMIN = "/v1/admin/"

#: How an audit names whoever has the admin token.
ACTOR = "admin"

#: How long to wait for a store that does not answer.
RETRY_SECONDS = 1

_FIELDS = ((b"content-type", b"application/json"),)

_log = Logger()


@attrs.frozen(kw_only=True)
class Asked:
    """
    One request to an endpoint.

    `path` are the parts of the path that have a name, `query` and `body` what the endpoint declares.  `key`
    is the key of whoever asks, None for an administrator and in a gateway without keys.  `request` is for
    endpoints that write their answer themselves.
    """

    path: Mapping[str, str]
    query: Any
    body: Any
    key: VirtualKey | None
    request: Any


@attrs.frozen
class Endpoint:
    """
    One endpoint.

    `path` is a route of werkzeug's, as in "/v1/admin/keys/<name>".  `act` does it.  `action` is the audit's
    word for it where it changes something, "" where it does not.  `query` and `body` are settings classes,
    None where there is no such thing; with `body_as_mapping` the class only describes it, and the mapping
    that came is passed.  `answer` describes what is answered with `status`, None for nothing.  `refusals` are
    those of its own, by status.  With `for_keys` it is not for administrators but for whoever has a key.
    With `streams` it is an event stream that `act` writes, and ends, itself; the answer is then one event's
    data.  `example` and `answer_example` are for the document, as JSON has them.
    """

    method: Literal["GET", "POST", "PATCH", "DELETE"]
    path: str
    summary: str
    act: Callable[[Asked], Any]
    action: str = attrs.field(default="", kw_only=True)
    description: str = attrs.field(default="", kw_only=True)
    query: type[attrs.AttrsInstance] | None = attrs.field(default=None, kw_only=True)
    body: type[attrs.AttrsInstance] | None = attrs.field(default=None, kw_only=True)
    body_as_mapping: bool = attrs.field(default=False, kw_only=True)
    answer: Any = attrs.field(default=None, kw_only=True)
    status: int = attrs.field(default=200, kw_only=True)
    refusals: Mapping[int, str] = attrs.field(factory=dict, kw_only=True)
    for_keys: bool = attrs.field(default=False, kw_only=True)
    streams: bool = attrs.field(default=False, kw_only=True)
    example: Any = attrs.field(default=None, kw_only=True)
    answer_example: Any = attrs.field(default=None, kw_only=True)


def about(text: str) -> Mapping[str, str]:
    """Return the metadata of a field that the document is to explain."""
    return MappingProxyType({"crabtwist.about": text})


def add_endpoints(app: Klein, endpoints: Iterable[Endpoint], gateway: Gateway) -> None:
    """Give each endpoint its route."""
    for endpoint in endpoints:
        _add(app, endpoint, gateway)


def _add(app: Klein, endpoint: Endpoint, gateway: Gateway) -> None:
    @app.route(endpoint.path, methods=[endpoint.method], endpoint=f"{endpoint.method} {endpoint.path}")
    async def serve(request: Any, **path: str) -> bytes | None:
        # Admission has seen to it; what is done here must not hang on that alone.
        if isinstance(request.admission, Administrator) == endpoint.for_keys:
            raise path_not_found(request.path)
        # Whoever has what was shown yesterday should not take it for what is so today.
        request.responseHeaders.setRawHeaders(b"cache-control", [b"no-store"])
        if endpoint.action:
            return await _to_its_end(_changed(endpoint, request, path, gateway))
        return await _answered(endpoint, request, path)


async def _changed(
    endpoint: Endpoint, request: Any, path: Mapping[str, str], gateway: Gateway
) -> bytes | None:
    """Answer, and tell what was done or not."""
    outcome: Literal["done", "refused", "failed"] = "failed"
    detail = "the gateway failed"
    try:
        answer = await _answered(endpoint, request, path)
        outcome, detail = "done", _members(request)
    except Refusal as refusal:
        outcome = "failed" if refusal.status >= 500 else "refused"
        detail = refusal.message
        raise
    finally:
        at = gateway.clock.seconds()
        target = path.get("name") or _name_in(request)
        gateway.hooks.administered(AdminAction(at, ACTOR, endpoint.action, target, outcome, detail))
    return answer


async def _answered(endpoint: Endpoint, request: Any, path: Mapping[str, str]) -> bytes | None:
    asked = _asked(endpoint, request, path)
    try:
        answer = endpoint.act(asked)
        if isawaitable(answer):
            answer = await answer
    except StorageError as error:
        _log.error("{method} {path}: {error}", method=endpoint.method, path=endpoint.path, error=error)
        raise Refusal(
            503,
            "storage_unavailable",
            "the store does not answer, so this was not done, or not wholly; ask again",
            headers={"retry-after": str(RETRY_SECONDS)},
        ) from error
    if endpoint.streams:
        return None
    if endpoint.status == 204:
        return say(request, Answer(204, (), b""))
    return say(request, Answer(endpoint.status, _FIELDS, msgspec.json.encode(answer, enc_hook=_plain)))


def _asked(endpoint: Endpoint, request: Any, path: Mapping[str, str]) -> Asked:
    body: Any = None
    if endpoint.body is not None:
        content_type = request.requestHeaders.getRawHeaders(b"content-type", [b""])[0]
        body = read_body(request.body, content_type)
        if not endpoint.body_as_mapping:
            body = read_table(endpoint.body, body, "invalid_body")
    elif request.body.strip() not in (b"", b"{}"):
        raise refused(["this takes no body"], "body_not_wanted")
    return Asked(
        path=MappingProxyType(dict(path)),
        query=read_query(endpoint.query, request.args),
        body=body,
        key=request.admission if endpoint.for_keys else None,
        request=request,
    )


def _to_its_end(work: Awaitable[bytes | None]) -> Deferred[bytes | None]:
    """Do it all even if whoever asked leaves: half a change would be none on other nodes."""

    async def whole() -> bytes | None:
        return await work

    waiting: Deferred[bytes | None] = Deferred()
    Deferred.fromCoroutine(whole()).chainDeferred(waiting)
    return waiting


def _sent(request: Any) -> Mapping[str, Any]:
    try:
        return read_body(request.body, b"application/json")
    except Refusal:
        return {}


def _name_in(request: Any) -> str:
    name = _sent(request).get("name")
    return name if isinstance(name, str) and fault_in(word, name) is None else ""


def _members(request: Any) -> str:
    return ", ".join(_sent(request))


def _plain(value: Any) -> Any:
    if isinstance(value, Secret):
        return MASK
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is nothing that JSON has")
