"""The doors that tell of the process itself: alive, ready, counted."""

from __future__ import annotations

from typing import Any

from klein import Klein

from crabtwist.gateway import Gateway
from crabtwist.values import Answer
from crabtwist.web.answers import say, say_json


def add_process(app: Klein, gateway: Gateway) -> None:
    """Add `/health`, `/ready`, `/metrics`, and what clients ask for when they wake."""

    @app.route("/health", methods=["GET"], endpoint="health")
    def health(request: Any) -> bytes:
        return say_json(request, 200, {"status": "ok"})

    @app.route("/ready", methods=["GET"], endpoint="ready")
    def ready(request: Any) -> bytes:
        if gateway.draining:
            return say_json(request, 503, {"status": "draining"})
        if not gateway.usable:
            return say_json(request, 503, {"status": "no usable deployment"})
        return say_json(request, 200, {"status": "ready"})

    @app.route("/metrics", methods=["GET"], endpoint="metrics")
    def metrics(request: Any) -> bytes:
        content_type = b"text/plain; version=0.0.4; charset=utf-8"
        return say(request, Answer(200, ((b"content-type", content_type),), gateway.metrics.exposition()))

    # Claude Code asks for these before its first request, to warm its connection.
    @app.route("/", methods=["GET"], endpoint="root")
    @app.route("/api/hello", methods=["GET"], endpoint="hello")
    def hello(request: Any) -> bytes:
        return say_json(request, 200, {"name": "crabtwist"})
