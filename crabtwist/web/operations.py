"""The doors of the operations: endpoints that take a body naming a model."""

from __future__ import annotations

from typing import Any

from klein import Klein
from twisted.internet.defer import Deferred

from crabtwist.dialects.operations import OPERATIONS, Operation
from crabtwist.gateway import Gateway


def add_operations(app: Klein, gateway: Gateway) -> None:
    """Give each operation its route: `POST /v1` and the operation's path."""
    for operation in OPERATIONS.values():
        _add(app, gateway, operation)


def _add(app: Klein, gateway: Gateway, operation: Operation) -> None:
    # Klein tells handlers apart by the endpoint's name, not by the function (klein#153).
    @app.route("/v1" + operation.path, methods=["POST"], endpoint=operation.name)
    def serve(request: Any) -> Deferred[None]:
        return gateway.serve(operation, request, request.admission)
