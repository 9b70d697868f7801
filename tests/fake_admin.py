"""A server that says what a test tells it to, in the place of a gateway's admin API."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import attrs

TOKEN = "ct-admin-of-the-tests"


@attrs.frozen
class Asked:
    """A request as it came: `target` is the path with its query, `body` its JSON, None without."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: Any


class FakeAdmin:
    """
    Answers on loopback, from a thread of its own, until `close`.

    `answers` maps "METHOD /path" to a status and what is sent: bytes as they are, all else as JSON.  Below
    `/v1/admin/` whoever has not the token is refused, as is what has no answer.  `date` is the field's, None
    for that of now.
    """

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.answers: dict[str, tuple[int, Any]] = {
            "GET /health": (200, {"status": "ok"}),
            "GET /ready": (200, {"status": "ready"}),
        }
        self.date: str | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._requests())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: Asked) -> tuple[int, Any]:
        """Return what to say to a request."""
        self.asked.append(request)
        path = request.target.partition("?")[0]
        if path.startswith("/v1/admin/") and request.headers.get("authorization") != f"Bearer {TOKEN}":
            return 401, refusal("not_the_admin_token", "this needs the admin token")
        nothing = (404, refusal("path_not_found", f"there is nothing at {path!r}"))
        return self.answers.get(f"{request.method} {path}", nothing)

    def _requests(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Requests(BaseHTTPRequestHandler):
            def _serve(self) -> None:
                length = int(self.headers.get("content-length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                fields = {name.lower(): value for name, value in self.headers.items()}
                status, said = fake.answer(Asked(self.command, self.path, fields, body))
                data = said if isinstance(said, bytes) else b"" if said is None else json.dumps(said).encode()
                self.send_response(status)
                events = data.startswith((b":", b"event:"))
                self.send_header("content-type", "text/event-stream" if events else "application/json")
                self.send_header("content-length", str(len(data)))
                error = said.get("error") if isinstance(said, dict) else None
                if isinstance(error, dict):
                    self.send_header("x-crabtwist-error", error["code"])
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PATCH = do_DELETE = _serve

            def date_time_string(self, timestamp: float | None = None) -> str:
                return fake.date or super().date_time_string(timestamp)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's
                """Say nothing."""

        return Requests


def refusal(slug: str, message: str) -> dict[str, Any]:
    """Return a refusal as the admin API words it."""
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": slug}}


def event(name: str, data: object) -> bytes:
    """Return one event of a stream."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()
