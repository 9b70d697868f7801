"""The Klein application: every door, and what is said where there is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

from klein import Klein
from twisted.internet.defer import CancelledError
from twisted.logger import Logger
from werkzeug.exceptions import HTTPException, MethodNotAllowed
from werkzeug.routing import RequestRedirect

from crabtwist.administration import Administration
from crabtwist.dialects.operations import OPERATIONS
from crabtwist.errors import Refusal, internal_error
from crabtwist.gateway import Gateway
from crabtwist.web.admin.endpoint import Endpoint, add_endpoints
from crabtwist.web.admin.inside import Inside
from crabtwist.web.admin.keys import key_endpoints
from crabtwist.web.admin.openapi import add_document
from crabtwist.web.admin.providers import provider_endpoints
from crabtwist.web.admin.requests import request_endpoints
from crabtwist.web.admin.state import state_endpoints
from crabtwist.web.admin.usage import usage_endpoints
from crabtwist.web.answers import path_not_found, say_refusal
from crabtwist.web.extensions import add_extensions
from crabtwist.web.models import add_models
from crabtwist.web.operations import add_operations
from crabtwist.web.process import add_process

_log = Logger()


def make_app(
    gateway: Gateway,
    extensions: Sequence[Any] = (),
    administration: Administration | None = None,
    inside: Inside | None = None,
) -> Klein:
    """
    Return the application; its resource goes under a `Site`.

    `extensions` may show something to administrators.  Without an `administration` they can change
    nothing, and without the `inside` of a node see nothing of it.  Raises `ConfigurationError` if an
    extension cannot show what it means to.
    """
    app = Klein()
    # A redirect would make clients repeat a POST, or give up.
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False
    add_operations(app, gateway)
    add_models(app, gateway)
    add_process(app, gateway)
    add_extensions(app, extensions)
    endpoints = _endpoints(administration, inside)
    if endpoints:
        add_endpoints(app, endpoints, gateway)
        add_document(app, endpoints)
    _add_errors(app, gateway)
    return app


def shortcuts(app: Klein) -> Mapping[tuple[bytes, bytes], Callable[[Any], None]]:
    """
    Return the doors of the operations by method and path: what Klein would find, without its looking.

    It binds a router and makes four Deferreds for each request.  Paths that are spelled in another way are
    left to it.
    """
    found = {}
    for rule in app.url_map.iter_rules():
        if rule.endpoint in OPERATIONS and not rule.arguments:
            for method in rule.methods or ():
                found[method.encode(), rule.rule.encode()] = partial(_serve, app, rule.endpoint)
    return MappingProxyType(found)


def _serve(app: Klein, endpoint: str, request: Any) -> None:
    # An exchange finishes its request, and its Deferred never fails.
    serving: Any = app.execute_endpoint(endpoint, request)
    request.when_left(serving.cancel)


def _endpoints(administration: Administration | None, inside: Inside | None) -> list[Endpoint]:
    """Return what administrators can do, in the order of the document; one line for each family."""
    endpoints: list[Endpoint] = []
    if administration is not None:
        endpoints += key_endpoints(administration.keys)
        endpoints += provider_endpoints(administration.providers)
    if inside is not None:
        endpoints += usage_endpoints(inside)
        endpoints += request_endpoints(inside)
        endpoints += state_endpoints(inside)
    return endpoints


def _add_errors(app: Klein, gateway: Gateway) -> None:
    @app.handle_errors(Refusal)
    def refused(request: Any, failure: Any) -> bytes:
        return _refuse(request, failure.value)

    @app.handle_errors(MethodNotAllowed)
    def wrong_method(request: Any, failure: Any) -> bytes:
        allowed = ", ".join(sorted(failure.value.valid_methods or ()))
        method = request.method.decode("latin-1")
        message = f"{method} is not for this path; it takes {allowed}"
        return _refuse(request, Refusal(405, "method_not_allowed", message, headers={"allow": allowed}))

    @app.handle_errors(RequestRedirect, HTTPException)  # type: ignore[arg-type] # klein's protocol wants the word failure
    def unknown_path(request: Any, _failure: Any) -> bytes:
        return _refuse(request, path_not_found(request.path))

    @app.handle_errors(Exception)
    def crashed(request: Any, failure: Any) -> bytes:
        if failure.check(CancelledError):
            return b""
        _log.failure("a door failed", failure)
        return _refuse(request, internal_error())

    def _refuse(request: Any, refusal: Refusal) -> bytes:
        gateway.metrics.refused(refusal.slug)
        return say_refusal(request, refusal)
