"""The OpenAPI document of the admin API, made from the endpoints as they are declared."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, get_args, get_origin, get_type_hints

import attrs
import msgspec
from klein import Klein

from crabtwist.values import Answer
from crabtwist.web.admin.endpoint import ADMIN, Endpoint
from crabtwist.web.admin.page import page_of
from crabtwist.web.admin.schemas import REFERENCE, Schema, is_kept, patch_of, schemas_of
from crabtwist.web.answers import say

OPENAPI_VERSION = "3.1.0"

_PART = re.compile(r"<(?:\w+:)?(\w+)>")
_NULL: Schema = {"type": "null"}

_ABOUT = """\
How a person or a script runs the gateway. Every request carries the admin token (`admin_token` in the
configuration), as `Authorization: Bearer TOKEN` or `x-api-key: TOKEN`; a key opens nothing here, and the
token opens nothing else. After ten wrong tokens within a minute an address is told to wait.

Bodies are JSON, also those of errors: `error.code`, and the header `x-crabtwist-error`, are a word for
programs, `error.message` says all that is wrong at once, each with its path. Moments are RFC 3339 in UTC,
sums of money are dollars, exact, as texts."""

_EVERYWHERE = {
    400: "Something about the request is wrong; `error.message` says all of it.",
    401: "There is no admin token, or another.",
    429: "Too many wrong tokens came from this address; `retry-after` says how long to wait.",
    503: "A store does not answer, or the gateway is being stopped; ask again after `retry-after` seconds.",
}
_WITH_BODY = {413: "The body is too large.", 415: "The body does not call itself JSON."}

#: The styles are in the page itself, and it needs nothing else.
_NOTHING_ELSE = b"default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


class ErrorBody(msgspec.Struct, frozen=True):
    """What went wrong: in words, and `code` as a word for programs."""

    message: str
    type: str
    code: str
    param: str | None = None


class Error(msgspec.Struct, frozen=True):
    """Every answer with a status of 400 or more."""

    error: ErrorBody
    request_id: str


def add_document(app: Klein, endpoints: Sequence[Endpoint]) -> None:
    """Add `/openapi.json`, and the same to read at `/docs`."""

    @cache
    def document() -> dict[str, Any]:
        return document_of(endpoints)

    @app.route("/openapi.json", methods=["GET"], endpoint="openapi")
    def openapi(request: Any) -> bytes:
        fields = ((b"content-type", b"application/json"),)
        return say(request, Answer(200, fields, msgspec.json.format(msgspec.json.encode(document()))))

    @app.route("/docs", methods=["GET"], endpoint="docs")
    def docs(request: Any) -> bytes:
        fields = (
            (b"content-type", b"text/html; charset=utf-8"),
            (b"content-security-policy", _NOTHING_ELSE),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"),
        )
        return say(request, Answer(200, fields, page_of(document()).encode()))


def document_of(endpoints: Iterable[Endpoint]) -> dict[str, Any]:
    """Return the document of these endpoints."""
    endpoints = list(endpoints)
    settings = {endpoint.body for endpoint in endpoints if endpoint.body is not None}
    answers = [*(endpoint.answer for endpoint in endpoints if endpoint.answer is not None), Error]
    schemas = schemas_of(settings, answers)
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        if endpoint.method == "PATCH" and endpoint.body is not None:
            schemas[_patch_name(endpoint.body)] = patch_of(schemas[endpoint.body.__name__])
        paths.setdefault(_PART.sub(r"{\1}", endpoint.path), {})[endpoint.method.lower()] = _operation(
            endpoint
        )
    return {
        "openapi": OPENAPI_VERSION,
        "info": {"title": "crabtwist: the admin API", "version": _version(), "description": _ABOUT},
        "servers": [{"url": "/"}],
        "tags": [{"name": tag} for tag in dict.fromkeys(map(_tag, endpoints))],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "adminToken": {"type": "http", "scheme": "bearer", "description": "The admin token."},
                "key": {"type": "http", "scheme": "bearer", "description": "A virtual key."},
            },
        },
    }


def _version() -> str:
    try:
        return version("crabtwist")
    except PackageNotFoundError:
        # Run from a checkout.
        return "0"


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": _name(endpoint),
        "summary": endpoint.summary,
        "tags": [_tag(endpoint)],
        "security": [{"key": []} if endpoint.for_keys else {"adminToken": []}],
        "parameters": [*_path_parameters(endpoint), *_query_parameters(endpoint)],
        "responses": _responses(endpoint),
    }
    if endpoint.description:
        operation["description"] = endpoint.description
    if endpoint.body is not None:
        operation["requestBody"] = _request_body(endpoint, endpoint.body)
    return operation


def _tag(endpoint: Endpoint) -> str:
    return "a key's own" if endpoint.for_keys else endpoint.path.removeprefix(ADMIN).split("/")[0]


def _name(endpoint: Endpoint) -> str:
    words = [word for word in re.split(r"[/<>:.]", endpoint.path.removeprefix("/v1/")) if word]
    return "_".join([endpoint.method.lower(), *words])


def _path_parameters(endpoint: Endpoint) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in _PART.findall(endpoint.path)
    ]


def _query_parameters(endpoint: Endpoint) -> list[dict[str, Any]]:
    if endpoint.query is None:
        return []
    schemas = schemas_of([endpoint.query], [])[endpoint.query.__name__]
    hints = get_type_hints(endpoint.query)
    return [
        _query_parameter(field.name, dict(schemas["properties"][field.name]), hints[field.name])
        for field in attrs.fields(endpoint.query)
        if field.init
    ]


def _query_parameter(name: str, schema: Schema, hint: Any) -> dict[str, Any]:
    parameter: dict[str, Any] = {"name": name, "in": "query"}
    if "description" in schema:
        parameter["description"] = schema.pop("description")
    choices = [each for each in schema.pop("anyOf", [schema]) if each != _NULL]
    if schema.get("default") is None:
        schema.pop("default", None)
    parameter["schema"] = {**schema, **choices[0]} if len(choices) == 1 else {**schema, "anyOf": choices}
    if any(get_origin(each) is tuple for each in (hint, *get_args(hint))):
        parameter |= {"style": "form", "explode": False}
    return parameter


def _request_body(endpoint: Endpoint, body: type) -> dict[str, Any]:
    is_patch = endpoint.method == "PATCH"
    content: dict[str, Any] = {
        "schema": {"$ref": REFERENCE + (_patch_name(body) if is_patch else body.__name__)}
    }
    if endpoint.example is not None:
        content["example"] = endpoint.example
    media_types = ["application/merge-patch+json"] if is_patch else []
    return {
        "required": any(field.default is attrs.NOTHING for field in attrs.fields(body)),
        "content": dict.fromkeys([*media_types, "application/json"], content),
    }


def _patch_name(body: type) -> str:
    return f"{body.__name__}Patch"


def _responses(endpoint: Endpoint) -> dict[str, Any]:
    refusals = {**_EVERYWHERE, **({} if endpoint.body is None else _WITH_BODY)}
    for status, text in endpoint.refusals.items():
        refusals[status] = f"{text} {refusals[status]}" if status in refusals else text
    failed = {"application/json": {"schema": {"$ref": f"{REFERENCE}Error"}}}
    answers = {
        str(status): {"description": refusals[status], "content": failed} for status in sorted(refusals)
    }
    return {str(endpoint.status): _success(endpoint), **answers}


def _success(endpoint: Endpoint) -> dict[str, Any]:
    if endpoint.answer is None:
        return {"description": "It is done."}
    schema = (
        {"$ref": REFERENCE + endpoint.answer.__name__} if is_kept(endpoint.answer) else {"type": "object"}
    )
    if endpoint.streams:
        return {
            "description": f"Events; the data of each is a `{endpoint.answer.__name__}`.",
            "content": {"text/event-stream": {"schema": {"type": "string"}, "x-data": schema}},
        }
    content: dict[str, Any] = {"schema": schema}
    if endpoint.answer_example is not None:
        content["example"] = endpoint.answer_example
    return {"description": "It is done, and this is how it is.", "content": {"application/json": content}}
